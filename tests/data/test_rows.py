"""Files -> rows: every row with the place a user finds it at, also the rows that cannot be read."""

import json
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorakit.data import text_files
from lorakit.data.rows import Chunk, Row, hub_chunks, read_chunks, read_rows
from lorakit.errors import LorakitError, RunError
from lorakit.recipe.data import SUFFIXES

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


def chunks(name: str, **options: Any) -> list[Chunk]:
    return list(read_chunks(Path(name).absolute(), **options))


def all_rows(found: Sequence[Chunk]) -> list[Row]:
    return [row for chunk in found for row in chunk.rows()]


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
    assert (first.place, bad, last.place) == (
        "d.txt:1",
        Row("d.txt", 2, None, "not UTF-8 text"),
        "d.txt:3",
    )


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
    assert bad == Row("d.csv", 2, None, reason)
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


def test_a_parquet_column_of_dates_that_python_has_not_spoils_its_row_only() -> None:
    stamps = pyarrow.array([0, 1 << 50, 0], pyarrow.timestamp("s"))
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "day": stamps}), "d.parquet")
    first, bad, last = all_rows(chunks("d.parquet"))
    assert (first.error, bad.value, last.error) == ("", None, "")
    assert bad.error.startswith("cannot be read: ")


def test_text_that_is_not_utf_8_in_parquet_spoils_its_row_only() -> None:
    binary = pyarrow.array([b"a", b"caf\xe9", b"c"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, binary.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), "d.parquet")
    assert all_rows(chunks("d.parquet")) == [
        Row("d.parquet", 1, {"text": "a"}),
        Row("d.parquet", 2, None, "not UTF-8 text"),
        Row("d.parquet", 3, {"text": "c"}),
    ]


TURNS = [{"role": "user", "content": "x"}]
TABLE = pyarrow.table({"text": ["a", None, "c"], "n": [1, 2, 3], "turns": [TURNS, [], TURNS]})
TABLE_ROWS = [
    ("d.arrow:1", {"text": "a", "n": 1, "turns": TURNS}),
    ("d.arrow:2", {"text": None, "n": 2, "turns": []}),
    ("d.arrow:3", {"text": "c", "n": 3, "turns": TURNS}),
]


@pytest.mark.parametrize("new", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_arrow_row_is_at_its_record_in_a_file_and_in_a_stream(new: Any, batch: int) -> None:
    with new("d.arrow", TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=batch)
    assert [(row.place, row.value) for row in all_rows(chunks("d.arrow"))] == TABLE_ROWS


def test_what_datasets_saves_is_read(here: Path) -> None:
    import datasets

    datasets.Dataset.from_dict(TABLE.to_pydict()).save_to_disk(here / "saved")
    (file,) = (here / "saved").glob("*.arrow")
    assert [row.value for row in all_rows(list(read_chunks(file)))] == [value for _, value in TABLE_ROWS]


def test_arrow_columns_of_views_and_categories_are_read_as_text() -> None:
    text = ["a" * 100, None, "b" * 100]
    table = pyarrow.table(
        {"view": pyarrow.array(text, pyarrow.string_view()), "kind": pyarrow.array(text).dictionary_encode()}
    )
    with pyarrow.ipc.new_file("d.arrow", table.schema) as file:
        file.write_table(table)
    for found in (chunks("d.arrow"), chunks("d.arrow", size=1)):
        assert [row.value for row in all_rows(found)] == [{"view": cell, "kind": cell} for cell in text]


# ------------------------------------------------------------------------------------------------------------
# JSON is read through a window

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON, max_size=5), st.booleans(), st.sampled_from([None, 0, 1, "\t"]), st.integers(1, 9))
def test_json_read_through_any_window_is_what_json_loads_reads(
    values: list[Any], ascii_only: bool, indent: Any, window: int
) -> None:
    Path("d.json").write_text(json.dumps(values, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "_WINDOW", window)
        found = all_rows(chunks("d.json"))
    assert [row.number for row in found] == list(range(1, len(values) + 1))
    for row, value in zip(found, values, strict=True):
        if isinstance(value, dict):
            assert (row.value, row.error) == (value, "")
        else:
            assert row.value is None
            assert row.error.startswith("a row must be an object with fields, not ")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(JSON, min_size=1, max_size=3), st.data(), st.integers(1, 9))
def test_broken_json_is_refused_through_any_window_and_the_rows_before_it_come_first(
    values: list[Any], data: Any, window: int
) -> None:
    whole = json.dumps(values)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    Path("d.json").write_text(cut)
    found: list[Row] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(LorakitError, match=r"^d.json: not JSON: "):
        patch.setattr(text_files, "_WINDOW", window)
        for chunk in read_chunks(Path("d.json").absolute()):
            found += chunk.rows()
    complete = sum(
        len(json.dumps(values[: n + 1])) <= len(cut) + (n + 1 == len(values)) for n in range(len(values))
    )
    assert len(found) in (complete, complete - 1)
    assert [row.value for row in found] == [v if isinstance(v, dict) else None for v in values[: len(found)]]


@pytest.mark.parametrize("window", [3, 1 << 20])
def test_the_line_and_column_of_broken_json_are_those_of_the_file(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_WINDOW", window)
    raw = b'[{"a": "\xc3\xa9"},\n\n  {"b": 2}, {"c" 3},\n' + b'{"d": 4},' * 9 + b"{}]"
    assert refusal("d.json", raw) == "d.json: not JSON: Expecting ':' delimiter: line 3 column 18"


# ------------------------------------------------------------------------------------------------------------
# CSV without a header


@pytest.mark.parametrize(("name", "tab"), [("d.csv", ","), ("d.tsv", "\t")])
def test_given_names_stand_in_for_a_header_and_the_first_record_is_row_1(name: str, tab: str) -> None:
    Path(name).write_bytes(BOM + f"1{tab}2\n\n3\n4{tab}5\n".encode())
    assert all_rows(chunks(name, header=("a", "b"))) == [
        Row(name, 1, {"a": "1", "b": "2"}),
        Row(name, 2, None, "the header has 2 cells, the record 1"),
        Row(name, 3, {"a": "4", "b": "5"}),
    ]


def test_given_names_that_are_twice_the_same_are_refused() -> None:
    Path("d.csv").write_text("1,2\n")
    with pytest.raises(LorakitError, match=r'^d.csv: two columns are named "a"$'):
        chunks("d.csv", header=["a", "a"])


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.txt", "d.parquet", "d.arrow"])
def test_names_for_the_columns_of_a_file_that_has_its_own_are_refused(name: str) -> None:
    Path(name).write_text("")
    with pytest.raises(LorakitError, match=rf"^{name}: names for the columns were given, but it is no CSV"):
        chunks(name, header=["a"])


# ------------------------------------------------------------------------------------------------------------
# All forms


def write_packed(name: str, raw: bytes) -> None:
    """By a compressor that is not the reader."""
    import gzip

    if name.endswith(".gz"):
        Path(name).write_bytes(gzip.compress(raw[:7]) + gzip.compress(raw[7:]))  # two members, as `cat` makes
    elif name.endswith(".zst"):
        codec = pyarrow.Codec("zstd")
        Path(name).write_bytes(codec.compress(raw[:7], asbytes=True) + codec.compress(raw[7:], asbytes=True))
    else:
        Path(name).write_bytes(raw)


RAW = {  # rows good and bad, and blank lines, in every form of text
    ".jsonl": BOM + b'\n{"a": "1"}\r\nbroken\n  \n[2]\n{"a": "\xff"}\n{"a": "\xc3\xa9"}\n{"a": "6"}',
    ".json": BOM + b'[{"a": "1"}, 2, {"a": "3"},\n\n {"a": "4"}, null, {"a": "6"}]\n',
    ".csv": BOM + b'a,b\n1,"x\ny"\n\n2\n3,\xff\n4,\xc3\xa9\n5,5\n6,6\n',
    ".tsv": BOM + b"a\tb\r\n1\t2\r\n\r\n2\r\n3\t\xff\r\n4\t4\r\n5\t5\r\n6\t6\r\n",
    ".txt": BOM + b"1\n\n2\n \n\xff\n4\r\n  5\n6",
}
NUM_ROWS = 6


def write_any(suffix: str) -> str:
    """A file of six rows."""
    name = f"d{suffix}"
    table = pyarrow.table({"a": [f"{n}" for n in range(1, 7)], "b": [[n] * n for n in range(6)]})
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, name, row_group_size=2)
    elif suffix == ".arrow":
        with pyarrow.ipc.new_stream(name, table.schema) as file:
            file.write_table(table, max_chunksize=4)
    else:
        write_packed(name, RAW[Path(name.removesuffix(".gz").removesuffix(".zst")).suffix])
    return name


COMPRESSED = [suffix + packing for suffix in RAW for packing in (".gz", ".zst")]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_compressed_file_has_the_rows_of_the_plain_one(suffix: str) -> None:
    plain = all_rows(chunks(write_any(suffix.rpartition(".")[0])))
    packed = all_rows(chunks(write_any(suffix)))
    assert len(plain) == NUM_ROWS
    assert {row.file for row in packed} == {f"d{suffix}"}
    assert [(row.number, row.value, row.error) for row in packed] == [
        (row.number, row.value, row.error) for row in plain
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 6, 1000])
@pytest.mark.parametrize("suffix", [*SUFFIXES, ".jsonl.gz", ".csv.zst"])
def test_rows_that_are_skipped_change_nothing_of_those_after_them(suffix: str, size: int) -> None:
    name = write_any(suffix)
    everything = all_rows(chunks(name))
    assert len(everything) == NUM_ROWS
    for skip in range(NUM_ROWS + 2):
        found = chunks(name, size=size, skip=skip)
        assert all_rows(found) == everything[skip:]
        assert all(1 <= len(chunk) <= size for chunk in found)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_chunk_is_the_same_in_another_process_and_can_be_cut(suffix: str) -> None:
    (chunk,) = chunks(write_any(suffix))
    found = chunk.rows()
    assert len(chunk) == len(found) == NUM_ROWS
    assert pickle.loads(pickle.dumps(chunk)).rows() == found
    for n in range(NUM_ROWS + 2):
        assert len(chunk.first(n)) == min(n, NUM_ROWS)
        assert chunk.first(n).rows() == pickle.loads(pickle.dumps(chunk.first(n))).rows() == found[:n]


@pytest.mark.parametrize("form", ["parquet", "text", "view", "category"])
def test_a_chunk_of_a_large_batch_travels_without_the_rest_of_it(form: str) -> None:
    cells = pyarrow.array([f"{n:1000}" for n in range(1000)])
    column = {"view": lambda: cells.cast(pyarrow.string_view()), "category": cells.dictionary_encode}
    table = pyarrow.table({"text": column.get(form, lambda: cells)()})
    if form == "parquet":
        pyarrow.parquet.write_table(table, "d.parquet")
        found = chunks("d.parquet", size=10)
    else:
        with pyarrow.ipc.new_file("d.arrow", table.schema) as file:
            file.write_table(table)
        found = chunks("d.arrow", size=10, row_bytes=50_000)
    assert [row.value for row in all_rows(found)] == [{"text": f"{n:1000}"} for n in range(1000)]
    assert [len(chunk) for chunk in found] == [10] * 100
    assert max(len(pickle.dumps(chunk)) for chunk in found) < 20_000


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_rows_make_short_chunks(suffix: str) -> None:
    cells = ["x" * 3_000_000] * 10
    table = pyarrow.table({"text": cells})
    objects = [json.dumps({"text": cell}) for cell in cells]
    if suffix == ".arrow":
        with pyarrow.ipc.new_file("d.arrow", table.schema) as file:
            file.write_table(table)
    elif suffix == ".parquet":
        pyarrow.parquet.write_table(table, "d.parquet")
    else:
        raw = {".json": f"[{','.join(objects)}]", ".jsonl": "\n".join(objects)}
        Path(f"d{suffix}").write_text(
            raw.get(suffix, "\n".join(cells if suffix == ".txt" else ["text", *cells]))
        )
    found = chunks(f"d{suffix}")
    assert max(map(len, found)) <= 3
    assert [row.value for row in all_rows(found)] == [{"text": cell} for cell in cells]


@pytest.mark.parametrize(
    ("name", "raw"),
    [("d.csv", b'a,b\n1,2\n3,4\n5,"6\n'), ("d.json", b'[{"a": 1}, {"a": 2}, {"a"'), ("d.jsonl.gz", b"")],
)
def test_the_rows_before_a_broken_place_come_first(name: str, raw: bytes) -> None:
    import gzip
    import random

    if name.endswith(".gz"):
        noise = random.Random(0).randbytes(3 << 20).hex().encode()
        packed = gzip.compress(b'{"a": 1}\n{"a": 2}\n"' + noise)
        raw = packed[: len(packed) // 2]
    Path(name).write_bytes(raw)
    found = []
    with pytest.raises(LorakitError):
        for chunk in read_chunks(Path(name).absolute()):
            found += chunk.rows()
    assert [row.number for row in found] == [1, 2]
    assert all(row.value for row in found)


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
    assert found == [Row(f"D.{suffix}", 1, {"text": "one"})]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_file_is_named_as_the_user_would(suffix: str, here: Path) -> None:
    with pytest.raises(LorakitError) as caught:
        list(read_rows(str(here / "sub" / f"nosuch{suffix}")))
    assert str(caught.value) == f"sub/nosuch{suffix}: no such file"


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


# ------------------------------------------------------------------------------------------------------------
# Hub data sets


HUB_ROWS = [{"text": f"row {n}", "turns": [{"role": "user", "content": str(n)}]} for n in range(1, 8)]


@pytest.fixture
def data_set(here: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder that `datasets` loads as it loads one from the hub: two configurations, two splits."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", here / "cache")
    folder = here / "owner" / "name"
    for config in ("main", "other"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            rows = [row | {"text": f"{config} {split} {row['text']}"} for row in HUB_ROWS]
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, folder / config / f"{split}.parquet", row_group_size=2)
    parts = "".join(f"- config_name: {c}\n  data_dir: {c}\n" for c in ("main", "other"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{parts}---\n")
    return "owner/name"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("skip", [0, 1, 3, 6, 7, 9])
def test_the_rows_of_a_data_set_of_the_hub(data_set: str, streaming: bool, skip: int) -> None:
    found = list(hub_chunks(data_set, "other", "test", None, streaming, size=3, skip=skip))
    expected = [
        Row("owner/name", number, row | {"text": f"other test {row['text']}"})
        for number, row in enumerate(HUB_ROWS, 1)
    ]
    assert all_rows(found) == expected[skip:]
    assert all(len(chunk) <= 3 for chunk in found)


def test_a_hub_data_set_and_its_split_are_named_in_one_word(data_set: str) -> None:
    import shutil

    shutil.rmtree(Path(data_set) / "other")
    (Path(data_set) / "README.md").unlink()
    assert [row.value and row.value["text"] for row in read_rows("owner/name:test", limit=2)] == [
        "main test row 1",
        "main test row 2",
    ]
    assert [row.place for row in read_rows("owner/name", limit=1)] == ["owner/name:1"]


def test_a_row_of_the_hub_that_is_too_long_is_bad(data_set: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.rows.ROW_BYTES", len("main train row 1user1") - 1)
    found = all_rows(list(hub_chunks(data_set, "main", "train", None, streaming=True)))
    assert {row.error for row in found} == {
        "21 bytes in one row, the most is 20 bytes; is a line end missing?"
    }
    assert [row.number for row in found] == list(range(1, 8))


def test_everything_that_names_a_data_set_goes_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def load_dataset(*names: Any, **options: Any) -> Any:
        import datasets

        called.append((names, options))
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    list(hub_chunks("owner/name", "small", "train[:10%]", "f" * 40, streaming=False))
    assert called == [
        (("owner/name", "small"), {"split": "train[:10%]", "revision": "f" * 40, "streaming": False})
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_that_cannot_be_loaded_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    def load_dataset(*names: Any, **options: Any) -> Any:
        raise ConnectionError("no route to the hub\nand a long story")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(LorakitError) as caught:
        list(hub_chunks("owner/name", None, "train", None, streaming))
    assert str(caught.value) == (
        "owner/name:train: cannot load this data set from the hub: ConnectionError: no route to the hub\n"
        "  A local file needs its suffix (.jsonl, .csv, ...) and is relative to the recipe."
    )


def test_a_stream_that_breaks_off_gives_the_rows_before_and_then_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stream:
        def iter(self, batch_size: int) -> Iterator[dict[str, list[str]]]:
            yield {"text": ["a", "b"]}
            raise TimeoutError("the hub is gone")

    monkeypatch.setattr("datasets.load_dataset", lambda *names, **options: Stream())
    found: list[Row] = []
    with pytest.raises(RunError) as caught:
        for chunk in hub_chunks("owner/name", None, "train", None, streaming=True):
            found += chunk.rows()
    assert [row.number for row in found] == [1, 2]
    assert str(caught.value).startswith(
        "owner/name:train: reading stopped after row 2: TimeoutError: the hub is gone\n  "
    )
