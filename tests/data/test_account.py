"""Where every row went. Digits are one token each in the tiny tokenizer: lengths are counted by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit import data
from lorakit.data import Loaded, load
from lorakit.data.account import Account, account_of, table
from lorakit.data.reading import Reading, source_names
from lorakit.data.tokenize import Done, Setting
from lorakit.data.tokens import Entry, Part, TokenData, as_batch
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data, sources
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


def scored(score: str) -> str:
    """A row of its own reason, whatever is no number."""
    return json.dumps({"sentence1": "a", "sentence2": "b", "score": score})


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
    assert set(first) == {"truncated", "bad", "masked_out", "no_trained_end"}
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


def reading_of(*problems: tuple[str, str, str], read: int = 0, **fields: Any) -> Reading:
    """What is left of a pass over `read` rows with these problems: (kind, place, reason)."""
    section = Data(train="/d.jsonl", **fields)
    reading = Reading(sources(section.train, None), Setting(None, section, "auto"))
    counts = {kind: sum(problem[0] == kind for problem in problems) for kind, _, _ in problems}
    if (more := read - len(problems)) > 0:
        counts["kept"] = more
    reading.count(Done(0, as_batch([]), counts, problems))
    return reading


def complaint(reading: Reading) -> LorakitError:
    with pytest.raises(LorakitError) as caught:
        reading.raise_problems()
    return caught.value


@pytest.mark.parametrize(
    ("places", "told"),
    [
        (["a:3"], "a:3: r"),
        (["a:3", "a:7"], "a:3: r (also row 7)"),
        (["a:3", "b:7"], "a:3: r (also b:7)"),
        (["a:3", "a:5", "b:7", "b:8"], "a:3: r (also rows 5, b:7, b:8)"),
        (["a:3", "b:7", "a:5"], "a:3: r (also b:7, a:5)"),
        ([f"a:{n}" for n in range(12)], "a:0: r (also rows 1, 2, 3, 4, 5, 6, 7, 8 and 3 more)"),
        (["x:1:3", "x:1:4", "x:2:4"], "x:1:3: r (also rows 4, x:2:4)"),
    ],
)
def test_rows_of_other_files_are_told_with_their_file(places: list[str], told: str) -> None:
    reading = reading_of(*(("bad", place, "r") for place in places), read=20)
    assert complaint(reading).message.splitlines()[0] == told


def test_what_is_kept_of_bad_rows_does_not_grow_with_their_number() -> None:
    number = 3000
    problems = [("bad", f"d.jsonl:{n}", "the same") for n in range(number)]
    problems += [("bad", f"d.jsonl:{n}", f"reason {n} {'x' * 5000}") for n in range(number)]
    reading = reading_of(*problems)
    assert len(json.dumps([vars(reason) for reason in reading.reasons.values()])) < 300_000
    assert [len(reason.places) for reason in reading.reasons.values()] == [9] + [1] * 199
    listed = complaint(reading).message.splitlines()
    assert listed[0].endswith(f"and {number - 9:,} more)")
    assert listed[-2:] == [
        f"... and {number - 19:,} more",
        f"{2 * number:,} of {2 * number:,} rows read so far cannot be trained as they are",
    ]


def long(tokens: int) -> str:
    return f"{tokens:,} tokens, data.max_length is 1,024"


def test_rows_that_are_too_long_are_one_reason_with_the_range_of_their_tokens() -> None:
    nothing = "nothing left to train on: "
    problems = [("dropped", f"d:{n}", long(tokens)) for n, tokens in enumerate((1500, 1100, 9000))]
    problems += [("masked_out", f"d:{n}", nothing + long(n)) for n in (2000, 3000)]
    listed = complaint(reading_of(*problems, read=9)).message.splitlines()
    assert listed[:2] == [
        "d:0: longer than data.max_length 1,024: 1,100 to 9,000 tokens (also rows 1, 2)",
        f"d:2000: {nothing}longer than data.max_length 1,024: 2,000 to 3,000 tokens (also row 3000)",
    ]


@pytest.mark.parametrize(
    ("reasons", "cure"),
    [
        (['no column "q" (data.columns). The row has: a.'], "data.columns"),
        (['no field "prompt". The row has: a.'], "data.columns"),
        (["the header has 2 cells, the record 3", "the header has 2 cells, the record 4"], "data.header"),
        (["the chat template refuses this conversation: x"], "data.chat_template"),
        (["turn 1: the chat template leaves out the system turn."], "data.chat_template"),
        (["not JSON: Expecting value (column 1)"], "the end of its name"),
        (['field "text" must be text, not a list'], "data.format"),
    ],
)
def test_where_every_row_is_bad_the_cure_is_what_decides_it(reasons: list[str], cure: str) -> None:
    problems = [("bad", f"d:{n}", reasons[n % len(reasons)]) for n in range(4)]
    hint = complaint(reading_of(*problems)).hint
    assert hint.startswith(cure)
    assert SKIP not in hint and hint.count("data.") <= 1
    assert complaint(reading_of(*problems, read=5)).hint.startswith(SKIP)


def test_rows_that_are_masked_out_by_their_length_are_cured_by_it() -> None:
    reading = reading_of(("masked_out", "d:1", f"nothing left to train on: {long(2000)}"), read=3)
    hint = complaint(reading).hint
    assert "data.max_length above 1024" in hint and "data.on_long: drop" in hint and SKIP in hint
    reading = reading_of(*[("masked_out", f"d:{n}", "nothing left to train on") for n in (1, 2)])
    assert complaint(reading).hint.startswith("task.train_on decides what is trained")


def test_every_reason_of_the_rows_that_were_skipped_is_told(tokenizer: Any) -> None:
    problems = [("bad", "d:1", "one"), ("bad", "e:2", "two"), ("bad", "d:3", "one"), ("bad", "d:4", "one")]
    problems += [("bad", "d:5", "one")] + [("dropped", f"d:{n}", long(n)) for n in (2000, 3000)]
    note = json.loads(json.dumps(reading_of(*problems, on_bad_row="skip", on_long="drop").note()))
    assert note["reasons"] == {
        "bad": [["one", ["d:1", "d:3", "d:4"], 4], ["two", ["e:2"], 1]],
        "dropped": [
            ["longer than data.max_length 1,024: 2,000 to 3,000 tokens", ["d:2000", "d:3000"], 2],
        ],
    }
    account = account_of(note["rows"], note["first"], note["reasons"])
    assert account.as_dict()["reasons"] == note["reasons"]
    text = "\n".join(table([("training", account)]))
    assert "training: first bad: d:1: one (also rows 3, 4 and 1 more)\n  e:2: two\n  data.on_bad_row" in text
    assert "first dropped: d:2000: longer than data.max_length 1,024: 2,000 to 3,000 tokens (also row" in text


def test_of_many_reasons_ten_are_noted_and_the_rest_is_counted() -> None:
    reading = reading_of(*(("bad", f"d:{n}", f"reason {n}") for n in range(250)), on_bad_row="skip")
    noted = reading.note()["reasons"]["bad"]
    assert [reason for reason, _, _ in noted] == [f"reason {n}" for n in range(10)] + ["other reasons"]
    assert noted[-1] == ["other reasons", [], 240]
    lines = table([("training", account_of({"bad": 250}, reading.first, {"bad": noted}))])
    assert "  other reasons (240 rows)" in lines


def test_no_first_row_is_told_of_a_kind_without_rows() -> None:
    account = Account(read=2, kept=2, first={"truncated": "d:1: long", "bad": "d:2: odd"})
    assert not [line for line in table([("training", account)]) if "first" in line]
    account.bad = 1
    assert [line for line in table([("training", account)]) if "first" in line] == [
        "training: first bad: d:2: odd"
    ]


def test_samples_in_which_no_end_is_trained_are_counted_with_the_first_of_them() -> None:
    tokens, weights = np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.uint8)
    entries = [Entry(tokens, weights, row=n, hash=n, ends=n not in (2, 4)) for n in range(1, 5)]
    account = Account(read=4, kept=4)
    account.measure(TokenData.of([as_batch(entries)], ["d"]))
    assert (account.trained_ends, account.no_trained_end, account.first["no_trained_end"]) == (2, 2, "d:2")
    lines = table([("training", account)])
    assert any(line.split() == ["no", "trained", "end", "2"] for line in lines)
    assert "training: first no trained end: d:2" in lines
    account.measure(TokenData.of([as_batch(entries[:1])], ["d"]))
    assert "no trained end" not in "\n".join(table([("training", account)]))


def test_a_cut_sample_is_the_first_where_none_was_told() -> None:
    tokens, weights = np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.uint8)
    entries = [Entry(tokens, weights, row=n, hash=n, cut=n == 2) for n in (1, 2)]
    account = Account(read=2, kept=1, truncated=1)
    account.measure(TokenData.of([as_batch(entries)], ["d"]))
    assert account.first["truncated"] == "d:2: longer than data.max_length 3"


def test_each_source_has_a_line_where_there_are_several_or_a_weight_counts() -> None:
    def told(weights: list[float]) -> list[list[str]]:
        """Of each source rows 1, 1, 2: two rows, three samples."""
        tokens, trained = np.arange(3, dtype=np.int32), np.array([0, 1, 1], np.uint8)
        rows = [(file, row) for file in range(len(weights)) for row in (1, 1, 2)]
        entries = [Entry(tokens, trained, file, row, hash=n) for n, (file, row) in enumerate(rows)]
        parts = tuple(Part(3 * n, 3 * n + 3, weight) for n, weight in enumerate(weights))
        names = [f"{n}.jsonl" for n in range(len(weights))]
        account = account_of({"read": 9, "kept": 9}, {}, None, names)
        account.measure(TokenData((as_batch(entries),), tuple(names), parts))
        return [line.split() for line in table([("training", account)]) if ".jsonl  " in line]

    assert told([1.0]) == []
    assert told([2.0]) == [["0.jsonl", "2", "3", "2", "6"]]
    assert told([1.0, 0.1]) == [["0.jsonl", "2", "3", "1", "3"], ["1.jsonl", "2", "3", "0.1", "1"]]


def test_sources_are_named_as_a_user_would() -> None:
    path = str(Path("d.jsonl").absolute())
    listed = sources((path, "owner/name", "owner/name:test"), None)
    assert source_names(listed) == ["d.jsonl", "owner/name", "owner/name:test"]


def test_twenty_reasons_are_shown_and_the_rest_is_counted(tokenizer: Any) -> None:
    lines = [scored("x" * length) for length in range(1, 51)]
    listed = refusal(tokenizer, lines).message.splitlines()
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
    why = "as the recipe says; columns not used: prompt, completion"
    assert (found.format, found.why) == ("text", why)
    assert tokenizer.decode(found.tokens.sample(0)[0]) == "<s>345</s>"


@pytest.mark.parametrize(
    ("row", "fields", "why"),
    [
        ({"text": "1"}, {}, "the column text is there"),
        ({"text": "1", "category": 3, "id": 5}, {}, "the column text is there; columns not used: category"),
        (
            {"instruction": "1", "input": "", "output": "2", "system": ""},
            {},
            "output are there; columns not used: system",
        ),
        ({"text": "1", **dict.fromkeys("abcdefgh", "")}, {}, "columns not used: a, b, c, d, e, f and 2 more"),
        (
            {"q": "1", "a": "2", "z": 1},
            {"columns": {"prompt": "q", "completion": "a"}},
            "columns not used: z",
        ),
        (
            {"i": [{"o": "1"}]},
            {"columns": {"text": "i.0.o"}},
            "the column text is there",
        ),
    ],
)
def test_columns_that_are_not_used_are_named(
    tokenizer: Any, row: dict[str, Any], fields: dict[str, Any], why: str
) -> None:
    assert loaded(tokenizer, [json.dumps(row)], **fields).why.endswith(why)


def test_columns_that_are_not_used_are_named_with_the_file_where_formats_differ(tokenizer: Any) -> None:
    Path("a.jsonl").write_text('{"text": "1", "category": 2}\n')
    Path("b.jsonl").write_text('{"prompt": "1", "completion": "2"}\n')
    files = (str(Path("a.jsonl").absolute()), str(Path("b.jsonl").absolute()))
    found = load(files, Data(train=files), tokenizer, "auto")
    assert found.why == "a.jsonl: text (columns not used: category); b.jsonl: prompt-completion"


def test_a_line_of_plain_text_is_called_so(tokenizer: Any) -> None:
    path = Path("d.txt").absolute()
    path.write_text("12\n34\n")
    found = load(str(path), Data(train=str(path)), tokenizer, "auto")
    assert (found.format, found.why) == ("text", "one row per line of .txt")


def of_csv(tokenizer: Any, text: str, name: str = "d.csv", **fields: Any) -> Loaded:
    path = Path(name).absolute()
    path.write_text(text)
    return load(str(path), Data(train=str(path), **fields), tokenizer, "auto")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("How are you? Fine.,yes\n1,2\n", "Then name the 2 columns: data.header: [prompt, completion]."),
        (f"{'word' * 11}\nx\n", "Then name the column: data.header: [text]."),
        ("a,b,3.5\n1,2,3\n", "Then name the 3 columns: data.header: [prompt, completion, ...]."),
        ("question,answer\n1,2\n", ""),
        ("question (en),answer text\n1,2\n", ""),
    ],
)
def test_a_csv_file_whose_header_looks_like_a_row_is_told_of_data_header(
    tokenizer: Any, text: str, names: str
) -> None:
    with pytest.raises(LorakitError) as caught:
        of_csv(tokenizer, text)
    assert caught.value.hint.endswith(names) and ("data.header" in caught.value.hint) == bool(names)
    assert "data.columns" in caught.value.hint


def test_no_header_is_offered_to_jsonl(tokenizer: Any) -> None:
    assert "data.header" not in refusal(tokenizer, ['{"How are you? Fine.": 1}']).hint


@pytest.mark.parametrize("first", ["prompt,completion", "completion,prompt", "prompt, completion"])
def test_a_header_for_a_file_that_has_one_is_refused(tokenizer: Any, first: str) -> None:
    with pytest.raises(LorakitError) as caught:
        of_csv(tokenizer, f"{first}\n1,2\n", header=("prompt", "completion"))
    assert caught.value.message == "d.csv:1: the first record is the header itself: delete data.header"
    found = of_csv(tokenizer, "prompt,2\n1,2\n", header=("prompt", "completion"))
    assert found.account.read == 2


def test_a_misspelt_field_in_data_columns_is_told_when_rows_are_read(tokenizer: Any) -> None:
    row = '{"text": "1", "label": "2"}'
    error = refusal(tokenizer, [row], columns={"promt": "text", "completon": "label"})
    assert error.message.startswith('d.jsonl:1: no column "promt" (data.columns). The row has: text, label.')
    said = 'data.columns maps field: column, and "promt" is no field. Did you mean "prompt"?'
    assert said in error.message
    assert error.hint.startswith("data.columns") and SKIP not in error.hint


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
    assert any(line.split() == ["samples", "3"] for line in table([("", found.account)]))


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


def test_the_samples_of_a_row_are_held_out_together_and_counted_as_one(tokenizer: Any) -> None:
    """The second turn of a chat holds the first: on two sides, it would be scored after it was trained."""
    lines = [turns(str(n), "3", str(n + 1), "44") for n in range(10, 30)]
    found = loaded(qwen3(tokenizer), lines, "each-turn", max_length=14, on_long="truncate")
    assert (found.account.read, found.account.truncated, len(found.tokens)) == (20, 20, 40)
    train, held_out = data.hold_out(found, 0.25, 0)
    assert not set(train.tokens.places) & set(held_out.tokens.places)
    for part in (train, held_out):
        rows = len(set(part.tokens.places))
        assert (part.account.read, part.account.truncated, part.account.kept) == (rows, rows, 0)
    assert held_out.account.read == 5
