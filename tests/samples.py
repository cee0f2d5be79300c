"""Samples made by hand, as the rest of lorakit sees them."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from lorakit.data.tokens import Entry, Part, TokenData, as_batch


def made(ids: np.ndarray, weights: np.ndarray, offsets: Sequence[int], file: str = "by hand") -> TokenData:
    """Samples [offsets[i], offsets[i + 1]) of the tokens, as rows 1, 2, ... of `file`."""
    spans = [slice(start, stop) for start, stop in pairwise(offsets)]
    entries = [
        Entry(ids[span].astype(np.int32), weights[span].astype(np.uint8), row=number, hash=number)
        for number, span in enumerate(spans, 1)
    ]
    return TokenData.of([as_batch(entries)], [file])


def whole(num_samples: int) -> tuple[Part, ...]:
    """All samples, each once in an epoch."""
    return (Part(0, num_samples),)
