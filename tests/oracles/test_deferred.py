"""The loop that reads what a step computed one step later: the same bits, and no update from numbers that are
none.

Deferred is for GPUs, where reading makes the host wait. It runs on a CPU all the same, and there it must give
bit for bit what the loop gives that reads at once. The toy and its data are those of test_loop_by_hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import loop, optim
from lorakit.data.batches import Batches
from lorakit.errors import RunError
from lorakit.recipe.optimizer import AdamW
from lorakit.tasks import Objective
from lorakit.tasks.causal_lm import CausalLmTask
from tests.oracles import test_adalora_by_hand as adalora
from tests.oracles.test_loop_by_hand import (
    BATCH_SIZE,
    LAYOUTS,
    SEED,
    SETTINGS,
    TOTAL_STEPS,
    adapted_toy,
    token_data,
)

TIMES = ("seconds", "tokens_per_s")
LAYOUT = LAYOUTS["packed rows of 12"]  # several micro-batches in a step


@dataclass
class Seen:
    """An observer that keeps all it is told, with the adapter as it was then."""

    parameters: dict[str, nn.Parameter]
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def copies(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def stepped(self, state: loop.TrainState) -> None:
        self.told.append(("stepped", state.step, self.copies()))

    def metrics(self, line: dict[str, Any]) -> None:
        self.told.append(("metrics", {k: v for k, v in line.items() if k not in TIMES}))

    def best(self, state: loop.TrainState) -> None:
        self.told.append(("best", state.step, state.best_loss, self.copies()))

    def checkpoint(self, state: loop.TrainState) -> None:
        self.told.append(("checkpoint", state.step, state.tokens, state.best_loss, self.copies()))

    def steps_of(self, kind: str) -> list[int]:
        return [event[1] for event in self.told if event[0] == kind]


@dataclass
class Run:
    """One run of the toy, ready to be driven; `poison` changes the loss of a micro-batch of a step."""

    method: str = "lora"
    log: int = 1
    poison: Callable[[int, Tensor], Tensor] = lambda step, loss: loss  # step from 1
    stop_at: int = 1000  # asked to stop while this step is computed, from 1

    def __post_init__(self) -> None:
        if self.method == "adalora":
            toy, adapter, self.parameters = adalora.attached(torch.float32, adalora.SECTION)
            self.adapter: Any = adapter
        else:
            toy, self.adapter, self.parameters = adapted_toy(torch.float32)
        section = AdamW(lr=SETTINGS.lr, weight_decay=SETTINGS.weight_decay)
        self.optimizer = optim.build(section, self.adapter.trained())
        self.seen, self.state, self.step = Seen(self.parameters), loop.TrainState(), 0
        self.objective = Objective(toy, CausalLmTask())
        self.batches = Batches(token_data(), BATCH_SIZE, SEED, **LAYOUT)
        self.objective.register_forward_hook(lambda module, given, loss: self.poison(self.step, loss))

    def batch_at(self, step: int) -> Any:
        self.step = step + 1
        return self.batches.at(step)

    def evaluate(self) -> dict[str, float]:
        """A held-out loss that depends on every parameter and is not monotonous: some are the best, some
        not."""
        return {
            "eval_loss": float(sum((50 * p.detach().double()).sin().sum() for p in self.parameters.values()))
        }

    def drive(self, deferred: bool, max_grad_norm: float | None = SETTINGS.max_grad_norm) -> loop.Outcome:
        return loop.run(
            objective=self.objective,
            adapter=self.adapter,
            optimizer=self.optimizer,
            batch_at=self.batch_at,
            lr_at=lambda step: optim.lr_at(step, "cosine", SETTINGS.lr, 4, TOTAL_STEPS),
            evaluate=self.evaluate,
            observer=self.seen,
            state=self.state,
            cadence=loop.Cadence(
                log=self.log, evaluate=4, checkpoint=5, evaluate_at_start=True, early_stopping=None
            ),
            total_steps=TOTAL_STEPS,
            seed=0,
            max_grad_norm=max_grad_norm,
            device=torch.device("cpu"),
            deferred=deferred,
            stop_requested=lambda: self.step >= self.stop_at,
        )

    def moments(self) -> dict[str, Tensor]:
        return {name: t.clone() for name, t in optim.state(self.optimizer, self.adapter.trained()).items()}


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, through tuples, lists, dicts and tensors."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


# ------------------------------------------------------------------------------------------------------------
# The same bits


@pytest.mark.parametrize("log", [1, 3, 100])
@pytest.mark.parametrize("max_grad_norm", [None, SETTINGS.max_grad_norm])
@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_deferred_gives_the_same_bits(method: str, max_grad_norm: float | None, log: int) -> None:
    """Lines, checkpoints, the best adapter and the adapter after every step, whatever is read in between."""
    at_once, deferred = Run(method, log), Run(method, log)
    assert at_once.drive(deferred=False, max_grad_norm=max_grad_norm) == "finished"
    assert deferred.drive(deferred=True, max_grad_norm=max_grad_norm) == "finished"
    assert same(at_once.seen.told, deferred.seen.told)
    assert same(at_once.moments(), deferred.moments())
    assert vars(at_once.state).keys() == vars(deferred.state).keys()
    for name, value in vars(at_once.state).items():
        assert name == "seconds" or vars(deferred.state)[name] == value
    assert deferred.seen.steps_of("checkpoint") == [5, 10, 15, 20, 21]


def test_the_runs_that_are_compared_can_tell() -> None:
    """Every step moves every matrix, some evaluations are the best so far, and some are not."""
    run = Run()
    run.drive(deferred=True)
    moved = [event[2] for event in run.seen.told if event[0] == "stepped"]
    for before, after in pairwise(moved):
        assert not any(torch.equal(before[name], after[name]) for name in before)
    assert 0 < len(run.seen.steps_of("best")) < 6


# ------------------------------------------------------------------------------------------------------------
# Numbers that are none


def nan_loss(step: int) -> Callable[[int, Tensor], Tensor]:
    return lambda now, loss: loss * float("nan") if now == step else loss


class _NoNumber(torch.autograd.Function):
    """x, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("inf")


def infinite_gradient(step: int) -> Callable[[int, Tensor], Tensor]:
    return lambda now, loss: _NoNumber.apply(loss) if now == step else loss


@pytest.mark.parametrize("log", [1, 100])  # read at once, because a line is due, or one step later
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("poison", [nan_loss, infinite_gradient])
@pytest.mark.parametrize("step", [1, 2, 8, 10, 13, TOTAL_STEPS])
def test_an_update_that_is_no_number_is_not_applied(
    step: int, poison: Callable[..., Any], deferred: bool, log: int
) -> None:
    """8 is followed by an evaluation, 10 by a checkpoint, 13 by nothing; after 21 there is no step that could
    notice."""
    good = Run(log=log)
    before = {"parameters": good.seen.copies(), "moments": good.moments()}

    def note(now: int, loss: Tensor) -> Tensor:
        if now == step:
            before["parameters"], before["moments"] = good.seen.copies(), good.moments()
        return loss

    good.poison = note
    good.drive(deferred=False)
    run = Run(log=log, poison=poison(step))
    with pytest.raises(loop.NotFinite, match=rf"^step {step}: .*the update was not applied"):
        run.drive(deferred=deferred)
    assert run.step == (step + 1 if deferred and log == 100 and step in (2, 13) else step)
    assert same(run.seen.copies(), before["parameters"])
    moments = before["moments"]
    if deferred and step == 1:  # the optimizer has made its state, and left it at zero
        assert not any(tensor.any() for tensor in run.moments().values())
    else:
        assert same(run.moments(), moments)
    for kind in ("best", "checkpoint"):
        assert all(at < step for at in run.seen.steps_of(kind))


@pytest.mark.parametrize("deferred", [False, True])
def test_the_samples_of_the_step_are_named(deferred: bool) -> None:
    """Those of the micro-batches whose loss is no number, also when it is noticed one step later."""
    poisoned: list[Any] = []
    run = Run(log=100)

    def second_of_step_2(now: int, loss: Tensor) -> Tensor:
        if now == 2:
            poisoned.append(loss)
        return loss * float("nan") if now == 2 and len(poisoned) == 2 else loss

    run.poison = second_of_step_2
    with pytest.raises(loop.NotFinite) as caught:
        run.drive(deferred=deferred)
    micros = run.batches.at(1).micros
    assert len(micros) > 1 and len(poisoned) == len(micros)
    assert caught.value.samples == list(micros[1].samples)


# ------------------------------------------------------------------------------------------------------------
# Stopping


@pytest.mark.parametrize("log", [1, 100])
@pytest.mark.parametrize("asked", [1, 2, 7, 19])
def test_a_stop_ends_within_one_step_more(asked: int, log: int) -> None:
    """With a checkpoint there, from which another run would continue."""
    at_once, deferred = Run(log=log, stop_at=asked), Run(log=log, stop_at=asked)
    assert at_once.drive(deferred=False) == deferred.drive(deferred=True) == "interrupted"
    assert at_once.state.step == asked
    assert asked <= deferred.state.step <= asked + 1
    assert deferred.seen.steps_of("checkpoint")[-1] == deferred.state.step


@pytest.mark.parametrize("deferred", [False, True])
def test_rows_that_end_do_not_hide_a_step_that_is_no_number(deferred: bool) -> None:
    """What stops for want of rows writes a checkpoint: the step before must not count as done unread."""
    run = Run(log=100, poison=nan_loss(3))
    real = run.batch_at

    def until_three(step: int) -> Any:
        if step == 3:
            raise RunError("the rows end here")
        return real(step)

    run.batch_at = until_three  # type: ignore[method-assign]
    with pytest.raises(loop.NotFinite, match="step 3"):
        run.drive(deferred=deferred)


def test_rows_that_end_after_a_sound_step_say_so() -> None:
    run = Run(log=100)
    run.batch_at = lambda step: (_ for _ in ()).throw(RunError("the rows end here"))  # type: ignore
    with pytest.raises(RunError, match="the rows end here"):
        run.drive(deferred=True)


def test_a_stop_in_the_last_step_is_the_end() -> None:
    run = Run(stop_at=TOTAL_STEPS)
    assert run.drive(deferred=True) == "finished"
    assert run.seen.steps_of("checkpoint")[-1] == TOTAL_STEPS


# ------------------------------------------------------------------------------------------------------------
# What PyTorch must do


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fused_adamw_leaves_an_update_out_by_found_inf(device: str) -> None:
    """An attribute that torch's gradient scaler sets, and that no documentation promises: parameters, moments
    and the count of steps stay, and the next update is that of an optimizer that never saw the bad one."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    draw = torch.Generator().manual_seed(0)
    start, first, second = (torch.randn(5, 3, generator=draw).to(device) for _ in range(3))

    def made() -> tuple[nn.Parameter, torch.optim.Optimizer]:
        parameter = nn.Parameter(start.clone())
        return parameter, torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, fused=True)

    def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grad: Tensor, found: float) -> None:
        parameter.grad = grad.clone()
        optimizer.found_inf = torch.full((), found, device=device)  # type: ignore[attr-defined]
        optimizer.step()

    parameter, optimizer = made()
    step(optimizer, parameter, first, 0.0)
    before = parameter.detach().clone()
    state = {name: tensor.clone() for name, tensor in optimizer.state[parameter].items()}
    step(optimizer, parameter, torch.full_like(start, float("nan")), 1.0)
    assert torch.equal(parameter, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.state[parameter].items())
    step(optimizer, parameter, second, 0.0)

    untroubled, other = made()
    for grad in (first, second):
        untroubled.grad = grad.clone()
        other.step()
    assert torch.equal(parameter, untroubled)
    assert not torch.equal(parameter, before)
