"""WHAT is minimised: one file per loss family.

A task names the transformers class it needs and gives the summed loss of a micro-batch over its trained
tokens; the loop divides by their number over the whole step. To add one: its file here, its section in
recipe/task.py, one line.
"""

from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, nn

from lorakit.kernels import repeating
from lorakit.micro_batch import MicroBatch

TASKS = {"causal-lm": "lorakit.tasks.causal_lm:CausalLmTask"}  # name -> module:class, imported on use


class Task(Protocol):
    model_class: str  # of transformers

    def loss_sum(self, model: Any, micro: MicroBatch) -> Tensor:
        """A scalar: the loss summed over the targets of a micro-batch, zero and differentiable without any,
        by the model's own forward pass."""

    def drawn_loss_sum(self, model: Any, micro: MicroBatch, places: Tensor) -> Tensor:
        """The loss of labels that the model itself draws, summed over the M targets of a micro-batch.

        places: (M,) fp64 in [0, 1), where in the model's distribution each is drawn.
        """

    def fused_loss_sum(self, model: Any, micro: MicroBatch) -> Tensor:
        """The same number by the fast path, for a model on which a guard has found it to be the same.

        Raises: Unsupported with the reason, for a model or task that it is not written for.
        """


class Objective(nn.Module):
    """The loss of a micro-batch as a module: what is differentiated, and what is wrapped for several
    processes."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task
        self.fused = False
        self.repeats_shapes = False
        self.train(model.training)  # as the model is, not as a new module is

    def forward(self, micro: MicroBatch, places: Tensor | None = None) -> Tensor:
        """The summed loss of `micro`; with `places` that of labels which the model itself draws there."""
        if self.repeats_shapes:
            micro = micro.widened(repeating(micro.input_ids.shape[1]))
        if places is not None:
            return self.task.drawn_loss_sum(self.model, micro, places)
        loss_sum = self.task.fused_loss_sum if self.fused else self.task.loss_sum
        return loss_sum(self.model, micro)


def build(section: Any) -> Task:
    module, _, name = TASKS[section.type].partition(":")
    task: Task = getattr(import_module(module), name)()
    return task
