"""The loop with AdaLoRA against adalora_by_hand: losses, gradient norms, kept triplets and the adapter.

The toy, its data and its layouts are those of test_loop_by_hand. In fp64 every number agrees to 1e-9; in fp32
the losses do to 1e-5, and the same triplets are kept in every step.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakit.adapters.adalora import AdaLoraAdapter, phases
from lorakit.recipe.methods import AdaLora
from lorakit.shapes import Layer
from lorakit.targets import Target
from tests.oracles import adalora_by_hand, lora_by_hand, test_loop_by_hand
from tests.oracles.test_loop_by_hand import (
    EMBEDDING,
    HIDDEN,
    LAYOUTS,
    TOTAL_STEPS,
    VOCABULARY,
    Lines,
    Toy,
    documents_of_steps,
    token_data,
)

INIT_RANK = 5
PEFT = {"P": "B", "L": "E", "Q": "A"}  # what PEFT calls them
LORA = replace(test_loop_by_hand.SETTINGS, lr=4e-2, alpha1=10.0, alpha2=10.0)  # one alpha for all layers
# 21 steps: 0.2 of them are 4, 0.3 are 6, so that decisions fall at 6, 9, 12 and, as the last, 15.
SECTION = AdaLora(
    method="adalora", init_rank=INIT_RANK, target_rank=2, alpha=10.0, warmup=0.2, final=0.3, interval=3
)
SETTINGS = adalora_by_hand.Settings(
    target_rank=2,
    start=4,
    settled=15,
    interval=3,
    beta1=SECTION.beta1,
    beta2=SECTION.beta2,
    orthogonal_weight=SECTION.orthogonal_weight,
)


def start() -> lora_by_hand.Arrays:
    """P, L and Q of both layers, exact in fp32. L is not zero, so that P and Q learn in the first step."""
    draw = np.random.default_rng(3)
    shapes = {
        "P1": (HIDDEN, INIT_RANK),
        "L1": (INIT_RANK,),
        "Q1": (INIT_RANK, EMBEDDING),
        "P2": (VOCABULARY, INIT_RANK),
        "L2": (INIT_RANK,),
        "Q2": (INIT_RANK, HIDDEN),
    }
    return {
        n: draw.normal(0, 0.3, shape).astype(np.float32).astype(np.float64) for n, shape in shapes.items()
    }


@dataclass
class Run:
    lines: Lines
    kept: list[dict[int, list[bool]]]  # after every step, as in adalora_by_hand
    adapter: AdaLoraAdapter
    weights: dict[str, nn.Parameter]


def attached(dtype: torch.dtype, section: AdaLora) -> tuple[Toy, AdaLoraAdapter, dict[str, nn.Parameter]]:
    toy = Toy(test_loop_by_hand.arrays()[0])
    targets = [
        Target(Layer("linear1", "linear", EMBEDDING, HIDDEN), INIT_RANK, 10.0),
        Target(Layer("linear2", "linear", HIDDEN, VOCABULARY), INIT_RANK, 10.0),
    ]
    adapter = AdaLoraAdapter(section, toy, targets, 0, TOTAL_STEPS)
    for parameter in toy.parameters():
        parameter.data = parameter.data.to(dtype)
    adapter.importance = {key: tensor.to(dtype) for key, tensor in adapter.importance.items()}
    kinds = {"P": adapter.p, "L": adapter.lambda_, "Q": adapter.q}
    weights = {kind + name[-1]: p for kind, found in kinds.items() for name, p in found.items()}
    for name, array in start().items():
        weights[name].data.copy_(torch.from_numpy(array).reshape(weights[name].shape))
    return toy, adapter, weights


def train(dtype: torch.dtype, layout: dict[str, Any], section: AdaLora = SECTION) -> Run:
    toy, adapter, weights = attached(dtype, section)
    run = Run(Lines(), [], adapter, weights)
    run.lines.stepped = lambda state: run.kept.append(  # type: ignore[method-assign]
        {int(name[-1]): mask.tolist() for name, mask in adapter.kept.items()}
    )
    test_loop_by_hand.drive(toy, adapter, LORA, layout, run.lines)
    return run


def by_hand(settings: adalora_by_hand.Settings = SETTINGS) -> adalora_by_hand.Trained:
    frozen = test_loop_by_hand.arrays()[0]
    return adalora_by_hand.train(frozen, start(), documents_of_steps(token_data()), settings, LORA)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_run_in_fp64_equals_the_formulas(layout: dict[str, Any]) -> None:
    """The layouts differ in the number of micro-batches of a step: the penalty must not."""
    expected, run = by_hand(), train(torch.float64, layout)
    np.testing.assert_allclose(run.lines.column("loss"), expected.losses, rtol=0, atol=1e-9)
    np.testing.assert_allclose(run.lines.column("grad_norm"), expected.norms, rtol=0, atol=1e-9)
    assert run.kept == expected.kept
    for name, array in expected.final.items():
        found = run.weights[name].detach().numpy().reshape(array.shape)
        np.testing.assert_allclose(found, array, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_run_in_fp32_equals_the_formulas_to_rounding(layout: dict[str, Any]) -> None:
    expected, run = by_hand(), train(torch.float32, layout)
    assert {parameter.dtype for parameter in run.weights.values()} == {torch.float32}
    np.testing.assert_allclose(run.lines.column("loss"), expected.losses, rtol=1e-5)
    assert run.kept == expected.kept


@pytest.mark.parametrize(
    "change",
    [{"orthogonal_weight": 0.0}, {"beta1": 0.5}, {"beta2": 0.5}, {"target_rank": 1}, {"interval": 2}],
    ids=str,
)
def test_every_setting_does_what_the_formulas_say(change: dict[str, Any]) -> None:
    expected = by_hand(replace(SETTINGS, **change))
    run = train(torch.float64, LAYOUTS["packed rows of 12"], SECTION.model_copy(update=change))
    np.testing.assert_allclose(run.lines.column("loss"), expected.losses, rtol=0, atol=1e-9)
    assert run.kept == expected.kept
    usual = by_hand()
    for name, wanted in expected.scores.items():
        item = f"linear{name[1]}.lora_{PEFT[name[0]]}.default"
        found = run.adapter.importance["sensitivity", item] * run.adapter.importance["uncertainty", item]
        np.testing.assert_allclose(found.numpy().reshape(wanted.shape), wanted, rtol=1e-9, atol=1e-15)
        assert not np.allclose(wanted, usual.scores[name], rtol=1e-3, atol=0)


def test_the_lines_tell_the_budget() -> None:
    """What is kept: 4 + floor(6 (9/11)^3) after step 6, 4 + floor(6 (6/11)^3) after step 9."""
    expected = [sum(map(sum, kept.values())) for kept in by_hand().kept]
    assert train(torch.float32, LAYOUTS["one packed row"]).lines.column("budget").tolist() == expected
    assert expected == [10] * 5 + [7] * 3 + [4] * 13


def test_the_run_is_one_that_can_tell() -> None:
    """Of the run that is compared: the layers end with different ranks, triplets come back between decisions,
    no score is near the edge, some steps are clipped and some not, and the loss falls."""
    told = by_hand()
    assert phases(TOTAL_STEPS, SECTION.warmup, SECTION.final) == (SETTINGS.start, SETTINGS.settled)
    assert len({tuple(map(sum, kept.values())) for kept in told.kept}) >= 3
    assert sum(told.kept[-1][1]) != sum(told.kept[-1][2])
    assert min(told.gaps) > 1e-3, told.gaps
    clipped = np.array(told.norms) > LORA.max_grad_norm
    assert clipped.any()
    assert not clipped.all()
    assert np.mean(told.losses[-6:]) < np.mean(told.losses[:6]) - 0.1


def test_the_gradient_by_hand_equals_finite_differences() -> None:
    """The oracle itself, by a third way."""
    frozen, weights = test_loop_by_hand.arrays()[0], start()
    documents = documents_of_steps(token_data())[0]

    def objective(moved: lora_by_hand.Arrays) -> float:
        loss, _ = adalora_by_hand.loss_and_gradient(frozen, moved, documents, SETTINGS, LORA)
        return loss + SETTINGS.orthogonal_weight * adalora_by_hand.penalty(moved)

    _, gradient = adalora_by_hand.loss_and_gradient(frozen, weights, documents, SETTINGS, LORA)
    for name, array in weights.items():
        for place in np.ndindex(array.shape):
            moved = {n: a.copy() for n, a in weights.items()}
            sides = []
            for change in (1e-5, -1e-5):
                moved[name][place] = array[place] + change
                sides.append(objective(moved))
            assert gradient[name][place] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-8)
