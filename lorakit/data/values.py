"""What stands in a file -> values: a line of JSONL or text, a batch of Parquet or Arrow.

A value is a row's fields, or in their place the reason why it cannot be read. These functions run where the
rows are wanted, which may be another process than the one that reads the file.
"""

import json
import re
from typing import TYPE_CHECKING, Any

from lorakit.data.formats import kind_of

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Value = dict[str, Any] | str  # a str stands for a row that cannot be read: the reason
Item = tuple[int, Any, int]  # number of a row, what a chunk holds of it, its bytes (about)
NOT_UTF8 = "not UTF-8 text"
DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


def parse_json_line(line: bytes | str) -> Value:
    if isinstance(line, str):
        return line
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return NOT_UTF8
    try:
        value, end = DECODER.raw_decode(text)  # half the time of json.loads
        if after_space(text, end) != len(text):
            value = json.loads(text)
    except (ValueError, RecursionError):
        try:  # white space before it, or its message
            value = json.loads(text.rstrip("\r\n"))
        except json.JSONDecodeError as error:
            return f"not JSON: {error.msg} (column {error.colno})"
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
    return value if isinstance(value, dict) else no_object(value)


def parse_text_line(line: bytes | str) -> Value:
    if isinstance(line, str):
        return line
    try:
        return {"text": line.decode().rstrip("\r\n")}
    except UnicodeDecodeError:
        return NOT_UTF8


def parse_batch(batch: "RecordBatch") -> list[Value]:
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [NOT_UTF8]
    except (ValueError, OverflowError) as error:  # a date that Python has not, for one
        if batch.num_rows == 1:
            return [f"cannot be read: {error}"]
    return [value for n in range(batch.num_rows) for value in parse_batch(batch.slice(n, 1))]


def no_object(value: Any) -> str:
    return f"a row must be an object with fields, not {kind_of(value)}"


def too_long(num_bytes: int, most: int) -> str:
    return f"{told(num_bytes)} in one row, the most is {told(most)}; is a line end missing?"


def told(num_bytes: int) -> str:
    for unit, width in (("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << width:
            return f"{num_bytes / (1 << width):,.0f} {unit}"
    return f"{num_bytes:,} bytes"


def weigh(value: Any) -> int:
    """The text and bytes in a value, at any depth."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(weigh, value.values()))
    return sum(map(weigh, value)) if isinstance(value, list | tuple) else 8
