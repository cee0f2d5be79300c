"""The turns and tools of a row -> messages as chat templates read them, and what is said of those that are
none.

A message has a role of ROLES, its text as content ("" when there is none), and of `name`, `tool_call_id`,
`reasoning_content`, `thinking`, `reasoning` and `tool_calls` what the row has. Arguments of calls are
objects. `weight` 0 says that an assistant's turn is not trained.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import did_you_mean

Message = dict[str, Any]
Fields = Mapping[str, Any]
ROLES = ("system", "user", "assistant", "tool")

_CALL = "tool call"  # not a role of its own: an assistant turn whose text is a call as JSON
OPENAI_ROLES = {"developer": "system", "function": "tool"}
SHAREGPT_ROLES = (
    dict.fromkeys(("human", "prompter"), "user")
    | dict.fromkeys(("gpt", "chatgpt", "bot", "bard", "bing", "model", "ai"), "assistant")
    | dict.fromkeys(("observation", "function_response", "tool_response"), "tool")
    | dict.fromkeys(("function_call", "tool_call"), _CALL)
)
_KEPT = (
    "name",
    "tool_call_id",
    "reasoning_content",
    "thinking",
    "reasoning",
)  # what templates read beside the text
_PARTS = {  # type of a part of a turn -> in words
    **dict.fromkeys(("image", "image_url", "input_image"), "an image"),
    **dict.fromkeys(("audio", "audio_url", "input_audio"), "an audio"),
    **dict.fromkeys(("video", "video_url", "input_video"), "a video"),
    **dict.fromkeys(("file", "input_file"), "a file"),
}
_CALL_IN_TEXT = re.compile(r'tool_?calls?\b|function|"name"', re.IGNORECASE)


class BadRow(ValueError):
    """A row that is no sample of its format; the message says why."""


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "true or false"}
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return "null" if value is None else "a number"
    return names.get(type(value), f"a {type(value).__name__}")


def read_turns(
    row: Fields, field: str, role_key: str, text_key: str, roles: Mapping[str, str]
) -> tuple[Message, ...]:
    """The turns of a field as messages; their order is not looked at.

    `roles`: other names of ROLES. A turn may have "role" and "content" in place of the two keys.
    Raises: BadRow with the number of the turn, from 1.
    """
    turns = row.get(field)
    if not isinstance(turns, list | tuple) or not turns:
        raise BadRow(f'"{field}" must be a list of turns, and not empty')
    found = []
    for number, turn in enumerate(turns, 1):
        keys = (role_key, text_key)
        if isinstance(turn, Mapping) and keys[0] not in turn and "role" in turn:
            keys = ("role", "content")
        calls = isinstance(turn, Mapping) and (turn.get("tool_calls") or turn.get("function_call"))
        if not isinstance(turn, Mapping) or keys[0] not in turn or (keys[1] not in turn and not calls):
            raise BadRow(f'turn {number} of "{field}" needs "{role_key}" and "{text_key}"')
        found.append(_turn(number, turn, *keys, roles))
    return tuple(found)


def _turn(number: int, turn: Fields, role_key: str, text_key: str, roles: Mapping[str, str]) -> Message:
    role: Any = turn[role_key]
    if isinstance(role, str):  # the names of sharegpt are spelt in every way, those of OpenAI in one
        role = roles.get(role.lower() if "human" in roles else role, role)
        role = role.lower() if "human" in roles and role.lower() in ROLES else role
    if role not in (*ROLES, _CALL):
        hint = did_you_mean(str(role), (*roles, *ROLES))
        raise BadRow(f'turn {number}: unknown role "{turn[role_key]}". {hint}'.rstrip())
    content: Any = turn.get(text_key)
    calls: Any = turn.get("tool_calls") or turn.get("function_call")
    if role == _CALL:
        role, calls, content = "assistant", content, None
    if calls and role != "assistant":
        raise BadRow(f"turn {number}: tool_calls in a turn of the {role}; only the assistant calls tools")
    message = {"role": role, "content": _content(number, "" if content is None and calls else content)}
    if calls:
        message["tool_calls"] = _calls(number, calls)
    if turn.get("weight") == 0:  # OpenAI's mark of an assistant's turn that is not trained
        message["weight"] = 0
    elif role == "assistant" and not calls and not message["content"].strip():
        raise BadRow(f"turn {number}: the assistant says nothing; only its end would be trained")
    return message | {name: turn[name] for name in _KEPT if isinstance(turn.get(name), str)}


def _content(number: int, content: Any) -> str:
    """The text of a turn; its parts joined when it is a list of them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise BadRow(f"turn {number}: only text is supported, not {kind_of(content)}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        words = part if isinstance(part, str) else part.get("text") if kind == "text" else None
        if not isinstance(words, str):
            what = _PARTS.get(str(kind)) or (f'a "{kind}"' if kind and kind != "text" else "a nameless")
            raise BadRow(f"turn {number}: {what} part; lorakit trains on text only")
        texts.append(words)
    return "".join(texts)


def _calls(number: int, calls: Any) -> list[dict[str, Any]]:
    """The calls in OpenAI's form, with arguments as objects."""
    if isinstance(calls, str):
        calls = _json(calls, f"turn {number}: the tool call")
    found = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        function = call.get("function") or call if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f'turn {number}: a tool call needs "name" and "arguments"')
        name, arguments = function["name"], function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str) and arguments.strip():
            arguments = _json(arguments, f"turn {number}: the arguments of {name}")
        if arguments and not isinstance(arguments, Mapping):
            raise BadRow(
                f"turn {number}: the arguments of {name} must be an object, not {kind_of(arguments)}"
            )
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        function = {"name": name, "arguments": dict(arguments or {})}
        found.append({**kept, "type": "function", "function": function})
    return found


def _json(written: str, what: str) -> Any:
    try:
        return json.loads(written)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
        raise BadRow(f"{what}: not JSON: {reason}") from None


def read_tools(value: Any) -> tuple[dict[str, Any], ...]:
    """Function schemas, each as {"type": "function", "function": {...}}; a bare schema is put into one."""
    if isinstance(value, str):
        value = _json(value, 'field "tools"') if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise BadRow(f'field "tools" must be a list of function schemas, not {kind_of(value)}')
    found = []
    for number, tool in enumerate(value, 1):
        schema = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(schema, Mapping) or not isinstance(schema.get("name"), str):
            raise BadRow(f'tool {number} of field "tools" has no name: it is no function schema')
        found.append(dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)})
    return tuple(found)


def check_order(turns: Sequence[Message]) -> None:
    """Raises: BadRow at the first turn that cannot follow the one before it."""
    before = ""
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == "system" and number > 1:
            cure = "put it first, or join it with the turn that is"
            raise BadRow(f"turn {number}: a system turn that is not the first; {cure}")
        if role == before and role != "tool":
            raise BadRow(f"turn {number}: a turn of the {role} after a turn of the {role}; join the two")
        if role == "tool" and before != "tool":
            called = before == "assistant" and _calls_a_tool(turns[number - 2])
            if not called:
                cure = 'give the assistant\'s turn before it "tool_calls"'
                raise BadRow(f"turn {number}: a tool result that follows no tool call; {cure}")
        before = role


def _calls_a_tool(turn: Message) -> bool:
    """Whether an assistant's turn has a call, or writes one in its text as older data sets do."""
    return "tool_calls" in turn or _CALL_IN_TEXT.search(turn["content"]) is not None
