"""Rows that are read while they are trained, for more of them than fits a disk.

The sources run on for ever, each from its start again when it ends, mixed in the ratio of their weights.
Their rows come in blocks of BLOCK; the samples of a block change places by a permutation of (seed, block),
and a step takes the next `batch_size` of them. So the samples of a step are a function of seed and step
alone.

Of each block the number of samples, and what became of its rows, is written to a journal in the run
directory: a resumed run finds its block without tokenizing what was trained before. Without the journal it is
counted again.
"""

import hashlib
import json
import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.account import KINDS, Account, account_of
from lorakit.data.reading import Reading, chunks_of, limited, local_files
from lorakit.data.rows import Chunk, hub_chunks, read_chunks, shown
from lorakit.data.tokenize import Done, Piece
from lorakit.data.tokens import TokenData
from lorakit.data.workers import num_cores, tokenize_all
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data, Source
from lorakit.terminal import say

BLOCK = 8192  # rows
_REASON_LENGTH = 300  # characters of it in the journal
_NOTED = {"samples", "tokens", "trained_tokens", "rows", "first", "rounds"}  # of each block


@dataclass
class Endless:
    """The rows of a source, again and again."""

    source: Source
    section: Data
    position: int = 0  # rows taken so far, over all passes
    rounds: int = 0  # passes before the one that the last row is of
    _length: int | None = None  # rows of a pass, once one has ended
    _chunks: Iterator[Chunk] | None = None
    _ahead: Chunk | None = None
    _in_pass: int = 0

    def take(self, number: int) -> Iterator[Chunk]:
        """The next `number` rows. Raises: LorakitError when the source has no row at all."""
        while number:
            chunk = self._next()
            yield (taken := chunk.first(number))
            number -= len(taken)
            self.position += len(taken)
            self._ahead = chunk.after(len(taken)) if len(taken) < len(chunk) else None

    def _next(self) -> Chunk:
        if self._ahead is not None:
            return self._ahead
        while True:
            if self._chunks is None:
                self.rounds += self.position > 0
                self._chunks, self._in_pass = (
                    limited(chunks_of(self.source, self.section), self.source.limit),
                    0,
                )
            for chunk in self._chunks:
                if len(chunk):
                    self._in_pass += len(chunk)
                    return chunk
            if not self._in_pass:
                raise LorakitError(f"{self.source.path}: no row to train on", "It is empty.")
            self._length, self._chunks = self._in_pass, None

    def seek(self, position: int) -> None:
        """Go on from row `position` (from 0, over all passes).

        A hub data set and a source of one Parquet or Arrow file are asked for what follows. Else the rows on
        the way are read: lines unparsed, records of CSV and JSON parsed, which is how their ends are found.
        """
        self._restart()
        wanted = position % self._length if self._length else position
        if not self._jump(wanted):
            while self.position < wanted:
                for _ in self.take(min(wanted - self.position, BLOCK)):
                    pass
                if self._length is not None and self._length < wanted:  # a pass is shorter than that
                    self._restart()
                    wanted = position % self._length
        if self._length:
            self.rounds = max(0, position - (wanted == 0)) // self._length
        self.position = position

    def _jump(self, wanted: int) -> bool:
        """Whether what follows the first `wanted` rows was there without reading them."""
        source, limit = self.source, self.source.limit
        if not wanted or (limit is not None and wanted >= limit):
            return False
        if not source.is_local:
            split = source.split or "train"
            chunks = hub_chunks(
                source.path, source.config, split, source.revision, streaming=True, skip=wanted
            )
        else:
            files = local_files(source)
            if len(files) > 1 or files[0].suffix.lower() not in (".parquet", ".arrow"):
                return False
            chunks = read_chunks(files[0], skip=wanted)
        rest = limited(chunks, None if limit is None else limit - wanted)
        self._ahead = next((chunk for chunk in rest if len(chunk)), None)
        if self._ahead is None:  # a pass is shorter than that
            return False
        self._chunks, self._in_pass, self.position = rest, wanted + len(self._ahead), wanted
        return True

    def _restart(self) -> None:
        self.position, self.rounds, self._chunks, self._ahead = 0, 0, None, None


@dataclass
class _Seen:
    """What came of the rows of a block."""

    batches: list[pa.RecordBatch] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    first: dict[str, str] = field(default_factory=dict)  # kind -> its first row, and why
    rounds: dict[int, int] = field(default_factory=dict)  # source -> passes before the one it is in

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    def rows(self) -> dict[str, int]:
        return {"read": self.num_rows, **self.counts}

    def add(self, done: Done, rounds: int) -> None:
        self.batches.append(done.batch)
        for kind, number in done.counts.items():
            self.counts[kind] += number
        for kind, place, reason in done.problems:
            self.first.setdefault(kind, f"{place}: {reason}"[:_REASON_LENGTH])
        self.rounds[done.source] = rounds


@dataclass
class Stream:
    """Samples of sources that are read along with the training."""

    reading: Reading
    seed: int
    journal: Path | None = None  # None: this process keeps none
    _noted: list[dict[str, Any]] = field(default_factory=list)  # of each block whose samples are known
    _upto: list[int] = field(default_factory=lambda: [0])  # samples before each of them, and in all
    _first: tuple[TokenData, dict[str, int]] | None = None
    _blocks: dict[int, TokenData] = field(default_factory=dict)
    _coming: Iterator[tuple[int, TokenData]] | None = None
    _next: int = 0

    def block(self, number: int) -> TokenData:
        """The samples of a block in the order in which they are trained.

        Raises: LorakitError for rows that cannot be trained, all of the block together.
        """
        if number not in self._blocks:
            if self._coming is None or self._next != number:
                self._coming = self._read(number)
            at, tokens = next(self._coming)
            self._next = at + 1
            self._blocks = {n: data for n, data in self._blocks.items() if n == at - 1} | {at: tokens}
        return self._blocks[number]

    def first_pass(self) -> tuple[TokenData, dict[str, int]]:
        """(samples, account) of the rows of the first block, in the order of the sources, each row once: what
        a source shorter than its share brings again is left out."""
        if self._first is None:
            self.block(0)
        assert self._first is not None
        return self._first

    def num_samples(self, number: int) -> int:
        """Samples of a block, from the journal where it tells."""
        while number >= len(self._noted):
            self.block(len(self._noted))
        return int(self._noted[number]["samples"])

    def samples_at(self, start: int, number: int) -> TokenData:
        """Samples [start, start + number) of the stream. Raises: LorakitError as block(), and when a block is
        not what it was."""
        batches: list[pa.RecordBatch] = []
        picked: list[np.ndarray] = []
        before = 0  # samples in `batches`
        for block in count(bisect_right(self._upto, start) - 1):
            size, place = self.num_samples(block), self._upto[block]
            first, last = max(start, place) - place, min(start + number, place + size) - place
            if first < last:
                data = self.block(block)
                assert data.picked is not None
                if len(data) != size:
                    raise LorakitError(
                        f"{self.reading.name}: rows {block * BLOCK + 1:,} to {(block + 1) * BLOCK:,} of the "
                        f"stream (block {block}) are {len(data):,} samples now; they were {size:,} when this "
                        "run counted them",
                        "Restore the rows and the recipe, or start a new run with --output.",
                    )
                picked.append(before + data.picked[first:last])
                batches += data.batches
                before += sum(batch.num_rows for batch in data.batches)
            if place + size >= start + number:
                return TokenData.of(batches, self.reading.files).in_order(np.concatenate(picked))
        raise AssertionError("a stream has no end")

    def _read(self, first: int) -> Iterator[tuple[int, TokenData]]:
        """Every block from `first` on."""
        rows = [Endless(source, self.reading.setting.section) for source in self.reading.sources]
        for number, (before, _) in enumerate(self._shares(first)):
            rows[number].seek(before)

        rounds: deque[int] = deque()  # of each piece that is on its way

        def pieces() -> Iterator[Piece]:
            for block in count(first):
                for number, (before, after) in enumerate(self._shares(block)):
                    for chunk in rows[number].take(after - before):
                        rounds.append(rows[number].rounds)
                        yield self.reading.piece(number, chunk)

        dones = tokenize_all(pieces(), self.reading.setting, num_cores())
        for block in count(first):
            seen, once = _Seen(), _Seen()
            while seen.num_rows < BLOCK:
                done, again = next(dones), rounds.popleft()
                self.reading.count(done)
                seen.add(done, again)
                if not again:
                    once.add(done, again)
            assert seen.num_rows == BLOCK
            self.reading.raise_problems()
            tokens = TokenData.of(seen.batches, self.reading.files)
            if not (samples := len(tokens)):
                raise LorakitError(f"{self.reading.name}: no row of {BLOCK:,} in a row can be trained")
            if not block:
                self._first = TokenData.of(once.batches, self.reading.files), once.rows()
            self._note(block, tokens, seen)
            shuffled = np.random.Generator(np.random.PCG64([self.seed, block, 3])).permutation(samples)
            yield block, tokens.in_order(shuffled)

    def _shares(self, block: int) -> list[tuple[int, int]]:
        """(first, one past the last) row of each source in a block."""
        upto = np.cumsum([0.0, *(source.weight for source in self.reading.sources)], dtype=np.float64)
        upto /= upto[-1]  # ends in 1.0, which no rounding may take a row from
        ends = [
            np.floor(upto * rows + 1e-9).astype(np.int64) for rows in (block * BLOCK, (block + 1) * BLOCK)
        ]
        before, after = (np.diff(end) for end in ends)
        return [(int(a), int(b)) for a, b in zip(before, after, strict=True)]

    # The journal

    def open_journal(self, path: Path) -> None:
        """Take up what an earlier process of this run noted. Nothing is written."""
        known: list[dict[str, Any]] = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                note = json.loads(line)
            except ValueError:  # a line that a kill cut short
                break
            if not _is_note(note, len(known)):
                break
            known.append(note)
        if len(known) > len(self._noted):
            self._noted, self._upto = known, [0, *accumulate(note["samples"] for note in known)]
        for source in self.reading.sources:
            if not source.is_local and not re.fullmatch("[0-9a-f]{40}", source.revision or ""):
                say(
                    f"note      {source.path}: without a commit as its revision nobody can tell whether a "
                    "resumed run reads the same rows"
                )

    def keep_journal(self, path: Path) -> None:
        """Write the journal, as a whole, and what follows as it comes. No process may be reading it."""
        new = path.with_name(f".{path.name}.new")
        with new.open("w") as file:
            file.write("".join(json.dumps(note) + "\n" for note in self._noted))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        self.journal = path

    def _note(self, block: int, tokens: TokenData, seen: _Seen) -> None:
        if block != len(self._noted):  # known, or asked for out of turn
            return
        rounds = dict(enumerate(self.rounds())) | seen.rounds
        note = {
            "block": block,
            "samples": len(tokens),
            "tokens": tokens.num_tokens,
            "trained_tokens": tokens.num_trained,
            "rows": seen.rows(),
            "first": seen.first,
            "rounds": list(rounds.values()),
        }
        self._noted.append(note)
        self._upto.append(self._upto[-1] + len(tokens))
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps(note) + "\n")

    def rows(self) -> dict[str, int]:
        """The account of all rows that were read for the blocks so far."""
        return {name: sum(note["rows"][name] for note in self._noted) for name in ("read", *KINDS)}

    def account(self) -> Account:
        """All that was read for the blocks so far, by this process and those before it; lengths and
        repetitions are not known of a stream."""
        first: dict[str, str] = {}
        for note in self._noted:
            first = note["first"] | first
        account = account_of(self.rows(), first)
        for name in ("samples", "tokens", "trained_tokens"):
            setattr(account, name, sum(note[name] for note in self._noted))
        return account

    def rounds(self) -> list[int]:
        """How often each source has begun again."""
        return list(self._noted[-1]["rounds"]) if self._noted else [0] * len(self.reading.sources)

    def lines(self) -> list[str]:
        """A line for each source that came to its end in the blocks so far."""
        read = sum(note["rows"]["read"] for note in self._noted)
        return [
            f"{_shown(source)} is read again where it ends: {rounds:,} time{'s'[: rounds > 1]} in the first "
            f"{read:,} rows of the stream"
            for source, rounds in zip(self.reading.sources, self.rounds(), strict=True)
            if rounds
        ]

    def fingerprint(self) -> str:
        """SHA-256 of what decides the samples and is not compared as a field of the recipe: what the files
        look like from outside, the tokenizer and its template, on_long, the seed; no row is read for it.

        on_bad_row is not in it: a block in which it made a difference is noted under skip alone.
        """
        setting = self.reading.setting
        tokenizer = setting.tokenizer
        facts: list[Any] = [
            self.seed,
            setting.section.on_long,
            tokenizer.backend_tokenizer.to_str(),
            tokenizer.special_tokens_map,
            tokenizer.chat_template,
        ]
        for source in self.reading.sources:
            facts.append(source.model_dump(exclude={"path"}))
            for file in local_files(source) if source.is_local else ():
                # Named as seen from its source: the directory that lorakit is started in is no part of it.
                stat = file.stat()
                facts.append([os.path.relpath(file, source.path), stat.st_size, stat.st_mtime_ns])
            facts += [] if source.is_local else [source.path]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _is_note(note: Any, block: int) -> bool:
    return isinstance(note, dict) and note.get("block") == block and note.keys() >= _NOTED


def _shown(source: Source) -> str:
    return shown(Path(source.path)) if source.is_local else source.path
