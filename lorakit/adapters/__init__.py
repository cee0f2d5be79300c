"""HOW weights move: one file per method, all with the same face (the Adapter protocol).

A method knows its own section of the recipe and the layers it was given, and nothing of data, loops or files
other than those of its adapter. To add one: its file here, its section in recipe/methods.py, its traits in
recipe/traits.py, one line in METHODS.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError
from lorakit.micro_batch import MicroBatch
from lorakit.targets import Target

METHODS = {  # name -> module:class, imported on use
    "lora": "lorakit.adapters.lora:LoraAdapter",
    "dora": "lorakit.adapters.lora:LoraAdapter",
    "lora-fa": "lorakit.adapters.lora_fa:LoraFaAdapter",
    "adalora": "lorakit.adapters.adalora:AdaLoraAdapter",
    "vera": "lorakit.adapters.vera:VeraAdapter",
    "delta-lora": "lorakit.adapters.delta_lora:DeltaLoraAdapter",
    "lora-drop": "lorakit.adapters.lora_drop:LoraDropAdapter",
    "full": "lorakit.adapters.full:FullAdapter",
    "peft": "lorakit.adapters.peft_tuner:PeftTunerAdapter",
}


class Role(Enum):
    """What a trained parameter is: the only source for optimizer groups, counts, checkpoints and reports."""

    A = "A"  # (rank, in): reads the layer's input
    B = "B"  # (out, rank): writes to the layer's output
    SCALE = "scale"  # a vector: singular values (rank, 1), sizes of the rows of a weight (out), ...
    HEAD = "head"  # a module trained whole beside the adapter
    OTHER = "other"  # of a tuner that lorakit does not know the inside of
    FULL = "full"  # a weight of the base model itself


@dataclass(frozen=True)
class Trained:
    """A trained parameter under its name in the model."""

    name: str
    parameter: nn.Parameter
    role: Role
    layer: str = ""  # the adapted layer, where the name does not begin with it


class Probe(Protocol):
    """A sample of the training rows, for methods that decide something by it before step 0."""

    def draw(self, share: float) -> int:
        """Draws `share` of the rows (from 1: so many rows); how many these are."""

    def train(self, share: float) -> None:
        """Draws rows and trains the adapter on them, each seen once."""

    def micro_batches(self) -> Iterator[MicroBatch]:
        """This rank's part of the rows that were drawn."""

    def forward(self, micro: MicroBatch) -> None:
        """Runs the model without gradients and dropout, each token in its own row."""

    def stored(self, parameter: str) -> Tensor:
        """A parameter of the base as its files hold it. Raises: LorakitError where they do not."""

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        """The sum of what all ranks give, on all ranks."""

    def from_all_ranks(self, tensor: Tensor) -> Tensor:
        """(ranks, ...): what all ranks give, on all ranks."""


class Adapter(Protocol):
    """An attached adapter. The model it was attached to computes with it from then on.

    Methods name this class as their base. The hooks here that return something do nothing for most methods,
    so that a method's file shows only what is its own.
    """

    targets: tuple[Target, ...]  # the adapted layers with their rank and alpha; empty for full fine-tuning
    moves_ranks: bool = False  # whether training decides the ranks
    prepares: bool = False  # whether prepare() does anything; its result is checkpoint 0

    def trained(self) -> list[Trained]:
        """Every parameter that moves, in a fixed order."""

    def prepare(self, probe: Probe) -> None:
        """Decides before step 0 what the data or the weights must decide; trained() may be another
        afterwards."""
        return None

    def try_out(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """Whatever shows before step 0 that the method cannot compute on this model; nothing stays of it.

        Raises: LorakitError where it cannot.
        """
        return None

    def penalty(self) -> Tensor | None:
        """A regulariser added to the loss once per optimizer step, alike on every rank."""
        return None

    def before_step(self, step: int) -> None:
        """Sees the gradients of optimizer step `step`, summed over ranks, before clipping."""
        return None

    def after_step(self, step: int) -> None:
        """Runs after the optimizer's update of step `step`."""
        return None

    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer as it is now."""
        return {target.layer.name: target.rank for target in self.targets}

    def settled(self, step: int) -> bool:
        """Whether after `step` steps the adapter has the shape it was asked for: only then may it be the
        best."""
        return True

    def notes(self) -> dict[str, dict[str, Any]]:
        """What params.json says of a layer beside its sides, rank and count."""
        return {}

    def measures(self) -> dict[str, float]:
        """What a line of metrics.jsonl says of the adapter beside the loss."""
        return {}

    def disabled(self) -> AbstractContextManager[None]:
        """Within it the model is the base model."""

    def state(self) -> dict[str, Tensor]:
        """All tensors needed to continue, by the names of the adapter's file; they share memory with the
        model."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Copies `tensors` into place. Raises: LorakitError when names or shapes differ."""

    def config(self, base_name: str) -> dict[str, Any]:
        """adapter_config.json of state() as other tools read it; empty when none would."""
        return {}

    def write(self, folder: Path, base_name: str) -> None:
        """The adapter's files, in PEFT's format wherever PEFT has the method, for tools other than
        lorakit."""


def attach(section: Any, model: Any, targets: list[Target], seed: int, **more: Any) -> Adapter:
    """The adapter of `section.method` attached to `model`; its random start is a function of `seed`."""
    module, _, name = METHODS[section.method].partition(":")
    adapter: Adapter = getattr(import_module(module), name)(section, model, targets, seed, **more)
    return adapter


@contextmanager
def base_alone(peft: Any) -> Iterator[None]:
    """The model of a PeftModel without its adapter. PEFT takes away all gradients to switch an adapter off
    and switches it on with gradients everywhere, also for what a method does not train."""
    trained = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    try:
        with peft.disable_adapter():
            yield
    finally:
        for parameter, was in trained:
            parameter.requires_grad_(was)


def in_dtype_of_base(layer: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output of PEFT's `layer` in the dtype that its base layer would have given it: a forward hook.

    Under autocast a plain matrix answers in autocast's dtype, one of bitsandbytes' in its input's. PEFT's
    tuners answer some of them in another, and what follows then computes otherwise than in the base model.
    """
    base, device = layer.get_base_layer(), output.device.type
    if not isinstance(base, nn.Linear | Conv1D) or not given:  # read by keyword, which no known model does
        return output
    cast = type(base) in (nn.Linear, Conv1D) and torch.is_autocast_enabled(device)
    return output.to(torch.get_autocast_dtype(device) if cast else given[0].dtype)


def copy_into(tensors: dict[str, Tensor], ours: dict[str, Tensor], what: str) -> None:
    """Copy `tensors` over `ours`, name by name, nothing missing, nothing left over.

    Raises: LorakitError naming the first tensors that differ in name or shape.
    """
    problems = [f"{name} is missing" for name in ours.keys() - tensors.keys()]
    problems += [f"{name} belongs to no adapted layer" for name in tensors.keys() - ours.keys()]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(ours[name].shape)}"
        for name in ours.keys() & tensors.keys()
        if tensors[name].shape != ours[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise LorakitError(f"{what} does not fit this model: {'; '.join(sorted(problems)[:3])}{more}")
    for name, tensor in ours.items():
        tensor.copy_(tensors[name])


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file, tensors in order of their names. Its metadata is one key and nothing else: several
    come out in random order."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(tensors.items())}
    path.touch()
    mode = path.stat().st_mode  # what the umask says; safetensors would leave a file for its owner alone
    save_file(plain, path, metadata={"format": "pt"})
    path.chmod(mode)
