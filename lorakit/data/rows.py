"""Files and hub data sets -> rows, each with the place it came from.

A row is a 1-based physical line in JSONL and text, a 1-based record elsewhere. A row that cannot be read is
still a row: it carries the reason, so that it can be counted. Blank lines are no rows.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lorakit.data.formats import kind_of
from lorakit.errors import LorakitError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class Row:
    place: str  # "data.jsonl:3"
    value: dict[str, Any] | None  # None: `error` says why
    error: str = ""


def read_rows(source: str, limit: int | None = None) -> Iterator[Row]:
    """The rows of a file or of a hub data set `owner/name[:split]`, at most `limit`.

    Raises: LorakitError when there is no such file, or it has no known form.
    """
    path = Path(source)
    if not path.is_absolute():
        rows = _hub(source)
    elif not path.exists():
        raise LorakitError(f"{shown(path)}: no such file")
    elif path.suffix.lower() not in SUFFIXES:
        raise LorakitError(f"{shown(path)}: not a data file lorakit reads", f"One of {', '.join(SUFFIXES)}.")
    else:
        reader = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".txt": _text}.get(
            path.suffix.lower(), _csv
        )
        rows = reader(path, shown(path))
    try:
        yield from islice(rows, limit)
    except OSError as error:
        raise LorakitError(f"{shown(path)}: cannot read: {error.strerror or error}") from None


def shown(path: Path) -> str:
    """The path as a user would type it: relative when it lies below the current directory."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _lines(path: Path, name: str) -> Iterator[tuple[str, str | None]]:
    """(place, text of the line, None when it is not UTF-8), without blank lines and without a byte-order
    mark."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if not raw.strip():
                continue
            try:
                yield f"{name}:{number}", raw.decode().rstrip("\r\n")
            except UnicodeDecodeError:
                yield f"{name}:{number}", None


def _object(place: str, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(place, value)
    return Row(place, None, f"a row must be an object with fields, not {kind_of(value)}")


def _jsonl(path: Path, name: str) -> Iterator[Row]:
    for place, line in _lines(path, name):
        if line is None:
            yield Row(place, None, "not UTF-8 text")
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            yield Row(place, None, f"not JSON: {error.msg} (column {error.colno})")
        except (ValueError, RecursionError) as error:
            yield Row(place, None, f"not JSON: {error}")
        else:
            yield _object(place, value)


def _json(path: Path, name: str) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise LorakitError(f"{name}: not JSON: {error}") from None
    if not isinstance(values, list):
        raise LorakitError(
            f"{name}: expected a list of objects", "One object per line is JSONL: name the file .jsonl"
        )
    for number, value in enumerate(values, 1):
        yield _object(f"{name}:{number}", value)


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(1 << 28)
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        records = _records(reader, name)
        header = next(records, [])
        if doubled := [cell for cell in header if header.count(cell) > 1]:
            raise LorakitError(f'{name}: two columns are named "{doubled[0]}"')
        if any(map(_not_utf8, header)):
            raise LorakitError(f"{name}: the header is not UTF-8 text")
        for number, cells in enumerate(records, 1):
            place = f"{name}:{number}"
            if len(cells) != len(header):
                yield Row(place, None, f"the header has {len(header)} cells, the record {len(cells)}")
            elif any(map(_not_utf8, cells)):
                yield Row(place, None, "not UTF-8 text")
            else:
                yield Row(place, dict(zip(header, cells, strict=True)))


def _records(reader: Iterator[list[str]], name: str) -> Iterator[list[str]]:
    number = 0  # of the record that is being read; 0 is the header
    try:
        for cells in reader:
            if cells:
                yield cells
                number += 1
    except csv.Error as error:
        place = f"{name}:{number}: " if number else f"{name}: the header is "
        cure = 'A cell that begins with a quote ends with one; a quote inside it is written twice ("").'
        raise LorakitError(f"{place}not CSV: {error}", cure) from None


def _not_utf8(cell: str) -> bool:
    """Whether surrogateescape had to stand in for a byte."""
    return any("\udc80" <= character <= "\udcff" for character in cell)


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches():
            for value in batch.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", value)
    except pyarrow.ArrowException as error:
        raise LorakitError(f"{name}: not Parquet: {error}") from None


def _text(path: Path, name: str) -> Iterator[Row]:
    for place, line in _lines(path, name):
        yield Row(place, None, "not UTF-8 text") if line is None else Row(place, {"text": line})


def _hub(source: str) -> Iterator[Row]:
    import datasets

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # every layer below (hub, HTTP, Arrow) raises its own kinds
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise LorakitError(
            f"{source}: cannot load this data set from the hub: {reason}",
            "A local file needs its suffix (.jsonl, .csv, ...) and is relative to the recipe.",
        ) from None
    for number, value in enumerate(rows, 1):
        yield Row(f"{source}:{number}", dict(value))
