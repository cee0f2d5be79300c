"""Data: rows -> samples -> tokens and weights, with an account of every row.

rows.py reads, formats.py understands, render.py tokenizes, batches.py plans the steps. Here are the nouns
that the rest of lorakit knows, and load().

Shapes: N tokens and S samples of a data set. In a micro-batch: T tokens of a packed row, or B rows of T
tokens when padded; M trained tokens.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorakit.data.formats import FIELDS, FORMATS, BadRow, Chat, Fields, Pair, Sample, detect, rename
from lorakit.data.render import Tokens, render
from lorakit.data.rows import Row, read_rows, shown
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data
from lorakit.recipe.task import fits
from lorakit.shapes import Layer
from lorakit.terminal import say, track

_SHOWN_PROBLEMS = 20


@dataclass
class Account:
    """Where every row that was read went: each is in exactly one of the other five."""

    read: int = 0
    kept: int = 0  # trained whole
    truncated: int = 0  # trained without its end (on_long: truncate)
    dropped: int = 0  # too long (on_long: drop)
    masked_out: int = 0  # nothing left to predict (on_bad_row: skip)
    bad: int = 0  # not readable as a sample (on_bad_row: skip)
    first: dict[str, str] = field(
        default_factory=dict, repr=False
    )  # kind -> the first row of it, with the reason

    def rows(self) -> dict[str, int]:
        names = ("read", "kept", "truncated", "dropped", "masked_out", "bad")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        gone = [
            f"{n:,} {kind.replace('_', ' ')}"
            for kind, n in self.rows().items()
            if n and kind not in ("read", "kept")
        ]
        return ", ".join([f"{self.read:,} rows read", f"{self.kept:,} kept", *gone])


@dataclass(frozen=True)
class TokenData:
    """All samples, end to end."""

    ids: np.ndarray  # (N,) int32
    weights: np.ndarray  # (N,) uint8, 1 where the token is a prediction target
    offsets: np.ndarray  # (S + 1,) int64
    places: tuple[str, ...]  # (S,) file:row

    def __len__(self) -> int:
        return len(self.places)

    @cached_property
    def lengths(self) -> np.ndarray:  # (S,)
        return np.diff(self.offsets)

    @cached_property
    def num_targets(self) -> np.ndarray:  # (S,) trained tokens of each sample
        return np.add.reduceat(self.weights, self.offsets[:-1], dtype=np.int64)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.ids[span], self.weights[span]

    def sizes(self) -> Iterator[tuple[int, str]]:
        """(tokens, file:row) of every sample."""
        return zip(self.lengths.tolist(), self.places, strict=True)

    def fingerprint(self) -> str:
        """SHA-256 of what is trained on: tokens, weights and boundaries."""
        digest = hashlib.sha256()
        for array in (self.ids, self.weights, self.offsets):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass."""

    input_ids: Tensor  # (1, T) packed, (B, T) padded
    position_ids: Tensor  # as input_ids; starts again at 0 in every document
    document_lengths: tuple[int, ...] | None  # packed: sums to T
    attention_mask: Tensor | None  # (B, T) padded: 1 at real tokens
    predictors: Tensor  # (M,) indices into the B * T positions whose next token is trained
    targets: Tensor  # (M,) those next tokens
    samples: tuple[int, ...]  # indices of the samples, for messages

    def to(self, device: torch.device) -> "MicroBatch":
        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            attention_mask=None if self.attention_mask is None else moved(self.attention_mask),
            predictors=moved(self.predictors),
            targets=moved(self.targets),
        )


@dataclass(frozen=True)
class Loaded:
    tokens: TokenData
    account: Account
    format: str
    why: str  # how the format was recognised


def load(source: str, section: Data, tokenizer: Any, train_on: str) -> Loaded:
    """Every row of `source` as tokens, or counted.

    Raises: LorakitError with the place and reason of all bad or too long rows (the first 20 in words), unless
    the recipe says to skip, drop or truncate them; also when no row is left to train on.
    """
    account, problems = Account(), []
    detected: list[tuple[str, str]] = []
    ids: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    places: list[str] = []
    for row, tokens, kind, reason in _classified(source, section, tokenizer, train_on, detected):
        account.read += 1
        setattr(account, kind, getattr(account, kind) + 1)
        if tokens is not None and kind in ("kept", "truncated"):
            ids.append(np.asarray(tokens.ids, dtype=np.int32))
            weights.append(np.asarray(tokens.weights, dtype=np.uint8))
            places.append(row.place)
        else:
            account.first.setdefault(kind, f"{row.place}: {reason}")
        if reason and _fatal(kind, section):
            problems.append((kind, f"{row.place}: {reason}"))
    _raise(problems, account, section)
    if not places:
        raise LorakitError(
            f"{_shown(source)}: no row to train on ({account})",
            "; ".join(account.first.values()) or "The file is empty.",
        )
    for kind, first in account.first.items():  # what the recipe let pass; the account has their number
        say(f"note      {kind.replace('_', ' ')}: {first}")
    offsets = np.cumsum([0, *(len(a) for a in ids)], dtype=np.int64)
    together = TokenData(np.concatenate(ids), np.concatenate(weights), offsets, tuple(places))
    return Loaded(together, account, *(detected[0] if detected else (section.format, "as the recipe says")))


def _classified(
    source: str, section: Data, tokenizer: Any, train_on: str, detected: list[tuple[str, str]]
) -> Iterator[tuple[Row, Tokens | None, str, str]]:
    """(row, its tokens, the column of the account it belongs to, the reason when it is not kept)."""
    format_name: str = section.format
    for row in track(read_rows(source, section.limit), f"tokenizing {source.rsplit('/', 1)[-1]}"):
        try:
            if row.value is None:
                raise BadRow(row.error)
            fields = rename(row.value, section.columns)
            if format_name == "auto":
                format_name = _detect(fields, row.place)
                detected.append((format_name, f"the columns {', '.join(FIELDS[format_name])} are there"))
            sample = as_chat(FORMATS[format_name](fields), format_name, tokenizer)
            _check_fit(sample, train_on, format_name, tokenizer)
            tokens = render(sample, tokenizer, train_on, section.max_length)
        except BadRow as error:
            yield row, None, "bad", str(error)
            continue
        long = f"{tokens.full_length} tokens, data.max_length is {section.max_length}"
        if tokens.cut and section.on_long != "truncate":
            yield row, tokens, "dropped", long
        elif not any(tokens.weights):
            yield row, tokens, "masked_out", "nothing left to train on" + (f": {long}" if tokens.cut else "")
        else:
            yield row, tokens, "truncated" if tokens.cut else "kept", ""


def _detect(fields: Fields, place: str) -> str:
    try:
        return detect(fields)
    except LorakitError as error:
        raise LorakitError(f"{place}: {error.message}", error.hint) from None


def _shown(source: str) -> str:
    return shown(Path(source)) if Path(source).is_absolute() else source


def as_chat(sample: Sample, format_name: str, tokenizer: Any) -> Sample:
    """An instruction for a model with a chat template is a chat of one turn: what it will be prompted
    with."""
    if format_name == "alpaca" and isinstance(sample, Pair) and tokenizer.chat_template:
        turns = (("user", sample.prompt.rstrip("\n")), ("assistant", sample.completion))
        return Chat(tuple({"role": role, "content": content} for role, content in turns))
    return sample


def _check_fit(sample: Sample, train_on: str, format_name: str, tokenizer: Any) -> None:
    """Raises: LorakitError when the recipe and the kind of data do not fit, which no single row is to blame
    for."""
    if isinstance(sample, Chat) and not tokenizer.chat_template:
        raise LorakitError(
            f"the data are chats ({format_name}), but the tokenizer has no chat template",
            "Write data.chat_template: a Jinja template or a file that holds one.",
        )
    if not fits(train_on, format_name):
        raise LorakitError(
            f"task.train_on: {train_on} does not fit data of format {format_name}", "auto fits every one."
        )


def _fatal(kind: str, section: Data) -> bool:
    if kind == "dropped":
        return section.on_long == "error"
    return kind in ("bad", "masked_out") and section.on_bad_row == "error"


def check_context(config: Mapping[str, Any], layers: Sequence[Layer], *parts: Loaded | None) -> None:
    """Warns of a sample with more tokens than the model of config.json was made for.

    Raises: LorakitError where positions are an embedding, which ends there.
    """
    text = config.get("text_config") or config
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    context = next((text[name] for name in names if isinstance(text.get(name), int)), None)
    longest = max(size for part in parts if part for size in part.tokens.sizes())
    if context is None or longest[0] <= context:
        return
    message = f"{longest[1]}: {longest[0]:,} tokens, the model was made for {context:,} at most"
    cure = f"Write data.max_length: {context}, and data.on_long: truncate or drop."
    if any(layer.kind == "embedding" and re.search(r"wpe|position", layer.name) for layer in layers):
        raise LorakitError(message, cure)
    say(f"warning: {message}. {cure}")


def _raise(problems: list[tuple[str, str]], account: Account, section: Data) -> None:
    if not problems:
        return
    lines = [text for _, text in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"... and {len(problems) - _SHOWN_PROBLEMS:,} more of {account.read:,} rows")
    kinds = {kind for kind, _ in problems}
    cures = []
    if "dropped" in kinds:
        longer = f"data.max_length above {section.max_length}"
        cures.append(f"{longer}, or data.on_long: truncate or drop, lets long rows pass")
    if kinds & {"bad", "masked_out"}:
        cures.append("data.on_bad_row: skip trains without the rows that are bad or have nothing to train on")
    raise LorakitError("\n".join(lines), "; ".join(cures) + ".")
