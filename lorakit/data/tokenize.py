"""Rows -> tokens, a chunk at a time: in this process, or on all cores.

`tokenize` is a pure function, so that it does not matter which process runs it. Workers are forks: they have
the tokenizer without it being sent, and touch neither torch nor a GPU.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lorakit.data.formats import FORMATS, BadRow, Chat, Sample, rename
from lorakit.data.render import Tokens, as_trained, render_all, turns_apart
from lorakit.data.rows import Chunk, Row
from lorakit.data.tokens import Entry, as_batch
from lorakit.errors import LorakitError, RunError
from lorakit.recipe.data import Data
from lorakit.recipe.task import fits

_IN_FLIGHT = 3  # chunks for each worker: enough to keep it busy, few enough to hold in memory


# A row of several samples is in the column of the worst of them; where only some have nothing to train on,
# the others are trained.
_WORST = {kind: number for number, kind in enumerate(("bad", "dropped", "truncated", "kept", "masked_out"))}


@dataclass(frozen=True)
class Setting:
    """What all rows have in common."""

    tokenizer: Any
    section: Data
    train_on: str


@dataclass(frozen=True)
class Piece:
    """A chunk of rows, what a row looks like, and the numbers of its source and its file."""

    chunk: Chunk
    format: str  # empty: no row of it can be read
    source: int
    file: int


@dataclass(frozen=True)
class Done:
    """What became of a chunk."""

    source: int
    batch: pa.RecordBatch  # its samples
    counts: dict[str, int]  # column of the account -> rows
    problems: tuple[tuple[str, str, str], ...]  # (column, place, reason) of every row that is not kept whole


def tokenize(piece: Piece, setting: Setting) -> Done:
    """The samples of a chunk as tokens, each row counted.

    Raises: LorakitError when the recipe and the kind of data do not fit, which no single row is to blame for.
    """
    if piece.format and not fits(setting.train_on, piece.format):
        message = f"task.train_on: {setting.train_on} does not fit data of format {piece.format}"
        raise LorakitError(message, "auto fits every one.")
    each_turn = setting.train_on == "each-turn"
    train_on = "last-turn" if each_turn else setting.train_on
    rows = piece.chunk.rows()
    samples: list[list[Sample] | BadRow] = []
    for row in rows:
        sample = _sample(row, piece.format, setting)
        samples.append(
            sample if isinstance(sample, BadRow) else turns_apart(sample) if each_turn else [sample]
        )
    good = [sample for group in samples if not isinstance(group, BadRow) for sample in group]
    rendered = iter(render_all(good, setting.tokenizer, train_on, setting.section.max_length))
    entries: list[Entry] = []
    counts: dict[str, int] = {}
    problems: list[tuple[str, str, str]] = []
    for row, group in zip(rows, samples, strict=True):
        tokens = [group] if isinstance(group, BadRow) else [next(rendered) for _ in group]
        kind, reason = min(
            (_kind(part, setting.section) for part in tokens), key=lambda found: _WORST[found[0]]
        )
        counts[kind] = counts.get(kind, 0) + 1
        if reason:
            problems.append((kind, row.place, reason))
        if kind in ("kept", "truncated"):
            trained = [part for part in tokens if isinstance(part, Tokens) and part.weights.any()]
            entries += [_entry(row, part, piece.file, first=not n) for n, part in enumerate(trained)]
    return Done(piece.source, as_batch(entries), counts, tuple(problems))


def _sample(row: Row, format_name: str, setting: Setting) -> Sample | BadRow:
    try:
        if row.value is None:
            raise BadRow(row.error)
        fields = rename(row.value, setting.section.columns)
        sample = as_trained(FORMATS[format_name](fields), format_name, setting.tokenizer)
    except BadRow as error:
        return error
    if isinstance(sample, Chat) and not setting.tokenizer.chat_template:
        raise LorakitError(
            f"the data are chats ({format_name}), but the tokenizer has no chat template",
            "Write data.chat_template: a Jinja template or a file that holds one.",
        )
    return sample


def _kind(tokens: Tokens | BadRow, section: Data) -> tuple[str, str]:
    """(column of the account, the reason when the row is not kept as it is)."""
    if isinstance(tokens, BadRow):
        return "bad", str(tokens)
    long = f"{tokens.full_length:,} tokens, data.max_length is {section.max_length:,}"
    if tokens.cut and section.on_long != "truncate":
        return "dropped", long
    if not tokens.weights.any():
        return "masked_out", "nothing left to train on" + (f": {long}" if tokens.cut else "")
    return ("truncated", long) if tokens.cut else ("kept", "")


def _entry(row: Row, tokens: Tokens, file: int, first: bool) -> Entry:
    """`first`: the first sample of its row, which alone counts for the row's id."""
    assert row.value is not None
    mark = hashlib.blake2b(tokens.ids.tobytes(), digest_size=8)
    mark.update(tokens.full_length.to_bytes(8, "little"))
    name = row.value.get("id")
    named = first and isinstance(name, str | int) and not isinstance(name, bool) and name != ""
    id_hash = _number(hashlib.blake2b(repr(name).encode(), digest_size=8)) if named else 0
    return Entry(
        tokens.ids, tokens.weights, file, row.number, _number(mark), id_hash, tokens.cut, tokens.ends
    )


def _number(mark: Any) -> int:
    return int.from_bytes(mark.digest(), "little")


# ------------------------------------------------------------------------------------------------------------
# On all cores


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tokenize_all(pieces: Iterable[Piece], setting: Setting, num_workers: int) -> Iterator[Done]:
    """tokenize() of every piece, in order; few are in memory at a time.

    Raises: LorakitError as tokenize(); RunError when a worker was killed.
    """
    if num_workers < 2 or sys.platform != "linux":  # elsewhere a fork may meet locks that are never freed
        for piece in pieces:
            yield tokenize(piece, setting)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are what runs at once
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(setting, os.getpid())
    )
    waiting: deque[Future[Done]] = deque()
    try:
        for piece in pieces:
            waiting.append(pool.submit(_work, piece))
            if len(waiting) >= _IN_FLIGHT * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("a process that tokenized rows was killed", "Was there enough memory?") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


_setting: Setting | None = None  # of a worker, from its birth on


def _start(setting: Setting, parent: int) -> None:
    """Make a fork a worker: it leaves signals to its parent, and goes when its parent is gone."""
    global _setting
    _setting = setting
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(piece: Piece) -> Done:
    assert _setting is not None
    return tokenize(piece, _setting)
