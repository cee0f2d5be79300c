"""Files that are damaged, hostile or not what their name says: what the user reads, and what it costs."""

import errno
import gzip
import io
import tracemalloc
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from lorakit.data import text_files
from lorakit.data.rows import ROW_BYTES, UNPACKED_BYTES, Row, read_chunks
from lorakit.data.values import told as size
from lorakit.errors import LorakitError
from lorakit.recipe.data import SUFFIXES

BOM = b"\xef\xbb\xbf"
MIB = 1 << 20
REPACK = "\n  Fetch it or compress it again. If it is not compressed, take the last suffix off its name."


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(name: str, raw: bytes | None = None, **options: Any) -> list[Row]:
    if raw is not None:
        Path(name).write_bytes(raw)
    return [row for chunk in read_chunks(Path(name).absolute(), **options) for row in chunk.rows()]


def told(name: str, raw: bytes | None = None, **options: Any) -> list[tuple[str, str]]:
    """(place, the reason when it is bad) of every row."""
    return [(row.place, row.error) for row in rows(name, raw, **options)]


def refusal(name: str, raw: bytes | None = None, **options: Any) -> str:
    with pytest.raises(LorakitError) as caught:
        rows(name, raw, **options)
    return str(caught.value)


def zstd(raw: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(raw, asbytes=True))


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most that Python held at once; pyarrow's own memory is counted beside it."""
    pool = pyarrow.default_memory_pool()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] + int(pool.bytes_allocated())
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------------------
# Names and contents


@pytest.mark.parametrize(
    "name",
    ["d.xlsx", "d", "jsonl", ".jsonl", "d.gz", "d.xlsx.gz", "d.jsonl.bz2", "d.parquet.gz", "d.arrow.zst"],
)
def test_a_file_of_an_unknown_form_is_refused_with_the_known_ones(name: str) -> None:
    assert refusal(name, b"{}") == (
        f"{name}: not a data file lorakit reads\n"
        "  One of .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt;"
        " .jsonl, .json, .csv, .tsv, .txt also with .gz or .zst after it."
    )


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_that_fails_is_told_as_such(suffix: str, here: Path) -> None:
    (here / f"d{suffix}").symlink_to("/proc/self/mem")
    if suffix in (".parquet", ".arrow"):  # its size is 0
        assert refusal(f"d{suffix}").startswith(f"d{suffix}: not ")
    else:
        assert refusal(f"d{suffix}") == f"d{suffix}: cannot read: Input/output error"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("d.parquet", "pyarrow.parquet.ParquetFile"),
        ("d.arrow", "pyarrow.ipc.open_stream"),
        ("d.jsonl.gz", "pyarrow.CompressedInputStream"),
        ("d.jsonl.gz", "pyarrow.CompressedInputStream.readinto"),
    ],
)
def test_a_disk_that_fails_is_not_called_a_damaged_file(
    name: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    failing = fail if not call.endswith("readinto") else lambda *_: types.SimpleNamespace(readinto=fail)
    monkeypatch.setattr(call.removesuffix(".readinto"), failing)
    assert refusal(name, b"some") == f"{name}: cannot read: Input/output error"


TEXT = [suffix for suffix in SUFFIXES if suffix not in (".parquet", ".arrow")]


def parquet() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": ["x" * 100] * 1000}), sink)
    return sink.getvalue()


def arrow(new: Any = pyarrow.ipc.new_stream) -> bytes:
    sink = io.BytesIO()
    table = pyarrow.table({"a": [f"{n}" * 20 for n in range(1000)]})
    with new(sink, table.schema) as file:
        file.write_table(table)
    return sink.getvalue()


@pytest.mark.parametrize("suffix", TEXT)
@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (gzip.compress(b'{"a": 1}'), "it is compressed with gzip: end its name with .gz"),
        (zstd(b'{"a": 1}'), "it is compressed with Zstandard: end its name with .zst"),
        (parquet(), "it is Parquet: end its name with .parquet"),
        (arrow(pyarrow.ipc.new_file), "it is Arrow: end its name with .arrow"),
        ('{"a": 1}'.encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        (b"\xfe\xff" + '{"a": 1}'.encode("utf-16-be"), "it is UTF-16: save it as UTF-8"),
    ],
    ids=["gzip", "zstd", "parquet", "arrow", "utf-16", "utf-16 big"],
)
def test_a_file_that_is_no_text_is_told_by_how_it_begins(suffix: str, raw: bytes, what: str) -> None:
    assert refusal(f"d{suffix}", raw) == f"d{suffix}: not text: {what}"
    assert refusal(f"d{suffix}.gz", gzip.compress(raw)) == f"d{suffix}.gz: not text: {what}"


def test_utf_16_that_does_not_say_so_is_a_bad_row() -> None:
    (row,) = rows("d.jsonl", '{"a": 1}'.encode("utf-16-le"))
    assert row.error == "not JSON: Expecting property name enclosed in double quotes (column 2)"


@pytest.mark.parametrize("suffix", TEXT)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(suffix: str, packing: str) -> None:
    kind, detail = {
        ".gz": ("gzip", "zlib inflate failed: incorrect header check"),
        ".zst": ("zstd", "ZSTD decompress failed: Unknown frame descriptor"),
    }[packing]
    name = f"d{suffix}{packing}"
    assert refusal(name, b'[{"a": 1}]\n') == f"{name}: cannot be unpacked ({kind}): {detail}{REPACK}"


@pytest.mark.parametrize("suffix", TEXT)
@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_an_empty_file_is_no_compressed_file(suffix: str, packing: str) -> None:
    name = f"d{suffix}{packing}"
    assert refusal(name, b"") == f"{name}: cannot be unpacked: it is empty"


@pytest.mark.parametrize("cut", [5, 30, -9, -1])
@pytest.mark.parametrize(("packing", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_compressed_file_that_ends_too_soon_is_refused(
    packing: str, pack: Callable[[bytes], bytes], cut: int
) -> None:
    raw = pack(b"".join(b'{"a": %d}\n' % n**9 for n in range(9999)))
    kind = {".gz": "gzip", ".zst": "zstd"}[packing]
    reason = f"d.jsonl{packing}: cannot be unpacked ({kind}): Truncated compressed stream{REPACK}"
    assert refusal(f"d.jsonl{packing}", raw[:cut]) == reason


def test_a_gzip_file_with_a_wrong_checksum_or_something_behind_it_is_refused() -> None:
    raw = gzip.compress(b'{"a": 1}\n')
    wrong = raw[:-8] + b"\0\0\0\0" + raw[-4:]
    assert refusal("d.jsonl.gz", wrong).startswith("d.jsonl.gz: cannot be unpacked (gzip): ")
    assert refusal("d.jsonl.gz", raw + b"more").startswith("d.jsonl.gz: cannot be unpacked (gzip): ")


@pytest.mark.parametrize(("packing", "pack"), [(".gz", gzip.compress), (".zst", zstd)])
def test_a_bomb_is_not_unpacked_beyond_the_cap(packing: str, pack: Callable[[bytes], bytes]) -> None:
    Path(f"d.jsonl{packing}").write_bytes(pack(b'{"a": 1}\n' * (4 * MIB)))
    assert Path(f"d.jsonl{packing}").stat().st_size < MIB
    assert refusal(f"d.jsonl{packing}", unpacked_bytes=3 * MIB) == (
        f"d.jsonl{packing}: unpacks to more than 3 MiB, the most that is read\n"
        "  If that is right, unpack it and name the file without its last suffix."
    )


def test_a_compressed_file_of_just_the_cap_is_read() -> None:
    raw = b'{"a": 1}\n' * 1000
    assert len(rows("d.jsonl.gz", gzip.compress(raw), unpacked_bytes=len(raw))) == 1000
    assert "8,999 bytes" in refusal("d.jsonl.gz", unpacked_bytes=len(raw) - 1)


def test_the_caps_are_told_in_the_unit_that_fits_them() -> None:
    assert [size(n) for n in (UNPACKED_BYTES, ROW_BYTES, MIB - 1)] == ["64 GiB", "32 MiB", "1,048,575 bytes"]


def test_a_bomb_of_one_row_costs_no_memory() -> None:
    Path("d.jsonl.gz").write_bytes(gzip.compress(b'{"a": "' + b"x" * (200 * MIB) + b'"}\n{"a": 1}\n', 1))
    found: list[tuple[str, str]] = []
    assert peak_bytes(lambda: found.extend(told("d.jsonl.gz"))) < 100 * MIB
    reason = "200 MiB in one row, the most is 32 MiB; is a line end missing?"
    assert found == [("d.jsonl.gz:1", reason), ("d.jsonl.gz:2", "")]


# ------------------------------------------------------------------------------------------------------------
# Rows that are too long


@pytest.mark.parametrize("suffix", [".jsonl", ".txt"])
def test_a_row_of_50_mb_is_bad_and_the_rows_around_it_are_read(suffix: str) -> None:
    long = b'{"a": "' + b"x" * (50 * MIB) + b'"}'
    Path(f"d{suffix}").write_bytes(b'{"a": 1}\n' + long + b'\n\n{"a": 2}\n' + long)
    del long
    found: list[tuple[str, str]] = []
    assert peak_bytes(lambda: found.extend(told(f"d{suffix}"))) < 100 * MIB
    reason = "50 MiB in one row, the most is 32 MiB; is a line end missing?"
    assert found == [
        (f"d{suffix}:1", ""),
        (f"d{suffix}:2", reason),
        (f"d{suffix}:4", ""),
        (f"d{suffix}:5", reason),
    ]


@pytest.mark.parametrize(
    ("suffix", "raw"), [(".csv", b"a,b\n1,"), (".csv", b'a,b\n1,"'), (".json", b'[{"a": "')]
)
def test_a_cell_of_50_mb_is_refused_before_it_is_in_memory(suffix: str, raw: bytes) -> None:
    Path(f"d{suffix}").write_bytes(raw + b"x" * (50 * MIB))
    found: list[str] = []
    assert peak_bytes(lambda: found.append(refusal(f"d{suffix}"))) < 300 * MIB
    assert found[0].startswith(f"d{suffix}:1: more than 32 MiB in one r")


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_the_most_that_a_line_may_have_counts_its_line_end(end: bytes) -> None:
    line = b'{"a": 1}' + end
    raw = line + b" " + line + line
    reason = f"{len(line) + 1} bytes in one row, the most is {len(line)} bytes; is a line end missing?"
    expected = [("d.jsonl:1", ""), ("d.jsonl:2", reason), ("d.jsonl:3", "")]
    assert told("d.jsonl", raw, row_bytes=len(line)) == expected
    assert told("d.jsonl", raw, row_bytes=len(line), skip=1) == expected[1:]
    assert told("d.jsonl", raw, row_bytes=len(line) + 1) == [(place, "") for place, _ in expected]


@pytest.mark.parametrize(
    ("raw", "place"),
    [
        (b"a,b\n1,2\n3," + b"x" * 99 + b"\n", "d.csv:2: "),
        (b'a,b\n1,2\n3,"' + b"x\n" * 99, "d.csv:2: "),
        (b"a,b\n" + b'"x\ny",' * 30, "d.csv:1: "),
        (b"a" * 99 + b"\n1\n", "d.csv: the header: "),
    ],
    ids=["cell", "quote not closed", "many cells", "header"],
)
def test_a_csv_record_that_is_too_long_is_refused_at_its_place(raw: bytes, place: str) -> None:
    assert refusal("d.csv", raw, row_bytes=64) == (
        f"{place}more than 64 bytes in one record\n  Is a quote not closed, or a line end missing?"
    )


def test_many_csv_records_of_the_most_that_one_may_have_are_read() -> None:
    raw = b"a,b\n" + b'"%s",1\n' % (b"x\n" * 20) * 9
    assert told("d.csv", raw, row_bytes=45) == [(f"d.csv:{n}", "") for n in range(1, 10)]
    assert refusal("d.csv", raw, row_bytes=44).startswith("d.csv:1: more than 44 bytes in one record")


@pytest.mark.parametrize("window", [8, MIB])
def test_a_json_record_that_is_too_long_is_refused_at_its_place(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "_WINDOW", window)
    raw = b'[{"a": 1}, {"a": "%s"}]'
    assert refusal("d.json", raw % (b"x" * 56), row_bytes=64) == (
        "d.json:2: more than 64 bytes in one row\n"
        "  Is a quote not closed? As JSONL (one object per line) such a row is passed over."
    )
    assert told("d.json", raw % (b"x" * 55), row_bytes=64) == [("d.json:1", ""), ("d.json:2", "")]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("size", [1, 2, 1000])
def test_a_parquet_or_arrow_row_that_is_too_long_is_bad(suffix: str, size: int) -> None:
    table = pyarrow.table(
        {"a": ["x", "y" * 99, "z", "w" * 10], "b": [[{"c": "x"}]] * 3 + [[{"c": "x" * 60}]]}
    )
    if suffix == ".arrow":
        Path("d.arrow").write_bytes(b"")
        with pyarrow.ipc.new_file("d.arrow", table.schema) as file:
            file.write_table(table)
    else:
        pyarrow.parquet.write_table(table, "d.parquet")
    reason = "{} bytes in one row, the most is 64 bytes; is a line end missing?"
    expected = [
        (f"d{suffix}:1", ""),
        (f"d{suffix}:2", reason.format(100)),
        (f"d{suffix}:3", ""),
        (f"d{suffix}:4", reason.format(70)),
    ]
    assert told(f"d{suffix}", size=size, row_bytes=64) == expected


# ------------------------------------------------------------------------------------------------------------
# JSON that is hard to read


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"a": 1', "not JSON: Expecting ',' delimiter (column 8)"),
        (b'{"a": "1', "not JSON: Unterminated string starting at (column 7)"),
        (b"[1]", "a row must be an object with fields, not a list"),
        (b"7", "a row must be an object with fields, not a number"),
        (b'{"a": "caf\xe9"}', "not UTF-8 text"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text"),
        (b'{"a": \x00"x"}', "not JSON: Expecting value (column 7)"),
        (b'{"a": "\x00"}', "not JSON: Invalid control character at (column 8)"),
        (BOM + b'{"a": 1}', "not JSON: Unexpected UTF-8 BOM (decode using utf-8-sig) (column 1)"),
        (b'  {"a": 1} x', "not JSON: Extra data (column 12)"),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_bad_line_says_what_is_wrong_with_it_and_spoils_no_other(
    line: bytes, reason: str, end: bytes
) -> None:
    raw = BOM + b'{"a": 1}' + end + line + end + b' {"a": 2} ' + end
    assert told("d.jsonl", raw) == [("d.jsonl:1", ""), ("d.jsonl:2", reason), ("d.jsonl:3", "")]


def test_json_numbers_that_are_none_are_taken_as_json_takes_them() -> None:
    (row,) = rows("d.jsonl", b'{"a": NaN, "b": -Infinity}\n')
    assert row.value is not None
    assert (row.value["a"] != row.value["a"], row.value["b"]) == (True, float("-inf"))


@pytest.mark.parametrize("deep", [b'{"a":', b"["])
def test_nesting_without_end_is_a_bad_row_or_a_broken_list(deep: bytes) -> None:
    (row,) = rows("d.jsonl", deep * 200_000 + b"\n")
    assert row.error.startswith("not JSON: maximum recursion depth exceeded")
    message = refusal("d.json", b'[{"a": 1}, ' + deep * 200_000)
    assert message.startswith("d.json: not JSON: row 2: maximum recursion depth exceeded")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "d.json: not JSON: it is empty"),
        (BOM + b" \n", "d.json: not JSON: it is empty"),
        (b"[", "d.json: not JSON: Expecting value: line 1 column 2"),
        (b'[{"a": 1}', "d.json: not JSON: Expecting ',' delimiter: line 1 column 10"),
        (b'[{"a": 1},\n ]', "d.json: not JSON: Expecting value: line 2 column 2"),
        (b'[{"a": 1}]\n]', "d.json: not JSON: Extra data: line 2 column 1"),
        (b'[{"a": 1} {"a": 2}]', "d.json: not JSON: Expecting ',' delimiter: line 1 column 11"),
        (b'[{"a": "\xff"}]', "d.json: not JSON: not UTF-8 text (near byte 9)\n  Save it as UTF-8."),
        (b'[{"a": "\xc3', "d.json: not JSON: not UTF-8 text (near byte 9)\n  Save it as UTF-8."),
        (
            b'{"a": 1}\n{"a": 2}\n',
            "d.json: expected a list of objects\n  One object per line is JSONL: name the file .jsonl",
        ),
    ],
)
def test_a_json_file_that_is_broken_says_where(raw: bytes, message: str) -> None:
    assert refusal("d.json", raw) == message


def test_the_byte_of_json_that_is_not_utf_8_is_that_of_the_file() -> None:
    raw = b'[{"a": "' + b"x" * (2 * MIB) + b'\xff"}]'
    assert refusal("d.json", raw) == (
        "d.json: not JSON: not UTF-8 text (near byte 2,097,161)\n  Save it as UTF-8."
    )


def test_a_json_list_is_never_held_whole() -> None:
    item = b'{"a": "' + b"x" * 1000 + b'"}'
    Path("d.json").write_bytes(b"[" + b",\n".join([item] * 60_000) + b"]")
    count = [0]

    def read() -> None:
        for chunk in read_chunks(Path("d.json").absolute()):
            count[0] += len(chunk)

    assert peak_bytes(read) < 20 * MIB < Path("d.json").stat().st_size
    assert count == [60_000]


# ------------------------------------------------------------------------------------------------------------
# Parquet and Arrow


@pytest.mark.parametrize(
    "raw", [b"", b"no arrow at all\n", b"ARROW1", b"ARROW1\0\0" + b"\0" * 99, b'[{"a": 1}]']
)
def test_a_file_that_is_no_arrow_is_refused(raw: bytes) -> None:
    assert refusal("d.arrow", raw).startswith("d.arrow: not Arrow: ")


def test_a_parquet_file_named_arrow_and_the_other_way_round() -> None:
    assert refusal("d.arrow", parquet()).startswith("d.arrow: not Arrow: ")
    assert refusal("d.parquet", arrow()).startswith("d.parquet: not Parquet: ")


@pytest.mark.parametrize(
    ("suffix", "raw"),
    [(".parquet", parquet()), (".arrow", arrow()), (".arrow", arrow(pyarrow.ipc.new_file))],
)
def test_a_file_that_ends_too_soon_is_refused(suffix: str, raw: bytes) -> None:
    for cut in (len(raw) // 3, len(raw) // 2, len(raw) * 9 // 10):
        assert refusal(f"d{suffix}", raw[:cut]).startswith(f"d{suffix}: not ")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_columns_of_one_name_are_refused(suffix: str) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array([1]), pyarrow.array([2])], ["a", "a"])
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, "d.parquet")
    else:
        with pyarrow.ipc.new_stream("d.arrow", table.schema) as file:
            file.write_table(table)
    assert refusal(f"d{suffix}") == f'd{suffix}: two columns are named "a"'


OFFSETS = b"".join(n.to_bytes(4, "little") for n in (0, 20, 40, 60))  # where the first texts of arrow() begin


def test_an_arrow_file_that_points_outside_of_itself_is_refused() -> None:
    raw = arrow()
    bad = OFFSETS[:8] + (1 << 30).to_bytes(4, "little") + OFFSETS[12:]
    assert raw.count(OFFSETS) == 1
    assert refusal("d.arrow", raw.replace(OFFSETS, bad)).startswith("d.arrow: not Arrow: ")


def test_text_that_is_not_utf_8_does_not_hide_that_a_list_points_outside_of_it() -> None:
    turns = [[{"role": "user", "content": f"{n}" * 3}] * 2 for n in range(10)]
    sink = io.BytesIO()
    table = pyarrow.table({"turns": turns})
    with pyarrow.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table)
    raw = sink.getvalue().replace(b"333", b"3\xff3")
    assert [row.error for row in rows("d.arrow", raw)] == [""] * 3 + ["not UTF-8 text"] + [""] * 6
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 2, 4, 6))
    assert raw.count(offsets) == 1
    bad = raw.replace(offsets, offsets[:8] + (1 << 30).to_bytes(4, "little") + offsets[12:])
    assert refusal("d.arrow", bad).startswith("d.arrow: not Arrow: ")


def test_a_field_inside_of_arrow_whose_name_is_not_utf_8_is_refused() -> None:
    sink = io.BytesIO()
    table = pyarrow.table({"turns": [[{"thecontent": "x"}]]})
    with pyarrow.ipc.new_stream(sink, table.schema) as file:
        file.write_table(table)
    raw = sink.getvalue().replace(b"thecontent", b"thecont\xffnt")
    assert refusal("d.arrow", raw).startswith("d.arrow: not Arrow: 'utf-8' codec")


@pytest.mark.parametrize("seed", range(4))
def test_bytes_changed_at_random_are_refused_or_read_and_never_a_crash(seed: int) -> None:
    import random

    draw = random.Random(seed)
    for suffix, raw in (
        (".parquet", parquet()),
        (".arrow", arrow()),
        (".arrow", arrow(pyarrow.ipc.new_file)),
    ):
        for _ in range(50):
            changed = bytearray(raw)
            for _ in range(draw.randint(1, 8)):
                changed[draw.randrange(len(raw))] = draw.randrange(256)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                try:
                    rows(f"d{suffix}", bytes(changed))
                except LorakitError as error:
                    assert str(error).startswith(f"d{suffix}: ")
