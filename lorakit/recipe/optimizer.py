"""Section `optimizer`: how a gradient becomes an update. One section type per optimizer, chosen by `name`."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Tagged, Written

# lr_ratio: lora+. Where B starts at zero 4 to 8 (RoBERTa) and 2 to 4 (Llama 7B) are told to have been best.
LORA_PLUS = 4.0
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Mover(Section):
    """What every optimizer has."""

    name: str
    """Which optimizer."""

    lr: Positive
    """Peak learning rate."""

    weight_decay: NotNegative = 0.0
    """Decoupled weight decay, times the learning rate, on matrices (not on biases and norms)."""

    lr_ratio: Literal["lora+"] | Positive = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354). lora+: 4, what was best where B starts at
    zero; the paper's 16 is for B at random and A at zero."""

    max_grad_norm: Positive | None = 1.0
    """The gradient of a step is scaled down to this Euclidean norm; null: never."""


class AdamW(Mover):
    """Adam with decoupled weight decay. Loshchilov and Hutter 2017, arXiv 1711.05101."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""

    lr: Positive = 2e-4
    """Peak learning rate."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: Positive = 1e-8
    """Added to the denominator."""


class AdamW8bit(Mover):
    """AdamW whose two means are held in 8 bits, block by block of 256 numbers (bitsandbytes). Parameters of
    fewer than 4096 numbers keep 32 bits. Dettmers et al. 2021, arXiv 2110.02861."""

    name: Literal["adamw_8bit"]
    """Which optimizer."""

    lr: Positive = 2e-4
    """Peak learning rate; AdamW's."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: Positive = 1e-8
    """Added to the denominator."""


class PagedAdamW8bit(Mover):
    """adamw_8bit whose means may leave a full GPU for the memory of the host, page by page (CUDA's unified
    memory). Only on CUDA. Dettmers et al. 2023, arXiv 2305.14314."""

    name: Literal["paged_adamw_8bit"]
    """Which optimizer."""

    lr: Positive = 2e-4
    """Peak learning rate; AdamW's."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: Positive = 1e-8
    """Added to the denominator."""


class Sgd(Mover):
    """Stochastic gradient descent, with momentum."""

    name: Literal["sgd"]
    """Which optimizer."""

    lr: Positive = 0.1
    """Peak learning rate. A step is as long as the gradient, which adaptive optimizers divide out: what fits
    differs by orders of magnitude between models, and 0.1 is where to begin a search."""

    weight_decay: NotNegative = 0.0
    """L2: times the parameter, added to its gradient and so part of the momentum; on matrices."""

    momentum: Beta = 0.9
    """Share of the last step's direction that is kept; 0: none, and no state."""

    nesterov: bool = False
    """Whether the gradient is added once more to the direction, as if one step ahead; needs momentum."""


class Adafactor(Mover):
    """Adam without momentum, the squares of a matrix held as means of its rows and columns; the update of a
    parameter has at most 1 as root mean square. Shazeer and Stern 2018, arXiv 1804.04235.

    A step is lr * max(eps2, root mean square of the parameter) * update, lr being at most 1 / sqrt(steps).
    """

    name: Literal["adafactor"]
    """Which optimizer."""

    lr: Positive = 2e-4
    """Peak learning rate. AdamW's: with eps2 of 1 the updates of both are about 1 times this."""

    beta2_decay: Annotated[float, Field(lt=0)] = -0.8
    """The squares of step t have the weight t ** beta2_decay in their running mean."""

    eps2: NotNegative = 1.0
    """Least size of a parameter that steps are made relative to. 1: steps are absolute (but where a parameter
    is larger), as LoRA needs them, whose B starts at zero. The paper's are relative: 1e-3, with lr 1e-2."""


class Lion(Mover):
    """The sign of a mix of gradient and momentum: every number moves by lr in every step. Chen et al. 2023,
    arXiv 2302.06675, algorithm 2."""

    name: Literal["lion"]
    """Which optimizer."""

    lr: Positive = 5e-5
    """Peak learning rate. A quarter of AdamW's, whose updates are shorter than 1: the paper says 3 to 10
    times smaller, with a weight decay as many times larger."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Weight of the momentum in the mix; decay of the momentum."""


class Sophia(Mover):
    """Sophia-G: momentum over an estimate of the diagonal curvature (Gauss-Newton-Bartlett), no number by
    more than lr. Liu et al. 2023, arXiv 2305.14342, algorithm 3."""

    name: Literal["sophia"]
    """Which optimizer."""

    lr: Positive = 1e-4
    """Peak learning rate. Half of AdamW's: lr is also the most that a number moves in a step, and the paper
    takes slightly less than AdamW's."""

    betas: tuple[Beta, Beta] = (0.965, 0.99)
    """Decay of the running means of the gradient, and of the curvature from one estimate to the next."""

    rho: Positive = 0.04
    """Scale of the curvature: the smaller, the more numbers are clipped. `clipped_share` in metrics.jsonl
    says how many are; the paper aims at 0.5 to 0.9."""

    every: Annotated[int, Field(ge=1)] = 10
    """Estimate the curvature every so many steps, the first included: one more forward and backward pass."""

    eps: Positive = 1e-12
    """Least curvature that is divided by."""


@dataclass(frozen=True)
class OptimizerTraits:
    """What can be told of an optimizer from its name, for the README too."""

    section: type[Mover]
    update: str  # g: gradient, m and v: running means of g and g², θ: a parameter
    state: str  # bytes per trained parameter
    state_bytes: Callable[[Any, tuple[int, ...]], int]  # of a section and the shape of a fp32 parameter
    says: str  # one honest line
    source: str


def _moments(number: int) -> Callable[[Any, tuple[int, ...]], int]:
    return lambda section, shape: 4 * number * prod(shape)


def _in_8_bits(section: Any, shape: tuple[int, ...]) -> int:
    """Two bytes, two constants per block of 256, and the two tables of 256 values."""
    numbers = prod(shape)
    return 8 * numbers if numbers < 4096 else 2 * numbers + 8 * -(-numbers // 256) + 2048


def _of_rows_and_columns(section: Any, shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 4 * prod(shape)
    *stacked, rows, columns = shape
    return 4 * prod(stacked) * (rows + columns)


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(
        AdamW,
        "m / (√v + ε)",
        "8",
        _moments(2),
        "the default, and what the evidence on LoRA is about",
        "arXiv 1711.05101",
    ),
    "adamw_8bit": OptimizerTraits(
        AdamW8bit,
        "AdamW's, m and v rounded",
        "2 (8 below 4096 numbers)",
        _in_8_bits,
        "`full` and large ranks, where state is what fills the memory; of a small adapter it saves little",
        "arXiv 2110.02861",
    ),
    "paged_adamw_8bit": OptimizerTraits(
        PagedAdamW8bit,
        "AdamW's, m and v rounded",
        "2, which may leave the GPU",
        _in_8_bits,
        "a GPU that is full in some steps only; not on a CPU",
        "arXiv 2305.14314",
    ),
    "sgd": OptimizerTraits(
        Sgd,
        "μ u + g",
        "4 (0 without momentum)",
        lambda section, shape: 4 * prod(shape) if section.momentum else 0,
        "a baseline, and exact experiments; its learning rate must be searched",
        "",
    ),
    "adafactor": OptimizerTraits(
        Adafactor,
        "g / √(rows · columns of v)",
        "4 per row and column",
        _of_rows_and_columns,
        "`full`, with next to no state; no momentum",
        "arXiv 1804.04235",
    ),
    "lion": OptimizerTraits(
        Lion,
        "sign(β₁ m + (1 - β₁) g)",
        "4",
        _moments(1),
        "half of AdamW's state; its gains were shown for large batches, and lr must be lowered",
        "arXiv 2302.06675",
    ),
    "sophia": OptimizerTraits(
        Sophia,
        "clip(m / max(ρ h, ε), 1), h ≈ diagonal curvature",
        "8",
        _moments(2),
        "here to be compared: its gains were shown for pre-training; one step in ten costs twice",
        "arXiv 2305.14342",
    ),
}
TAGGED = Tagged("name", "adamw", "optimizer", {name: traits.section for name, traits in OPTIMIZERS.items()})
if TYPE_CHECKING:
    Optimizer = Mover  # a union that is built is no type to a checker
else:
    Optimizer = TAGGED.union()


def elsewhere(section: Any, device: str) -> Conflicts:
    """What only another device than `device` ("cpu" or "cuda") can do."""
    if section.name == "paged_adamw_8bit" and device != "cuda":
        yield (
            "optimizer.name",
            f"pages state out of a GPU's memory, but this run is on the {device}; write adamw_8bit",
        )


def conflicts(recipe: Any, written: Written) -> Conflicts:
    section, adapter = recipe.optimizer, recipe.adapter
    if section.name == "sgd" and section.nesterov and not section.momentum:
        yield "optimizer.nesterov", "looks ahead along the momentum, which is 0; write a momentum"
    if section.name == "sophia" and adapter.method == "lora-fa" and adapter.projected:
        message = (
            "Sophia divides a gradient by its curvature, but projected has already multiplied it by"
            " (A A^T)^-1: write projected: false, or another optimizer"
        )
        yield "optimizer.name", message
    if section.name == "sophia" and adapter.method == "delta-lora":
        message = (
            "Sophia divides a gradient by its curvature; Delta-LoRA divides gradients by 1 + delta_ratio, and"
            " not what the curvature is estimated from: write another optimizer, or lora with a larger alpha"
        )
        yield "optimizer.name", message
