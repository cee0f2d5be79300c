"""lr_at against closed forms written another way; learning rate and weight decay of the parameter groups."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lorakit import optim
from lorakit.adapters import Role, Trained
from lorakit.recipe.optimizer import AdamW
from lorakit.recipe.schedule import SCHEDULES

PEAK = 3e-4
# (warm-up steps, total steps)
LENGTHS = [(0, 1), (0, 2), (0, 50), (1, 2), (1, 50), (5, 50), (49, 50)]
SHAPES = tuple(SCHEDULES)


def learning_rates(name: str, warmup_steps: int, total_steps: int, *more: float) -> np.ndarray:
    """`more`: steps of the decay, the floor."""
    steps = range(total_steps)
    return np.array([optim.lr_at(step, name, PEAK, warmup_steps, total_steps, *more) for step in steps])


@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_the_warm_up_is_a_straight_line_to_the_peak(warmup_steps: int, total_steps: int) -> None:
    expected = np.linspace(0, PEAK, warmup_steps + 1)[1:]
    for name in SHAPES:
        rates = learning_rates(name, warmup_steps, total_steps)
        np.testing.assert_allclose(rates[:warmup_steps], expected, rtol=1e-12)


@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_constant_stays_at_the_peak(warmup_steps: int, total_steps: int) -> None:
    assert np.all(learning_rates("constant", warmup_steps, total_steps)[warmup_steps:] == PEAK)


@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_linear_falls_by_the_same_amount_in_every_step(warmup_steps: int, total_steps: int) -> None:
    """Points of the line from the peak to a zero that lies one step after the last."""
    expected = np.linspace(PEAK, 0, total_steps - warmup_steps + 1)[:-1]
    rates = learning_rates("linear", warmup_steps, total_steps)[warmup_steps:]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_cosine_falls_as_half_a_wave(warmup_steps: int, total_steps: int) -> None:
    """By the half-angle formula, (1 + cos a) / 2 is the square of cos(a / 2)."""
    quarter = np.linspace(0, math.pi / 2, total_steps - warmup_steps + 1)[:-1]
    rates = learning_rates("cosine", warmup_steps, total_steps)[warmup_steps:]
    np.testing.assert_allclose(rates, PEAK * np.cos(quarter) ** 2, rtol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("warmup_steps", [1, 7, 40])
def test_nothing_jumps_at_the_end_of_the_warm_up(name: str, warmup_steps: int) -> None:
    """The peak is reached in the last step of the warm-up and is where the fall begins; from there on no step
    changes more than the steepest part of the fall."""
    total_steps = 100
    rates = learning_rates(name, warmup_steps, total_steps)
    assert rates[warmup_steps - 1] == rates[warmup_steps] == PEAK
    assert rates.max() == PEAK
    steepest = {"constant": 0.0, "wsd": 0.0, "linear": 1.0, "cosine": math.pi / 2}
    if name == "inverse-sqrt":  # its slope at the end of the warm-up is half of the warm-up's
        steepest[name] = (total_steps - warmup_steps) / warmup_steps / 2
    steepest_step = steepest[name] * PEAK / (total_steps - warmup_steps)
    assert np.abs(np.diff(rates[warmup_steps - 1 :])).max() <= steepest_step * (1 + 1e-9)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("total_steps", [1, 2, 3, 10, 37])
def test_every_step_learns(name: str, total_steps: int) -> None:
    """Whatever the warm-up, no learning rate is negative or zero, that of the last step included."""
    for warmup_steps in range(total_steps + 1):
        rates = learning_rates(name, warmup_steps, total_steps)
        assert rates.min() > 0, f"{warmup_steps} of {total_steps}: {rates}"
        assert rates.max() <= PEAK


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_fall_would_reach_zero_at_the_total(name: str) -> None:
    """The step after the last, which no run takes."""
    assert optim.lr_at(20, name, PEAK, 4, 20) == pytest.approx(0, abs=1e-20)
    assert 0 < optim.lr_at(19, name, PEAK, 4, 20) < optim.lr_at(18, name, PEAK, 4, 20)


@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
def test_inverse_sqrt_is_vaswanis_formula(warmup_steps: int, total_steps: int) -> None:
    """min(t^-1/2, t w^-3/2), scaled to the peak at t = w, which is held for a second step as by every
    schedule; without a warm-up it is that of a warm-up of one."""
    w = max(1, warmup_steps)
    t = np.concatenate([np.arange(warmup_steps) + 1, w + np.arange(total_steps - warmup_steps)]).astype(float)
    formula = PEAK * math.sqrt(w) * np.minimum(t**-0.5, t * w**-1.5)
    np.testing.assert_allclose(learning_rates("inverse-sqrt", warmup_steps, total_steps), formula, rtol=1e-12)


def test_inverse_sqrt_knows_nothing_of_the_end() -> None:
    assert np.array_equal(learning_rates("inverse-sqrt", 5, 100)[:60], learning_rates("inverse-sqrt", 5, 60))


@pytest.mark.parametrize("floor", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    ("warmup_steps", "decay_steps", "total_steps"),
    [(0, 1, 1), (0, 0, 1), (1, 0, 1), (2, 3, 10), (0, 10, 10), (5, 5, 10), (4, 0, 10), (0, 1, 10)],
)
def test_wsd_rises_stays_and_falls(
    warmup_steps: int, decay_steps: int, total_steps: int, floor: float
) -> None:
    """Three straight lines laid end to end; the last would reach the floor one step after the run."""
    rise = np.linspace(0, PEAK, warmup_steps + 1)[1:]
    stay = np.full(total_steps - warmup_steps - decay_steps, PEAK)
    fall = np.linspace(PEAK, floor * PEAK, decay_steps + 2)[1:-1]
    rates = learning_rates("wsd", warmup_steps, total_steps, decay_steps, floor)
    np.testing.assert_allclose(rates, np.concatenate([rise, stay, fall]), rtol=1e-12)


@pytest.mark.parametrize("floor", [0.1, 0.37, 0.9])
@pytest.mark.parametrize(("warmup_steps", "total_steps"), LENGTHS)
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_floor_lifts_the_fall(name: str, warmup_steps: int, total_steps: int, floor: float) -> None:
    """Affinely: the same warm-up and peak, and between peak and floor what lies between peak and zero."""
    plain = learning_rates(name, warmup_steps, total_steps)
    rates = learning_rates(name, warmup_steps, total_steps, 0, floor)
    np.testing.assert_array_equal(rates[:warmup_steps], plain[:warmup_steps])
    wanted = floor * PEAK + (1 - floor) * plain[warmup_steps:]
    np.testing.assert_allclose(rates[warmup_steps:], wanted, rtol=1e-12)
    assert rates[-1] > floor * PEAK
    after = optim.lr_at(total_steps, name, PEAK, warmup_steps, total_steps, 0, floor)
    assert after == pytest.approx(floor * PEAK, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------
# Groups


def one_of_each() -> dict[str, Trained]:
    """A trained parameter of every role, as matrix or vector as it occurs, all ones."""
    shapes = {
        "a": (Role.A, (2, 5)),
        "b": (Role.B, (4, 2)),
        "scale": (Role.HEAD, (4,)),
        "head": (Role.HEAD, (3, 4)),
        "head bias": (Role.HEAD, (3,)),
        "norm": (Role.FULL, (4,)),
        "whole": (Role.FULL, (4, 4)),
    }
    return {
        name: Trained(name, nn.Parameter(torch.ones(shape)), role) for name, (role, shape) in shapes.items()
    }


def group_of(optimizer: torch.optim.Optimizer, item: Trained) -> dict[str, Any]:
    """The only group that holds a parameter."""
    found = [group for group in optimizer.param_groups if any(p is item.parameter for p in group["params"])]
    assert len(found) == 1, f"{item.name} is in {len(found)} groups"
    return found[0]


@pytest.mark.parametrize("lr_ratio", [1.0, 4.0, 0.5])
def test_b_alone_learns_at_its_own_rate(lr_ratio: float) -> None:
    trained = one_of_each()
    optimizer = optim.build(AdamW(lr=PEAK, weight_decay=0.1, lr_ratio=lr_ratio), list(trained.values()))
    for lr in (1e-3, 2e-5):
        optim.set_lr(optimizer, lr)
        for name, item in trained.items():
            assert group_of(optimizer, item)["lr"] == (lr * lr_ratio if name == "b" else lr), name


def test_lora_plus_by_name_is_a_ratio_of_four() -> None:
    trained = one_of_each()
    optimizer = optim.build(AdamW(lr=PEAK, lr_ratio="lora+"), list(trained.values()))
    ratios = {name: group_of(optimizer, item)["lr_ratio"] for name, item in trained.items()}
    assert ratios == {name: 4.0 if name == "b" else 1.0 for name in trained}


@pytest.mark.parametrize("lr_ratio", [1.0, 4.0])
def test_matrices_alone_decay_and_by_their_own_learning_rate(lr_ratio: float) -> None:
    """With gradients of zero, a step of AdamW is its decay and nothing else."""
    trained = one_of_each()
    optimizer = optim.build(AdamW(lr=PEAK, weight_decay=0.1, lr_ratio=lr_ratio), list(trained.values()))
    optim.set_lr(optimizer, 0.5)
    for item in trained.values():
        item.parameter.grad = torch.zeros_like(item.parameter)
    optimizer.step()
    for name, item in trained.items():
        left = 1 - 0.5 * (lr_ratio if name == "b" else 1) * 0.1 if item.parameter.dim() == 2 else 1.0
        torch.testing.assert_close(item.parameter.data, torch.full_like(item.parameter.data, left), msg=name)


def test_the_section_reaches_the_optimizer() -> None:
    section = AdamW(lr=PEAK, weight_decay=0.1, betas=(0.7, 0.8), eps=1e-5, lr_ratio=2.0)
    optimizer = optim.build(section, list(one_of_each().values()))
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["amsgrad"]) == ((0.7, 0.8), 1e-5, False)
        assert group["weight_decay"] in (0.0, 0.1)
