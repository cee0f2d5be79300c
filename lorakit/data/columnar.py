"""Parquet and Arrow files -> batches of rows.

Arrow files are mapped, not read; of Parquet one batch is held.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.data.values import parse_batch, too_long, weigh
from lorakit.errors import LorakitError

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch

_JOINED_BYTES = 1 << 20  # batches with more are not put together


def columnar(
    path: Path, name: str, form: str, size: int, skip: int, row_bytes: int, chunk_bytes: int
) -> "Iterator[tuple[range, RecordBatch | list[str]]]":
    """(numbers, rows) after `skip` rows: at most `size` and about `chunk_bytes`. A row that has more than
    `row_bytes` is alone, in a list: the reason that it is not read.

    Raises: LorakitError when the file is broken.
    """
    most = min(row_bytes, chunk_bytes)
    what, reader = {".parquet": ("Parquet", _parquet), ".arrow": ("Arrow", _arrow)}[form]
    with _refusing(name, what):
        for first, batch in reader(path, name, skip, size):
            for number, piece in _pieces(first, _plain(batch), most):
                numbers = range(number, number + piece.num_rows)
                if piece.nbytes > row_bytes and (num_bytes := weigh(parse_batch(piece))) > row_bytes:
                    yield numbers, [too_long(num_bytes, row_bytes)]
                else:
                    yield numbers, piece


def _parquet(path: Path, name: str, skip: int, size: int) -> "Iterator[tuple[int, RecordBatch]]":
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        _refuse_doubled(name, file.schema_arrow.names)
        first, before = 0, 0  # row groups, and rows in them, that are passed over whole
        counts = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
        while first < len(counts) and before + counts[first] <= skip:
            before += counts[first]
            first += 1
        if first < len(counts):
            batches = file.iter_batches(batch_size=size, row_groups=range(first, len(counts)))
            yield from _numbered(batches, before, skip, size)


def _arrow(path: Path, name: str, skip: int, size: int) -> "Iterator[tuple[int, RecordBatch]]":
    import pyarrow.ipc

    if not path.stat().st_size:
        raise LorakitError(f"{name}: not Arrow: it is empty")
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            names, batches = file.schema.names, (file.get_batch(n) for n in range(file.num_record_batches))
        else:  # a stream, as `datasets` writes it
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
            names = batches.schema.names
        _refuse_doubled(name, names)
        yield from _joined(_numbered(batches, 0, skip, size, _check), size)


def _check(batch: "RecordBatch") -> None:
    """Nothing in it points outside of its own bytes: to read such a value would be a crash."""
    for column in batch.columns:
        column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: "DataType") -> "DataType":
    """The type with bytes for text: whether those are UTF-8 is for the row to tell, not for the file."""
    import pyarrow
    from pyarrow import types

    def named_as_bytes(field: Any) -> Any:  # whose name is read, which raises where it is not UTF-8
        return pyarrow.field(field.name, _as_bytes(field.type), field.nullable)

    if types.is_struct(kind):
        return pyarrow.struct([named_as_bytes(field) for field in kind])
    if types.is_map(kind):
        return pyarrow.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _as_bytes(kind.value_type), kind.ordered)
    for is_list, make in ((types.is_list, pyarrow.list_), (types.is_large_list, pyarrow.large_list)):
        if is_list(kind):
            return make(named_as_bytes(kind.value_field))
    texts = {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }
    return texts.get(kind, kind)


def _joined(batches: "Iterable[tuple[int, RecordBatch]]", size: int) -> "Iterator[tuple[int, RecordBatch]]":
    """Small batches put together to at most `size` rows: what is done by the chunk pays off by the row."""
    import pyarrow

    first = 0
    held: list[RecordBatch] = []
    for number, batch in batches:
        rows = sum(part.num_rows for part in held)
        if held and (rows + batch.num_rows > size or sum(part.nbytes for part in held) > _JOINED_BYTES):
            yield first, held[0] if len(held) == 1 else pyarrow.concat_batches(held)
            held = []
        first = first if held else number
        held.append(batch)
    if held:
        yield first, held[0] if len(held) == 1 else pyarrow.concat_batches(held)


@contextmanager
def _refusing(name: str, what: str) -> Iterator[None]:
    """Raises: LorakitError for what pyarrow says about a broken file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the disk, not of what is on it
            raise
        raise LorakitError(f"{name}: not {what}: {error}") from None


def _refuse_doubled(name: str, names: Sequence[str]) -> None:
    if doubled := [column for column in names if names.count(column) > 1]:
        raise LorakitError(f'{name}: two columns are named "{doubled[0]}"')


def _numbered(
    batches: "Iterable[RecordBatch]",
    before: int,
    skip: int,
    size: int,
    check: "Callable[[RecordBatch], None] | None" = None,
) -> "Iterator[tuple[int, RecordBatch]]":
    """(number of its first row, at most `size` rows) after `skip` rows; `before` of them are passed over."""
    for batch in batches:
        if check and before + batch.num_rows > skip:
            check(batch)
        for start in range(max(skip - before, 0), batch.num_rows, size):
            yield before + start + 1, batch.slice(start, size)
        before += batch.num_rows


def _pieces(number: int, batch: "RecordBatch", most: int) -> "list[tuple[int, RecordBatch]]":
    """(number of its first row, rows) of at most `most` bytes, or one row."""
    if batch.nbytes > most and batch.num_rows > 1:
        half = batch.num_rows // 2
        rest = _pieces(number + half, batch.slice(half), most)
        return [*_pieces(number, batch.slice(0, half), most), *rest]
    if batch.get_total_buffer_size() > 2 * batch.nbytes:  # a view into more: pickling would take it all along
        import pyarrow

        batch = batch.take(pyarrow.array(range(batch.num_rows)))
    return [(number, batch)]


def _plain(batch: "RecordBatch") -> "RecordBatch":
    """Columns whose slices hold their own text only: no dictionaries and no views."""
    import pyarrow
    from pyarrow import types

    columns = []
    for column in batch.columns:
        if types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if types.is_string_view(column.type):
            column = column.cast(pyarrow.large_string())
        columns.append(column)
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)
