"""WHAT is minimised: one file per loss family.

A task names the transformers class it needs and gives the summed loss of a micro-batch over its trained
tokens; the loop divides by their number over the whole step. To add one: its file here, its section in
recipe/task.py, one line.
"""

from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

TASKS = {"causal-lm": "lorakit.tasks.causal_lm:CausalLmTask"}  # name -> module:class, imported on use


class Task(Protocol):
    model_class: str  # of transformers

    def loss_sum(self, model: Any, micro: Any) -> Tensor:
        """A scalar: the loss summed over the targets of a micro-batch, zero and differentiable without
        any."""


def build(section: Any) -> Task:
    module, _, name = TASKS[section.type].partition(":")
    task: Task = getattr(import_module(module), name)()
    return task
