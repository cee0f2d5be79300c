"""Text files -> items: JSONL and plain text by the line, CSV and JSON by the record; also compressed.

Memory is bounded whatever a file holds: a line that is too long is passed over piece by piece, of a JSON list
only a window is held, and compressed text is unpacked as far as it has been read.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorakit.data.values import DECODER, NOT_UTF8, Item, Value, after_space, no_object, told, too_long
from lorakit.errors import LorakitError

_WINDOW = 1 << 20  # characters of a JSON list that are read at a time
_ESCAPED = re.compile("[\udc80-\udcff]")  # what surrogateescape puts in for a byte that is not UTF-8
_STARTS = {  # how files begin that are no text
    b"\x1f\x8b": "it is compressed with gzip: end its name with .gz",
    b"\x28\xb5\x2f\xfd": "it is compressed with Zstandard: end its name with .zst",
    b"PAR1\x15": "it is Parquet: end its name with .parquet",
    b"ARROW1\0\0": "it is Arrow: end its name with .arrow",
    b"\xff\xfe": "it is UTF-16: save it as UTF-8",
    b"\xfe\xff": "it is UTF-16: save it as UTF-8",
}


class _Unpacked(io.RawIOBase):
    """The bytes of a compressed file, and a stop when they are too many."""

    def __init__(self, path: Path, name: str, kind: str, most: int) -> None:
        import pyarrow

        self.stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), kind)
        self.name, self.kind, self.most, self.num_bytes = name, kind, most, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            count = int(self.stream.readinto(buffer))
        except OSError as error:
            if error.errno is not None:  # of the disk, not of what is on it
                raise
            reason = f"cannot be unpacked ({self.kind}): {error}"
            cure = (
                "Fetch it or compress it again. If it is not compressed, take the last suffix off its name."
            )
            raise LorakitError(f"{self.name}: {reason}", cure) from None
        self.num_bytes += count
        if self.num_bytes > self.most:
            raise LorakitError(
                f"{self.name}: unpacks to more than {told(self.most)}, the most that is read",
                "If that is right, unpack it and name the file without its last suffix.",
            )
        return count


@contextmanager
def open_text(path: Path, name: str, packing: str, unpacked_bytes: int) -> Iterator[io.BufferedReader]:
    """The file, unpacked and after its byte-order mark.

    Raises: LorakitError when it is told by its first bytes that it is no text.
    """
    if packing and not path.stat().st_size:
        raise LorakitError(f"{name}: cannot be unpacked: it is empty")
    kind = {".gz": "gzip", ".zst": "zstd", "": ""}[packing]
    raw: Any = _Unpacked(path, name, kind, unpacked_bytes) if kind else io.FileIO(path)
    with io.BufferedReader(raw, 1 << 18) as file:
        start = file.peek(8)[:8]
        for signature, what in _STARTS.items():
            if start.startswith(signature):
                raise LorakitError(f"{name}: not text: {what}")
        if start.startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        yield file


def lines(file: io.BufferedReader, most: int) -> Iterator[Item]:
    """Every line that is not blank; one that is too long is passed over piece by piece."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        num_bytes = len(line)
        if num_bytes > most:
            while not line.endswith(b"\n") and (line := file.readline(_WINDOW)):
                num_bytes += len(line)
            yield number, too_long(num_bytes, most), 0
        elif not line.isspace():
            yield number, line, num_bytes


def csv_records(
    file: io.BufferedReader, name: str, delimiter: str, header: Sequence[str] | None, most: int
) -> Iterator[Item]:
    records = _records(file, name, delimiter, 0 if header is None else 1, most)
    names = next(records, []) if header is None else list(header)
    if doubled := [cell for cell in names if names.count(cell) > 1]:
        raise LorakitError(f'{name}: two columns are named "{doubled[0]}"')
    if _ESCAPED.search("".join(names)):
        raise LorakitError(f"{name}: the header is {NOT_UTF8}")
    for number, cells in enumerate(records, 1):
        text = "".join(cells)
        value: Value
        if len(cells) != len(names):
            value = f"the header has {len(names)} cells, the record {len(cells)}"
        elif not text.isascii() and _ESCAPED.search(text):
            value = NOT_UTF8
        else:
            value = dict(zip(names, cells, strict=True))
        yield number, value, len(text)


def _records(
    file: io.BufferedReader, name: str, delimiter: str, number: int, most: int
) -> Iterator[list[str]]:
    """Records without the empty ones; `number` is that of the first, 0 that of a header."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    num_read = 0  # characters since the last record ended

    def pieces() -> Iterator[str]:
        nonlocal num_read
        while line := text.readline(most + 1):
            num_read += len(line)
            if num_read > most:
                place = f"{name}:{number}: " if number else f"{name}: the header: "
                what = f"{place}more than {told(most)} in one record"
                raise LorakitError(what, "Is a quote not closed, or a line end missing?")
            yield line

    csv.field_size_limit(most)  # of the whole process, but nothing else in it reads CSV
    try:
        for cells in csv.reader(pieces(), delimiter=delimiter, strict=True):
            num_read = 0
            if cells:
                yield cells
                number += 1
    except csv.Error as error:
        place = f"{name}:{number}: " if number else f"{name}: the header is "
        cure = 'A cell that begins with a quote ends with one; a quote inside it is written twice ("").'
        raise LorakitError(f"{place}not CSV: {error}", cure) from None


def json_records(file: io.BufferedReader, name: str, most: int) -> Iterator[Item]:
    text = _Json(file, name, most)
    start = text.next_character()
    if not start:
        raise LorakitError(f"{name}: not JSON: it is empty")
    if start != "[":
        raise LorakitError(
            f"{name}: expected a list of objects", "One object per line is JSONL: name the file .jsonl"
        )
    text.at += 1
    number, closed = 0, text.next_character() == "]"
    while not closed:
        number += 1
        value, num_bytes = text.next_value(number)
        yield number, value if isinstance(value, dict) else no_object(value), num_bytes
        closed = text.next_character() == "]"
        text.at += 0 if closed else 1
    text.at += 1
    if text.next_character():
        raise text.broken("Extra data", text.at)


class _Json:
    """A list in JSON, of which only a window is held: the value that is being read, and what came with it."""

    def __init__(self, file: io.BufferedReader, name: str, most: int) -> None:
        self.file, self.name, self.most = file, name, most
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0  # the window, and how far it has been read
        self.num_bytes = self.num_lines = self.column = 0  # before the window
        self.ended = False

    def next_character(self) -> str:
        """The next one that is no white space, not read yet; empty at the end of the file."""
        while True:
            self.at = after_space(self.text, self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._grow()

    def next_value(self, number: int) -> tuple[Any, int]:
        """(the next value, its characters). A comma or the closing bracket follows it."""
        self.next_character()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                reason, where = error.msg, error.pos
            except (ValueError, RecursionError) as error:
                raise LorakitError(f"{self.name}: not JSON: row {number}: {error}") from None
            else:
                reason, where = "Expecting ',' delimiter", after_space(self.text, end)
                if self.text[where : where + 1] in (",", "]"):
                    start, self.at = self.at, end
                    if end - start > self.most:
                        raise self._too_long(number)
                    return value, end - start
            # Only of what stands at its very end can the rest of the window say something else.
            cut = where + 16 > len(self.text) or reason.startswith("Unterminated")
            if self.ended or not cut:
                raise self.broken(reason, where)
            if len(self.text) - self.at > self.most:
                raise self._too_long(number)
            self._grow()

    def _too_long(self, number: int) -> LorakitError:
        return LorakitError(
            f"{self.name}:{number}: more than {told(self.most)} in one row",
            "Is a quote not closed? As JSONL (one object per line) such a row is passed over.",
        )

    def broken(self, reason: str, where: int) -> LorakitError:
        """The error at an index of the window, told by its place in the file."""
        line, _, column = self._place(where)
        return LorakitError(f"{self.name}: not JSON: {reason}: line {line + 1} column {column + 1}")

    def _place(self, where: int) -> tuple[int, int, int]:
        """(line ends before an index of the window, in it, characters since the last)."""
        count = self.text.count("\n", 0, where)
        column = where - 1 - self.text.rfind("\n", 0, where) if count else self.column + where
        return self.num_lines + count, count, column

    def _grow(self) -> None:
        self.num_lines, _, self.column = self._place(self.at)
        raw = self.file.read(max(_WINDOW, len(self.text) - self.at))  # doubling: linear in all
        started = len(self.decoder.getstate()[0])  # bytes of a character whose rest is in `raw`
        try:
            more = self.decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            near = f"near byte {self.num_bytes - started + error.start + 1:,}"
            raise LorakitError(f"{self.name}: not JSON: {NOT_UTF8} ({near})", "Save it as UTF-8.") from None
        self.ended = not raw
        self.num_bytes += len(raw)
        self.text, self.at = self.text[self.at :] + more, 0
