"""Sections `training`, `eval`, `checkpoint` and `log`: how long, how laid out, what is kept and what is
told."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Written

Every = Annotated[int, Field(ge=1)]


class Training(Section):
    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the training rows. Not together with max_steps."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; the rows repeat as often as needed. Not together with epochs."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    """Samples per optimizer step, over all micro-batches and processes."""

    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Most tokens per forward pass; changes memory and speed, never the update. A longer sample goes alone.
    """

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the adapter's start, the order of the rows and the dropout masks."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What products are computed in. auto: bf16 when the base is stored in 16 bits or quantized and the
    hardware multiplies bf16, else fp32. Adapters and losses are always fp32."""

    gradient_checkpointing: Literal["auto"] | bool = "auto"
    """Recompute activations in the backward pass instead of holding them. auto: only when they do not fit."""

    fast: Literal["auto", "off"] = "auto"
    """auto: every fast path that agrees with its plain twin on this model, which is tried before step 0. off:
    the code of transformers, PEFT and PyTorch alone."""

    deterministic: Literal["auto"] | bool = "auto"
    """true: the same bits on every run on CUDA too, slower. auto: as fast as possible. CPUs always repeat."""


class Eval(Section):
    every: Every = 100
    """Evaluate every so many steps, and after the last one."""

    at_start: bool = True
    """Evaluate before the first step: the base model's score, or with init: loftq that of its start."""

    early_stopping: Every | None = None
    """Stop after so many evaluations in a row without a lower loss. null: never."""


class Checkpoint(Section):
    every: Every = 100
    """Write a resumable checkpoint every so many steps, and after the last one."""

    keep: Annotated[int, Field(ge=1)] = 2
    """How many checkpoints stay; older ones are deleted."""

    best: bool = True
    """adapter/ holds the lowest evaluation loss (when there is data.eval), else the last step."""


class Log(Section):
    every: Every = 10
    """Write a line to metrics.jsonl every so many steps, and after the last one."""

    trackers: tuple[Literal["tensorboard"], ...] = ()
    """Where else the metrics go. tensorboard: event files in the run directory."""


def conflicts(recipe: Any, written: Written) -> Conflicts:
    if written("training.epochs") and written("training.max_steps"):
        yield "training.epochs", "conflicts with training.max_steps; keep the one you mean"
