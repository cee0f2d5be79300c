"""Full fine-tuning as the empty adapter: the weights of the base move, in fp32. The baseline of every
comparison.

All of them, or those that `train_only` names: the last layers, the norms, or all biases (BitFit, Ben Zaken et
al. 2021, arXiv 2106.10199, is `train_only: [bias]`). What is written is the whole model either way.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained, copy_into
from lorakit.recipe.methods import Full
from lorakit.targets import Target


class FullAdapter(Adapter):
    def __init__(
        self,
        section: Full,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        stored_config: Any,
        moving: Sequence[str] | None = None,
    ) -> None:
        """`moving`: names of the parameters that move; None: all. `stored_config`: the model's configuration
        as it was read; model/ is written with it, and in its dtype."""
        self.targets: tuple[Target, ...] = ()
        self.model = model
        self.stored_config = stored_config
        named = dict(model.named_parameters())
        names = named if moving is None else moving
        self.moving = {name: named[name].requires_grad_(True) for name in names}

    def trained(self) -> list[Trained]:
        return [Trained(name, parameter, Role.FULL) for name, parameter in self.moving.items()]

    def disabled(self) -> AbstractContextManager[None]:
        raise AssertionError("full fine-tuning has moved the base model: there is nothing to disable")

    def state(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.moving.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the checkpoint")

    def write(self, folder: Path, base_name: str) -> None:
        dtype = self.stored_config.dtype or torch.float32
        cast: dict[int, Tensor] = {}  # by place in memory, so that tied weights stay one tensor
        state = {
            name: cast.setdefault(tensor.data_ptr(), tensor.to("cpu", dtype))
            for name, tensor in self.model.state_dict().items()
        }
        self.model.save_pretrained(folder, state_dict=state)
        self.stored_config.save_pretrained(folder)
