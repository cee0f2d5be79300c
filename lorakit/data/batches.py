"""The batch plan: which samples make a step, and how they are laid out. A pure function of seed, epoch, step
and rank.

Nothing is iterated and nothing is saved: to resume is to ask for another step. A step holds `batch_size`
samples over all ranks; the last step of an epoch holds what is left. Its samples are dealt to the ranks, then
laid out in micro-batches of at most `micro_batch_tokens` tokens: side by side in one row when packed, else as
padded rows. Neither changes the loss of the step, which is a sum over its samples divided by its number of
trained tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lorakit.data.stream import Stream
from lorakit.data.tokens import Entry, Part, TokenData, as_batch
from lorakit.errors import LorakitError, RunError
from lorakit.micro_batch import MicroBatch


@dataclass(frozen=True)
class Step:
    """What one rank does in one optimizer step, and the sums over all ranks."""

    micros: tuple[MicroBatch, ...]  # at least one; one without targets when the rank has no sample
    num_targets: int  # trained tokens of the step, on all ranks
    num_tokens: int  # real tokens of the step, on all ranks


@lru_cache(maxsize=2)  # consecutive steps share it
def order(parts: tuple[Part, ...], seed: int, epoch: int) -> np.ndarray:
    """The samples of an epoch in the order in which they are trained."""
    pool = np.concatenate([drawn(part, number, seed, epoch) for number, part in enumerate(parts)])
    return pool[np.random.Generator(np.random.PCG64([seed, epoch])).permutation(len(pool))]


def drawn(part: Part, number: int, seed: int, epoch: int) -> np.ndarray:
    """The samples of part `number` in an epoch: `num_draws` of an endless row of permutations, each epoch
    going on where the one before stopped, so that no sample is ever seen more than once more than another."""
    size, count = part.stop - part.start, part.num_draws
    if count == size:
        return np.arange(part.start, part.stop)
    found, place = [], epoch * count
    while count:
        turn, offset = divmod(place, size)
        taken = min(count, size - offset)
        turns = np.random.Generator(np.random.PCG64([seed, number, turn, 2]))
        found.append(turns.permutation(size)[offset : offset + taken])
        place, count = place + taken, count - taken
    return part.start + np.concatenate(found) if found else np.zeros(0, np.int64)


def steps_per_epoch(parts: tuple[Part, ...], batch_size: int) -> int:
    return -(-sum(part.num_draws for part in parts) // batch_size)


def samples_of(step: int, parts: tuple[Part, ...], batch_size: int, seed: int) -> np.ndarray:
    """Indices of the samples of optimizer step `step` (from 0), over all ranks."""
    epoch, place = divmod(step, steps_per_epoch(parts, batch_size))
    return order(parts, seed, epoch)[place * batch_size : (place + 1) * batch_size]


def deal(samples: Sequence[int], lengths: np.ndarray, num_ranks: int) -> list[list[int]]:
    """Samples for each rank with nearly equal tokens: the longest first, each to the rank with the fewest so
    far."""
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    tokens = [0] * num_ranks
    for sample in sorted(samples, key=lambda s: (-lengths[s], s)):
        rank = tokens.index(min(tokens))
        hands[rank].append(int(sample))
        tokens[rank] += int(lengths[sample])
    return hands


def layout(samples: Sequence[int], lengths: np.ndarray, budget: int, packing: bool) -> list[list[int]]:
    """Samples in micro-batches of at most `budget` tokens (padding counted); a longer sample goes alone.

    Packed: first fit, the longest first. Padded: neighbours in length share a micro-batch.
    """
    micros: list[list[int]] = []
    used: list[int] = []  # packed: tokens; padded: tokens of the longest row
    for sample in sorted(samples, key=lambda s: (-lengths[s], s)):
        length = int(lengths[sample])
        if packing:
            fit = next((i for i, tokens in enumerate(used) if tokens + length <= budget), None)
        else:
            fit = len(micros) - 1 if micros and used[-1] * (len(micros[-1]) + 1) <= budget else None
        if fit is None:
            micros.append([sample])
            used.append(length)
        else:
            micros[fit].append(sample)
            used[fit] += length if packing else 0
    return micros


def collate(samples: Sequence[int], data: TokenData, packing: bool, trained: bool = True) -> MicroBatch:
    """The tensors of a micro-batch; with `trained=False` none of its tokens counts."""
    documents = [data.sample(index) for index in samples]
    lengths = [len(ids) for ids, _ in documents]
    width = sum(lengths) if packing else max(lengths)
    num_rows = 1 if packing else len(documents)
    input_ids = np.zeros((num_rows, width), dtype=np.int64)
    position_ids, mask = np.zeros_like(input_ids), np.zeros_like(input_ids)
    predictors = []
    start = 0
    for number, ((ids, weights), length) in enumerate(zip(documents, lengths, strict=True)):
        row, first = (0, start) if packing else (number, 0)
        input_ids[row, first : first + length] = ids
        position_ids[row, first : first + length] = np.arange(length)
        mask[row, first : first + length] = 1
        predictors.append(row * width + first + np.flatnonzero(weights) - 1)
        start += length
    before = np.concatenate(predictors) if trained else np.zeros(0, dtype=np.int64)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        document_lengths=tuple(lengths) if packing else None,
        attention_mask=None if packing else torch.from_numpy(mask),
        predictors=torch.from_numpy(before),
        targets=torch.from_numpy(input_ids.reshape(-1)[before + 1]),
        samples=tuple(int(index) for index in samples),
    )


def step_of(
    samples: Sequence[int], data: TokenData, budget: int, packing: bool, rank: int, num_ranks: int
) -> Step:
    """What a rank does with the samples of a step."""
    lengths = data.lengths
    mine = deal(samples, lengths, num_ranks)[rank]
    # A rank without a sample must still run a forward and a backward pass, or the others wait for ever.
    micros = layout(mine, lengths, budget, packing) or [[int(samples[0])]]
    return Step(
        micros=tuple(collate(micro, data, packing, trained=bool(mine)) for micro in micros),
        num_targets=int(data.num_targets[samples].sum()),
        num_tokens=int(lengths[samples].sum()),
    )


def first_tokens(data: TokenData, num_tokens: int, packing: bool) -> MicroBatch:
    """The first samples, each cut at half of what is left of `num_tokens` tokens, so that there are several
    of different lengths; every token of them is trained but the first."""
    entries: list[Entry] = []
    for index in range(len(data)):
        ids = data.sample(index)[0][: max(2, num_tokens // 2)]
        if len(ids) > 1:
            weights = np.ones(len(ids), np.uint8)
            weights[0] = 0
            entries.append(Entry(ids, weights))
            num_tokens -= len(ids)
        if num_tokens < 2:
            break
    return collate(range(len(entries)), TokenData.of([as_batch(entries)], ["the first rows"]), packing)


def heaviest(
    lengths: np.ndarray, num_targets: np.ndarray, ids: np.ndarray, budget: int, batch_size: int, packing: bool
) -> list[MicroBatch]:
    """Micro-batches that no micro-batch of a run needs more memory than, made of the tokens `ids`.

    `lengths` and `num_targets`: tokens and trained tokens of the samples, of which a step has `batch_size`.
    Packed: as many tokens as a row can have, in the longest documents. Padded: the longest rows, and the
    block with the most slots. As many of their tokens are trained as `batch_size` samples can have.
    """
    every = np.sort(lengths)[::-1].astype(np.int64)
    if packing:
        most = every[:batch_size]
        sizes = np.diff(np.minimum(np.cumsum(most), max(budget, int(most[0]))), prepend=0)
        shapes = [sizes[sizes > 0]]
    else:
        most = np.minimum(batch_size, np.maximum(1, budget // every))  # rows, where there are as many
        rows = np.minimum(np.arange(len(every), 0, -1), most)
        full = int((every * rows).argmax())
        shapes = [every[: rows[0]], every[full : full + rows[full]]][: 2 if full else 1]
    trained = int(np.sort(num_targets)[::-1][:batch_size].sum(dtype=np.int64))
    return [_made_up(shape.tolist(), trained, ids, packing) for shape in shapes]


def _made_up(sizes: Sequence[int], trained: int, ids: np.ndarray, packing: bool) -> MicroBatch:
    entries = []
    for size in sizes:
        weights = np.zeros(size, np.uint8)
        weights[max(1, size - trained) :] = 1
        trained -= int(weights.sum())
        entries.append(Entry(np.resize(ids, size), weights))
    return collate(range(len(sizes)), TokenData.of([as_batch(entries)], ["the most of the run"]), packing)


@dataclass(frozen=True)
class Batches:
    """The plan over one set of samples."""

    data: TokenData
    batch_size: int
    seed: int
    micro_batch_tokens: int
    packing: bool
    rank: int = 0
    num_ranks: int = 1

    def at(self, step: int) -> Step:
        """What this rank does in optimizer step `step`."""
        samples = samples_of(step, self.data.parts, self.batch_size, self.seed).tolist()
        budget, packing = self.micro_batch_tokens, self.packing
        return step_of(samples, self.data, budget, packing, self.rank, self.num_ranks)

    def every_sample(self) -> Iterator[MicroBatch]:
        """This rank's share of all samples, each once, in windows of the file order: for evaluation."""
        lengths = self.data.lengths
        for start in range(0, len(lengths), 1024):
            window = range(start, min(start + 1024, len(lengths)))
            for number, micro in enumerate(layout(window, lengths, self.micro_batch_tokens, self.packing)):
                if number % self.num_ranks == self.rank:
                    yield collate(micro, self.data, self.packing)


class StreamEnded(RunError):
    """Rows further on in a stream cannot be trained."""


@dataclass
class StreamBatches:
    """The plan over a stream: step s takes its samples [s * batch_size, (s + 1) * batch_size)."""

    stream: Stream
    batch_size: int
    micro_batch_tokens: int
    packing: bool
    rank: int = 0
    num_ranks: int = 1
    data: TokenData | None = None  # of the last step that was asked for

    def at(self, step: int) -> Step:
        """What this rank does in optimizer step `step`. Raises: StreamEnded."""
        try:
            data = self.stream.samples_at(step * self.batch_size, self.batch_size)
        except LorakitError as error:
            raise StreamEnded(error.message, error.hint) from None
        self.data = data
        samples = list(range(len(data)))
        return step_of(samples, data, self.micro_batch_tokens, self.packing, self.rank, self.num_ranks)
