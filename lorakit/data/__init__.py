"""Data: rows -> samples -> tokens and weights, with an account of every row. No torch but in batches.py.

rows.py reads, formats.py understands, render.py renders, tokenize.py and workers.py do it to all rows,
cache.py keeps the result, stream.py does without one, batches.py plans the steps. Here is load(), from a
recipe's words to all of it.

Shapes: S samples.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from lorakit.data import cache
from lorakit.data.account import CURES, KINDS, Account, account_of, table
from lorakit.data.reading import Reading, shown_sources, source_names
from lorakit.data.stream import Stream
from lorakit.data.tokenize import Done, Setting, tokenize
from lorakit.data.tokens import Part, TokenData
from lorakit.data.workers import num_cores, tokenize_all
from lorakit.errors import LorakitError
from lorakit.recipe import Recipe
from lorakit.recipe.data import Data, Rows, sources
from lorakit.shapes import Layer
from lorakit.terminal import progress, say

FIRST_ROWS = 1000  # their problems are told before the rest is read


@dataclass(frozen=True)
class Loaded:
    tokens: TokenData
    account: Account
    format: str  # auto: several sources of different formats
    why: str  # how the format was recognised
    stream: Stream | None = None  # where more rows come from; `tokens` are those of its first block


def load_parts(recipe: Recipe, tokenizer: Any) -> tuple[Loaded, Loaded | None]:
    """The training rows and the held-out rows of a recipe, the rows of a share taken from the training rows.

    Raises: LorakitError as load(); also when nothing is left on one side.
    """
    section, train_on = recipe.data, recipe.task.train_on
    if section.streaming:
        rows = _first_of_stream(recipe, tokenizer)
    else:
        rows = load(section.train, section, tokenizer, train_on)
    if section.eval is None:
        return rows, None
    if isinstance(section.eval, float):
        rows, held_out = hold_out(rows, section.eval, recipe.training.seed)
    else:
        same_format = section.model_copy(update={"format": rows.format, "streaming": False})
        held_out = load(section.eval, same_format, tokenizer, train_on)
    held_out.account.compare(held_out.tokens, rows.stream.first_pass()[0] if rows.stream else rows.tokens)
    return rows, held_out


def _first_of_stream(recipe: Recipe, tokenizer: Any) -> Loaded:
    section = recipe.data
    setting = Setting(tokenizer, section, recipe.task.train_on)
    reading = Reading(sources(section.train, section.limit), setting)
    stream = Stream(reading, recipe.training.seed)
    with progress() as display:
        display.add_task(f"tokenizing {reading.name}", total=None)
        tokens = stream.block(0)
    note = reading.note()
    once, rows = stream.first_pass()
    account = account_of(rows, note["first"], note["reasons"])
    account.measure(once)
    loaded = Loaded(tokens, account, note["format"], note["why"], stream)
    _check_any(loaded, section.train)
    return loaded


def load(value: Rows, section: Data, tokenizer: Any, train_on: str) -> Loaded:
    """Every row that `value` names as tokens, or counted: out of the cache, else read and put there.

    Raises: LorakitError with the place and reason of all bad or too long rows, unless the recipe says to
    skip, drop or truncate them; also when no row is left to train on.
    """
    reading = Reading(sources(value, section.limit), Setting(tokenizer, section, train_on))
    name = reading.cache_key()
    entry = cache.Entry(name)
    found = entry.read() if name else None
    batches, note = found or _read_all(reading, entry)
    loaded = _loaded(batches, note, reading)
    _check_any(loaded, value)
    return loaded


def _loaded(batches: Sequence[pa.RecordBatch], note: Mapping[str, Any], reading: Reading) -> Loaded:
    parts, start = [], 0
    for source, number in zip(reading.sources, note["samples"], strict=True):
        parts.append(Part(start, start + number, source.weight))
        start += number
    tokens = TokenData(
        tuple(batches), tuple(note["files"]), tuple(parts), stored_fingerprint=note.get("fingerprint", "")
    )
    account = account_of(note["rows"], note["first"], note["reasons"], source_names(reading.sources))
    if len(tokens):
        account.measure(tokens)
    return Loaded(tokens, account, note["format"], note["why"])


def _read_all(reading: Reading, entry: cache.Entry) -> tuple[Sequence[pa.RecordBatch], dict[str, Any]]:
    """(record batches, note) of all rows; what goes beyond the first rows is written to the cache."""
    pieces = reading.pieces()
    with progress() as display:
        bar = display.add_task(f"tokenizing {reading.name}", total=None)

        def counted(dones: Iterable[Done]) -> Iterator[pa.RecordBatch]:
            for done in dones:
                reading.count(done)
                display.advance(bar, sum(done.counts.values()))
                yield done.batch

        first: list[pa.RecordBatch] = []
        for piece in pieces:
            first += counted([tokenize(piece, reading.setting)])
            if reading.num_rows >= FIRST_ROWS:
                break
        reading.raise_problems()
        rest = next(pieces, None)
        if rest is None:
            return first, reading.note()
        with ExitStack() as stack:
            try:
                stack.enter_context(entry.locked())
            except cache.Unwritable as error:
                say(f"note      no cache: {error}; LORAKIT_CACHE names another place for it")
                entry = cache.Entry(home=Path(stack.enter_context(TemporaryDirectory())))
                stack.enter_context(entry.locked())
            if found := None if entry.passing else entry.read():  # written while this process waited
                return found
            try:
                with entry.writing() as sink:
                    more = tokenize_all(chain([rest], pieces), reading.setting, num_cores())
                    for batch in chain(first, counted(more)):
                        sink.add(batch)
                reading.raise_problems()
                entry.commit({**reading.note(), "fingerprint": sink.fingerprint()})
            except BaseException:
                entry.discard()
                raise
            done = entry.read()
            assert done is not None
            return done


def _check_any(loaded: Loaded, value: Rows) -> None:
    if not len(loaded.tokens):
        account = loaded.account
        reasons = [account.first[kind] for kind in KINDS if kind in account.first]
        message = f"{shown_sources(value)}: no row to train on ({account})"
        raise LorakitError(message, "; ".join(reasons) or "It is empty.")


def check_ends(loaded: Loaded, section: Data) -> None:
    """Raises: LorakitError when no sample teaches a model to stop."""
    account = loaded.account
    if account.trained_ends:
        return
    cure = "lorakit preview shows what is trained; task.train_on and the chat template decide it."
    told = ""
    if account.truncated:
        told = f": {account.truncated:,} of {len(loaded.tokens):,} samples are cut"
        cure = f"Write a data.max_length above {section.max_length}."
    raise LorakitError(
        f"{shown_sources(section.train)}: no end token is trained in any sample{told}",
        f"A model trained on it would never learn to stop. {cure}",
    )


def hold_out(rows: Loaded, share: float, seed: int) -> tuple[Loaded, Loaded]:
    """(training rows, held-out rows). Raises: LorakitError when one of them would be empty."""
    train, held_out = rows.tokens.split(share, seed)
    if not (len(train) and len(held_out)):
        raise LorakitError(
            f"data.eval: {share:g} of {len(rows.tokens)} samples cannot be held out",
            "Equal samples stay together. Name a file of held-out rows, or leave data.eval out.",
        )
    begins = np.flatnonzero(held_out.begins_row)
    cut = int(np.maximum.reduceat(held_out.column("cut"), begins).sum())  # rows of which a sample is cut
    apart = Account(read=len(begins), kept=len(begins) - cut, truncated=cut)
    account = replace(
        rows.account,
        read=rows.account.read - apart.read,
        kept=rows.account.kept - apart.kept,
        truncated=rows.account.truncated - apart.truncated,
        # Which side the rows that were cut are on is measured.
        first={
            kind: text for kind, text in rows.account.first.items() if kind in CURES and kind != "truncated"
        },
        reasons={kind: told for kind, told in rows.account.reasons.items() if kind != "truncated"},
    )
    apart.measure(held_out)
    account.measure(train)
    return replace(rows, tokens=train, account=account), replace(rows, tokens=held_out, account=apart)


def _longest(part: Loaded) -> tuple[int, str]:
    """(tokens of the longest sample, where it is); of a stream, of the longest that may come."""
    if part.stream:
        return part.stream.reading.setting.section.max_length, "data.max_length"
    at = int(part.tokens.lengths.argmax())
    return int(part.tokens.lengths[at]), part.tokens.places[at]


def check_context(config: Mapping[str, Any], layers: Sequence[Layer], *parts: Loaded | None) -> None:
    """Warns of a sample with more tokens than the model of config.json was made for.

    Raises: LorakitError where positions are an embedding, which ends there.
    """
    text = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    context = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    length, where = max(_longest(part) for part in parts if part)
    if context is None or length <= context:
        return
    message = f"{where}: {length:,} tokens, the model was made for {context:,} at most"
    cure = f"Write data.max_length: {context}, and data.on_long: truncate or drop."
    if any(layer.kind == "embedding" and re.search(r"wpe|position", layer.name) for layer in layers):
        raise LorakitError(message, cure)
    say(f"warning: {message}. {cure}")


def account_lines(rows: Loaded, held_out: Loaded | None) -> list[str]:
    """The account of both parts as a table."""
    parts = [("first rows" if rows.stream else "training", rows.account)] + (
        [("held out", held_out.account)] if held_out else []
    )
    again = rows.stream.lines() if rows.stream else []
    return [*table(parts), *([""] if again else []), *again]
