"""Samples -> tokens and weights: exactly what the model is given, and which tokens it is trained to predict.

weights[i] is 1 where ids[i] is a prediction target. The first token never is: nothing predicts it. What is
trained is decided on characters of the rendered text and carried to tokens by the tokenizer's offsets,
because a prompt tokenized alone may end in other tokens than the same prompt followed by its completion.

Shapes: T tokens of a sample, N tokens of all samples of a call, K trained spans of characters of theirs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import numpy as np

from lorakit.data.formats import (
    BadRow,
    Chat,
    Labelled,
    Pair,
    Preference,
    Sample,
    Scored,
    SourceTarget,
    Text,
)
from lorakit.data.templates import Draft, chat_drafts
from lorakit.errors import LorakitError

_PIECE = 1 << 18  # characters that are tokenized at once when a text is far longer than max_length
_NEAR = 32  # tokens beside the end of a piece that may be others than in the whole text


@dataclass(frozen=True)
class Tokens:
    ids: np.ndarray  # (T,) int32, cut at max_length
    weights: np.ndarray  # (T,) uint8, 1 where the token is a prediction target
    cut: bool  # longer than max_length: its end is missing, and so is the end token
    full_length: int  # before cutting
    ends: bool  # an end token, of a turn or of the text, is among the trained tokens


def as_trained(sample: Sample, format_name: str, tokenizer: Any) -> Sample:
    """What causal-lm trains on: a Pair, a Chat or a Text.

    An instruction, a labelled text, a scored pair or a source for a model with a chat template is a chat of
    one turn: what it will be prompted with.
    Raises: LorakitError for a Preference, which causal-lm cannot train.
    """
    if isinstance(sample, Pair | Chat | Text) and format_name != "alpaca":
        return sample
    if isinstance(sample, Preference):
        texts = isinstance(sample.chosen, str)
        cure = "prompt-completion, data.columns: {prompt: prompt, completion: chosen}"
        raise LorakitError(
            "the rows are preferences (chosen, rejected), which task causal-lm does not train",
            "To train on the chosen answers: data.format: "
            + (cure if texts else "messages, data.columns: {messages: chosen}"),
        )
    pair = sample
    if isinstance(sample, Labelled):
        label = str(sample.label).lower() if isinstance(sample.label, bool) else str(sample.label)
        pair = Pair(sample.text + "\n", label)
    elif isinstance(sample, Scored):
        pair = Pair(f"{sample.first}\n{sample.second}\n", sample.written)
    elif isinstance(sample, SourceTarget):
        pair = Pair(sample.source + "\n", sample.target)
    if isinstance(pair, Pair) and tokenizer.chat_template:
        turns = (("user", pair.prompt.rstrip("\n")), ("assistant", pair.completion))
        return Chat(tuple({"role": role, "content": content} for role, content in turns))
    return pair


def turns_apart(sample: Sample) -> list[Sample]:
    """A chat for each trained turn of the assistant, which is its last; any other sample as it is."""
    if not isinstance(sample, Chat):
        return [sample]
    said = [turn["role"] == "assistant" and turn.get("weight") != 0 for turn in sample.messages]
    ends = [number + 1 for number, trained in enumerate(said) if trained]
    return [Chat(sample.messages[:end], sample.tools) for end in ends] or [sample]


def render(sample: Sample, tokenizer: Any, train_on: str, max_length: int) -> Tokens:
    """The tokens of a sample, cut at `max_length`. Raises: BadRow when it cannot be rendered."""
    found = render_all([sample], tokenizer, train_on, max_length)[0]
    if isinstance(found, BadRow):
        raise found
    return found


def render_all(
    samples: Sequence[Sample], tokenizer: Any, train_on: str, max_length: int
) -> list[Tokens | BadRow]:
    """The tokens of each sample, cut at `max_length`, or why there are none. The arrays are views of shared
    ones."""
    drafts = _drafts(samples, tokenizer, train_on)
    found: dict[int, Tokens | BadRow] = {i: draft for i, draft in drafts.items() if isinstance(draft, BadRow)}
    for whole in (True, False):
        chosen = {i: d for i, d in drafts.items() if isinstance(d, Draft) and d.whole is whole}
        found |= zip(chosen, _tokenize(list(chosen.values()), tokenizer, max_length), strict=True)
    return [found[index] for index in range(len(samples))]


def _drafts(samples: Sequence[Sample], tokenizer: Any, train_on: str) -> dict[int, Draft | BadRow]:
    chats = {index: sample for index, sample in enumerate(samples) if isinstance(sample, Chat)}
    drafts = dict(zip(chats, chat_drafts(list(chats.values()), tokenizer, train_on), strict=True))
    for index, sample in enumerate(samples):
        if isinstance(sample, Pair | Text):
            drafts[index] = _plain(sample, tokenizer, train_on)
        draft = drafts[index]
        try:
            _ = isinstance(draft, Draft) and draft.text.encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
            drafts[index] = BadRow("the text holds half of a surrogate pair: it is no Unicode text")
    return drafts


def _plain(sample: Pair | Text, tokenizer: Any, train_on: str) -> Draft:
    begin = tokenizer.bos_token or ""
    if isinstance(sample, Text):
        text, start = sample.text, 0
    else:
        text = sample.prompt + sample.completion
        start = len(sample.prompt) if train_on in ("auto", "completion") else 0
    begins = bool(begin) and text.startswith(begin)
    return Draft(text, ((start, len(text)),), whole=begins, add_end=True, brings_begin=begins)


def _tokenize(drafts: Sequence[Draft], tokenizer: Any, max_length: int) -> list[Tokens | BadRow]:
    """The tokens of drafts that are alike in `whole`, in one call of the tokenizer."""
    if not drafts:
        return []
    # What tokenizer(...) calls, without its lists of what nobody asked for.
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    most = max(_PIECE, 32 * max_length)  # characters
    texts = [draft.text if len(draft.text) <= most else _piece(draft.text, 0, most) for draft in drafts]
    encodings = backend.encode_batch(texts, add_special_tokens=not drafts[0].whole)
    uncounted = [0] * len(drafts)
    for number, (draft, text) in enumerate(zip(drafts, texts, strict=True)):
        if len(text) < len(draft.text):  # tens of megabytes at once would take a hundred times their size
            if len(encodings[number]) > max_length + _NEAR:
                uncounted[number] = _count(backend, draft.text, len(text))
            else:
                encodings[number] = backend.encode(draft.text, add_special_tokens=not draft.whole)
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    rows = [encoding.ids for encoding in encodings]
    for draft, ids in zip(drafts, rows, strict=True):
        if draft.add_end and (not ids or ids[-1] != end):
            ids.append(end)
    bounds = [0, *accumulate(map(len, rows))]
    flat = np.fromiter(chain.from_iterable(rows), np.int32, bounds[-1])
    weights = _weights(drafts, encodings, bounds)
    found: list[Tokens | BadRow] = []
    for number, (draft, ids) in enumerate(zip(drafts, rows, strict=True)):
        if not ids or (ids[0] == begin and ids[:2] == [begin, begin]):
            found.append(BadRow(_doubled(draft, tokenizer) if ids else "it has no tokens"))
            continue
        ends = draft.add_end and 1 < len(ids) <= max_length
        if draft.closed >= 0 and not ends:
            token = encodings[number].char_to_token(draft.closed)
            ends = token is not None and 0 < token < max_length
        kept = slice(bounds[number], min(bounds[number + 1], bounds[number] + max_length))
        length = len(ids) + uncounted[number]
        found.append(Tokens(flat[kept], weights[kept], length > max_length, length, ends))
    return found


def _piece(text: str, start: int, most: int) -> str:
    """At most `most` characters of `text`, up to the white space between two words if there is any near."""
    end = start + most
    if end >= len(text):
        return text[start:]
    words = max(text.rfind(" ", end - _NEAR**2, end), text.rfind("\n", end - _NEAR**2, end))
    return text[start : words if words > start else end]


def _count(backend: Any, text: str, start: int) -> int:
    """The number of tokens from character `start` on, of a text too long to be tokenized in one piece."""
    tokens = 0
    while start < len(text):
        piece = _piece(text, start, _PIECE)
        tokens += len(backend.encode(piece, add_special_tokens=False))
        start += len(piece)
    return tokens


def _weights(drafts: Sequence[Draft], encodings: Sequence[Any], bounds: Sequence[int]) -> np.ndarray:
    """(N,) 1 for every token that shares a character with a span, and for an end token that must be there.

    All texts are laid end to end, so that each token is looked up in one sorted list of spans.
    """
    bases = np.cumsum([0, *(len(draft.text) for draft in drafts)])
    lengths = np.diff(bounds)
    # One list of offsets at a time: together they are the largest things here, and slow to collect.
    places = (e.offsets + [(0, 0)] * (length - len(e)) for e, length in zip(encodings, lengths, strict=True))
    at = np.fromiter(chain.from_iterable(chain.from_iterable(places)), np.int64, 2 * bounds[-1])
    first, last = (at.reshape(-1, 2) + np.repeat(bases[:-1], lengths)[:, None]).T
    spans = [
        base + np.array(span) for base, draft in zip(bases, drafts, strict=False) for span in draft.spans
    ]
    starts, ends = np.array(spans, dtype=np.int64).reshape(-1, 2).T  # (K,) each
    span = np.searchsorted(ends, first, side="right")  # the first that ends after the token begins
    begins = np.append(starts, np.iinfo(np.int64).max)[span]
    weights: np.ndarray = (begins < last).astype(np.uint8)
    for draft, start, stop in zip(drafts, bounds[:-1], bounds[1:], strict=True):
        if stop > start:
            weights[stop - 1] |= draft.add_end
            weights[start] = 0
    return weights


def _doubled(draft: Draft, tokenizer: Any) -> str:
    token = tokenizer.bos_token
    if draft.whole:
        cause = "one is in the text of the row" if draft.brings_begin else "the chat template writes both"
    else:
        cause = "the tokenizer adds one to the text's own"
    return f"it begins with the begin-of-sequence token {token} twice: {cause}"


def check_tokenizer(tokenizer: Any, num_embeddings: int | None = None) -> None:
    """Raises: LorakitError for a tokenizer that cannot mark the end of a text, or has no offsets."""
    if tokenizer.eos_token_id is None:
        raise LorakitError(
            "the tokenizer has no end-of-sequence token, so that the model could never learn to stop",
            "Set eos_token in the model's tokenizer_config.json.",
        )
    if not tokenizer.is_fast:
        raise LorakitError(
            "this model has only a slow tokenizer, without character offsets; lorakit needs tokenizer.json"
        )
    if num_embeddings is not None and len(tokenizer) > num_embeddings:
        raise LorakitError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {num_embeddings} only"
        )
