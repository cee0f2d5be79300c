"""Files -> rows: every row with the place a user finds it at, also the rows that cannot be read."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from lorakit.data.rows import SUFFIXES, Row, read_rows
from lorakit.errors import LorakitError

BOM = b"\xef\xbb\xbf"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, so that places read as a user sees them: d.jsonl:3."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(name: str, raw: bytes, limit: int | None = None) -> list[Row]:
    path = Path(name).absolute()
    path.write_bytes(raw)
    return list(read_rows(str(path), limit))


def good(name: str, raw: bytes) -> list[tuple[str, dict[str, Any] | None]]:
    found = rows(name, raw)
    assert all(not row.error for row in found), found
    return [(row.place, row.value) for row in found]


def refusal(name: str, raw: bytes) -> str:
    with pytest.raises(LorakitError) as caught:
        rows(name, raw)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------
# JSONL and text: a row is a physical line


def test_a_jsonl_row_is_at_its_physical_line_and_blank_lines_are_no_rows() -> None:
    raw = b'{"a": 1}\n\n   \n\t\n{"a": 2}\n\n'
    assert good("d.jsonl", raw) == [("d.jsonl:1", {"a": 1}), ("d.jsonl:5", {"a": 2})]


def test_jsonl_may_have_a_byte_order_mark_windows_line_ends_and_no_last_line_end() -> None:
    raw = BOM + b'{"a": "x"}\r\n\r\n{"a": "y\\r\\n"}'
    assert good("d.jsonl", raw) == [("d.jsonl:1", {"a": "x"}), ("d.jsonl:3", {"a": "y\r\n"})]


def test_a_blank_first_line_with_a_byte_order_mark_is_no_row() -> None:
    assert good("d.jsonl", BOM + b'\n{"a": 1}\n') == [("d.jsonl:2", {"a": 1})]


def test_unicode_line_separators_do_not_end_a_jsonl_line() -> None:
    raw = '{"a": "x\u2028y\x85z"}\n{"a": 2}\n'.encode()
    assert good("d.jsonl", raw) == [("d.jsonl:1", {"a": "x\u2028y\x85z"}), ("d.jsonl:2", {"a": 2})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": ', "not JSON: "),
        (b"[1, 2]", "a row must be an object with fields, not "),
        (b'"text"', "a row must be an object with fields, not "),
        (b"3", "a row must be an object with fields, not "),
        (b"null", "a row must be an object with fields, not "),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON: "),
        (b"[" * 100_000, "not JSON: "),
        (b'{"a": 1} {"a": 2}', "not JSON: "),
        (b"{'a': 1}", "not JSON: "),
    ],
    ids=[
        "cut",
        "list",
        "text",
        "number",
        "null",
        "latin-1",
        "huge number",
        "nested",
        "two objects",
        "quotes",
    ],
)
def test_a_bad_jsonl_line_is_a_row_with_a_reason_and_the_lines_around_it_are_read(
    line: bytes, reason: str
) -> None:
    before, bad, after = rows("d.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    assert (before.place, before.value) == ("d.jsonl:1", {"a": 1})
    assert (bad.place, bad.value) == ("d.jsonl:2", None)
    assert bad.error.startswith(reason)
    assert (after.place, after.value) == ("d.jsonl:3", {"a": 2})


def test_the_reason_of_a_broken_line_does_not_name_another_line() -> None:
    (row,) = rows("d.jsonl", b'\n{"a": \n')
    assert row.place == "d.jsonl:2"
    assert "line 1" not in row.error
    assert "column" in row.error


def test_the_kind_of_a_bad_row_is_told_in_words() -> None:
    assert rows("d.jsonl", b"null\n")[0].error.endswith("not null")


def test_a_text_row_is_a_line_without_its_line_end_but_with_its_spaces() -> None:
    raw = BOM + b"one\r\n\r\n  two \nthree"
    assert good("d.txt", raw) == [
        ("d.txt:1", {"text": "one"}),
        ("d.txt:3", {"text": "  two "}),
        ("d.txt:4", {"text": "three"}),
    ]


def test_a_text_line_that_is_not_utf_8_is_a_row_with_a_reason() -> None:
    first, bad, last = rows("d.txt", b"one\ncaf\xe9\ntwo\n")
    assert (first.place, bad, last.place) == ("d.txt:1", Row("d.txt:2", None, "not UTF-8 text"), "d.txt:3")


# ------------------------------------------------------------------------------------------------------------
# JSON, CSV, TSV, Parquet: a row is a record


def test_a_json_row_is_at_its_record_wherever_its_lines_are() -> None:
    raw = BOM + b'[\n\n{"a":\n1}, {"a": 2}\n,\n{"a": 3}]'
    assert good("d.json", raw) == [("d.json:1", {"a": 1}), ("d.json:2", {"a": 2}), ("d.json:3", {"a": 3})]


def test_a_json_item_that_is_no_object_is_a_row_with_a_reason() -> None:
    first, bad, last = rows("d.json", b'[{"a": 1}, [2], {"a": 3}]')
    assert (bad.place, bad.value) == ("d.json:2", None)
    assert bad.error.startswith("a row must be an object with fields")
    assert (first.value, last.value, last.place) == ({"a": 1}, {"a": 3}, "d.json:3")


@pytest.mark.parametrize("raw", [b"", b"[1", b'[{"a": 1},]', b"\xff", b"[" * 100_000])
def test_a_broken_json_file_is_refused(raw: bytes) -> None:
    assert refusal("d.json", raw).startswith("d.json: not JSON: ")


def test_a_json_file_that_is_one_object_is_refused_and_told_of_jsonl() -> None:
    assert refusal("d.json", b'{"a": 1}') == (
        "d.json: expected a list of objects\n  One object per line is JSONL: name the file .jsonl"
    )


def test_a_csv_row_is_at_its_record_whatever_lines_its_quoted_cells_cover() -> None:
    raw = BOM + b'a,b\r\n1,"two\nlines"\r\n\r\n"she said ""hi"", twice",\r\n'
    assert good("d.csv", raw) == [
        ("d.csv:1", {"a": "1", "b": "two\nlines"}),
        ("d.csv:2", {"a": 'she said "hi", twice', "b": ""}),
    ]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,2,3", "the header has 2 cells, the record 3"),
        (b"1", "the header has 2 cells, the record 1"),
        (b"caf\xe9,2", "not UTF-8 text"),
    ],
)
def test_a_bad_csv_record_is_a_row_with_a_reason_and_the_records_around_it_are_read(
    line: bytes, reason: str
) -> None:
    before, bad, after = rows("d.csv", b"a,b\nx,y\n" + line + b"\nz,w\n")
    assert (before.place, before.value) == ("d.csv:1", {"a": "x", "b": "y"})
    assert bad == Row("d.csv:2", None, reason)
    assert (after.place, after.value) == ("d.csv:3", {"a": "z", "b": "w"})


QUOTES = '\n  A cell that begins with a quote ends with one; a quote inside it is written twice ("").'


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'a,b\n1,"2\n3,4\n', "d.csv:1: not CSV: unexpected end of data"),
        (b'a,b\n1,2\n\n3,"4"x\n', "d.csv:2: not CSV: ',' expected after '\"'"),
    ],
    ids=["unclosed", "after the quote"],
)
def test_a_csv_file_with_broken_quotes_is_refused_at_the_record(raw: bytes, message: str) -> None:
    assert refusal("d.csv", raw) == message + QUOTES


def test_a_csv_header_with_broken_quotes_is_refused() -> None:
    assert refusal("d.csv", b'"a,b\n1,2\n') == (
        "d.csv: the header is not CSV: unexpected end of data" + QUOTES
    )


def test_blank_lines_before_a_csv_header_are_no_header() -> None:
    assert good("d.csv", b"\n\na,b\n1,2\n") == [("d.csv:1", {"a": "1", "b": "2"})]


def test_a_csv_header_with_a_column_twice_is_refused() -> None:
    assert '"a"' in refusal("d.csv", b"a,a\n1,2\n")


def test_a_csv_header_that_is_not_utf_8_is_refused() -> None:
    assert "not UTF-8" in refusal("d.csv", b"caf\xe9,b\n1,2\n")


def test_a_tsv_row_is_split_at_tabs_only() -> None:
    raw = b'a\tb\n1\t2,3\n"x\ty"\tz\n'
    assert good("d.tsv", raw) == [("d.tsv:1", {"a": "1", "b": "2,3"}), ("d.tsv:2", {"a": "x\ty", "b": "z"})]


def test_a_cell_of_a_megabyte_is_read() -> None:
    ((_, value),) = good("d.csv", b"a,b\n1," + b"x" * 1_000_000 + b"\n")
    assert value is not None
    assert len(value["b"]) == 1_000_000


def test_a_parquet_row_is_at_its_record_with_nested_values_and_nulls() -> None:
    turns = [{"role": "user", "content": "x"}]
    table = pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3], "turns": [turns, [], turns]})
    pyarrow.parquet.write_table(table, "d.parquet", row_group_size=2)
    found = list(read_rows(str(Path("d.parquet").absolute())))
    assert [(row.place, row.value) for row in found] == [
        ("d.parquet:1", {"text": "a", "n": 1, "turns": turns}),
        ("d.parquet:2", {"text": None, "n": 2, "turns": []}),
        ("d.parquet:3", {"text": "c", "n": 3, "turns": turns}),
    ]


@pytest.mark.parametrize("raw", [b"", b"PAR1 but no more", b'{"a": 1}\n'])
def test_a_file_that_is_no_parquet_is_refused(raw: bytes) -> None:
    assert refusal("d.parquet", raw).startswith("d.parquet: not Parquet: ")


# ------------------------------------------------------------------------------------------------------------
# All forms


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("d.jsonl", b""),
        ("d.jsonl", b"\n\n"),
        ("d.jsonl", BOM),
        ("d.txt", b"\n"),
        ("d.json", b"[]"),
        ("d.csv", b""),
        ("d.csv", b"a,b\n"),
        ("d.tsv", b"a\tb\n\n"),
    ],
)
def test_a_file_without_rows_has_none(name: str, raw: bytes) -> None:
    assert rows(name, raw) == []


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("d.jsonl", b'\n{"a": 1}\nbroken\n{"a": 3}\n'),
        ("d.json", b'[{"a": 1}, 2, {"a": 3}]'),
        ("d.csv", b"a\n1\n2,2\n3\n"),
        ("d.txt", b"1\n\xff\n3\n"),
    ],
)
def test_a_limit_counts_rows_from_the_start_bad_ones_included(name: str, raw: bytes) -> None:
    everything = rows(name, raw)
    assert len(everything) == 3
    assert rows(name, raw, limit=2) == everything[:2]
    assert rows(name, raw, limit=9) == everything


def test_a_limit_stops_before_what_is_broken_further_on() -> None:
    assert [row.value for row in rows("d.csv", b'a,b\n1,2\n3,"4\n', limit=1)] == [{"a": "1", "b": "2"}]


@pytest.mark.parametrize(
    ("name", "raw"),
    [
        ("D.JSONL", b'{"a": "1"}\n'),
        ("D.Json", b'[{"a": "1"}]'),
        ("D.CSV", b"a\n1\n"),
        ("D.TSV", b"a\tb\n1\t2\n"),
    ],
)
def test_a_suffix_in_capitals_is_read_as_the_same_in_small_letters(name: str, raw: bytes) -> None:
    assert good(name, raw) == [(f"{name}:1", {"a": "1"} | ({"b": "2"} if name == "D.TSV" else {}))]


@pytest.mark.parametrize("suffix", ["TXT", "Parquet"])
def test_text_and_parquet_are_read_with_a_suffix_in_capitals_too(suffix: str) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), "D.Parquet")
    Path("D.TXT").write_text("one\n")
    found = list(read_rows(str(Path(f"D.{suffix}").absolute())))
    assert found == [Row(f"D.{suffix}:1", {"text": "one"})]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named_as_the_user_would(suffix: str, here: Path) -> None:
    with pytest.raises(LorakitError) as caught:
        list(read_rows(str(here / "sub" / f"nosuch{suffix}")))
    assert str(caught.value) == f"sub/nosuch{suffix}: no such file"


@pytest.mark.parametrize("name", ["d.xlsx", "d", "d.jsonl.gz", "jsonl"])
def test_a_file_of_an_unknown_form_is_refused_with_the_known_ones(name: str) -> None:
    assert refusal(name, b"{}") == (
        f"{name}: not a data file lorakit reads\n  One of .jsonl, .json, .csv, .tsv, .parquet, .txt."
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_directory_is_refused_even_with_the_name_of_a_file(suffix: str, here: Path) -> None:
    (here / f"d{suffix}").mkdir()
    with pytest.raises(LorakitError, match=rf"^d{suffix}: cannot read: .*directory"):
        list(read_rows(str(here / f"d{suffix}")))


def test_a_place_outside_the_current_directory_is_absolute(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    (here / "d.txt").write_text("one\n")
    assert [row.place for row in read_rows(str(here / "d.txt"))] == [f"{here}/d.txt:1"]
