"""Sections `optimizer` and `schedule`: how a gradient becomes an update, and how large."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Written

# lr_ratio: lora+. Where B starts at zero 4 to 8 (RoBERTa) and 2 to 4 (Llama 7B) are told to have been best.
LORA_PLUS = 4.0
Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamW(Section):
    """Adam with decoupled weight decay. Loshchilov and Hutter 2017, arXiv 1711.05101."""

    name: Literal["adamw"] = "adamw"
    """Which optimizer."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, times the learning rate, on matrices (not on biases and norms)."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square."""

    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""

    lr_ratio: Literal["lora+"] | Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354). lora+: 4, what was best where B starts at
    zero; the paper's 16 is for B at random and A at zero."""

    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient of a step is scaled down to this Euclidean norm; null: never."""


Optimizer = AdamW


class Schedule(Section):
    """The learning rate over the steps, as a share of `optimizer.lr`."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """cosine and linear fall towards zero, which they would reach one step after the last."""

    warmup: Annotated[float, Field(ge=0, lt=1)] | Annotated[int, Field(ge=0)] = 0.03
    """Linear rise at the start: below 1 a share of the steps, from 1 a number of steps."""


def conflicts(recipe: Any, written: Written) -> Conflicts:
    steps = recipe.training.max_steps
    if steps is not None and isinstance(recipe.schedule.warmup, int) and recipe.schedule.warmup > steps:
        yield (
            "schedule.warmup",
            f"{recipe.schedule.warmup} steps of warm-up do not fit into max_steps: {steps}",
        )
