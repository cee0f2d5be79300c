"""Rows -> samples: one function per format, and the rule that recognises it.

A sample is what the row means, still as text. What tokens it becomes is render.py's matter.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.data.turns import OPENAI_ROLES, SHAREGPT_ROLES, check_order, read_tools, read_turns
from lorakit.data.turns import BadRow as BadRow
from lorakit.data.turns import Fields as Fields
from lorakit.data.turns import Message as Message
from lorakit.data.turns import kind_of as kind_of
from lorakit.errors import LorakitError, did_you_mean
from lorakit.recipe.data import FORMAT_FIELDS

FIELDS: dict[str, tuple[str, ...]] = {  # the fields a row must have, per format, in order of detection
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "sentence-pair": ("sentence1", "sentence2", "score"),
    "labelled-text": ("text", "label"),
    "text-to-text": ("source", "target"),
    "text": ("text",),
}
_KNOWN = {name for names in FIELDS.values() for name in names} | {"input", "system", "tools"}


@dataclass(frozen=True)
class Pair:
    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()  # {"type": "function", "function": {"name", ...}}


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Preference:
    prompt: str | tuple[Message, ...]  # "" when chosen and rejected hold it
    chosen: str | tuple[Message, ...]
    rejected: str | tuple[Message, ...]


@dataclass(frozen=True)
class Labelled:
    text: str
    label: str | int | float | bool


@dataclass(frozen=True)
class Scored:
    first: str
    second: str
    score: float
    written: str  # the score as the row has it: 5, 5.0 and 5.00 are one number and three texts


@dataclass(frozen=True)
class SourceTarget:
    source: str
    target: str


Sample = Pair | Chat | Text | Preference | Labelled | Scored | SourceTarget


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


# Columns and fields


def rename(row: Fields, columns: Mapping[str, str]) -> Fields:
    """`row` with the format's names. `columns` is {field: column}; {column: field} is understood as well.

    A column may be a path into nested values, with positions in lists: instances.0.output.
    Raises: BadRow for a column that is not there.
    """
    if not columns:
        return row
    pairs = dict(columns)
    turned = {field: column for column, field in columns.items()}
    if not set(columns) <= _KNOWN or (set(turned) <= _KNOWN and _are_there(row, turned, columns)):
        pairs = turned
    try:
        found = {field: _column(row, column) for field, column in pairs.items()}
    except BadRow as error:
        raise BadRow(f"{error}{_other_reading(columns)}") from None
    rest = {name: value for name, value in row.items() if name not in pairs.values()}
    return rest | found


def _other_reading(columns: Mapping[str, str]) -> str:
    """What to say when a key is no field, but near one: it was read as a column, and may be a misspelling."""
    for name in columns:
        if name not in _KNOWN and (near := did_you_mean(name, sorted(_KNOWN))):
            return f' data.columns maps field: column, and "{name}" is no field. {near}'
    return ""


def unused(row: Fields, format_name: str, columns: Mapping[str, str]) -> list[str]:
    """The columns of a renamed row that its format does not read; "id" is no one's."""
    fields = {*FIELDS[format_name], *FORMAT_FIELDS.get(format_name, ("prompt",)), "id"}
    inside = {path.split(".")[0] for path in (*columns, *columns.values()) if "." in path}
    return [name for name in map(str, row) if name not in fields | inside]


def _are_there(row: Fields, columns: Mapping[str, str], others: Mapping[str, str]) -> bool:
    """Whether `row` has all of the columns, and not all of the others."""
    return all(name in row for name in columns.values()) and not all(name in row for name in others.values())


def _column(row: Fields, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    above = ""
    for part in column.split("."):
        is_list = isinstance(value, list | tuple)
        pairs: Any = value.items() if isinstance(value, Mapping) else enumerate(value if is_list else ())
        inside = {str(name): item for name, item in pairs}
        if part not in inside:
            where = f'"{above[:-1]}"' if above else "The row"
            has = f"has: {', '.join(inside)}" if isinstance(value, Mapping) else f"is {kind_of(value)}"
            has += f" of {len(value)}, counted from 0" if is_list else ""
            near = did_you_mean(part, inside).replace('"', f'"{above}', 1)
            raise BadRow(f'no column "{column}" (data.columns). {near or f"{where} {has}."}')
        value = inside[part]
        above += f"{part}."
    return value


def _text(row: Fields, field: str, required: bool = True) -> str:
    value = row.get(field)
    if value is None:
        if not required:
            return ""
        raise _missing(row, field)
    if not isinstance(value, str):
        raise BadRow(f'field "{field}" must be text, not {kind_of(value)}')
    if required and not value.strip():
        raise BadRow(f'field "{field}" is empty')
    return value


def _missing(row: Fields, field: str) -> BadRow:
    odd = [name for name in map(str, row) if name not in _KNOWN]
    hint = did_you_mean(field, odd) or f"The row has: {', '.join(map(str, row))}."
    return BadRow(f'field "{field}" is null' if field in row else f'no field "{field}". {hint}')


# Formats of single texts


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


def labelled_text(row: Fields) -> Labelled:
    """text and label: text, a number, or true or false."""
    label = row.get("label")
    if label is None:
        raise _missing(row, "label")
    if not isinstance(label, str | int | float):
        raise BadRow(f'field "label" must be text, a number, or true or false, not {kind_of(label)}')
    return Labelled(_text(row, "text"), _text(row, "label") if isinstance(label, str) else label)


def sentence_pair(row: Fields) -> Scored:
    """sentence1, sentence2 and their score: a number, or text that is one."""
    score = row.get("score")
    if score is None:
        raise _missing(row, "score")
    number = math.nan
    if isinstance(score, str | int | float) and not isinstance(score, bool):
        try:
            number = float(score)
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        what = f'"{score}"' if isinstance(score, str | float) else kind_of(score)
        raise BadRow(f'field "score" must be a number, not {what}')
    return Scored(_text(row, "sentence1"), _text(row, "sentence2"), number, str(score).strip())


def text_to_text(row: Fields) -> SourceTarget:
    """source and target, as in translation."""
    return SourceTarget(_text(row, "source"), _text(row, "target"))


# Chats


def messages(row: Fields) -> Chat:
    """A list of {"role", "content"} as in OpenAI's API: tool calls, tool results and `tools` included."""
    return _chat(row, "messages", "role", "content", OPENAI_ROLES)


def sharegpt(row: Fields) -> Chat:
    """A list of {"from", "value"} or of {"role", "content"}, with optional `system` and `tools` beside it."""
    chat = _chat(row, "conversations", "from", "value", OPENAI_ROLES | SHAREGPT_ROLES)
    system = _text(row, "system", required=False)
    if system and chat.messages[0]["role"] == "system":
        raise BadRow('both a field "system" and a system turn')
    return Chat(({"role": "system", "content": system}, *chat.messages), chat.tools) if system else chat


def preference(row: Fields) -> Preference:
    """chosen, rejected and an optional prompt, each a text or a list of turns."""
    sides = {name: _text_or_turns(row, name) for name in ("chosen", "rejected")}
    prompt = _text_or_turns(row, "prompt") if row.get("prompt") is not None else ""
    for name, turns in sides.items():
        if not isinstance(turns, str) and turns[-1]["role"] != "assistant":
            raise BadRow(f'"{name}" must end with a turn of the assistant')
    if sides["chosen"] == sides["rejected"]:
        raise BadRow('"chosen" and "rejected" are the same: nothing to prefer')
    return Preference(prompt, sides["chosen"], sides["rejected"])


def _text_or_turns(row: Fields, field: str) -> str | tuple[Message, ...]:
    value = row.get(field)
    if isinstance(value, Mapping):  # one turn without a list around it
        row = {field: [value]}
    elif not isinstance(value, list | tuple):
        return _text(row, field)
    return read_turns(row, field, "from", "value", OPENAI_ROLES | SHAREGPT_ROLES)


def _chat(row: Fields, field: str, role_key: str, text_key: str, roles: Mapping[str, str]) -> Chat:
    turns = read_turns(row, field, role_key, text_key, roles)
    check_order(turns)
    if all(turn["role"] != "assistant" for turn in turns):
        raise BadRow("no assistant turn: nothing to train on")
    return Chat(turns, read_tools(row.get("tools")))


FORMATS: dict[str, Callable[[Fields], Sample]] = {
    "preference": preference,
    "messages": messages,
    "sharegpt": sharegpt,
    "prompt-completion": prompt_completion,
    "alpaca": alpaca,
    "sentence-pair": sentence_pair,
    "labelled-text": labelled_text,
    "text-to-text": text_to_text,
    "text": text,
}
