"""Samples -> tokens and weights: exactly what the model is given, and which tokens it is trained to predict.

weights[i] is 1 where ids[i] is a prediction target. The first token never is: nothing predicts it. What is
trained is decided on characters of the rendered text and carried to tokens by the tokenizer's offsets,
because a prompt tokenized alone may end in other tokens than the same prompt followed by its completion.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorakit.data.formats import BadRow, Chat, Pair, Sample
from lorakit.errors import LorakitError

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Tokens:
    ids: list[int]
    weights: list[int]
    cut: bool  # longer than max_length: its end is missing, and so is the end token
    full_length: int


def render(sample: Sample, tokenizer: Any, train_on: str, max_length: int) -> Tokens:
    """The tokens of a sample, cut at `max_length`.

    Raises: BadRow when the sample cannot be rendered (a template that refuses it, or rewrites earlier turns).
    """
    if isinstance(sample, Chat):
        text, spans = chat_text(sample, tokenizer, train_on)
        # A rendered template holds its special tokens already: adding them again would double the first one.
        ids, weights = _encode(tokenizer, text, spans, add_special_tokens=False)
        answered = train_on == "all" or sample.messages[-1]["role"] == "assistant"
        ends = answered and not text.rstrip().endswith(special_tokens(tokenizer))
    else:
        if isinstance(sample, Pair):
            text = sample.prompt + sample.completion
            spans = [(len(sample.prompt) if train_on in ("auto", "completion") else 0, len(text))]
        else:
            text, spans = sample.text, [(0, len(sample.text))]
        begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
        ids, weights = _encode(tokenizer, text, spans, add_special_tokens=not begins)
        ends = True
    if ends:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, weights = [*ids, tokenizer.eos_token_id], [*weights, 1]
        weights[-1] = 1
    if not ids:
        raise BadRow("it has no tokens")
    weights[0] = 0
    return Tokens(ids[:max_length], weights[:max_length], len(ids) > max_length, len(ids))


def chat_text(chat: Chat, tokenizer: Any, train_on: str) -> tuple[str, list[Span]]:
    """(the conversation as the tokenizer's template renders it, the characters that are trained).

    An assistant turn is what rendering adds between the prompt for it (with the generation prompt) and its
    end.
    """
    messages = list(chat.messages)
    text = apply_template(tokenizer, messages)
    if train_on == "all":
        return text, [(0, len(text))]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return text, [
        _span(tokenizer, messages, turn, text) for turn in (turns[-1:] if train_on == "last-turn" else turns)
    ]


def _span(tokenizer: Any, messages: list[dict[str, str]], turn: int, text: str) -> Span:
    """The characters of `text` that the assistant's turn number `turn` (from 0) adds to what precedes it.

    The turn's end token is trained; the white space that a template puts after it is not.
    """
    upto = apply_template(tokenizer, messages[: turn + 1])
    if turn == 0:  # nothing precedes it: no prompt can be rendered
        before = upto[: max(0, upto.find(messages[0]["content"]))]
    else:
        before = apply_template(tokenizer, messages[:turn], add_generation_prompt=True)
    if not text.startswith(upto):  # some templates write an end token after the last turn only
        upto = upto.rstrip().removesuffix(tokenizer.eos_token)
    if not (upto.startswith(before) and text.startswith(upto)):
        raise BadRow(
            f"turn {turn + 1}: the chat template renders this turn in another way in a prompt, or when more"
            " turns follow: what is trained would not be generated; task.train_on: last-turn or all may do"
        )
    ended = upto.rstrip()
    whole = len(ended) > len(before) and ended.endswith(special_tokens(tokenizer))
    return len(before), len(ended) if whole else len(upto)


@lru_cache(maxsize=4)
def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all special tokens, those without a name of their own included."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(added | {str(token) for token in tokenizer.all_special_tokens}))


def apply_template(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    """The conversation as text. Raises: BadRow when the template refuses it."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # a template is a program: it can fail in any way
        raise BadRow(f"the chat template refuses this conversation: {error}") from None


def _encode(
    tokenizer: Any, text: str, spans: list[Span], add_special_tokens: bool
) -> tuple[list[int], list[int]]:
    """(ids, 1 for every token that shares a character with one of `spans`)."""
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        raise BadRow("the text holds half of a surrogate pair: it is no Unicode text") from None
    encoded = tokenizer(text, add_special_tokens=add_special_tokens, return_offsets_mapping=True)
    weights = [
        int(any(first < end and last > start for start, end in spans) and last > first)
        for first, last in encoded["offset_mapping"]
    ]
    return list(encoded["input_ids"]), weights


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
