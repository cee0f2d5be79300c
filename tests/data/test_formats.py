"""Rows -> samples: which format a row has, what it means, and what is said of a row that means nothing."""

import json
from typing import Any, get_args

import pytest

from lorakit.data.formats import (
    FIELDS,
    FORMATS,
    BadRow,
    Chat,
    Labelled,
    Pair,
    Preference,
    Scored,
    SourceTarget,
    Text,
    detect,
    rename,
    unused,
)
from lorakit.errors import LorakitError
from lorakit.recipe.data import FORMAT_FIELDS, Data
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
    "preference": ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
    "labelled-text": ({"text": "t", "label": "good"}, Labelled("t", "good")),
    "sentence-pair": (
        {"sentence1": "a", "sentence2": "b", "score": "3.50"},
        Scored("a", "b", 3.5, "3.50"),
    ),
    "text-to-text": ({"source": "s ", "target": " t"}, SourceTarget("s ", " t")),
}


def reason(format_name: str, row: dict[str, Any]) -> str:
    """Why `row` is no sample of the format."""
    with pytest.raises(BadRow) as caught:
        FORMATS[format_name](row)
    return str(caught.value)


def test_every_format_is_known_everywhere_and_has_a_good_row_here() -> None:
    assert set(FORMATS) == set(FIELDS) == set(GOOD)
    trained = set(GOOD) - {"preference"}  # which no task trains yet
    assert set(TRAIN_ON) == trained == set(FORMAT_FIELDS)
    assert {"auto", *trained} == set(get_args(Data.model_fields["format"].annotation))
    for name in trained:
        assert set(FIELDS[name]) <= set(FORMAT_FIELDS[name])


@pytest.mark.parametrize("name", FORMAT_FIELDS)
def test_a_field_that_a_row_may_leave_out_is_read_all_the_same(name: str) -> None:
    """The two tables differ by these fields only: what each does to a row is seen."""
    for field in set(FORMAT_FIELDS[name]) - set(FIELDS[name]):
        assert reason(name, GOOD[name][0] | {field: 3}).startswith(f'field "{field}" must be ')
    assert unused(dict.fromkeys(FORMAT_FIELDS[name]) | {"id": 1, "zz": 1}, name, {}) == ["zz"]


@pytest.mark.parametrize("name", GOOD)
def test_a_good_row_is_recognised_and_becomes_its_sample_as_it_stands(name: str) -> None:
    row, sample = GOOD[name]
    assert detect(row) == name
    assert FORMATS[name](row) == sample
    assert FORMATS[name](row | {"id": 7, "origin": None}) == sample


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
        ("messages prompt chosen rejected", "preference"),
        ("conversations chosen rejected", "preference"),
        ("prompt chosen text", "text"),
        ("sentence1 sentence2 score label text", "sentence-pair"),
        ("sentence1 sentence2 label text", "labelled-text"),
        ("source target text", "text-to-text"),
        ("source text", "text"),
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


def test_columns_with_the_names_of_fields_are_understood_by_which_of_them_are_there() -> None:
    row = {"source": "s", "target": "t"}
    expected = {"prompt": "s", "completion": "t"}
    assert rename(row, {"source": "prompt", "target": "completion"}) == expected
    assert rename(row, {"prompt": "source", "completion": "target"}) == expected
    both = {**row, "prompt": "p", "completion": "c"}  # then the first way of writing them counts
    assert rename(both, {"source": "prompt", "target": "completion"}) == {"source": "p", "target": "c"}
    with pytest.raises(BadRow, match='no column "prompt"'):
        rename({"source": "s"}, {"source": "prompt", "target": "completion"})


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


@pytest.mark.parametrize(
    ("row", "columns", "nearest"),
    [
        ({"prompt": "p", "completion": "c"}, {"promt": "prompt"}, 'Did you mean "prompt"?'),
        ({"a": "p", "b": "c"}, {"promt": "prompt"}, "The row has: a, b."),
    ],
)
def test_a_key_that_is_neither_column_nor_field_is_told_in_both_readings(
    row: dict[str, Any], columns: dict[str, str], nearest: str
) -> None:
    with pytest.raises(BadRow) as caught:
        rename(row, columns)
    both = 'data.columns maps field: column, and "promt" is no field. Did you mean "prompt"?'
    assert str(caught.value) == f'no column "promt" (data.columns). {nearest} {both}'
    assert rename({"promt": "p"}, columns) == {"prompt": "p"}  # a column that is spelt so


NESTED = {"id": "seed_0", "instances": [{"input": "", "output": "o"}, {"output": "p"}], "a.b": "dotted"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("instances.0.output", "o"),
        ("instances.1.output", "p"),
        ("instances.0", NESTED["instances"][0]),
        ("a.b", "dotted"),
    ],
)
def test_a_column_can_be_a_path_into_nested_values(column: str, value: Any) -> None:
    assert rename(NESTED, {"output": column})["output"] == value
    assert rename(NESTED, {column: "output"})["output"] == value
    assert rename(NESTED, {"output": column})["id"] == "seed_0"


@pytest.mark.parametrize(
    ("column", "hint"),
    [
        ("instances.0.ouput", 'Did you mean "instances.0.output"?'),
        ("instance.0.output", 'Did you mean "instances"?'),
        ("zzz.0.output", "The row has: id, instances, a.b."),
        ("instances.7.output", '"instances" is a list of 2, counted from 0.'),
        ("instances.0.zzzzzzzz", '"instances.0" has: input, output.'),
        ("id.name", '"id" is text.'),
        ("instances.output", '"instances" is a list of 2, counted from 0.'),
    ],
)
def test_a_path_that_leads_nowhere_is_told_with_what_is_there(column: str, hint: str) -> None:
    with pytest.raises(BadRow) as caught:
        rename(NESTED, {"output": column})
    assert str(caught.value) == f'no column "{column}" (data.columns). {hint}'


# ------------------------------------------------------------------------------------------------------------
# Fields


TEXTS = ("alpaca", "prompt-completion", "text", "text-to-text")
FIELD_CASES = [
    *((name, field) for name in TEXTS for field in FIELDS[name]),
    *(("labelled-text", "text"), ("sentence-pair", "sentence1"), ("sentence-pair", "sentence2")),
]


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
    assert found == f'no field "{field}". The row has: {", ".join(row)}.'


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
# Labels, scores, preferences


@pytest.mark.parametrize("label", ["good", " 3 ", 0, 7, 0.5, True, False])
def test_a_label_is_text_a_number_or_true_or_false_as_it_stands(label: Any) -> None:
    sample = FORMATS["labelled-text"]({"text": "t", "label": label})
    assert isinstance(sample, Labelled)
    assert (sample.label, type(sample.label)) == (label, type(label))


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, 'field "label" is null'),
        (["a"], 'field "label" must be text, a number, or true or false, not a list'),
        ({"a": 1}, 'field "label" must be text, a number, or true or false, not an object'),
        ("", 'field "label" is empty'),
    ],
)
def test_what_is_no_label_is_refused(label: Any, message: str) -> None:
    assert reason("labelled-text", {"text": "t", "label": label}) == message


@pytest.mark.parametrize(
    ("score", "number", "written"),
    [(5, 5.0, "5"), (5.0, 5.0, "5.0"), ("5.00", 5.0, "5.00"), (" -1e-1 ", -0.1, "-1e-1"), (0, 0.0, "0")],
)
def test_a_score_is_a_number_and_keeps_how_it_was_written(score: Any, number: float, written: str) -> None:
    sample = FORMATS["sentence-pair"]({"sentence1": "a", "sentence2": "b", "score": score})
    assert sample == Scored("a", "b", number, written)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (None, "is null"),
        (True, "must be a number, not true or false"),
        ("high", 'must be a number, not "high"'),
        ("", 'must be a number, not ""'),
        ("nan", 'must be a number, not "nan"'),
        (float("inf"), 'must be a number, not "inf"'),
        ([1], "must be a number, not a list"),
    ],
)
def test_what_is_no_score_is_refused(score: Any, message: str) -> None:
    row = {"sentence1": "a", "sentence2": "b", "score": score}
    assert reason("sentence-pair", row) == f'field "score" {message}'


def test_labels_and_scores_that_are_missing_are_named() -> None:
    assert reason("labelled-text", {"text": "t", "lable": 1}) == 'no field "label". Did you mean "lable"?'
    assert reason("sentence-pair", {"sentence1": "a", "sentence2": "b"}).startswith('no field "score". ')


@pytest.mark.parametrize(
    ("row", "sample"),
    [
        ({"chosen": "c", "rejected": "r"}, Preference("", "c", "r")),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, Preference("", "c", "r")),
        (
            {"prompt": [ASK], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "b"}]},
            Preference((ASK,), (ANSWER,), ({"role": "assistant", "content": "b"},)),
        ),
        (
            {"prompt": "q", "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
            Preference("q", (ANSWER,), "b"),
        ),
        ({"chosen": [ASK, ANSWER], "rejected": "r"}, Preference("", (ASK, ANSWER), "r")),
    ],
)
def test_preferences_are_texts_or_turns(row: dict[str, Any], sample: Preference) -> None:
    assert detect(row) == "preference"
    assert FORMATS["preference"](row) == sample


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "c", "rejected": None}, 'field "rejected" is null'),
        ({"chosen": 3, "rejected": "r"}, 'field "chosen" must be text, not a number'),
        ({"chosen": "c", "rejected": "c"}, '"chosen" and "rejected" are the same: nothing to prefer'),
        ({"chosen": [ASK], "rejected": "r"}, '"chosen" must end with a turn of the assistant'),
        ({"chosen": [], "rejected": "r"}, '"chosen" must be a list of turns, and not empty'),
    ],
)
def test_what_is_no_preference_is_refused(row: dict[str, Any], message: str) -> None:
    assert reason("preference", row) == message


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
@pytest.mark.parametrize(
    ("content", "kind"),
    [(None, "null"), (3, "a number"), (True, "true or false"), ({"text": "x"}, "an object")],
)
def test_the_text_of_a_turn_must_be_text(name: str, content: Any, kind: str) -> None:
    row = chat(name, ("user", "q"), ("assistant", content))
    assert reason(name, row) == f"turn 2: only text is supported, not {kind}"


@pytest.mark.parametrize("name", KEYS)
def test_parts_of_text_are_joined(name: str) -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}, "c"]
    sample = FORMATS[name](chat(name, ("user", parts), ("assistant", ["d"])))
    assert sample == Chat(({"role": "user", "content": "a bc"}, {"role": "assistant", "content": "d"}))


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("content", ["", " \n", []])
def test_an_empty_answer_is_refused_unless_it_is_not_trained(name: str, content: Any) -> None:
    row = chat(name, ("user", "q"), ("assistant", content))
    assert reason(name, row) == "turn 2: the assistant says nothing; only its end would be trained"
    turns = row["messages" if name == "messages" else "conversations"]
    turns[1]["weight"] = 0
    assert FORMATS[name](row)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    ("part", "what"),
    [
        ({"type": "image"}, "an image"),
        ({"type": "image_url", "image_url": {"url": "x"}}, "an image"),
        ({"type": "input_audio", "input_audio": {}}, "an audio"),
        ({"type": "audio"}, "an audio"),
        ({"type": "video"}, "a video"),
        ({"type": "refusal", "refusal": "no"}, 'a "refusal"'),
        ({"text": "no type"}, "a nameless"),
        ({"type": "text"}, "a nameless"),
        (3, "a nameless"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_its_kind(name: str, part: Any, what: str) -> None:
    row = chat(name, ("user", "q"), ("assistant", [{"type": "text", "text": "see "}, part]))
    assert reason(name, row) == f"turn 2: {what} part; lorakit trains on text only"


@pytest.mark.parametrize("name", KEYS)
def test_a_chat_without_an_assistant_turn_has_nothing_to_train_on(name: str) -> None:
    assert (
        reason(name, chat(name, ("system", "s"), ("user", "q"))) == "no assistant turn: nothing to train on"
    )


@pytest.mark.parametrize(
    ("spelling", "role"),
    [
        ("human", "user"),
        ("Human", "user"),
        ("prompter", "user"),
        ("user", "user"),
        ("USER", "user"),
        ("bard", "assistant"),
        ("bing", "assistant"),
        ("model", "assistant"),
        ("ai", "assistant"),
        ("GPT", "assistant"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("assistant", "assistant"),
        ("observation", "tool"),
        ("function_response", "tool"),
        ("tool", "tool"),
        ("system", "system"),
    ],
)
def test_sharegpt_has_many_names_for_the_same_roles(spelling: str, role: str) -> None:
    first = {"tool": [("function_call", '{"name": "f"}')], "assistant": [("human", "q")]}.get(role, [])
    last = [] if role == "assistant" else [("gpt", "a")]
    sample = FORMATS["sharegpt"](chat("sharegpt", *first, (spelling, "x"), *last))
    assert isinstance(sample, Chat)
    assert sample.messages[len(first)] == {"role": role, "content": "x"}


def test_conversations_may_be_written_with_role_and_content() -> None:
    assert FORMATS["sharegpt"]({"conversations": [ASK, ANSWER]}) == Chat((ASK, ANSWER))
    mixed = [ASK, {"from": "gpt", "value": "a"}]
    assert FORMATS["sharegpt"]({"conversations": mixed}) == Chat((ASK, ANSWER))


@pytest.mark.parametrize(("spelling", "role"), [("developer", "system"), ("function", "tool")])
def test_openai_has_had_other_names_for_two_roles(spelling: str, role: str) -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    first = [ASK, called] if role == "tool" else []
    row = {"messages": [*first, {"role": spelling, "content": "x", "name": "f"}, ANSWER]}
    sample = FORMATS["messages"](row)
    assert isinstance(sample, Chat)
    assert sample.messages[len(first)] == {"role": role, "content": "x", "name": "f"}


@pytest.mark.parametrize(
    ("system", "leading"), [("s", [{"role": "system", "content": "s"}]), ("", []), (None, [])]
)
def test_a_sharegpt_system_text_beside_the_turns_is_the_first_turn(system: Any, leading: list[Any]) -> None:
    sample = FORMATS["sharegpt"](GOOD["sharegpt"][0] | {"system": system})
    assert sample == Chat((*leading, ASK, ANSWER))
    sample = FORMATS["sharegpt"](GOOD["sharegpt"][0] | {"system": system, "tools": [TOOL]})
    assert sample == Chat((*leading, ASK, ANSWER), (TOOL,))


def test_a_sharegpt_system_that_is_no_text_is_refused() -> None:
    assert reason("sharegpt", GOOD["sharegpt"][0] | {"system": 3}).startswith('field "system" must be text')


def test_two_system_texts_are_refused() -> None:
    row = chat("sharegpt", ("system", "one"), ("human", "q"), ("gpt", "a")) | {"system": "two"}
    assert "system" in reason("sharegpt", row)


def test_turns_keep_their_order_and_their_spaces() -> None:
    turns = (("system", " s "), ("user", "\nq"), ("assistant", " b"), ("user", "t"), ("assistant", "a\n"))
    sample = FORMATS["messages"](chat("messages", *turns))
    assert sample == Chat(tuple({"role": role, "content": text} for role, text in turns))


# ------------------------------------------------------------------------------------------------------------
# The order of turns

JOIN_USERS = "a turn of the user after a turn of the user; join the two"
JOIN_ANSWERS = "a turn of the assistant after a turn of the assistant; join the two"
LATE = "a system turn that is not the first; put it first, or join it with the turn that is"
UNASKED = 'a tool result that follows no tool call; give the assistant\'s turn before it "tool_calls"'


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("user user assistant", f"turn 2: {JOIN_USERS}"),
        ("user assistant user user assistant", f"turn 4: {JOIN_USERS}"),
        ("user assistant assistant", f"turn 3: {JOIN_ANSWERS}"),
        ("user system assistant", f"turn 2: {LATE}"),
        ("system system user assistant", f"turn 2: {LATE}"),
        ("user assistant system", f"turn 3: {LATE}"),
        ("tool user assistant", f"turn 1: {UNASKED}"),
        ("user tool assistant", f"turn 2: {UNASKED}"),
        ("user assistant tool assistant", f"turn 3: {UNASKED}"),
        ("system user", "no assistant turn: nothing to train on"),
        ("system", "no assistant turn: nothing to train on"),
        ("user", "no assistant turn: nothing to train on"),
    ],
)
def test_a_wrong_order_of_turns_is_refused_with_the_turn_and_the_cure(
    name: str, roles: str, message: str
) -> None:
    assert reason(name, chat(name, *((role, "x") for role in roles.split()))) == message


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize(
    "roles",
    [
        "assistant",
        "assistant user",
        "user assistant user",
        "system assistant user assistant",
        "system user assistant",
    ],
)
def test_a_chat_may_begin_with_the_assistant_and_end_with_the_user(name: str, roles: str) -> None:
    sample = FORMATS[name](chat(name, *((role, "x") for role in roles.split())))
    assert sample == Chat(tuple({"role": role, "content": "x"} for role in roles.split()))


def test_a_result_may_follow_a_call_that_is_written_in_the_text() -> None:
    turns = (
        ("human", "q"),
        ("gpt", '<tool_call>\n{"name": "f"}\n</tool_call>'),
        ("tool", "1"),
        ("tool", "2"),
    )
    sample = FORMATS["sharegpt"](chat("sharegpt", *turns))
    assert isinstance(sample, Chat)
    assert [turn["role"] for turn in sample.messages] == ["user", "assistant", "tool", "tool"]


# ------------------------------------------------------------------------------------------------------------
# Tools

SCHEMA = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, "é"]}}}
RESULT = {"role": "tool", "content": "7", "tool_call_id": "x1"}


def called(**call: Any) -> dict[str, Any]:
    """A row in which the assistant makes one call."""
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [ASK, turn, RESULT, ANSWER]}


@pytest.mark.parametrize("tools", [[TOOL], (TOOL,), [SCHEMA], json.dumps([TOOL]), json.dumps([SCHEMA])])
@pytest.mark.parametrize("name", KEYS)
def test_tools_are_schemas_or_json_text_of_them(name: str, tools: Any) -> None:
    sample = FORMATS[name](GOOD[name][0] | {"tools": tools})
    assert sample == Chat((ASK, ANSWER), (TOOL,))


@pytest.mark.parametrize("tools", [None, [], "[]", "", " "])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert FORMATS["messages"](GOOD["messages"][0] | {"tools": tools}) == Chat((ASK, ANSWER))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ("[{", 'field "tools": not JSON: Expecting property name enclosed in double quotes (column 3)'),
        ({"f": 1}, 'field "tools" must be a list of function schemas, not an object'),
        ("3", 'field "tools" must be a list of function schemas, not a number'),
        ([TOOL, {"type": "function"}], 'tool 2 of field "tools" has no name: it is no function schema'),
        (["f"], 'tool 1 of field "tools" has no name: it is no function schema'),
        ([{"function": {"name": 3}}], 'tool 1 of field "tools" has no name: it is no function schema'),
    ],
)
def test_tools_that_are_none_are_refused(tools: Any, message: str) -> None:
    assert reason("messages", GOOD["messages"][0] | {"tools": tools}) == message


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"type": "function", "function": {"name": "f", "arguments": '{"a": [1, "\\u00e9"]}'}},
        {"name": "f", "arguments": {"a": [1, "é"]}},
        {"name": "f", "parameters": {"a": [1, "é"]}},
        {"index": 0, "function": {"name": "f", "arguments": {"a": [1, "é"]}}},
    ],
)
def test_calls_of_every_writing_have_their_arguments_as_objects(call: dict[str, Any]) -> None:
    sample = FORMATS["messages"](called(**call))
    assert sample == Chat((ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, RESULT, ANSWER))


def test_a_call_keeps_its_id_and_a_turn_what_templates_read() -> None:
    turn = {
        "role": "assistant",
        "content": "Let me see",
        "tool_calls": [{"id": "x1", **CALL}],
        "reasoning_content": "hm",
        "name": "bot",
        "tool_call_id": None,
        "weight": 1,
        "thinking": "oh",
    }
    sample = FORMATS["messages"]({"messages": [ASK, turn, RESULT, ANSWER]})
    assert isinstance(sample, Chat)
    assert sample.messages[1] == {
        "role": "assistant",
        "content": "Let me see",
        "tool_calls": [{"id": "x1", **CALL}],
        "reasoning_content": "hm",
        "name": "bot",
        "thinking": "oh",
    }


@pytest.mark.parametrize(("weight", "kept"), [(0, {"weight": 0}), (0.0, {"weight": 0}), (1, {}), (None, {})])
def test_a_turn_of_weight_0_says_so(weight: Any, kept: dict[str, int]) -> None:
    sample = FORMATS["messages"]({"messages": [ASK, ANSWER | {"weight": weight}]})
    assert sample == Chat((ASK, ANSWER | kept))


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_may_have_no_arguments(arguments: Any) -> None:
    sample = FORMATS["messages"](called(name="f", arguments=arguments))
    assert isinstance(sample, Chat)
    assert sample.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            {"name": "f", "arguments": '{"a": '},
            "turn 2: the arguments of f: not JSON: Expecting value (column 7)",
        ),
        ({"name": "f", "arguments": "[1]"}, "turn 2: the arguments of f must be an object, not a list"),
        ({"name": "f", "arguments": 3}, "turn 2: the arguments of f must be an object, not a number"),
        ({"arguments": "{}"}, 'turn 2: a tool call needs "name" and "arguments"'),
        ({"function": {"name": None}}, 'turn 2: a tool call needs "name" and "arguments"'),
        ({"function": "f"}, 'turn 2: a tool call needs "name" and "arguments"'),
    ],
)
def test_a_call_that_cannot_be_read_is_refused_with_its_turn(call: dict[str, Any], message: str) -> None:
    assert reason("messages", called(**call)) == message


def test_only_the_assistant_calls_tools() -> None:
    row = {"messages": [{**ASK, "tool_calls": [CALL]}, ANSWER]}
    assert reason("messages", row).startswith("turn 1: tool_calls in a turn of the user")


def test_empty_content_needs_a_call() -> None:
    row = {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": []}]}
    assert reason("messages", row) == "turn 2: only text is supported, not null"
    del row["messages"][1]["content"]
    assert reason("messages", row) == 'turn 2 of "messages" needs "role" and "content"'


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize(
    ("value", "calls"),
    [
        ('{"name": "f", "arguments": {"a": [1, "é"]}}', [CALL]),
        ('{"name": "f", "arguments": "{\\"a\\": [1, \\"é\\"]}"}', [CALL]),
        (
            '[{"name": "f", "arguments": {"a": [1, "é"]}}, {"name": "g"}]',
            [CALL, {"type": "function", "function": {"name": "g", "arguments": {}}}],
        ),
    ],
)
def test_a_call_of_sharegpt_is_a_turn_of_the_assistant(role: str, value: str, calls: list[Any]) -> None:
    turns = (("human", "q"), (role, value), ("observation", "7"), ("gpt", "a"))
    sample = FORMATS["sharegpt"](chat("sharegpt", *turns) | {"tools": json.dumps([SCHEMA])})
    assert sample == Chat(
        (
            ASK,
            {"role": "assistant", "content": "", "tool_calls": calls},
            {"role": "tool", "content": "7"},
            ANSWER,
        ),
        (TOOL,),
    )


def test_a_call_of_sharegpt_that_is_no_json_is_refused_with_its_turn() -> None:
    row = chat("sharegpt", ("human", "q"), ("function_call", "f(1)"), ("observation", "7"), ("gpt", "a"))
    assert reason("sharegpt", row) == "turn 2: the tool call: not JSON: Expecting value (column 1)"
