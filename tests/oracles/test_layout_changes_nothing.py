"""How a step's samples are laid out (packed, padded, micro-batches, ranks) changes rounding, nothing else.

All runs go through lorakit's loop. Two ranks are two runs of one step each, whose gradients are averaged here
as DistributedDataParallel would average them. B starts at random where gradients are compared: from zero, A
would have none.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import loop, optim
from lorakit.adapters import Adapter, Role, attach
from lorakit.data.batches import Batches, deal, order, samples_of, steps_per_epoch
from lorakit.data.tokens import TokenData
from lorakit.kernels import attention
from lorakit.layers import layers_of
from lorakit.recipe.methods import Lora
from lorakit.recipe.optimizer import AdamW
from lorakit.targets import assign, select
from lorakit.tasks import Objective
from lorakit.tasks.causal_lm import CausalLmTask
from tests.samples import made, whole

VOCABULARY = 64
BATCH_SIZE = 8
LENGTHS = (9, 4, 17, 2, 12, 7, 23, 5, 14, 3, 8, 11, 6, 20)  # a whole batch of 8 and a partial one of 6
LAYOUTS: dict[str, dict[str, Any]] = {
    "one packed row": {"micro_batch_tokens": 1000, "packing": True},
    "one sample at a time": {"micro_batch_tokens": 1, "packing": True},
    "packed rows of 30": {"micro_batch_tokens": 30, "packing": True},
    "one padded block": {"micro_batch_tokens": 1000, "packing": False},
    "padded blocks of 40": {"micro_batch_tokens": 40, "packing": False},
}
REFERENCE = "one packed row"
both_kinds = pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])


def token_data() -> TokenData:
    """Random tokens; about half of each sample is trained, its last token always and its first never."""
    draw = np.random.default_rng(3)
    weights = [draw.integers(0, 2, length) for length in LENGTHS]
    for marks in weights:
        marks[-1], marks[0] = 1, 0
    ids = draw.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    return made(ids, np.concatenate(weights).astype(np.uint8), np.cumsum([0, *LENGTHS]))


def batches(seed: int = 0, **layout: Any) -> Batches:
    return Batches(token_data(), **({"batch_size": BATCH_SIZE, "seed": seed} | layout))


def tiny_llama(packing: bool) -> LlamaForCausalLM:
    """The same random weights every time, frozen, with the attention that the layout needs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    attention.register()
    model.set_attn_implementation(attention.NAME if packing else "sdpa")
    return model


def adapt(model: LlamaForCausalLM, dropout: float = 0.0) -> Adapter:
    """LoRA of rank 4 on all linear layers but the head; B is zero."""
    section = Lora(rank=4, dropout=dropout)
    chosen, problems = select(layers_of(model)[0], section.targets)
    targets, more_problems = assign(chosen, section.rank, section.alpha, {}, {})
    assert len(targets) == 14 and not problems and not more_problems
    return attach(section, model, targets, seed=0)


def fill_b(adapter: Adapter) -> None:
    """The same random B every time."""
    generator = torch.Generator().manual_seed(1)
    for item in adapter.trained():
        if item.role is Role.B:
            item.parameter.data.normal_(0, 0.05, generator=generator)


@dataclass
class Seen:
    """An observer that keeps the losses, and what the loop gave to the adapter as gradients."""

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)  # of every step, before clipping

    def stepped(self, state: loop.TrainState) -> None:
        pass

    def metrics(self, line: dict[str, Any]) -> None:
        self.losses.append(line["loss"])

    def best(self, state: loop.TrainState) -> None:
        raise AssertionError("there is no evaluation in these runs")

    def checkpoint(self, state: loop.TrainState) -> None:
        pass


@dataclass
class Training:
    """A tiny model with its adapter and optimizer, ready for steps."""

    plan: Batches
    dropout: float = 0.0
    seed: int = 0  # of the loop alone: of the dropout masks
    task: CausalLmTask = field(default_factory=CausalLmTask)
    state: loop.TrainState = field(default_factory=loop.TrainState)

    def __post_init__(self) -> None:
        self.model = tiny_llama(self.plan.packing)
        self.adapter = adapt(self.model, self.dropout)
        fill_b(self.adapter)
        self.optimizer = optim.build(AdamW(lr=1e-2, weight_decay=0.1), self.adapter.trained())

    def run(self, total_steps: int) -> Seen:
        """From where it stands up to `total_steps`."""
        seen = Seen()

        def keep_gradients(step: int) -> None:
            gradients = {item.name: item.parameter.grad for item in self.adapter.trained()}
            seen.gradients.append({name: g.clone() for name, g in gradients.items() if g is not None})

        self.adapter.before_step = keep_gradients
        outcome = loop.run(
            objective=Objective(self.model, self.task),
            adapter=self.adapter,
            optimizer=self.optimizer,
            batch_at=self.plan.at,
            lr_at=lambda step: optim.lr_at(step, "constant", 1e-2, 3, 20),
            evaluate=None,
            observer=seen,
            state=self.state,
            cadence=loop.Cadence(
                log=1, evaluate=1, checkpoint=100, evaluate_at_start=False, early_stopping=None
            ),
            total_steps=total_steps,
            seed=self.seed,
            max_grad_norm=1.0,
            device=torch.device("cpu"),
            rank=self.plan.rank,
            num_ranks=self.plan.num_ranks,
        )
        assert outcome == "finished"
        return seen


def relative_error(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Frobenius norm of the difference over that of `expected`, over all tensors together."""
    assert ours.keys() == expected.keys()
    difference = sum(float((ours[name] - expected[name]).double().square().sum()) for name in expected)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


# ------------------------------------------------------------------------------------------------------------
# Layouts


@pytest.fixture(scope="module")
def reference() -> Seen:
    return Training(batches(**LAYOUTS[REFERENCE])).run(20)


def test_the_layouts_are_different() -> None:
    """Rows by tokens of every micro-batch of step 0: what the comparisons below compare."""
    shapes = {
        name: [tuple(micro.input_ids.shape) for micro in batches(**layout).at(0).micros]
        for name, layout in LAYOUTS.items()
    }
    samples = samples_of(0, whole(len(LENGTHS)), BATCH_SIZE, seed=0)
    assert shapes[REFERENCE] == [(1, sum(LENGTHS[sample] for sample in samples))]
    assert len(shapes["one sample at a time"]) == BATCH_SIZE
    assert 1 < len(shapes["packed rows of 30"]) < BATCH_SIZE
    assert shapes["one padded block"] == [(BATCH_SIZE, max(LENGTHS[sample] for sample in samples))]
    assert 1 < len(shapes["padded blocks of 40"]) < BATCH_SIZE
    assert any(rows > 1 for rows, _ in shapes["padded blocks of 40"])


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != REFERENCE])
def test_gradients_and_losses_do_not_depend_on_the_layout(name: str, reference: Seen) -> None:
    seen = Training(batches(**LAYOUTS[name])).run(20)
    assert len(seen.gradients[0]) == 28  # A and B of 14 layers
    assert relative_error(seen.gradients[0], reference.gradients[0]) < 1e-6
    np.testing.assert_allclose(seen.losses, reference.losses, rtol=0, atol=1e-5)


def test_the_runs_that_are_compared_learn(reference: Seen) -> None:
    """Losses that stand still would agree in any layout."""
    assert len(reference.losses) == 20
    assert np.mean(reference.losses[-4:]) < np.mean(reference.losses[:4]) - 0.5
    assert all(gradient.norm() > 0 for gradient in reference.gradients[0].values())


@pytest.mark.parametrize("layout", [REFERENCE, "packed rows of 30", "padded blocks of 40"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_together_have_the_gradient_of_one(num_ranks: int, layout: str, reference: Seen) -> None:
    """The mean of the ranks' gradients is the gradient, and their shares of the loss add up to it."""
    ranks = [
        Training(batches(**LAYOUTS[layout], rank=rank, num_ranks=num_ranks)).run(1)
        for rank in range(num_ranks)
    ]
    mean = {
        name: torch.stack([seen.gradients[0][name] for seen in ranks]).mean(0)
        for name in reference.gradients[0]
    }
    assert relative_error(mean, reference.gradients[0]) < 1e-6
    assert sum(seen.losses[0] for seen in ranks) == pytest.approx(reference.losses[0], abs=1e-5)
    for seen in ranks:  # each has a part of it only
        assert relative_error(seen.gradients[0], reference.gradients[0]) > 0.1


@both_kinds
def test_a_rank_without_a_sample_contributes_exactly_nothing(packing: bool) -> None:
    """It takes part all the same: every trained parameter has a gradient, or the other ranks would wait for
    ever. Its partner has all of the sample, counted twice, so that the mean over both is right."""
    layout = {"batch_size": 1, "num_ranks": 2, "micro_batch_tokens": 100, "packing": packing}
    step = batches(**layout, rank=1).at(0)
    assert [len(micro.targets) for micro in step.micros] == [0]
    assert (step.num_targets, step.num_tokens) == (
        batches(**layout, rank=0).at(0).num_targets,
        len(batches(**layout, rank=0).at(0).micros[0].input_ids[0]),
    )
    assert step.num_targets > 0
    training = Training(batches(**layout, rank=1))
    seen = training.run(1)
    assert seen.losses == [0.0]
    assert seen.gradients[0].keys() == {item.name for item in training.adapter.trained()}
    assert not any(gradient.any() for gradient in seen.gradients[0].values())
    both = Training(batches(**layout, rank=0)).run(1)
    alone = Training(batches(**(layout | {"num_ranks": 1}))).run(1)
    halved = {name: gradient / 2 for name, gradient in both.gradients[0].items()}
    assert relative_error(halved, alone.gradients[0]) < 1e-6


# ------------------------------------------------------------------------------------------------------------
# Step 0 is the base model


@both_kinds
@torch.no_grad()
def test_before_the_first_step_the_model_is_the_base_model(packing: bool) -> None:
    micro = batches(micro_batch_tokens=1000, packing=packing).at(0).micros[0]
    inputs: dict[str, Any] = {"input_ids": micro.input_ids, "position_ids": micro.position_ids}
    if packing:
        inputs["document_lengths"] = micro.document_lengths
    else:
        inputs["attention_mask"] = micro.attention_mask
    model = tiny_llama(packing)
    base = model(**inputs).logits
    adapter = adapt(model)
    assert torch.equal(model(**inputs).logits, base)

    fill_b(adapter)
    assert (model(**inputs).logits - base).abs().max() > 0.01
    with adapter.disabled():
        assert torch.equal(model(**inputs).logits, base)


# ------------------------------------------------------------------------------------------------------------
# The batch plan


@pytest.mark.parametrize(("num_samples", "batch_size"), [(1, 1), (7, 3), (8, 8), (8, 100), (64, 5)])
def test_an_epoch_is_every_sample_once(num_samples: int, batch_size: int) -> None:
    """Its steps are disjoint, all full but the last, and follow the order of the epoch."""
    number = steps_per_epoch(whole(num_samples), batch_size)
    for epoch in range(3):
        steps = [
            samples_of(epoch * number + place, whole(num_samples), batch_size, seed=4)
            for place in range(number)
        ]
        assert sorted(np.concatenate(steps).tolist()) == list(range(num_samples))
        assert [len(step) for step in steps[:-1]] == [batch_size] * (number - 1)
        assert np.concatenate(steps).tolist() == order(whole(num_samples), 4, epoch).tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [tuple(order(whole(64), seed, epoch)) for seed in (0, 1, 2**62) for epoch in range(3)]
    assert len(set(orders)) == len(orders)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_ranks_share_the_samples_of_a_step(num_ranks: int) -> None:
    """Every sample is on one rank, and no two ranks differ by more tokens than the longest sample has."""
    lengths = np.array(LENGTHS)
    for step in range(6):
        samples = samples_of(step, whole(len(LENGTHS)), BATCH_SIZE, seed=0)
        hands = deal(samples, lengths, num_ranks)
        assert len(hands) == num_ranks
        assert sorted(sample for hand in hands for sample in hand) == sorted(samples.tolist())
        tokens = [int(lengths[hand].sum()) for hand in hands]
        assert max(tokens) - min(tokens) <= lengths[samples].max()


@both_kinds
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5])
def test_the_micro_batches_of_all_ranks_are_the_step(num_ranks: int, packing: bool) -> None:
    """Sample by sample, token by token and target by target, in the partial step (1) too."""
    data = token_data()
    for step in range(3):
        samples = samples_of(step, whole(len(LENGTHS)), BATCH_SIZE, seed=0)
        steps = [
            batches(micro_batch_tokens=30, packing=packing, rank=rank, num_ranks=num_ranks).at(step)
            for rank in range(num_ranks)
        ]
        micros = [micro for share in steps for micro in share.micros]
        assert sorted(s for micro in micros for s in micro.samples) == sorted(samples.tolist())
        targets = sorted(token for micro in micros for token in micro.targets.tolist())
        documents = [data.sample(sample) for sample in samples]
        assert targets == sorted(token for ids, weights in documents for token in ids[weights == 1].tolist())
        for share in steps:
            assert share.num_targets == len(targets)
            assert share.num_tokens == sum(len(ids) for ids, _ in documents)


# ------------------------------------------------------------------------------------------------------------
# Dropout


PACKED_ROWS = LAYOUTS["packed rows of 30"]


def test_dropout_masks_are_a_function_of_the_seed() -> None:
    """The same bits again, whatever was drawn from the global generator before; other losses with another
    seed, or without dropout."""
    first = Training(batches(**PACKED_ROWS), dropout=0.5).run(4).losses
    again = Training(batches(**PACKED_ROWS), dropout=0.5)
    torch.manual_seed(987654321)
    assert again.run(4).losses == first
    other = Training(batches(**PACKED_ROWS), dropout=0.5, seed=1).run(4).losses
    without = Training(batches(**PACKED_ROWS)).run(4).losses
    for step in range(4):
        assert len({first[step], other[step], without[step]}) == 3


def test_dropout_masks_of_a_step_do_not_depend_on_where_the_run_began() -> None:
    """Steps 3 and 4 after a pause, with other draws in it, are those of a run without a pause."""
    whole = Training(batches(**PACKED_ROWS), dropout=0.5).run(4).losses
    parts = Training(batches(**PACKED_ROWS), dropout=0.5)
    begun = parts.run(2).losses
    torch.manual_seed(987654321)
    assert begun + parts.run(4).losses == whole


def test_every_step_micro_batch_and_rank_draws_masks_of_its_own() -> None:
    """Seeds over a grid of small numbers, where a poor mix would repeat, and what forward passes draw."""
    grid = [
        loop.draw(seed, step, micro, rank)
        for seed in (0, 1, 2, 2**63 - 1)
        for step in range(12)
        for micro in range(6)
        for rank in range(4)
    ]
    assert len(set(grid)) == len(grid)
    assert all(0 <= value < 2**63 for value in grid)

    found: list[float] = []

    class FirstDraw(CausalLmTask):
        def loss_sum(self, model: Any, micro: Any) -> Tensor:
            found.append(torch.rand(()).item())
            return super().loss_sum(model, micro)

    for rank in range(2):
        plan = batches(**PACKED_ROWS, rank=rank, num_ranks=2)
        Training(plan, task=FirstDraw()).run(3)
    assert len(found) > 2 * 3
    assert len(set(found)) == len(found)
