"""The trial before step 0 is the most that a run can need."""

from typing import Any

import numpy as np
import pytest

from lorakit.data.batches import Batches, heaviest
from tests.samples import made


def plan(number: int, **options: Any) -> Batches:
    draw = np.random.default_rng(number)
    lengths = draw.integers(2, draw.choice([5, 40, 200]), draw.integers(3, 60))
    weights = (draw.random(lengths.sum()) < draw.choice([0.1, 0.9])).astype(np.uint8)
    offsets = np.cumsum([0, *lengths])
    weights[offsets[:-1]] = 0
    return Batches(made(draw.integers(0, 9, lengths.sum()), weights, offsets.tolist()), **options)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("seed", range(25))
def test_no_micro_batch_of_a_run_is_heavier_than_the_trial(seed: int, packing: bool) -> None:
    draw = np.random.default_rng(seed + 100)
    batch_size, budget = int(draw.integers(1, 20)), int(draw.integers(4, 400))
    batches = plan(seed, batch_size=batch_size, seed=0, micro_batch_tokens=budget, packing=packing)
    data = batches.data
    trial = heaviest(data.lengths, data.num_targets, data.sample(0)[0], budget, batch_size, packing)
    slots = max(micro.input_ids.numel() for micro in trial)
    longest = max(int(micro.position_ids.max()) for micro in trial)
    trained = max(len(micro.targets) for micro in trial)
    seen = [micro for step in range(40) for micro in batches.at(step).micros]
    assert max(micro.input_ids.numel() for micro in seen) <= slots <= max(budget, data.lengths.max())
    assert max(int(micro.position_ids.max()) for micro in seen) <= longest == data.lengths.max() - 1
    if packing:  # padded rows cost logits at every slot
        assert max(len(micro.targets) for micro in seen) <= trained or trained == slots - len(
            trial[0].samples
        )
        assert [micro.input_ids.shape[0] for micro in trial] == [1]


def test_the_trial_is_as_much_as_there_can_be() -> None:
    """Where one long document leaves room that only a part of the next can fill, it is filled."""
    lengths = np.array([1000, 900, *[500] * 30])
    ids = np.arange(3)
    [packed] = heaviest(lengths, lengths - 1, ids, 1500, 16, packing=True)
    assert packed.document_lengths == (1000, 500)
    assert len(packed.targets) == 1498
    padded = heaviest(lengths, lengths - 1, ids, 1500, 16, packing=False)
    assert [tuple(micro.input_ids.shape) for micro in padded] == [(1, 1000), (3, 500)]
    [alone] = heaviest(lengths, np.full(32, 7), ids, 10_000, 2, packing=True)
    assert alone.document_lengths == (1000, 900)  # a step has no more samples
    assert len(alone.targets) == 14
