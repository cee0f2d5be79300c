"""Chats -> text and the characters of it that are trained, for any chat template.

A template is a program that nobody can look into. So it is run on the whole conversation, and for every turn
that is trained on what precedes the turn (as a prompt) and on the conversation up to its end. Where the three
texts agree, the turn is what the last adds to the first, with marks in the template or without; where they do
not, what would be trained is not what the model will be asked for, and the row is refused.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lorakit.data.formats import BadRow, Chat, Message

Span = tuple[int, int]  # characters [start, end)
Tools = tuple[dict[str, Any], ...]
Request = tuple[list[Message], Tools, bool]  # what to render; True: as a prompt for the next turn
_MARK = "_marked"


@dataclass(frozen=True)
class Draft:
    """What is to be tokenized."""

    text: str
    spans: tuple[Span, ...]  # trained characters; in order, none overlaps
    whole: bool  # the text has its special tokens; False: the tokenizer adds them
    add_end: bool  # the text must end with the tokenizer's end token
    closed: int = -1  # a character of the first trained end token; -1: no end token is in `spans`
    brings_begin: bool = False  # the row's own text holds a begin token


def chat_drafts(chats: Sequence[Chat], tokenizer: Any, train_on: str) -> list[Draft | BadRow]:
    """Every conversation as the tokenizer's template renders it; a BadRow says what the template does not
    do."""
    wholes = _render_wholes(chats, tokenizer)
    asked = [
        [] if isinstance(whole, BadRow) else list(_requests(whole[0], chat.tools, train_on))
        for chat, whole in zip(chats, wholes, strict=True)
    ]
    answers = iter(render_many(tokenizer, [request for requests in asked for request in requests]))
    found: list[Draft | BadRow] = []
    for chat, whole, requests in zip(chats, wholes, asked, strict=True):
        if isinstance(whole, BadRow):
            found.append(whole)
            continue
        parts = [next(answers) for _ in requests]
        try:
            _check_whole(whole[0], chat.tools, whole[1], parts)
            found.append(_draft(*whole, parts, tokenizer, train_on))
        except BadRow as error:
            found.append(error)
    return found


def prompt_text(messages: Sequence[Message], tools: Tools, tokenizer: Any) -> str:
    """The conversation and what the template puts before an answer. Raises: BadRow."""
    listed = list(messages)
    text = render_many(tokenizer, [(listed, tools, True)])[0]
    if _has_calls(listed) and _wants_json(listed, text):
        again = render_many(tokenizer, [(_with_json(listed), tools, True)])[0]
        text = text if isinstance(again, BadRow) else again
    if isinstance(text, BadRow):
        raise text
    return text


# Running the template


# What a template that asks for the date is told: with the day of the call the same rows would be other tokens
# tomorrow, and a run could not be continued. Llama 3's templates take this date when they are told none. It
# comes as a macro of the template, which hides the function of that name.
_DATE = {
    "%d": "26",
    "%m": "07",
    "%b": "Jul",
    "%B": "July",
    "%Y": "2024",
    "%y": "24",
    "%a": "Fri",
    "%A": "Friday",
}
_TODAY = "{%- macro strftime_now(format) -%}{{ format"
_TODAY += "".join(f" | replace('{sign}', '{text}')" for sign, text in _DATE.items()) + " }}{%- endmacro -%}"


def render_many(tokenizer: Any, requests: Sequence[Request]) -> list[str | BadRow]:
    """The text of every request, or why there is none. Alike ones share a call, which halves their cost."""
    groups: dict[tuple[bool, int], list[int]] = {}
    for index, (_, tools, prompt) in enumerate(requests):
        groups.setdefault((prompt, id(tools) if tools else 0), []).append(index)
    found: list[str | BadRow] = [BadRow("")] * len(requests)
    for (prompt, _), group in groups.items():
        tools = requests[group[0]][1]
        conversations = [requests[index][0] for index in group]
        try:
            texts = _apply(tokenizer, conversations, tools, prompt)
        except Exception:  # one of them fails: which, and why, shows when each is alone
            texts = [_alone(tokenizer, conversation, tools, prompt) for conversation in conversations]
        for index, text in zip(group, texts, strict=True):
            found[index] = text
    return found


def _apply(tokenizer: Any, conversations: list[list[Message]], tools: Tools, prompt: bool) -> list[Any]:
    options: dict[str, Any] = {"tools": list(tools)} if tools else {}
    if "strftime_now" in str(tokenizer.chat_template):
        options["chat_template"] = _TODAY + tokenizer.get_chat_template(tools=options.get("tools"))
    texts = tokenizer.apply_chat_template(
        conversations, tokenize=False, add_generation_prompt=prompt, **options
    )
    return list(texts)


def _alone(tokenizer: Any, conversation: list[Message], tools: Tools, prompt: bool) -> str | BadRow:
    try:
        return str(_apply(tokenizer, [conversation], tools, prompt)[0])
    except Exception as error:  # a template is a program: it can fail in any way
        return BadRow(f"the chat template refuses this conversation: {error}")


def _render_wholes(chats: Sequence[Chat], tokenizer: Any) -> list[tuple[list[Message], str] | BadRow]:
    """(messages, text) of each conversation, with arguments of calls as objects or, where the template needs
    it, as JSON text."""
    wholes = [list(chat.messages) for chat in chats]
    texts = render_many(
        tokenizer, [(whole, chat.tools, False) for whole, chat in zip(wholes, chats, strict=True)]
    )
    other = [i for i, whole in enumerate(wholes) if _has_calls(whole) and _wants_json(whole, texts[i])]
    for i in other:
        written = _with_json(wholes[i])
        again = render_many(tokenizer, [(written, chats[i].tools, False)])[0]
        if not isinstance(again, BadRow):
            wholes[i], texts[i] = written, again
    return [
        text if isinstance(text, BadRow) else (whole, text) for whole, text in zip(wholes, texts, strict=True)
    ]


def _has_calls(messages: Sequence[Message]) -> bool:
    return any("tool_calls" in message for message in messages)


def _functions(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from (call["function"] for call in message.get("tool_calls", ()))


def _wants_json(messages: Sequence[Message], text: str | BadRow) -> bool:
    """Whether the template fails on arguments that are objects, or writes them as Python would."""
    if isinstance(text, BadRow):
        return True
    return any(f["arguments"] and repr(f["arguments"]) in text for f in _functions(messages))


def _with_json(messages: list[Message]) -> list[Message]:
    return _with_functions(
        messages, lambda f: {**f, "arguments": json.dumps(f["arguments"], ensure_ascii=False)}
    )


def _with_functions(messages: list[Message], change: Any) -> list[Message]:
    def changed(message: Message) -> Message:
        calls = [{**call, "function": change(call["function"])} for call in message["tool_calls"]]
        return {**message, "tool_calls": calls}

    return [changed(message) if "tool_calls" in message else message for message in messages]


# Turns


def _turns(messages: Sequence[Message], train_on: str) -> list[int]:
    """The turns that are trained (from 0); none when all is."""
    if train_on == "all":
        return []
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight") != 0]
    return turns[-1:] if train_on == "last-turn" else turns


def _requests(messages: list[Message], tools: Tools, train_on: str) -> Iterator[Request]:
    """What _check_whole and _draft need rendered, in the order in which they take it."""
    if tools or _has_calls(messages):
        marked = _with_functions(messages, lambda f: {**f, "name": f["name"] + _MARK})
        yield marked, tuple(_renamed(tool) for tool in tools), False
    for turn in _turns(messages, train_on):
        if turn > 0:
            yield messages[:turn], tools, True
        if turn + 1 < len(messages):
            yield messages[: turn + 1], tools, False


def _renamed(tool: dict[str, Any]) -> dict[str, Any]:
    return {**tool, "function": {**tool["function"], "name": tool["function"]["name"] + _MARK * 2}}


def _check_whole(messages: Sequence[Message], tools: Tools, text: str, parts: list[str | BadRow]) -> None:
    """Takes the rendering with other names from `parts`. Raises: BadRow for what the template leaves out."""
    cure = "Write a data.chat_template that renders it, or take it out of the row."
    if messages[0]["role"] == "system" and not _holds(messages[0]["content"], text):
        raise BadRow(f"turn 1: the chat template leaves out the system turn. {cure}")
    if not (tools or _has_calls(messages)):
        return
    marked = parts.pop(0)
    if isinstance(marked, BadRow):  # names decide what this template does: nothing can be learnt from others
        return
    for tool in tools:
        name = tool["function"]["name"]
        if name + _MARK * 2 not in marked:
            raise BadRow(f'the chat template leaves out the tool "{name}" of field "tools". {cure}')
    marked = marked.replace(_MARK * 2, "")
    for number, message in enumerate(messages, 1):
        for function in _functions([message]):
            name = function["name"] + _MARK
            if name not in marked:
                raise BadRow(
                    f'turn {number}: the chat template leaves out the call of "{function["name"]}". {cure}'
                )
            marked = marked.replace(name, "", 1)


def _draft(
    messages: list[Message], text: str, parts: list[str | BadRow], tokenizer: Any, train_on: str
) -> Draft:
    ended = closing(text.rstrip(), tokenizer)
    if train_on == "all":
        closed = text.find(ended, 1) if ended else -1
        return Draft(text, ((0, len(text)),), True, not ended, closed, _brings_begin(messages, tokenizer))
    spans: list[Span] = []
    closed = -1
    for turn in _turns(messages, train_on):
        before = parts.pop(0) if turn > 0 else None
        upto = parts.pop(0) if turn + 1 < len(messages) else text
        for part in (before, upto):
            if isinstance(part, BadRow):
                raise BadRow(f"turn {turn + 1}: {part}")
        assert not isinstance(before, BadRow) and not isinstance(upto, BadRow)
        start = before if before is not None else _opening(tokenizer, messages[0], upto)
        span = _span(tokenizer, messages, turn, start, upto, text)
        _check_turn(messages[turn], turn, span, text)
        if closed < 0 and closing(text[slice(*span)], tokenizer):
            closed = span[1] - 1
        spans.append(span)
    add_end = messages[-1]["role"] == "assistant" and not ended
    return Draft(text, tuple(spans), True, add_end, closed, _brings_begin(messages, tokenizer))


def _brings_begin(messages: Sequence[Message], tokenizer: Any) -> bool:
    begin = tokenizer.bos_token
    return bool(begin) and any(begin in message["content"] for message in messages)


def _opening(tokenizer: Any, message: Message, upto: str) -> str:
    """What stands before an assistant's turn that is the first: no prompt can be rendered for it."""
    asked = [{"role": "user", "content": "A question"}]
    plain, prompt = render_many(tokenizer, [(asked, (), False), (asked, (), True)])
    if isinstance(plain, str) and isinstance(prompt, str) and prompt.startswith(plain):
        header = prompt[len(plain) :]
        if header and header in upto:
            return upto[: upto.index(header) + len(header)]
    return upto[: max(0, upto.find(message["content"]))]


def _span(tokenizer: Any, messages: Sequence[Message], turn: int, before: str, upto: str, text: str) -> Span:
    """The characters of `text` that the assistant's turn number `turn` (from 0) adds to what precedes it.

    The turn's end token is trained; the white space that a template puts after it is not.
    """
    if not text.startswith(upto):  # some templates write an end token after the last turn only
        shorter = upto.rstrip().removesuffix(tokenizer.eos_token)
        upto = shorter if text.startswith(shorter) else upto
    parting = ""
    if not upto.startswith(before):
        parting = f"than in a prompt: {_parting(before, upto)}"
    elif not text.startswith(upto):
        parting = f"when more turns follow: {_parting(upto, text)}"
    if parting:
        last = all(message["role"] != "assistant" for message in messages[turn + 1 :])
        cure = (
            "a data.chat_template that does not, or task.train_on: all,"
            if last
            else "task.train_on: each-turn, last-turn or all"
        )
        raise BadRow(
            f"turn {turn + 1}: the chat template renders the text up to here in another way {parting}."
            f" What is trained would not be generated; {cure} may do"
        )
    ended = upto.rstrip()
    whole = len(ended) > len(before) and closing(ended, tokenizer)
    return len(before), len(ended) if whole else len(upto)


def _parting(one: str, other: str) -> str:
    """The place where two texts part, in both."""
    ends = min(len(one), len(other))
    place = next((i for i in range(ends) if one[i] != other[i]), ends)
    start = max(0, place - 8)
    return " becomes ".join(repr(text[start : place + 20]) for text in (one, other))


def _check_turn(message: Message, turn: int, span: Span, text: str) -> None:
    """Raises: BadRow when a part of a trained turn is not in the text."""
    for name in ("content", "reasoning_content", "thinking", "reasoning"):
        part = message.get(name, "")
        if not _holds(part, text[max(0, span[0] - len(part)) : span[1]]):  # a prompt may hold its first words
            raise BadRow(
                f"turn {turn + 1}: the chat template leaves out a part of the turn's {name}."
                " Write a data.chat_template that renders it, or take it out of the row."
            )


def _holds(part: str, text: str) -> bool:
    """Whether `part` stands in `text`, whatever a template does with white space."""
    return part.strip() in text or "".join(part.split()) in "".join(text.split())


def closing(text: str, tokenizer: Any) -> str:
    """The longest special token that ends `text`; empty when none does."""
    tokens, lengths = _special_tokens(tokenizer)
    return next((text[-length:] for length in lengths if text[-length:] in tokens), "")


def opening(text: str, tokenizer: Any) -> str:
    """The longest special token that begins `text`; empty when none does."""
    tokens, lengths = _special_tokens(tokenizer)
    return next((text[:length] for length in lengths if text[:length] in tokens), "")


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> tuple[frozenset[str], tuple[int, ...]]:
    """The texts of all special tokens, those without a name of their own included; their lengths, the longest
    first. Some tokenizers have thousands of them."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = frozenset(added | {str(token) for token in tokenizer.all_special_tokens}) - {""}
    return tokens, tuple(sorted({len(token) for token in tokens}, reverse=True))
