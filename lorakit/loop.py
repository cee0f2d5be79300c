"""THE training loop. It takes flat arguments, never sees a recipe, and changes nothing but the adapter.

A step is: learning rate, micro-batches, gradients divided by the trained tokens of the whole step on all
ranks, clip, update. Every random draw is a function of (seed, step, micro-batch, rank), that of a label by
the model itself one of (seed, step, sample), and every learning rate one of the step, so that the only state
is what TrainState, the adapter and the optimizer hold.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from lorakit.adapters import Adapter
from lorakit.data.batches import Step
from lorakit.errors import RunError
from lorakit.micro_batch import MicroBatch
from lorakit.optim import estimate, estimates_at, measures, set_lr

_LABELS = -1  # in the place of a rank: drawn labels are a stream of their own

Outcome = Literal["finished", "stopped early", "interrupted"]


@dataclass
class TrainState:
    """What a checkpoint must hold beside tensors. Steps are optimizer steps."""

    step: int = 0  # done
    tokens: int = 0  # real tokens seen, all ranks
    trained_tokens: int = 0  # of these, prediction targets
    seconds: float = 0.0  # spent in the loop, over all resumptions
    best_loss: float | None = None  # lowest evaluation loss after step 0, the earliest of equals
    best_step: int | None = None
    evaluations_without_gain: int = 0  # in a row
    base_eval_loss: float | None = None  # before the first step
    eval_loss: float | None = None  # of the last evaluation


@dataclass(frozen=True)
class Cadence:
    """Every how many steps something happens; each also happens after the last step."""

    log: int
    evaluate: int
    checkpoint: int
    evaluate_at_start: bool
    early_stopping: int | None  # evaluations in a row without gain


class Observer(Protocol):
    """What the loop tells the world. All ranks call; rank 0 writes."""

    def stepped(self, state: TrainState) -> None:
        """One more optimizer step is done."""

    def metrics(self, line: dict[str, Any]) -> None:
        """A training or evaluation line."""

    def best(self, state: TrainState) -> None:
        """The adapter as it stands has the lowest evaluation loss so far."""

    def checkpoint(self, state: TrainState) -> None:
        """The run must be resumable from here."""


def run(
    *,
    objective: nn.Module,  # micro-batch -> summed loss; plain, or wrapped for several processes
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    batch_at: Callable[[int], Step],
    lr_at: Callable[[int], float],
    evaluate: Callable[[], dict[str, float]] | None,
    observer: Observer,
    state: TrainState,
    cadence: Cadence,
    total_steps: int,
    seed: int,
    max_grad_norm: float | None,
    device: torch.device,
    deferred: bool = False,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    rank: int = 0,
    num_ranks: int = 1,
    all_ranks_sum: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train from `state.step` to `total_steps`; `state` is changed in place.

    `deferred`: what a step computed is read while the next one is under way, so that neither waits for the
    other; for optimizers that leave out an update on the device, by `found_inf`.
    Raises: RunError when a loss or gradient is not finite; the update of that step is not applied.
    """
    parameters = [item.parameter for item in adapter.trained()]
    clock = Clock(state)
    last_sums: Sums | None = None
    objective.train()

    def accumulate(step: int, batch: Step, drawn: bool = False) -> list[Tensor]:
        """Adds the gradients of the step's loss; `drawn`: of that of labels which the model itself draws."""
        losses = []
        for index, micro in enumerate(batch.micros):
            last = index == len(batch.micros) - 1
            places = [label_places(micro, seed, step).to(device)] if drawn else []
            torch.manual_seed(draw(seed, step, index, rank))
            with synchronised(objective, last):
                with autocast():
                    loss = objective(micro.to(device), *places)
                (loss * (num_ranks / batch.num_targets)).backward()  # DDP averages over ranks
            losses.append(loss.detach())
        return losses

    def sums_of(step: int, batch: Step, losses: list[Tensor]) -> Sums:
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        asked = torch.full((), stop_requested(), dtype=torch.float64, device=device)
        totals = all_ranks_sum(torch.stack([torch.stack(losses).sum(dtype=torch.float64), asked]))
        return Sums(step + 1, batch, losses, totals, norm)

    def evaluate_now() -> None:
        if evaluate is None:
            return
        with clock.paused():
            line = evaluate()
        better = judge(state, line["eval_loss"], candidate=adapter.settled(state.step))
        observer.metrics({"step": state.step, **line, "seconds": clock.total()})
        if better:
            observer.best(state)

    if state.step == 0 and cadence.evaluate_at_start:
        evaluate_now()
    for step in range(state.step, total_steps):
        if exhausted(state, cadence):  # also a run that was killed right after its last evaluation
            return "stopped early"
        lr = lr_at(step)
        set_lr(optimizer, lr)
        batch = _next_batch(batch_at, step, last_sums)
        if estimates_at(optimizer, step):
            sums_of(step, batch, accumulate(step, batch, drawn=True)).read()  # refuses what is not finite
            estimate(optimizer, batch.num_targets)
        losses = accumulate(step, batch)
        penalty = adapter.penalty()
        if penalty is not None:
            penalty.backward()
        adapter.before_step(step)
        sums = sums_of(step, batch, losses)
        told = last_sums if deferred and last_sums is not None else sums
        told.read()
        last_sums = sums
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, sums.norm)
        if deferred:
            optimizer.found_inf = sums.found_inf()  # type: ignore[attr-defined]
        optimizer.step()
        adapter.after_step(step)
        optimizer.zero_grad(set_to_none=True)

        state.step, state.tokens = step + 1, state.tokens + batch.num_tokens
        state.trained_tokens += batch.num_targets
        observer.stepped(state)
        if due(state.step, cadence.log, total_steps):
            line = _training_line(state, *sums.read(), lr, clock)
            observer.metrics(line | adapter.measures() | measures(optimizer))
        if due(state.step, cadence.evaluate, total_steps):
            sums.read()
            evaluate_now()
        if told.stop or exhausted(state, cadence) or due(state.step, cadence.checkpoint, total_steps):
            sums.read()
            state.seconds = clock.total()
            with clock.paused():
                observer.checkpoint(state)
        if told.stop and state.step < total_steps:
            return "interrupted"
    return "stopped early" if exhausted(state, cadence) and state.step < total_steps else "finished"


# ------------------------------------------------------------------------------------------------------------


class NotFinite(RunError):
    """A loss or gradient that is no number. `samples`: those of this rank's micro-batches to blame."""

    def __init__(
        self, step: int, loss: float, grad_norm: float, micros: Sequence[MicroBatch], losses: Sequence[Tensor]
    ) -> None:
        super().__init__(f"step {step}: loss {loss}, gradient norm {grad_norm}; the update was not applied")
        pairs = zip(micros, losses, strict=True)
        self.samples = [sample for micro, loss in pairs if not loss.isfinite() for sample in micro.samples]


@dataclass
class Sums:
    """What a step computed, on its way from the device until it is read."""

    step: int  # from 1
    batch: Step
    losses: Sequence[Tensor]  # of this rank's micro-batches
    totals: Tensor  # (2,) fp64: loss over all ranks, ranks that were asked to stop
    norm: Tensor  # of the gradient
    numbers: tuple[float, float] | None = None  # once read
    stop: bool = False  # once read

    def __post_init__(self) -> None:
        self.sent = torch.stack([*self.totals, self.norm.double()])
        self.arrived: torch.cuda.Event | None = None
        if self.sent.is_cuda:  # to pinned memory: to read it is to wait for this step, not for the next one
            pinned = torch.empty(self.sent.shape, dtype=self.sent.dtype, pin_memory=True)
            self.sent = pinned.copy_(self.sent, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def read(self) -> tuple[float, float]:
        """(mean loss per trained token, norm of the gradient). Raises: NotFinite."""
        if self.numbers is None:
            if self.arrived is not None:
                self.arrived.synchronize()
            loss_total, num_asked, norm = self.sent.tolist()
            loss = loss_total / self.batch.num_targets
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise NotFinite(self.step, loss, norm, self.batch.micros, self.losses)
            self.numbers, self.stop = (loss, norm), num_asked > 0
        return self.numbers

    def found_inf(self) -> Tensor:
        """One where loss or gradient are no numbers, else zero; nobody waits for it."""
        return (~(self.totals[0].isfinite() & self.norm.isfinite())).float()


def _next_batch(batch_at: Callable[[int], Step], step: int, last_sums: Sums | None) -> Step:
    """The batch of `step`. Where there is none, the step before must have been sound to count as done."""
    try:
        return batch_at(step)
    except RunError:
        if last_sums is not None:
            last_sums.read()
        raise


def draw(seed: int, step: int, index: int, rank: int) -> int:
    """A seed of its own for every micro-batch of the run: a mix of four numbers (splitmix64's finaliser)."""
    value = seed
    for part in (step, index, rank):
        value = (value + 0x9E3779B97F4A7C15 * (part + 1)) & (2**64 - 1)
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        value ^= value >> 31
    return value >> 1  # torch takes a signed 64-bit seed


def label_places(micro: MicroBatch, seed: int, step: int) -> Tensor:
    """(M,) fp64 in [0, 1): where in the model's distribution the label of each target is drawn. A function of
    seed, step, sample and place in it alone, so that the layout of a step does not change its labels. A
    sample that is in a step twice has the same ones twice."""
    found = []
    for sample, number in zip(micro.samples, micro.num_targets(), strict=True):
        stream = torch.Generator().manual_seed(draw(seed, step, sample, _LABELS))
        found.append(torch.rand(number, dtype=torch.float64, generator=stream))
    return torch.cat(found)


def synchronised(objective: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged between ranks in the backward pass of the last micro-batch only."""
    exchanged = last or not hasattr(objective, "no_sync")
    return nullcontext() if exchanged else objective.no_sync()  # type: ignore[operator]


def due(step: int, every: int, total_steps: int) -> bool:
    return step % every == 0 or step == total_steps


def judge(state: TrainState, loss: float, candidate: bool = True) -> bool:
    """Record an evaluation; True when it is the best so far. That of step 0, where nothing was
    trained yet, is no candidate; nor is an adapter that has not its final shape yet.

    Raises: RunError for a loss that is no number: what is trained on would be lost.
    """
    if not math.isfinite(loss):
        raise RunError(
            f"step {state.step}: the held-out loss is {loss}; lower optimizer.lr, or look at data.eval"
        )
    state.eval_loss = loss
    if state.step == 0:
        state.base_eval_loss = loss
    if state.step == 0 or not candidate:
        return False
    if state.best_loss is None or loss < state.best_loss:
        state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
        return True
    state.evaluations_without_gain += 1
    return False


def exhausted(state: TrainState, cadence: Cadence) -> bool:
    """Whether early stopping has had enough."""
    return cadence.early_stopping is not None and state.evaluations_without_gain >= cadence.early_stopping


def _training_line(
    state: TrainState, loss: float, grad_norm: float, lr: float, clock: "Clock"
) -> dict[str, Any]:
    return {
        "step": state.step,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens": state.tokens,
        "trained_tokens": state.trained_tokens,
        "tokens_per_s": clock.rate(state.tokens),
        "seconds": clock.total(),
    }


class Clock:
    """Wall time of the loop, continued over resumptions, and the rate of tokens without evaluations and
    saves."""

    def __init__(self, state: TrainState) -> None:
        self.start = time.perf_counter() - state.seconds
        self.mark, self.tokens = time.perf_counter(), state.tokens

    def total(self) -> float:
        return time.perf_counter() - self.start

    def rate(self, tokens: int) -> float:
        """Tokens per second since the last call."""
        now = time.perf_counter()
        rate = (tokens - self.tokens) / (now - self.mark)
        self.mark, self.tokens = now, tokens
        return rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.mark += time.perf_counter() - began
