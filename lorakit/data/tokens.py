"""All samples of a data set as tokens: Arrow record batches in memory or in a memory-mapped file. No torch.

Shapes: N tokens and S samples.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.uint8())),  # 1 where the token is a prediction target
        ("file", pa.int32()),  # index into the names of the files
        ("row", pa.int64()),
        ("targets", pa.int32()),  # trained tokens
        ("hash", pa.uint64()),  # of the ids and of the length before cutting: equal for equal samples
        ("id_hash", pa.uint64()),  # of the row's field "id"; 0 without one
        ("cut", pa.uint8()),  # 1: longer than data.max_length
        ("ends", pa.uint8()),  # 1: an end token is trained
    ]
)


@dataclass(frozen=True)
class Entry:
    """One sample, as it goes into a record batch."""

    ids: np.ndarray  # (T,) int32
    weights: np.ndarray  # (T,) uint8
    file: int = 0
    row: int = 0
    hash: int = 0
    id_hash: int = 0
    cut: bool = False
    ends: bool = True


# pa.array() and Array.to_numpy() do the same, and import pandas first: a quarter of a second.


def _arrow(numbers: np.ndarray) -> pa.Array:
    """Numbers in one dimension as Arrow's, over the same memory."""
    kind = pa.from_numpy_dtype(numbers.dtype)
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(np.ascontiguousarray(numbers))])


def _view(numbers: pa.Array) -> np.ndarray:
    """Arrow's numbers, of which none is null, as numpy's: the same memory, not to be written to."""
    kind = np.dtype(numbers.type.to_pandas_dtype())
    memory = numbers.buffers()[1] or b""  # an empty array may have none
    found = np.frombuffer(memory, kind, len(numbers), numbers.offset * kind.itemsize)
    found.flags.writeable = False
    return found


def as_batch(entries: Sequence[Entry]) -> pa.RecordBatch:
    """The entries as a record batch of SCHEMA."""
    offsets = np.cumsum([0, *(len(entry.ids) for entry in entries)], dtype=np.int32)

    def joined(arrays: list[np.ndarray], dtype: Any) -> pa.Array:
        values = np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
        return pa.ListArray.from_arrays(_arrow(offsets), _arrow(values))

    numbers = {
        "file": [entry.file for entry in entries],
        "row": [entry.row for entry in entries],
        "targets": [int(entry.weights.sum()) for entry in entries],
        **{name: [getattr(entry, name) for entry in entries] for name in ("hash", "id_hash", "cut", "ends")},
    }
    columns = [
        joined([entry.ids for entry in entries], np.int32),
        joined([entry.weights for entry in entries], np.uint8),
        *(
            _arrow(np.array(values, SCHEMA.field(name).type.to_pandas_dtype()))
            for name, values in numbers.items()
        ),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


@dataclass(frozen=True)
class Part:
    """Samples [start, stop) of one source, and how often each is seen in an epoch."""

    start: int
    stop: int
    weight: float = 1.0

    @property
    def num_draws(self) -> int:
        """Samples of this part in an epoch."""
        return max(1, round(self.weight * (self.stop - self.start))) if self.stop > self.start else 0


@dataclass(frozen=True)
class TokenData:
    """The samples of a data set, end to end in the order of its rows."""

    batches: tuple[pa.RecordBatch, ...]
    files: tuple[str, ...]
    parts: tuple[Part, ...]
    picked: np.ndarray | None = None  # (S,) which of the samples in `batches`; None: all
    stored_fingerprint: str = ""  # of all samples in `batches`

    @classmethod
    def of(cls, batches: Sequence[pa.RecordBatch], files: Sequence[str]) -> "TokenData":
        whole = Part(0, sum(batch.num_rows for batch in batches))
        return cls(tuple(batches), tuple(files), (whole,))

    def __len__(self) -> int:
        return len(self.picked) if self.picked is not None else self._starts[-1]

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first sample of each batch, and one past the last."""
        return list(accumulate((batch.num_rows for batch in self.batches), initial=0))

    @cached_property
    def _tokens(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, weights, offsets) of each batch: views, not copies."""
        found = []
        for batch in self.batches:
            ids, weights = batch.column("ids"), batch.column("weights")
            found.append((_view(ids.values), _view(weights.values), _view(ids.offsets)))
        return found

    def column(self, name: str) -> np.ndarray:  # (S,)
        """One number for each sample: a column of SCHEMA."""
        every = [_view(batch.column(name)) for batch in self.batches]
        whole = np.concatenate(every) if every else np.zeros(0, np.int64)
        return whole if self.picked is None else whole[self.picked]

    @cached_property
    def lengths(self) -> np.ndarray:  # (S,) int32, tokens of each sample
        every = [np.diff(offsets) for _, _, offsets in self._tokens]
        whole = np.concatenate(every) if every else np.zeros(0, np.int32)
        return whole if self.picked is None else whole[self.picked]

    @cached_property
    def num_targets(self) -> np.ndarray:  # (S,) int32, trained tokens of each sample
        return self.column("targets")

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def num_trained(self) -> int:
        return int(self.num_targets.sum(dtype=np.int64))

    @property
    def num_draws(self) -> int:
        """Samples of an epoch: a source counts as often as its weight says."""
        return sum(part.num_draws for part in self.parts)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights) of a sample: views, not copies."""
        number = int(index if self.picked is None else self.picked[index])
        at = bisect_right(self._starts, number) - 1
        ids, weights, offsets = self._tokens[at]
        first = number - self._starts[at]
        span = slice(offsets[first], offsets[first + 1])
        return ids[span], weights[span]

    @cached_property
    def places(self) -> "Places":
        return Places(self.files, self.column("file"), self.column("row"))

    @cached_property
    def begins_row(self) -> np.ndarray:  # (S,) whether the sample is the first of its row
        file, row = self.places.file, self.places.row
        changes = (np.diff(file, prepend=-1) != 0) | (np.diff(row, prepend=-1) != 0)
        return np.asarray(changes, dtype=bool)

    def select(self, chosen: np.ndarray) -> "TokenData":
        """The samples with these numbers, in ascending order."""
        bounds = [(np.searchsorted(chosen, (part.start, part.stop)), part.weight) for part in self.parts]
        parts = tuple(Part(int(start), int(stop), weight) for (start, stop), weight in bounds)
        picked = chosen if self.picked is None else self.picked[chosen]
        return TokenData(self.batches, self.files, parts, picked, self.stored_fingerprint)

    def in_order(self, chosen: np.ndarray) -> "TokenData":
        """The samples with these numbers, in this order, as one part."""
        picked = chosen if self.picked is None else self.picked[chosen]
        return TokenData(self.batches, self.files, (Part(0, len(picked)),), picked)

    def split(self, share: float, seed: int) -> tuple["TokenData", "TokenData"]:
        """(training samples, held-out samples): about `share` of them, drawn by the seed.

        Equal samples stay on one side, and so do those of one row: none that is scored is also trained on.
        """
        first = np.maximum.accumulate(np.where(self.begins_row, np.arange(len(self)), 0))  # of its row
        _, group = np.unique(self.column("hash")[first], return_inverse=True)
        sizes = np.bincount(group)
        shuffled = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(sizes))
        wanted = min(max(1, round(share * len(self))), len(self) - 1)
        fitting = shuffled[np.cumsum(sizes[shuffled]) <= wanted]
        left = wanted - int(sizes[fitting].sum())
        # A group that would overshoot is passed over for smaller ones behind it.
        behind = shuffled[len(fitting) :]
        behind = behind[sizes[behind] <= left]
        more = behind[np.cumsum(sizes[behind]) <= left]
        taken = np.concatenate([fitting, more])
        if not len(taken) and len(sizes) > 1:
            taken = np.array([sizes.argmin()])
        held_out = np.isin(group, taken)
        return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))

    def fingerprint(self) -> str:
        """SHA-256 of what is trained on: tokens, weights, boundaries, and how often each counts."""
        whole = self.stored_fingerprint or Digest.of(self.batches)
        if self.picked is None and all(part.weight == 1 for part in self.parts):
            return whole
        digest = hashlib.sha256(whole.encode())
        digest.update(b"" if self.picked is None else np.ascontiguousarray(self.picked, np.int64).tobytes())
        digest.update(repr([(part.start, part.stop, part.weight) for part in self.parts]).encode())
        return digest.hexdigest()


class Digest:
    """SHA-256 of samples, whatever batches they come in."""

    def __init__(self) -> None:
        self._parts = {name: hashlib.sha256() for name in ("ids", "weights", "lengths")}

    def add(self, batch: pa.RecordBatch) -> None:
        for name in ("ids", "weights"):
            self._parts[name].update(np.ascontiguousarray(_view(batch.column(name).flatten())).data)
        lengths = np.diff(_view(batch.column("ids").offsets)).astype(np.int64)
        self._parts["lengths"].update(lengths.data)

    def hexdigest(self) -> str:
        return hashlib.sha256(b"".join(part.digest() for part in self._parts.values())).hexdigest()

    @classmethod
    def of(cls, batches: Sequence[pa.RecordBatch]) -> str:
        digest = cls()
        for batch in batches:
            digest.add(batch)
        return digest.hexdigest()


@dataclass(frozen=True)
class Places(Sequence[str]):
    """file:row of every sample."""

    files: tuple[str, ...]
    file: np.ndarray  # (S,)
    row: np.ndarray  # (S,)

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return f"{self.files[self.file[index]]}:{self.row[index]}"


def mapped(path: Path) -> tuple[pa.RecordBatch, ...]:
    """The record batches of an Arrow file, mapped into memory: no token is read before it is used."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return tuple(reader.get_batch(number) for number in range(reader.num_record_batches))
