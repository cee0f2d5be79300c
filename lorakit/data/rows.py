"""Files and hub data sets -> chunks of rows, each row with the place it came from.

A row is a 1-based physical line in JSONL and text, a 1-based record elsewhere. A row that cannot be read is
still a row: it carries the reason, so that it can be counted. Blank lines are no rows. Memory is bounded
whatever a file holds: a row has at most ROW_BYTES, a chunk about _CHUNK_BYTES or one row.

text_files.py and columnar.py read; values.py parses what they read, where Chunk.rows() is called.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lorakit.data.columnar import columnar
from lorakit.data.text_files import csv_records, json_records, lines, open_text
from lorakit.data.values import Item, Value, parse_batch, parse_json_line, parse_text_line, too_long, weigh
from lorakit.errors import LorakitError, RunError
from lorakit.recipe.data import COMPRESSED, SUFFIXES

ROW_BYTES = 32 << 20  # the most that one row may have
UNPACKED_BYTES = 64 << 30  # the most that a compressed file may unpack to
_CHUNK_BYTES = 8 << 20  # a chunk ends here, so that long rows do not pile up by the thousand
_COLUMNAR = (".parquet", ".arrow")


@dataclass(frozen=True)
class Row:
    file: str  # as a user knows it; of a hub data set its name
    number: int
    value: dict[str, Any] | None  # None: `error` says why
    error: str = ""

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file, cheap to send to another process: parsed where rows() is called."""

    file: str
    form: str  # how the items are parsed: a key of _PARSERS
    numbers: Sequence[int]
    items: Any  # of JSONL and text the lines (bytes), of Parquet and Arrow a RecordBatch, else the values

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self) -> list[Row]:
        """Its rows, in order; what does not parse is a row with its `error`."""
        values = _PARSERS[self.form](self.items)
        return [
            Row(self.file, number, None, value) if isinstance(value, str) else Row(self.file, number, value)
            for number, value in zip(self.numbers, values, strict=True)
        ]

    def first(self, n: int) -> "Chunk":
        """Its first n rows."""
        return self if n >= len(self) else Chunk(self.file, self.form, self.numbers[:n], self.items[:n])

    def after(self, n: int) -> "Chunk":
        """Its rows but the first n."""
        return Chunk(self.file, self.form, self.numbers[n:], self.items[n:])


def read_chunks(
    path: Path,
    size: int = 1000,
    header: Sequence[str] | None = None,
    skip: int = 0,
    *,
    row_bytes: int = ROW_BYTES,
    unpacked_bytes: int = UNPACKED_BYTES,
) -> Iterator[Chunk]:
    """The rows of one file after the first `skip`, in chunks of at most `size`.

    `header` names the columns of a CSV or TSV file that does not name them itself. Where a file turns out to
    be broken, the rows before that place come first. At most `row_bytes` of a row are read, and at most
    `unpacked_bytes` of what is compressed.

    Raises: LorakitError when there is no such file, it has no known form, or it is broken as a whole.
    """
    name = shown(path)
    try:
        form, packing = _form(path, name)
        if header is not None and form not in (".csv", ".tsv"):
            raise LorakitError(f"{name}: names for the columns were given, but it is no CSV or TSV file")
        if form in _COLUMNAR:
            for numbers, rows in columnar(path, name, form, size, skip, row_bytes, _CHUNK_BYTES):
                yield Chunk(name, "" if isinstance(rows, list) else ".arrow", numbers, rows)
            return
        with open_text(path, name, packing, unpacked_bytes) as file:
            if form in (".csv", ".tsv"):
                delimiter = "\t" if form == ".tsv" else ","
                items = csv_records(file, name, delimiter, header, row_bytes)
            else:
                items = json_records(file, name, row_bytes) if form == ".json" else lines(file, row_bytes)
            yield from _chunks(name, form, items, size, skip)
    except OSError as error:
        raise LorakitError(f"{name}: cannot read: {error.strerror or error}") from None


def read_rows(source: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file or of a hub data set `owner/name[:split]`, at most `limit`."""
    size = 1000 if limit is None else min(limit, 1000)
    if Path(source).is_absolute():
        chunks = read_chunks(Path(source), size)
    else:
        name, _, split = source.partition(":")
        chunks = hub_chunks(name, None, split or "train", None, streaming=False, size=size)
    yield from islice(chain.from_iterable(chunk.rows() for chunk in chunks), limit)


def hub_chunks(
    name: str,
    config: str | None,
    split: str,
    revision: str | None,
    streaming: bool,
    size: int = 1000,
    skip: int = 0,
) -> Iterator[Chunk]:
    """The rows of a hub data set after the first `skip`, in chunks of at most `size`.

    Raises: LorakitError when it cannot be loaded; RunError when it cannot be read any further.
    """
    import datasets

    try:
        found = datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
        if not streaming and skip >= len(found):
            return
        found = found.skip(skip) if skip else found
    except Exception as error:  # every layer below (hub, HTTP, Arrow) raises its own kinds
        raise LorakitError(
            f"{name}:{split}: cannot load this data set from the hub: {_reason(error)}",
            "A local file needs its suffix (.jsonl, .csv, ...) and is relative to the recipe.",
        ) from None

    def items() -> Iterator[Item]:
        number = skip
        try:
            for columns in found.iter(batch_size=100):
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    value = dict(zip(columns, values, strict=True))
                    num_bytes = weigh(value)
                    fits = num_bytes <= ROW_BYTES
                    yield number, value if fits else too_long(num_bytes, ROW_BYTES), num_bytes
        except Exception as error:
            place = f"{name}:{split}: reading stopped after row {number:,}"
            raise RunError(
                f"{place}: {_reason(error)}", "Run it again; without streaming it is kept."
            ) from None

    yield from _chunks(name, "", items(), size, 0)


def shown(path: Path) -> str:
    """The path as a user would type it: relative when it lies below the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _form(path: Path, name: str) -> tuple[str, str]:
    """(its suffix, the suffix of its compression or nothing)."""
    if not path.exists():
        raise LorakitError(f"{name}: no such file")
    if path.is_dir():
        raise LorakitError(f"{name}: cannot read: it is a directory")
    packing = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    form = Path(path.stem if packing else path.name).suffix.lower()
    if form not in SUFFIXES or (packing and form in _COLUMNAR):
        text = ", ".join(suffix for suffix in SUFFIXES if suffix not in _COLUMNAR)
        cure = f"One of {', '.join(SUFFIXES)}; {text} also with {' or '.join(COMPRESSED)} after it."
        raise LorakitError(f"{name}: not a data file lorakit reads", cure)
    return form, packing


def _chunks(name: str, form: str, items: Iterable[Item], size: int, skip: int) -> Iterator[Chunk]:
    numbers: list[int] = []
    held: list[Any] = []
    num_bytes = 0
    try:
        for number, item, item_bytes in islice(items, skip, None):
            numbers.append(number)
            held.append(item)
            num_bytes += item_bytes
            if len(held) >= size or num_bytes >= _CHUNK_BYTES:
                yield Chunk(name, form, numbers, held)
                numbers, held, num_bytes = [], [], 0
    except (LorakitError, OSError):
        if held:
            yield Chunk(name, form, numbers, held)
        raise
    if held:
        yield Chunk(name, form, numbers, held)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


_PARSERS: dict[str, Callable[[Any], Sequence[Value]]] = {
    ".jsonl": lambda lines: [parse_json_line(line) for line in lines],
    ".txt": lambda lines: [parse_text_line(line) for line in lines],
    ".arrow": parse_batch,
    ".json": list,
    ".csv": list,
    ".tsv": list,
    "": list,
}
