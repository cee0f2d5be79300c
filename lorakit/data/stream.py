"""Rows that are read while they are trained, for more of them than fits a disk.

The sources run on for ever, each from its start again when it ends, mixed in the ratio of their weights.
Their rows come in blocks of BLOCK; the samples of a block change places by a permutation of (seed, block),
and a step takes the next `batch_size` of them. So the samples of a step are a function of seed and step
alone.

Of each block the number of samples is written to a journal in the run directory: a resumed run finds its
block without tokenizing what was trained before. Without the journal it is counted again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data.account import KINDS
from lorakit.data.reading import Reading, chunks_of, limited, local_files
from lorakit.data.rows import Chunk, shown
from lorakit.data.tokenize import Piece, num_cores, tokenize_all
from lorakit.data.tokens import TokenData
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data, Source

BLOCK = 8192  # rows


@dataclass
class Endless:
    """The rows of a source, again and again."""

    source: Source
    section: Data
    position: int = 0  # rows taken so far, over all passes
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
        """Go on from row `position` (from 0, over all passes): rows on the way are passed over unparsed."""
        self._restart()
        wanted = position % self._length if self._length else position
        while self.position < wanted:
            for _ in self.take(min(wanted - self.position, BLOCK)):
                pass
            if self._length is not None and self._length < wanted:  # a pass is shorter than that
                self._restart()
                wanted = position % self._length
        self.position = position

    def _restart(self) -> None:
        self.position, self._chunks, self._ahead = 0, None, None


@dataclass
class Stream:
    """Samples of sources that are read along with the training."""

    reading: Reading
    seed: int
    journal: Path | None = None  # None: this process keeps none
    _noted: list[dict[str, Any]] = field(default_factory=list)  # of each block whose samples are known
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

    def num_samples(self, number: int) -> int:
        """Samples of a block, from the journal where it tells."""
        while number >= len(self._noted):
            self.block(len(self._noted))
        return int(self._noted[number]["samples"])

    def samples_at(self, start: int, number: int) -> TokenData:
        """Samples [start, start + number) of the stream."""
        batches: list[pa.RecordBatch] = []
        picked: list[np.ndarray] = []
        before = place = 0  # samples in `batches`; samples of the blocks passed
        for block in count():
            size = self.num_samples(block)
            first, last = max(start, place) - place, min(start + number, place + size) - place
            place += size
            if first < last:
                data = self.block(block)
                assert data.picked is not None
                picked.append(before + data.picked[first:last])
                batches += data.batches
                before += sum(batch.num_rows for batch in data.batches)
            if place >= start + number:
                return TokenData.of(batches, self.reading.files).in_order(np.concatenate(picked))
        raise AssertionError("a stream has no end")

    def _read(self, first: int) -> Iterator[tuple[int, TokenData]]:
        """Every block from `first` on."""
        rows = [Endless(source, self.reading.setting.section) for source in self.reading.sources]
        for number, (before, _) in enumerate(self._shares(first)):
            rows[number].seek(before)

        def pieces() -> Iterator[Piece]:
            for block in count(first):
                for number, (before, after) in enumerate(self._shares(block)):
                    for chunk in rows[number].take(after - before):
                        yield self.reading.piece(number, chunk)

        dones = tokenize_all(pieces(), self.reading.setting, num_cores())
        for block in count(first):
            batches, num_rows, counts = [], 0, dict.fromkeys(KINDS, 0)
            while num_rows < BLOCK:
                done = next(dones)
                self.reading.count(done)
                batches.append(done.batch)
                num_rows += sum(done.counts.values())
                for kind, number in done.counts.items():
                    counts[kind] += number
            self.reading.raise_problems()
            samples = sum(batch.num_rows for batch in batches)
            if not samples:
                raise LorakitError(f"{self.reading.name}: no row of {BLOCK:,} in a row can be trained")
            self._note(block, {"block": block, "samples": samples, "rows": {"read": num_rows, **counts}})
            shuffled = np.random.Generator(np.random.PCG64([self.seed, block, 3])).permutation(samples)
            yield block, TokenData.of(batches, self.reading.files).in_order(shuffled)

    def _shares(self, block: int) -> list[tuple[int, int]]:
        """(first, one past the last) row of each source in a block."""
        weights = np.array([source.weight for source in self.reading.sources], dtype=np.float64)
        upto = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
        ends = [
            np.floor(upto * rows + 1e-9).astype(np.int64) for rows in (block * BLOCK, (block + 1) * BLOCK)
        ]
        before, after = (np.diff(end) for end in ends)
        return [(int(a), int(b)) for a, b in zip(before, after, strict=True)]

    # The journal

    def open_journal(self, path: Path, writes: bool) -> None:
        """Take up what an earlier process of this run noted; `writes`: this process notes what follows."""
        known: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                note = json.loads(line)
            except ValueError:  # a line that a kill cut short
                break
            if not isinstance(note, dict) or note.get("block") != len(known):
                break
            known.append(note)
        mine = self._noted
        self._noted = known if len(known) > len(mine) else mine
        if writes:
            self.journal = path
            path.write_text("".join(json.dumps(note) + "\n" for note in self._noted))

    def _note(self, block: int, note: dict[str, Any]) -> None:
        if block < len(self._noted):
            return
        self._noted.append(note)
        if self.journal is not None:
            with self.journal.open("a") as file:
                file.write(json.dumps(note) + "\n")

    def rows(self) -> dict[str, int]:
        """The account of all rows that were read for the blocks so far."""
        names = ("read", *KINDS)
        return {name: sum(note["rows"][name] for note in self._noted) for name in names}

    def fingerprint(self) -> str:
        """SHA-256 of what the files look like from outside, and of the seed; no row is read for it."""
        facts: list[Any] = [self.seed]
        for source in self.reading.sources:
            facts.append(source.model_dump(exclude={"path"}))
            for file in local_files(source) if source.is_local else ():
                facts.append([shown(file), file.stat().st_size, file.stat().st_mtime_ns])
            facts += [] if source.is_local else [source.path]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
