"""Where every row went. Digits are one token each in the tiny tokenizer: lengths are counted by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit import data
from lorakit.data import Loaded, load
from lorakit.data.account import Account
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data
from lorakit.shapes import Layer
from tests.samples import made

LINES = [
    '{"prompt": "12", "completion": "34"}',  # 1: <s> 1 2 3 4 </s>, 6 tokens: kept
    "",  # 2: blank, no row
    '{"prompt": "12", "completion": "3456789"}',  # 3: 11 tokens, the first 8 have trained ones: too long
    '{"prompt": "12", "completion": ',  # 4: not JSON: bad
    '{"prompt": "12345678", "completion": "9"}',  # 5: 11 tokens, the first 8 are all prompt: too long
    '{"prompt": "12", "completion": null}',  # 6: a field is null: bad
    '{"prompt": "123", "completion": "456"}',  # 7: 8 tokens, which just fits: kept
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, so that places read as a user sees them: d.jsonl:3."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loaded(tokenizer: Any, lines: list[str], train_on: str = "auto", **fields: Any) -> Loaded:
    path = Path("d.jsonl").absolute()
    path.write_text("".join(line + "\n" for line in lines))
    return load(str(path), Data(train=str(path), **fields), tokenizer, train_on)


def refusal(tokenizer: Any, lines: list[str], train_on: str = "auto", **fields: Any) -> LorakitError:
    with pytest.raises(LorakitError) as caught:
        loaded(tokenizer, lines, train_on, **fields)
    return caught.value


# ------------------------------------------------------------------------------------------------------------
# One planted row of each kind


@pytest.mark.parametrize(
    ("on_long", "expected", "places", "lengths", "targets"),
    [
        (
            "truncate",
            {"read": 6, "kept": 2, "truncated": 1, "dropped": 0, "masked_out": 1, "bad": 2},
            ("d.jsonl:1", "d.jsonl:3", "d.jsonl:7"),
            [6, 8, 8],
            [3, 5, 4],
        ),
        (
            "drop",
            {"read": 6, "kept": 2, "truncated": 0, "dropped": 2, "masked_out": 0, "bad": 2},
            ("d.jsonl:1", "d.jsonl:7"),
            [6, 8],
            [3, 4],
        ),
    ],
)
def test_every_row_that_is_read_is_in_exactly_one_column(
    tokenizer: Any,
    on_long: str,
    expected: dict[str, int],
    places: tuple[str, ...],
    lengths: list[int],
    targets: list[int],
) -> None:
    found = loaded(tokenizer, LINES, max_length=8, on_long=on_long, on_bad_row="skip")
    assert found.account.rows() == expected
    assert sum(expected.values()) == 2 * expected["read"]
    assert tuple(found.tokens.places) == places
    assert found.tokens.lengths.tolist() == lengths
    assert found.tokens.num_targets.tolist() == targets
    assert len(found.tokens) == expected["kept"] + expected["truncated"]


def test_the_account_tells_the_first_row_of_each_kind_and_why(tokenizer: Any) -> None:
    first = loaded(tokenizer, LINES, max_length=8, on_long="truncate", on_bad_row="skip").account.first
    assert set(first) == {"truncated", "bad", "masked_out"}
    assert first["truncated"] == "d.jsonl:3: 11 tokens, data.max_length is 8"
    assert first["bad"].startswith("d.jsonl:4: not JSON: ")
    assert first["masked_out"] == "d.jsonl:5: nothing left to train on: 11 tokens, data.max_length is 8"
    first = loaded(tokenizer, LINES, max_length=8, on_long="drop", on_bad_row="skip").account.first
    assert first["dropped"] == "d.jsonl:3: 11 tokens, data.max_length is 8"


def test_the_account_in_words_leaves_out_what_is_zero(tokenizer: Any) -> None:
    found = loaded(tokenizer, LINES, max_length=8, on_long="truncate", on_bad_row="skip")
    assert str(found.account) == "6 rows read, 2 kept, 1 truncated, 1 masked out, 2 bad"
    assert str(loaded(tokenizer, LINES[:1]).account) == "1 rows read, 1 kept"


LONG = "data.max_length above 8, or data.on_long: truncate or drop"
SKIP = "data.on_bad_row: skip"


@pytest.mark.parametrize(
    ("on_long", "on_bad_row", "lines", "cures", "no_cures"),
    [
        ("error", "error", [3, 4, 6], [LONG, SKIP], []),
        ("error", "skip", [3], [LONG], [SKIP]),
        ("truncate", "error", [4, 5, 6], [SKIP], [LONG]),
        ("drop", "error", [4, 6], [SKIP], [LONG]),
    ],
)
def test_what_is_an_error_is_listed_with_file_and_row_and_the_cure(
    tokenizer: Any, on_long: str, on_bad_row: str, lines: list[int], cures: list[str], no_cures: list[str]
) -> None:
    error = refusal(tokenizer, LINES, max_length=8, on_long=on_long, on_bad_row=on_bad_row)
    *listed, counted = error.message.splitlines()
    number = len(lines) + (on_long == "error")  # rows 3 and 5 have one reason
    assert counted == f"{number} of 6 rows read so far cannot be trained as they are"
    assert [line.split(": ")[0] for line in listed] == [f"d.jsonl:{number}" for number in lines]
    reasons = {
        3: "11 tokens, data.max_length is 8 (also row 5)",
        4: "not JSON: ",
        5: "11 tokens, data.max_length is 8",
        6: 'field "completion" is null',
    }
    for number, line in zip(lines, listed, strict=True):
        assert reasons[number] in line
    assert all(cure in error.hint for cure in cures)
    assert not any(cure in error.hint for cure in no_cures)
    assert error.exit_code == 2


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"max_length": 11}, ["d.jsonl:1", "d.jsonl:3", "d.jsonl:5", "d.jsonl:7"]),
        ({"on_long": "truncate"}, ["d.jsonl:1", "d.jsonl:3", "d.jsonl:7"]),
        ({"on_long": "drop"}, ["d.jsonl:1", "d.jsonl:7"]),
    ],
)
def test_following_the_cures_makes_the_file_load(
    tokenizer: Any, fields: dict[str, Any], kept: list[str]
) -> None:
    found = loaded(tokenizer, LINES, **{"max_length": 8, "on_bad_row": "skip"} | fields)
    assert list(found.tokens.places) == kept


def test_rows_with_one_reason_are_told_together(tokenizer: Any) -> None:
    lines = ['{"prompt": "1", "completion": "2"}'] * 3 + ["{"] * 600
    told, counted = refusal(tokenizer, lines).message.splitlines()
    assert told.startswith("d.jsonl:4: not JSON: ")
    assert told.endswith("(also rows 5, 6, 7, 8, 9, 10, 11, 12 and 591 more)")
    assert counted == "600 of 603 rows read so far cannot be trained as they are"


def test_twenty_reasons_are_shown_and_the_rest_is_counted(tokenizer: Any) -> None:
    lines = [json.dumps({"prompt": "1", "completion": "2" * length}) for length in range(10, 60)]
    listed = refusal(tokenizer, lines, max_length=8).message.splitlines()
    assert len(listed) == 22
    assert [line.split(": ")[0] for line in listed[:20]] == [f"d.jsonl:{n}" for n in range(1, 21)]
    assert listed[20] == "... and 30 more"
    assert listed[21] == "50 of 50 rows read so far cannot be trained as they are"


def test_problems_of_the_first_thousand_rows_are_told_before_the_rest_is_read(tokenizer: Any) -> None:
    good = '{"prompt": "1", "completion": "2"}'
    lines = [good] * 500 + ["{"] + [good] * 499
    assert "1 of 1,000 rows" in refusal(tokenizer, [*lines, *["["] * 2000]).message
    later = refusal(tokenizer, [good] * 2500 + ["{", good, "["])
    assert "d.jsonl:2501: not JSON" in later.message and "d.jsonl:2503: not JSON" in later.message
    assert "2 of 2,503 rows" in later.message


# ------------------------------------------------------------------------------------------------------------
# Nothing to train on


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_refused(tokenizer: Any, lines: list[str]) -> None:
    error = refusal(tokenizer, lines)
    assert "d.jsonl: no row to train on (0 rows read, 0 kept)" in error.message
    assert error.hint == "It is empty."


@pytest.mark.parametrize(
    ("lines", "fields", "account", "why"),
    [
        (LINES[3:4], {}, "1 rows read, 0 kept, 1 bad", "d.jsonl:1: not JSON: "),
        (LINES[5:6], {}, "1 rows read, 0 kept, 1 bad", 'd.jsonl:1: field "completion" is null'),
        (LINES[2:3], {"on_long": "drop"}, "1 rows read, 0 kept, 1 dropped", "d.jsonl:1: 11 tokens"),
        (LINES[4:5], {"on_long": "truncate"}, "1 rows read, 0 kept, 1 masked out", "d.jsonl:1: nothing left"),
    ],
)
def test_a_file_whose_rows_are_all_skipped_is_refused_with_the_account_and_a_reason(
    tokenizer: Any, lines: list[str], fields: dict[str, Any], account: str, why: str
) -> None:
    error = refusal(tokenizer, lines, max_length=8, on_bad_row="skip", **fields)
    assert f"no row to train on ({account})" in error.message
    assert why in error.hint


def test_an_empty_file_is_named_as_the_user_would(tokenizer: Any) -> None:
    assert refusal(tokenizer, []).message.startswith("d.jsonl: ")


# ------------------------------------------------------------------------------------------------------------
# Formats, limits, and what no single row is to blame for


def test_the_format_is_decided_by_the_first_row_that_can_be_read(tokenizer: Any) -> None:
    lines = ["{", '{"prompt": "1", "completion": "2"}', '{"text": "3"}']
    found = loaded(tokenizer, lines, on_bad_row="skip")
    assert (found.format, found.why) == ("prompt-completion", "the columns prompt, completion are there")
    assert found.account.rows() == {
        "read": 3,
        "kept": 1,
        "truncated": 0,
        "dropped": 0,
        "masked_out": 0,
        "bad": 2,
    }
    assert "d.jsonl:1" in found.account.first["bad"]


def test_a_format_that_the_recipe_names_is_not_detected(tokenizer: Any) -> None:
    row = '{"prompt": "1", "completion": "2", "text": "345"}'
    found = loaded(tokenizer, [row], format="text")
    assert (found.format, found.why) == ("text", "as the recipe says")
    assert tokenizer.decode(found.tokens.sample(0)[0]) == "<s>345</s>"


def test_renamed_columns_are_renamed_before_the_format_is_decided(tokenizer: Any) -> None:
    found = loaded(tokenizer, ['{"q": "1", "a": "2"}'], columns={"prompt": "q", "completion": "a"})
    assert found.format == "prompt-completion"


def test_a_limit_is_the_number_of_rows_read(tokenizer: Any) -> None:
    found = loaded(tokenizer, LINES, limit=3, max_length=8, on_long="truncate", on_bad_row="skip")
    assert str(found.account) == "3 rows read, 1 kept, 1 truncated, 1 bad"


@pytest.mark.parametrize(
    ("row", "train_on", "words"),
    [
        (
            '{"prompt": "1", "completion": "2"}',
            "assistant",
            "assistant does not fit data of format prompt-completion",
        ),
        ('{"text": "1"}', "completion", "completion does not fit data of format text"),
        (
            '{"messages": [{"role": "assistant", "content": "1"}]}',
            "completion",
            "completion does not fit data of format messages",
        ),
    ],
)
def test_a_train_on_that_fits_no_row_is_one_error_with_the_cure(
    tokenizer: Any, row: str, train_on: str, words: str
) -> None:
    error = refusal(tokenizer, [row] * 3, train_on)
    assert error.message == f"task.train_on: {words}"
    assert "auto" in error.hint


def test_chats_need_a_chat_template(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    error = refusal(bare, [json.dumps(row)])
    assert error.message == "the data are chats (messages), but the tokenizer has no chat template"
    assert "data.chat_template" in error.hint


def test_an_instruction_is_a_chat_when_there_is_a_chat_template_and_a_pair_without(tokenizer: Any) -> None:
    row = '{"instruction": "12", "input": "34", "output": "56"}'
    ids, weights = loaded(tokenizer, [row]).tokens.sample(0)
    assert tokenizer.decode(ids) == "<s><|user|>12\n34</s>\n<|assistant|>56</s>\n"
    assert tokenizer.decode(ids[weights == 1]) == "56</s>"
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    ids, weights = loaded(bare, [row]).tokens.sample(0)
    assert bare.decode(ids) == "<s>12\n34\n56</s>"
    assert bare.decode(ids[weights == 1]) == "56</s>"


def test_columns_of_no_format_are_reported_with_the_row_that_has_them(tokenizer: Any) -> None:
    assert refusal(tokenizer, ['{"question": "1"}']).message.startswith("d.jsonl:1: ")


# ------------------------------------------------------------------------------------------------------------
# Tokens


def test_samples_lie_end_to_end_and_come_out_as_they_went_in(tokenizer: Any) -> None:
    found = loaded(tokenizer, LINES, max_length=8, on_long="truncate", on_bad_row="skip").tokens
    assert found.lengths.tolist() == [6, 8, 8]
    texts = [tokenizer.decode(found.sample(index)[0]) for index in range(3)]
    assert texts == ["<s>1234</s>", "<s>1234567", "<s>123456</s>"]
    assert [found.sample(index)[1].tolist() for index in range(3)] == [
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
    assert tuple(array.dtype for array in found.sample(0)) == (np.int32, np.uint8)


def test_the_fingerprint_is_of_what_is_trained_and_not_of_where_it_lies(tokenizer: Any) -> None:
    def fingerprint(lines: list[str], **fields: Any) -> str:
        return loaded(
            tokenizer, lines, max_length=8, on_long="drop", on_bad_row="skip", **fields
        ).tokens.fingerprint()

    same = fingerprint(LINES)
    assert same == fingerprint([LINES[0], LINES[6]])  # the others are not trained on
    assert same != fingerprint([LINES[6], LINES[0]])
    assert same != fingerprint(LINES[:1])
    # Same tokens in the same order, but another prompt: other weights.
    assert fingerprint(['{"prompt": "1", "completion": "234"}']) != fingerprint(LINES[:1])


@pytest.mark.parametrize(("positions", "says"), [("rope", "warning"), ("learned", "error")])
def test_a_sample_beyond_the_context_is_said(positions: str, says: str, capsys) -> None:
    """Rotary positions go on; an embedding of positions ends."""
    layers = [Layer("model.embed_tokens", "embedding", 64, 32)]
    layers += [Layer("transformer.wpe", "embedding", 8, 32)] if positions == "learned" else []
    ids = np.arange(14, dtype=np.int32)
    tokens = made(ids, np.ones(14, np.uint8), [0, 5, 14], "a.jsonl")
    loaded = data.Loaded(tokens, Account(2, 2), "text", "")
    data.check_context({"max_position_embeddings": 9}, layers, loaded, None)
    assert capsys.readouterr().err == ""
    config = {"text_config": {"max_position_embeddings": 8}}
    if says == "error":
        with pytest.raises(LorakitError, match=r"a\.jsonl:2: 9 tokens, the model was made for 8 at most"):
            data.check_context(config, layers, loaded, None)
    else:
        data.check_context(config, layers, loaded, None)
        assert "warning: a.jsonl:2: 9 tokens" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------
# Each turn as a sample of its own


def qwen3(tokenizer: Any) -> Any:
    """A template that writes a thinking block into the last turn only."""
    model = copy.deepcopy(tokenizer)
    model.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' and loop.last %}[]{% endif %}{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return model


def turns(*contents: str, **more: Any) -> str:
    names = ("user", "assistant")
    chat = [{"role": names[n % 2], "content": content} for n, content in enumerate(contents)]
    return json.dumps({"messages": chat, **more})


def test_each_turn_is_a_sample_given_what_a_prompt_would_hold(tokenizer: Any) -> None:
    model = qwen3(tokenizer)
    line = turns("12", "34", "56", "78")
    refused = refusal(model, [line])
    assert "task.train_on: each-turn, last-turn or all may do" in refused.message
    found = loaded(model, [line, turns("9", "8")], "each-turn")
    shown = [
        (model.decode(ids), model.decode(ids[weights == 1]))
        for ids, weights in (found.tokens.sample(number) for number in range(3))
    ]
    assert shown == [
        ("<|user|>12</s><|assistant|>[]34</s>", "[]34</s>"),
        ("<|user|>12</s><|assistant|>34</s><|user|>56</s><|assistant|>[]78</s>", "[]78</s>"),
        ("<|user|>9</s><|assistant|>[]8</s>", "[]8</s>"),
    ]
    assert list(found.tokens.places) == ["d.jsonl:1", "d.jsonl:1", "d.jsonl:2"]
    assert (found.account.read, found.account.kept, found.account.samples) == (2, 2, 3)
    assert any(line.split() == ["samples", "3"] for line in found.account.lines())


@pytest.mark.parametrize(
    ("on_long", "kind", "lengths"), [("drop", "dropped", [8]), ("truncate", "truncated", [8, 12, 8])]
)
def test_a_row_of_several_samples_is_counted_once_by_the_worst(
    tokenizer: Any, on_long: str, kind: str, lengths: list[int]
) -> None:
    """The second sample of the first row has 16 tokens."""
    lines = [turns("1", "2", "33", "44", id=1), turns("5", "6", id=2)]
    found = loaded(qwen3(tokenizer), lines, "each-turn", max_length=12, on_long=on_long)
    assert (found.account.read, found.account.kept, getattr(found.account, kind)) == (2, 1, 1)
    assert found.tokens.lengths.tolist() == lengths
    assert found.account.repeated_ids == 0


def test_a_turn_that_is_not_to_be_trained_is_no_sample(tokenizer: Any) -> None:
    chat = json.loads(turns("1", "2", "3", "4"))
    chat["messages"][1]["weight"] = 0
    found = loaded(qwen3(tokenizer), [json.dumps(chat)], "each-turn")
    assert len(found.tokens) == 1
    ids, weights = found.tokens.sample(0)
    assert tokenizer.decode(ids[weights == 1]) == "[]4</s>"


def test_each_turn_is_for_chats(tokenizer: Any) -> None:
    error = refusal(tokenizer, ['{"text": "1"}'], "each-turn")
    assert "each-turn does not fit data of format text" in error.message
