"""Section `schedule`: the learning rate over the steps. One section type per shape, chosen by `name`."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Tagged, Written, share_of

Share = Annotated[float, Field(ge=0, lt=1)]
Steps = Share | Annotated[int, Field(ge=0)]  # below 1 a share of the steps of the run, from 1 so many


class Shape(Section):
    """What every schedule has. All are shares of `optimizer.lr`, the peak."""

    name: str
    """How the learning rate goes on after the warm-up."""

    warmup: Steps = 0.03
    """Linear rise at the start: below 1 a share of the steps, from 1 a number of steps."""


class Cosine(Shape):
    """Half a cosine from the peak to the floor. Loshchilov and Hutter 2016, arXiv 1608.03983, without
    restarts."""

    name: Literal["cosine"] = "cosine"
    """How the learning rate goes on after the warm-up."""

    floor: Share = 0.0
    """Share of the peak that the fall ends at, which it would reach one step after the last."""


class Linear(Shape):
    """A straight line from the peak to the floor."""

    name: Literal["linear"]
    """How the learning rate goes on after the warm-up."""

    floor: Share = 0.0
    """Share of the peak that the fall ends at, which it would reach one step after the last."""


class Constant(Shape):
    """The peak, to the end."""

    name: Literal["constant"]
    """How the learning rate goes on after the warm-up."""


class InverseSqrt(Shape):
    """The peak times sqrt(warm-up steps / steps so far): knows nothing of the end. Vaswani et al. 2017, arXiv
    1706.03762, equation 3, with the peak as a factor of its own."""

    name: Literal["inverse-sqrt"]
    """How the learning rate goes on after the warm-up."""

    warmup: Steps = 0.03
    """Linear rise at the start: below 1 a share of the steps, from 1 a number of steps. The longer it is, the
    slower the fall; without one the fall begins at the first step, as after a warm-up of one."""


class Wsd(Shape):
    """Warm-up, stable, decay: the peak until the last `decay` steps, then a straight line to the floor. Hu et
    al. 2024, arXiv 2404.06395, with the line of Hägele et al. 2024, arXiv 2405.18392, for their exponential.
    """

    name: Literal["wsd"]
    """How the learning rate goes on after the warm-up."""

    decay: Steps = 0.1
    """How long the fall at the end is: below 1 a share of the steps, from 1 a number of steps."""

    floor: Share = 0.0
    """Share of the peak that the fall ends at, which it would reach one step after the last."""


@dataclass(frozen=True)
class ScheduleTraits:
    """What can be told of a schedule from its name, for the README too."""

    section: type[Shape]
    formula: str  # share of the peak after the warm-up. w: warm-up steps, t: steps done, T: all steps
    says: str  # one honest line
    source: str


SCHEDULES: dict[str, ScheduleTraits] = {
    "cosine": ScheduleTraits(
        Cosine,
        "f + (1 - f) (1 + cos(π (t - w) / (T - w))) / 2",
        "the default: gentle at both ends; its length must be known",
        "arXiv 1608.03983",
    ),
    "linear": ScheduleTraits(
        Linear,
        "f + (1 - f) (T - t) / (T - w)",
        "falls by as much in every step; spends less time near the peak than cosine",
        "",
    ),
    "constant": ScheduleTraits(
        Constant,
        "1",
        "for comparing checkpoints of different steps; ends noisier than one that falls",
        "",
    ),
    "inverse-sqrt": ScheduleTraits(
        InverseSqrt,
        "√(w / t)",
        "for runs whose end is not known: the same whatever T, with a warm-up in steps; ends high",
        "arXiv 1706.03762",
    ),
    "wsd": ScheduleTraits(
        Wsd,
        "1, then f + (1 - f) (T - t) / (d + 1) over the last d steps",
        "the peak for most of the run, then a short fall; its papers: as good as cosine",
        "arXiv 2404.06395",
    ),
}
TAGGED = Tagged("name", "cosine", "schedule", {name: traits.section for name, traits in SCHEDULES.items()})
if TYPE_CHECKING:
    Schedule = Shape  # a union that is built is no type to a checker
else:
    Schedule = TAGGED.union()


def phases(section: Any, total_steps: int) -> tuple[int, int]:
    """(steps of the warm-up, steps of the decay at the end) of a run of `total_steps`. A share of the steps
    is rounded up, and the decay takes no more than the warm-up leaves."""
    warmup, decay = section.warmup, getattr(section, "decay", 0)
    rise = warmup if isinstance(warmup, int) else math.ceil(share_of(warmup, total_steps))
    left = max(0, total_steps - rise)
    return rise, decay if isinstance(decay, int) else min(left, math.ceil(share_of(decay, total_steps)))


def too_few_steps(section: Any, total_steps: int, said: str = "") -> Conflicts:
    """Where the phases of a schedule do not fit into a run of `total_steps`; `said`: where that is said."""
    warmup, decay = phases(section, total_steps)
    run = said or f"the {total_steps} steps of this run"
    if warmup > total_steps:
        yield "schedule.warmup", f"{warmup} steps of warm-up do not fit into {run}"
    elif warmup + decay > total_steps:
        message = f"{decay} steps of decay after {warmup} of warm-up do not fit into {run}"
        yield "schedule.decay", message


def conflicts(recipe: Any, written: Written) -> Conflicts:
    section = recipe.schedule
    if recipe.training.max_steps is not None:
        steps = recipe.training.max_steps
        yield from too_few_steps(section, steps, f"max_steps: {steps}")
    shares = [share for share in (section.warmup, getattr(section, "decay", 0)) if isinstance(share, float)]
    if sum(shares) > 1:
        yield "schedule.decay", "warmup and decay together are more than all steps"
