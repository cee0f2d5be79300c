"""Rows -> tokens, a chunk at a time. `tokenize` is a pure function: it does not matter which process runs
it."""

import hashlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lorakit.data.formats import FORMATS, BadRow, Chat, Sample, rename
from lorakit.data.render import Tokens, as_trained, render_all, turns_apart
from lorakit.data.rows import Chunk, Row
from lorakit.data.tokens import Entry, as_batch
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data
from lorakit.recipe.task import fits

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
