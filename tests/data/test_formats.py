"""Rows -> samples: which format a row has, what it means, and what is said of a row that means nothing."""

from typing import Any

import pytest

from lorakit.data.formats import FIELDS, FORMATS, BadRow, Chat, Pair, Text, detect, rename
from lorakit.errors import LorakitError
from lorakit.recipe.data import FORMAT_FIELDS
from lorakit.recipe.task import TRAIN_ON

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
GOOD: dict[str, tuple[dict[str, Any], Any]] = {
    "alpaca": ({"instruction": "i", "input": "c", "output": "o"}, Pair("i\nc\n", "o")),
    "prompt-completion": ({"prompt": "p ", "completion": " c"}, Pair("p ", " c")),
    "messages": ({"messages": [ASK, ANSWER]}, Chat((ASK, ANSWER))),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Chat((ASK, ANSWER)),
    ),
    "text": ({"text": " t\n"}, Text(" t\n")),
}


def reason(format_name: str, row: dict[str, Any]) -> str:
    """Why `row` is no sample of the format."""
    with pytest.raises(BadRow) as caught:
        FORMATS[format_name](row)
    return str(caught.value)


def test_every_format_is_known_everywhere_and_has_a_good_row_here() -> None:
    assert set(FORMATS) == set(FIELDS) == set(FORMAT_FIELDS) == set(TRAIN_ON) == set(GOOD)
    for name, fields in FIELDS.items():
        assert set(fields) <= set(FORMAT_FIELDS[name])


@pytest.mark.parametrize("name", GOOD)
def test_a_good_row_is_recognised_and_becomes_its_sample_as_it_stands(name: str) -> None:
    row, sample = GOOD[name]
    assert detect(row) == name
    assert FORMATS[name](row) == sample
    assert FORMATS[name](row | {"id": 7, "source": None}) == sample


# ------------------------------------------------------------------------------------------------------------
# Detection and columns


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("messages conversations prompt completion instruction output text", "messages"),
        ("conversations prompt completion instruction output text", "sharegpt"),
        ("prompt completion instruction output text", "prompt-completion"),
        ("prompt instruction output text", "alpaca"),
        ("instruction output", "alpaca"),
        ("prompt instruction text", "text"),
    ],
)
def test_the_first_format_whose_fields_are_all_there_is_taken(columns: str, name: str) -> None:
    assert detect(dict.fromkeys(columns.split())) == name


@pytest.mark.parametrize("columns", ["question answer", "prompt", "completion instruction", "Text"])
def test_columns_of_no_format_are_refused_with_the_columns_and_what_formats_need(columns: str) -> None:
    with pytest.raises(LorakitError) as caught:
        detect(dict.fromkeys(columns.split()))
    message = str(caught.value)
    assert columns.replace(" ", ", ") in message
    assert "data.columns" in message
    for needed in (
        "messages: messages",
        "prompt-completion: prompt, completion",
        "alpaca: instruction, output",
    ):
        assert needed in message


@pytest.mark.parametrize(
    "columns",
    [{"prompt": "question", "completion": "answer"}, {"question": "prompt", "answer": "completion"}],
    ids=["field: column", "column: field"],
)
def test_columns_are_renamed_in_either_direction_and_others_stay(columns: dict[str, str]) -> None:
    row = {"question": "q", "answer": "a", "id": 1}
    assert rename(row, columns) == {"prompt": "q", "completion": "a", "id": 1}
    assert row == {"question": "q", "answer": "a", "id": 1}


def test_without_columns_a_row_stays_what_it_is() -> None:
    row = {"a": 1}
    assert rename(row, {}) is row


def test_two_columns_can_change_places() -> None:
    row = {"prompt": "p", "completion": "c"}
    assert rename(row, {"prompt": "completion", "completion": "prompt"}) == {"prompt": "c", "completion": "p"}


def test_a_renamed_column_replaces_one_that_had_the_name() -> None:
    assert rename({"text": "old", "content": "new"}, {"text": "content"}) == {"text": "new"}


def test_one_column_can_be_two_fields() -> None:
    assert rename({"a": "x"}, {"prompt": "a", "completion": "a"}) == {"prompt": "x", "completion": "x"}


def test_a_system_column_can_be_renamed_for_sharegpt() -> None:
    row = {"chat": GOOD["sharegpt"][0]["conversations"], "rules": "be brief"}
    renamed = rename(row, {"conversations": "chat", "system": "rules"})
    assert FORMATS["sharegpt"](renamed) == Chat(
        ({"role": "system", "content": "be brief"}, ASK, ANSWER),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, 'no column "queston" (data.columns). Did you mean "question"?'),
        ({"zzz": "q", "id": 1}, 'no column "queston" (data.columns). The row has: zzz, id.'),
    ],
)
def test_a_column_that_is_not_there_is_named_with_the_nearest_or_all(
    row: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRow) as caught:
        rename(row, {"prompt": "queston"})
    assert str(caught.value) == message


# ------------------------------------------------------------------------------------------------------------
# Fields


FIELD_CASES = [(name, field) for name in ("alpaca", "prompt-completion", "text") for field in FIELDS[name]]


@pytest.mark.parametrize(("name", "field"), FIELD_CASES)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "is null"),
        (3, "must be text"),
        (True, "must be text"),
        (["a"], "must be text"),
        ({"a": 1}, "must be text"),
        (b"a", "must be text"),
        ("", "is empty"),
        (" \n\t", "is empty"),
    ],
)
def test_a_required_field_must_be_text_with_something_in_it(
    name: str, field: str, value: Any, message: str
) -> None:
    assert reason(name, GOOD[name][0] | {field: value}).startswith(f'field "{field}" {message}')


@pytest.mark.parametrize(("name", "field"), FIELD_CASES)
def test_a_missing_field_is_named_with_the_fields_of_the_row(name: str, field: str) -> None:
    row = {key: value for key, value in GOOD[name][0].items() if key != field} | {"zz": 1}
    found = reason(name, row)
    assert found.startswith(f'no field "{field}". ')
    assert found.endswith(f"The row has: {', '.join(row)}.")


def test_a_misspelt_field_is_recognised() -> None:
    row = {"prompt": "p", "completon": "c"}
    assert reason("prompt-completion", row) == 'no field "completion". Did you mean "completon"?'


@pytest.mark.parametrize("row", [{}, {"input": None}, {"input": ""}])
def test_an_alpaca_row_without_input_has_no_line_for_it(row: dict[str, Any]) -> None:
    assert FORMATS["alpaca"]({"instruction": "i", "output": "o"} | row) == Pair("i\n", "o")


def test_an_alpaca_input_must_be_text_when_it_is_there() -> None:
    assert reason("alpaca", GOOD["alpaca"][0] | {"input": 3}).startswith('field "input" must be text')


def test_prompt_and_completion_are_joined_as_they_stand() -> None:
    sample = FORMATS["prompt-completion"]({"prompt": "a\n", "completion": "  b "})
    assert sample == Pair("a\n", "  b ")


# ------------------------------------------------------------------------------------------------------------
# Chats

KEYS = {"messages": ("role", "content", "user", "assistant"), "sharegpt": ("from", "value", "human", "gpt")}


def chat(name: str, *turns: tuple[Any, Any]) -> dict[str, Any]:
    """A row of the chat format `name`."""
    role, text, _, _ = KEYS[name]
    return {FIELDS[name][0]: [{role: who, text: what} for who, what in turns]}


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("turns", [None, [], "hello", {"role": "user"}, 3])
def test_turns_must_be_a_list_with_something_in_it(name: str, turns: Any) -> None:
    field = FIELDS[name][0]
    assert reason(name, {field: turns}) == f'"{field}" must be a list of turns, and not empty'


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("missing", [0, 1])
def test_a_turn_without_role_or_text_is_counted_and_told_both(name: str, missing: int) -> None:
    row = chat(name, (KEYS[name][2], "q"), (KEYS[name][3], "a"))
    del row[FIELDS[name][0]][1][KEYS[name][missing]]
    role, text, _, _ = KEYS[name]
    assert reason(name, row) == f'turn 2 of "{FIELDS[name][0]}" needs "{role}" and "{text}"'


@pytest.mark.parametrize("name", KEYS)
def test_a_turn_that_is_no_object_is_refused(name: str) -> None:
    assert reason(name, {FIELDS[name][0]: ["hello"]}).startswith("turn 1 of ")


@pytest.mark.parametrize(
    ("name", "role", "hint"),
    [
        ("messages", "usr", 'Did you mean "user"?'),
        ("messages", "asistant", 'Did you mean "assistant"?'),
        ("sharegpt", "hooman", 'Did you mean "human"?'),
        ("sharegpt", "gtp", 'Did you mean "gpt"?'),
        ("messages", "human", ""),
        ("messages", None, ""),
        ("messages", "User", 'Did you mean "user"?'),
    ],
)
def test_an_unknown_role_is_refused_with_the_nearest(name: str, role: Any, hint: str) -> None:
    row = chat(name, ("user", "q"), (role, "a"), ("assistant", "a"))
    assert reason(name, row).strip() == f'turn 2: unknown role "{role}". {hint}'.strip()


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("role", [["user"], {"name": "user"}])
def test_a_role_that_is_no_text_is_refused(name: str, role: Any) -> None:
    assert reason(name, chat(name, (role, "q"), ("assistant", "a"))).startswith("turn 1: unknown role ")


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("content", [None, 3, [{"type": "text", "text": "x"}]])
def test_the_text_of_a_turn_must_be_text(name: str, content: Any) -> None:
    row = chat(name, ("user", "q"), ("assistant", content))
    assert reason(name, row).startswith("turn 2: only text is supported")


@pytest.mark.parametrize("name", KEYS)
def test_a_chat_without_an_assistant_turn_has_nothing_to_train_on(name: str) -> None:
    assert (
        reason(name, chat(name, ("system", "s"), ("user", "q"))) == "no assistant turn: nothing to train on"
    )


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("assistant", "assistant"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("system", "system"),
    ],
)
def test_sharegpt_has_many_names_for_the_same_roles(spelling: str, role: str) -> None:
    sample = FORMATS["sharegpt"](chat("sharegpt", (spelling, "x"), ("gpt", "a")))
    assert isinstance(sample, Chat)
    assert sample.messages[0] == {"role": role, "content": "x"}


@pytest.mark.parametrize(
    ("system", "leading"), [("s", [{"role": "system", "content": "s"}]), ("", []), (None, [])]
)
def test_a_sharegpt_system_text_beside_the_turns_is_the_first_turn(system: Any, leading: list[Any]) -> None:
    sample = FORMATS["sharegpt"](GOOD["sharegpt"][0] | {"system": system})
    assert sample == Chat((*leading, ASK, ANSWER))


def test_a_sharegpt_system_that_is_no_text_is_refused() -> None:
    assert reason("sharegpt", GOOD["sharegpt"][0] | {"system": 3}).startswith('field "system" must be text')


def test_two_system_texts_are_refused() -> None:
    row = chat("sharegpt", ("system", "one"), ("human", "q"), ("gpt", "a")) | {"system": "two"}
    assert "system" in reason("sharegpt", row)


def test_turns_keep_their_order_and_their_spaces() -> None:
    turns = (("system", " s "), ("user", "\nq"), ("assistant", ""), ("tool", "t"), ("assistant", "a\n"))
    sample = FORMATS["messages"](chat("messages", *turns))
    assert sample == Chat(tuple({"role": role, "content": text} for role, text in turns))


def test_tool_calls_are_not_dropped_in_silence() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    assert "tool_calls" in reason("messages", {"messages": [ASK, call]})
