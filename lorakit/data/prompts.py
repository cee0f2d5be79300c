"""Prompts -> tokens: what a model is given before it answers, exactly as in training.

A prompt has a style: "chat" is a user's turn in the tokenizer's template; "instruction" is alpaca's text
without one, which ends with a line end; "text" is the text as it stands.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lorakit.data.formats import FORMATS, BadRow, Chat, Message, Pair, Text, rename
from lorakit.data.reading import rows_of
from lorakit.data.render import as_trained
from lorakit.data.templates import Tools, opening, prompt_text, render_many
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data, Rows

Style = Literal["chat", "instruction", "text"]
Messages = Sequence[Message]
_ONE_TURN = ("alpaca", "labelled-text", "sentence-pair", "text-to-text")  # pairs with a line end between
_ANSWER = "An answer"


@dataclass(frozen=True)
class Question:
    """A prompt whose answer is known."""

    place: str  # file:row
    prompt: list[int]
    reference: str


def style_of(format_name: str | None, tokenizer: Any) -> Style:
    """How a model was prompted that was trained on rows of this format; None: nobody knows; auto: several."""
    if tokenizer.chat_template and format_name in (None, "auto", "messages", "sharegpt", *_ONE_TURN):
        return "chat"
    return "instruction" if format_name in _ONE_TURN else "text"


def prompt_ids(text: str, style: Style, tokenizer: Any, system: str | None = None) -> list[int]:
    """The tokens of one prompt. `system`: a system turn before it, which only a chat has.

    Raises: LorakitError for what is no text, or is refused by the chat template.
    """
    if style == "chat":
        turns = [{"role": "system", "content": system}] if system else []
        return chat_ids([*turns, {"role": "user", "content": text}], tokenizer)
    return text_ids(text.rstrip("\n") + "\n" if style == "instruction" else text, tokenizer)


def text_ids(text: str, tokenizer: Any) -> list[int]:
    """Begin token and text, without the end token that some tokenizers add."""
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    ids = _encode(text, tokenizer, add_special_tokens=not begins)
    added = ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token))
    return ids[:-1] if added and ids[-1] != tokenizer.bos_token_id else ids


def chat_ids(messages: Messages, tokenizer: Any, tools: Tools = ()) -> list[int]:
    """The conversation and what the template puts before an answer. Raises: LorakitError."""
    try:
        text = prompt_text(messages, tools, tokenizer)
    except BadRow as error:
        raise LorakitError(str(error)) from None
    return _encode(text, tokenizer, add_special_tokens=False)


def _encode(text: str, tokenizer: Any, add_special_tokens: bool) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise LorakitError("the prompt is no Unicode text: it holds bytes that are not UTF-8") from None
    return list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts right after an answer; None where there is none.

    It need not be the tokenizer's end-of-sequence token, and a model that was trained on such chats ends its
    answers with it.
    """
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": _ANSWER}]
    text = render_many(tokenizer, [(turns, (), False)])[0]
    if isinstance(text, BadRow):
        return None
    rest = text.rpartition(_ANSWER)[2].lstrip()
    token = opening(rest, tokenizer)
    return int(tokenizer.convert_tokens_to_ids(token)) if token else None


def questions(value: Rows, section: Data, tokenizer: Any, kept: Collection[str]) -> list[Question]:
    """What the rows at the places `kept` ask, and the answer they give: the completion of a pair, the last
    assistant turn of a chat that calls no tool, given all turns before it. A chat that begins with it asks
    nothing.

    Raises: LorakitError for plain text, which asks nothing at all.
    """
    found = []
    for row, format_name in rows_of(value, section):
        if row.value is None or row.place not in kept:
            continue
        sample = as_trained(FORMATS[format_name](rename(row.value, section.columns)), format_name, tokenizer)
        if isinstance(sample, Pair):
            found.append(Question(row.place, text_ids(sample.prompt, tokenizer), sample.completion))
        elif isinstance(sample, Chat):
            turns = sample.messages
            said = [t["role"] == "assistant" and "tool_calls" not in t for t in turns]
            last = max((number for number, answer in enumerate(said) if answer), default=0)
            if last > 0:
                prompt = chat_ids(turns[:last], tokenizer, sample.tools)
                found.append(Question(row.place, prompt, turns[last]["content"]))
        elif isinstance(sample, Text):
            raise LorakitError("--exact-match: plain text has no answers to compare with", "Leave it out.")
    return found
