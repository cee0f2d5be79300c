"""Sophia-G's estimate of the curvature: exact where all labels are enumerated, and through the loop the same
whatever the layout of a step."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lorakit import loop, optim
from lorakit.adapters import Role, Trained
from lorakit.data.batches import Batches, collate, samples_of
from lorakit.micro_batch import MicroBatch
from lorakit.recipe.optimizer import Sophia
from lorakit.tasks import Objective
from lorakit.tasks.causal_lm import CausalLmTask, labels_at
from tests.oracles.test_loop_by_hand import (
    BATCH_SIZE,
    LAYOUTS,
    SEED,
    TOTAL_STEPS,
    Lines,
    adapted_toy,
    token_data,
)

F64 = torch.float64


# ------------------------------------------------------------------------------------------------------------
# Labels


def test_a_label_is_drawn_as_often_as_it_is_probable() -> None:
    """Over a grid of places: the stretches are as long as the probabilities, in the order of the labels."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0], [5.0, 5.0, -30.0, 4.0]], dtype=F64)
    grid = 20_000
    for row in logits:
        places = (torch.arange(grid, dtype=F64) + 0.5) / grid
        labels = labels_at(row.expand(grid, 4), places)
        assert torch.equal(labels, labels.sort().values)
        shares = torch.bincount(labels, minlength=4) / grid
        assert float((shares - row.softmax(0)).abs().max()) <= 1 / grid


def test_no_place_draws_a_label_that_cannot_be() -> None:
    """The ends of [0, 1) and what lies between, where the first, the last and a middle label are impossible;
    more rows than are held at a time."""
    row = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.5, -torch.inf], dtype=F64)
    places = torch.cat([torch.tensor([0.0, 1 - 2**-53], dtype=F64), torch.rand(198, dtype=F64)])
    assert set(labels_at(row.expand(200, 5), places).tolist()) == {1, 3}
    assert labels_at(row.expand(0, 5), places[:0]).tolist() == []


def micro_batches(packing: bool) -> list[MicroBatch]:
    data = token_data()
    return [collate([4, 1, 6], data, packing), collate([1], data, packing), collate([6, 4], data, packing)]


@pytest.mark.parametrize("packing", [True, False])
def test_the_places_of_a_sample_are_its_own(packing: bool) -> None:
    """Whatever shares its micro-batch; and they change with seed, step and sample."""

    def of(micro: MicroBatch, seed: int = 3, step: int = 7) -> dict[int, Tensor]:
        counts = micro.num_targets()
        assert counts == [int(token_data().num_targets[sample]) for sample in micro.samples]
        found = loop.label_places(micro, seed, step)
        assert found.dtype == F64 and float(found.min()) >= 0 and float(found.max()) < 1
        return dict(zip(micro.samples, found.split(counts), strict=True))

    together, alone, rest = (of(micro) for micro in micro_batches(packing))
    for sample, places in (alone | rest).items():
        assert torch.equal(places, together[sample])
    first = together[1]
    others = [of(micro_batches(packing)[1], seed=4)[1], of(micro_batches(packing)[1], step=8)[1]]
    others.append(together[4][: len(first)])
    for other in others:
        assert not torch.equal(first[: len(other)], other)
    # a rank without a sample has none
    empty = collate([1], token_data(), packing, trained=False)
    assert loop.label_places(empty, 3, 7).shape == (0,)
    assert micro_batches(True)[0].widened(40).num_targets()[:3] == micro_batches(True)[0].num_targets()


def test_labels_are_not_drawn_from_the_stream_of_the_dropout_masks() -> None:
    seeds = {loop.draw(5, 2, index, rank) for index in range(20) for rank in range(20)}
    assert seeds.isdisjoint({loop.draw(5, 2, sample, -1) for sample in range(400)})


# ------------------------------------------------------------------------------------------------------------
# The estimate

TOKENS, CLASSES, INSIDE = 3, 3, 2


class Softmax(nn.Module):
    """A linear classifier with the face of a language model: its loss is convex, and its Hessian is its
    Gauss-Newton matrix."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(CLASSES, INSIDE, dtype=F64, generator=draw))
        self.inputs = torch.randn(TOKENS, INSIDE, dtype=F64, generator=draw)

    def forward(self, **inputs: Any) -> Any:
        logits = (self.inputs @ self.weight.T)[inputs["logits_to_keep"]]
        return SimpleNamespace(logits=logits[None])


def test_o20_all_labels_enumerated_is_the_diagonal_of_the_hessian() -> None:
    """The mean of N g² over every combination of labels, each as often as the model draws it: lorakit's loss
    of drawn labels and its running mean (of no memory) against PyTorch's second derivatives."""
    model = Softmax()
    micro = MicroBatch(
        input_ids=torch.zeros(1, TOKENS + 1, dtype=torch.int64),
        position_ids=torch.arange(TOKENS + 1)[None],
        document_lengths=(TOKENS + 1,),
        attention_mask=None,
        predictors=torch.arange(TOKENS),
        targets=torch.tensor([0, 2, 1]),
        samples=(0,),
    )
    objective = Objective(model, CausalLmTask())
    chances = (model.inputs @ model.weight.T).softmax(-1).detach()
    ends = chances.cumsum(-1)
    item = Trained("w", model.weight, Role.FULL)
    section = Sophia(name="sophia", betas=(0.9, 0.0))
    mean = torch.zeros_like(model.weight)
    for labels in itertools.product(range(CLASSES), repeat=TOKENS):
        rows = torch.arange(TOKENS)
        places = ends[rows, list(labels)] - chances[rows, list(labels)] / 2  # the middle of their stretches
        optimizer = optim.build(section, [item])
        (objective(micro, places) / TOKENS).backward()
        optim.estimate(optimizer, TOKENS)
        mean += chances[rows, list(labels)].prod() * optim.state(optimizer, [item])["h|w"]

    def mean_loss(weight: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model.inputs @ weight.T, micro.targets)

    hessian = torch.autograd.functional.hessian(mean_loss, model.weight.detach())
    diagonal = torch.stack(
        [torch.stack([hessian[i, j, i, j] for j in range(INSIDE)]) for i in range(CLASSES)]
    )
    torch.testing.assert_close(mean, diagonal, rtol=0, atol=1e-14)
    assert float(diagonal.min()) > 1e-3
    assert model.weight.grad is None


def drive(
    objective: nn.Module, adapter: Any, optimizer: Any, layout: dict[str, Any], steps: int, clip: float | None
) -> Lines:
    """lorakit's loop at a constant learning rate."""
    lines = Lines()
    loop.run(
        objective=objective,
        adapter=adapter,
        optimizer=optimizer,
        batch_at=Batches(token_data(), BATCH_SIZE, SEED, **layout).at,
        lr_at=lambda step: 2e-2,
        evaluate=None,
        observer=lines,
        state=loop.TrainState(),
        cadence=loop.Cadence(log=1, evaluate=99, checkpoint=99, evaluate_at_start=False, early_stopping=None),
        total_steps=steps,
        seed=11,
        max_grad_norm=clip,
        device=torch.device("cpu"),
    )
    return lines


def run_of(layout: dict[str, Any], every: int = 4, steps: int = TOTAL_STEPS) -> tuple[Lines, Any, Any]:
    """The toy of the loop's oracle in fp64 with LoRA, `steps` steps of Sophia."""
    toy, adapter, ours = adapted_toy(F64)
    optimizer = optim.build(Sophia(name="sophia", every=every, rho=0.5, weight_decay=0.1), adapter.trained())
    lines = drive(Objective(toy, CausalLmTask()), adapter, optimizer, layout, steps, 1.7)
    return lines, optim.state(optimizer, adapter.trained()), ours


def test_the_estimate_of_a_step_is_that_of_its_samples_one_by_one() -> None:
    """h after the first step: (1 - beta2) N g², g the gradient at the start of the mean loss of labels that
    are drawn sample by sample, by hand."""
    _, state, _ = run_of(LAYOUTS["packed rows of 12"], every=1, steps=1)
    toy, adapter, _ = adapted_toy(F64)
    data = token_data()
    losses, number = [], 0
    for sample in samples_of(0, data.parts, BATCH_SIZE, SEED).tolist():
        ids, weights = data.sample(sample)
        logits = toy(torch.tensor(ids.astype(np.int64))[None]).logits[0][np.flatnonzero(weights) - 1]
        stream = torch.Generator().manual_seed(loop.draw(11, 0, sample, -1))
        places = torch.rand(len(logits), dtype=F64, generator=stream)
        ends = logits.detach().softmax(-1).cumsum(-1).numpy()
        labels = [int(np.searchsorted(row, place)) for row, place in zip(ends, places.tolist(), strict=True)]
        losses.append(nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum"))
        number += len(labels)
    (torch.stack(losses).sum() / number).backward()
    for item in adapter.trained():
        wanted = 0.01 * number * item.parameter.grad**2
        torch.testing.assert_close(state[f"h|{item.name}"], wanted, rtol=1e-9, atol=1e-15)
        assert float(wanted.abs().max()) > 0


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one packed row"])
def test_the_layout_of_a_step_changes_nothing(layout: str) -> None:
    lines, state, ours = run_of(LAYOUTS["one packed row"])
    others, other_state, theirs = run_of(LAYOUTS[layout])
    np.testing.assert_allclose(others.column("loss"), lines.column("loss"), rtol=0, atol=1e-9)
    for name, parameter in ours.items():
        assert float((parameter - theirs[name]).detach().abs().max()) < 1e-9
    for label, tensor in state.items():
        torch.testing.assert_close(other_state[label], tensor, rtol=1e-9, atol=1e-12)
    assert lines.column("loss")[-3:].mean() < lines.column("loss")[:3].mean()
    assert lines.column("clipped_share").min() > 0 and lines.column("clipped_share").max() < 1


def test_h_moves_in_the_steps_of_an_estimate_alone() -> None:
    """With every: 4 the first, the fifth, ... step have one, before their update."""
    seen = []
    for steps in range(1, 10):
        _, state, _ = run_of(LAYOUTS["one packed row"], every=4, steps=steps)
        seen.append(torch.cat([t.flatten() for label, t in state.items() if label.startswith("h|")]))
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert seen[0].any()
    assert changed == [step % 4 == 0 for step in range(1, 9)]


def test_the_regulariser_and_the_gradients_of_the_estimate_stay_apart() -> None:
    """A penalty of the adapter is in the update and not in h; the estimate leaves no gradient behind."""
    _, without, _ = run_of(LAYOUTS["one packed row"], every=1, steps=1)
    toy, adapter, _ = adapted_toy(F64)
    parameters = [item.parameter for item in adapter.trained()]
    adapter.penalty = lambda: 10 * torch.stack([p.pow(2).sum() for p in parameters]).sum()
    optimizer = optim.build(Sophia(name="sophia", every=1), adapter.trained())
    drive(Objective(toy, CausalLmTask()), adapter, optimizer, LAYOUTS["one packed row"], 1, None)
    found = optim.state(optimizer, adapter.trained())
    for label, tensor in without.items():
        assert torch.equal(found[label], tensor) == label.startswith("h|")


def test_an_estimate_that_is_no_number_is_refused_before_it_counts() -> None:
    toy, adapter, _ = adapted_toy(F64)

    class Broken(Objective):
        def forward(self, micro: MicroBatch, places: Tensor | None = None) -> Tensor:
            return super().forward(micro, places) * (1.0 if places is None else torch.nan)

    optimizer = optim.build(Sophia(name="sophia"), adapter.trained())
    before = [item.parameter.detach().clone() for item in adapter.trained()]
    with pytest.raises(loop.NotFinite):
        drive(Broken(toy, CausalLmTask()), adapter, optimizer, LAYOUTS["one packed row"], 1, None)
    assert all(torch.equal(a, item.parameter) for a, item in zip(before, adapter.trained(), strict=True))
    assert optim.state(optimizer, adapter.trained()) == {}


# ------------------------------------------------------------------------------------------------------------
# The update


def moved(section: Any, estimates: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The steps that a parameter of zeros takes along `gradients`, with the estimates that come before."""
    item = Trained("w", nn.Parameter(torch.zeros_like(gradients[0])), Role.A)
    optimizer = optim.build(section, [item])
    steps = []
    for number, gradient in enumerate(gradients):
        if number < len(estimates):
            item.parameter.grad = estimates[number].clone()
            optim.estimate(optimizer, 50)
        item.parameter.grad = gradient.clone()
        before = item.parameter.detach().clone()
        optimizer.step()
        steps.append(item.parameter.detach() - before)
    return steps


def gradients_of(steps: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(40, 5, dtype=F64, generator=draw) * 10.0 ** (step % 5 - 2) for step in range(steps)]


def test_o22_without_curvature_it_is_the_sign_of_the_momentum() -> None:
    """Of which the first is the gradient's: signSGD at the learning rate."""
    gradients = gradients_of(6)
    found = moved(Sophia(name="sophia", lr=0.01), [], gradients)
    torch.testing.assert_close(found[0], -0.01 * gradients[0].sign(), rtol=1e-12, atol=0)
    m = torch.zeros_like(gradients[0])
    for gradient, step in zip(gradients, found, strict=True):
        m = 0.965 * m + 0.035 * gradient
        torch.testing.assert_close(step, -0.01 * m.sign(), rtol=1e-10, atol=0)


def test_o22_no_number_moves_by_more_than_the_learning_rate() -> None:
    gradients, estimates = gradients_of(30), gradients_of(60)[30:]
    steps = moved(Sophia(name="sophia", lr=0.01, rho=1e-3), estimates, gradients)
    largest = [float(step.abs().max()) for step in steps]
    assert max(largest) <= 0.01 * (1 + 1e-12)
    assert min(float(step.abs().min()) for step in steps) < 0.005  # and some by less


def test_o22_where_the_curvature_is_huge_nothing_moves() -> None:
    gradients = gradients_of(6)
    estimates = [torch.full_like(gradients[0], 1e8)] * 6
    steps = moved(Sophia(name="sophia", lr=0.01), estimates, gradients)
    assert max(float(step.abs().max()) for step in steps) < 1e-12
    # and a number of no gradient and no curvature stays where it is: LoRA's A in the first step
    still = moved(Sophia(name="sophia", lr=0.01), [torch.zeros(3, 2)], [torch.zeros(3, 2)])
    assert not still[0].any()
