"""Rows -> samples: one function per format, and the rule that recognises it.

A sample is what the row means, still as text: a Pair, a Chat or a Text. What tokens it becomes is render.py's
matter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import LorakitError, did_you_mean

FIELDS: dict[str, tuple[str, ...]] = {  # the fields a row must have, per format, in order of detection
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[dict[str, str], ...]  # {"role": system|user|assistant|tool, "content": text}


@dataclass(frozen=True)
class Text:
    text: str


Sample = Pair | Chat | Text
ROLES = ("system", "user", "assistant", "tool")
Fields = Mapping[str, Any]


class BadRow(ValueError):
    """A row that is no sample of its format; the message says why."""


def detect(row: Fields) -> str:
    """The first format all of whose fields stand in `row`."""
    for name, fields in FIELDS.items():
        if all(field in row for field in fields):
            return name
    known = "; ".join(f"{name}: {', '.join(fields)}" for name, fields in FIELDS.items())
    columns = ", ".join(map(str, row)) or "none"
    every = [field for fields in FIELDS.values() for field in fields]
    odd = [name for name in map(str, row) if name not in every]
    hints = [f'"{name}": {hint}' for name in odd if (hint := did_you_mean(name, every))]
    raise LorakitError(
        f"no known format has just the columns that are there: {columns}. {' '.join(hints)}".rstrip(),
        "Name what they hold, for example data.columns: {prompt: question, completion: answer}."
        f" Formats: {known}.",
    )


def rename(row: Fields, columns: Mapping[str, str]) -> Fields:
    """`row` with the format's names. `columns` is {field: column}; {column: field} is understood as well."""
    if not columns:
        return row
    fields = {name for names in FIELDS.values() for name in (*names, "input", "system")}
    pairs = dict(columns) if set(columns) <= fields else {field: column for column, field in columns.items()}
    for column in pairs.values():
        if column not in row:
            hint = did_you_mean(column, map(str, row)) or f"The row has: {', '.join(map(str, row))}."
            raise BadRow(f'no column "{column}" (data.columns). {hint}')
    rest = {name: value for name, value in row.items() if name not in pairs.values()}
    return rest | {field: row[column] for field, column in pairs.items()}


def _text(row: Fields, field: str, required: bool = True) -> str:
    value = row.get(field)
    if value is None:
        if not required:
            return ""
        hint = did_you_mean(field, map(str, row)) or f"The row has: {', '.join(map(str, row))}."
        raise BadRow(f'field "{field}" is null' if field in row else f'no field "{field}". {hint}')
    if not isinstance(value, str):
        raise BadRow(f'field "{field}" must be text, not {kind_of(value)}')
    if required and not value.strip():
        raise BadRow(f'field "{field}" is empty')
    return value


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", tuple: "a list", bool: "true or false", type(None): "null"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )


def alpaca(row: Fields) -> Pair:
    """instruction, optional input, output: the instruction, a line with the input, a line end, then the
    output."""
    instruction, context = _text(row, "instruction"), _text(row, "input", required=False)
    return Pair("\n".join(part for part in (instruction, context) if part) + "\n", _text(row, "output"))


def prompt_completion(row: Fields) -> Pair:
    """prompt and completion, joined as they stand."""
    return Pair(_text(row, "prompt"), _text(row, "completion"))


def text(row: Fields) -> Text:
    return Text(_text(row, "text"))


def messages(row: Fields) -> Chat:
    """A list of {"role", "content"}."""
    return _chat(row, "messages", "role", "content", {})


def sharegpt(row: Fields) -> Chat:
    """A list of {"from", "value"}, with an optional system text beside it."""
    names = {
        "human": "user",
        "gpt": "assistant",
        "chatgpt": "assistant",
        "bot": "assistant",
        "observation": "tool",
    }
    chat = _chat(row, "conversations", "from", "value", names)
    system = _text(row, "system", required=False)
    if system and chat.messages[0]["role"] == "system":
        raise BadRow('both a field "system" and a system turn')
    return Chat(({"role": "system", "content": system}, *chat.messages)) if system else chat


def _chat(row: Fields, field: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Chat:
    turns = row.get(field)
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(f'"{field}" must be a list of turns, and not empty')
    chat = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or role_key not in turn or text_key not in turn:
            raise BadRow(f'turn {number} of "{field}" needs "{role_key}" and "{text_key}"')
        role, content = turn[role_key], turn[text_key]
        role = roles.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            hint = did_you_mean(str(role), (*roles, *ROLES))
            raise BadRow(f'turn {number}: unknown role "{role}". {hint}'.rstrip())
        if not isinstance(content, str):
            raise BadRow(f"turn {number}: only text is supported, not {kind_of(content)}")
        if turn.get("tool_calls"):
            raise BadRow(f"turn {number}: tool_calls are not supported yet; they would be lost")
        chat.append({"role": role, "content": content})
    if all(turn["role"] != "assistant" for turn in chat):
        raise BadRow("no assistant turn: nothing to train on")
    return Chat(tuple(chat))


FORMATS: dict[str, Callable[[Fields], Sample]] = {
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "messages": messages,
    "sharegpt": sharegpt,
    "text": text,
}
