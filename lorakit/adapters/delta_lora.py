"""Delta-LoRA: the base's weight follows what training adds to B A.

After every step t from K on, W <- W + lambda s (B_{t+1} A_{t+1} - B_t A_t), with s the scale of LoRA and no
dropout, so that the gradient of B A is that of W. Source: Zi et al. 2023, arXiv 2309.02411, algorithm 1.

Here W is never touched. The sum telescopes, so that from K on a layer computes

    y = W x + (1 + lambda) s B A x - lambda s B_K A_K x

with B_K A_K as it stood when W began to follow; and since what W took over passes no gradient to A and B,
theirs are those of the larger scale divided by 1 + lambda. That is the paper's update exactly, on a 4-bit
base too, without rounding small changes to bf16, and with an adapter that is saved by itself: it is a LoRA of
rank 2r at most,

    A' = [A; A - A_K],    B' = s [(1 + lambda) B - lambda B_K, lambda B_K].

What it is worth: with K = 0, where B A is zero, this is LoRA with the scale (1 + lambda) s but for the
division of the gradients, which Adam does not see. So Delta-LoRA is then LoRA with (1 + lambda) times the
alpha at the same learning rate: to the last digits without Adam's eps, to about 1e-6 with the usual one, with
weight decay too. Clipping makes a difference where only the larger gradients are above the limit. Compare it
with that LoRA, not with one of the same alpha.

A is (rank, in), B is (out, rank); for an Embedding A is (rank, vocabulary).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained, copy_into
from lorakit.adapters.lora import LoraAdapter
from lorakit.adapters.lora_files import write_plain
from lorakit.adapters.pairs import NAME, activate, add_frozen, as_one, factors
from lorakit.recipe.methods import DeltaLora, first_step
from lorakit.targets import Target

_BEFORE = "before"  # the adapter of B_K A_K


class DeltaLoraAdapter(Adapter):
    def __init__(
        self,
        section: DeltaLora,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        total_steps: int,
        train_also: Sequence[str] = (),
    ) -> None:
        """Attaches in place: A and B start as LoRA's of the same seed."""
        self.start = first_step(total_steps, section.start)
        self.ratio, self.targets, self.train_also = section.delta_ratio, tuple(targets), list(train_also)
        self.lora = LoraAdapter(section, model, targets, seed, train_also)
        self.items = self.lora.trained()
        base = self.lora.peft.get_base_model()
        self.layers: dict[str, Any] = {t.layer.name: base.get_submodule(t.layer.name) for t in targets}
        self.scales = {name: layer.scaling[NAME] for name, layer in self.layers.items()}  # s
        for name, layer in self.layers.items() if self.start else ():  # at 0 B A is zero: nothing to remember
            add_frozen(layer, _BEFORE, -self.ratio * self.scales[name])
        self.following = torch.tensor([self.start == 0], dtype=torch.uint8)
        self._activate()

    def trained(self) -> list[Trained]:
        return list(self.items)

    def before_step(self, step: int) -> None:
        """What W took over passes no gradient to A and B."""
        grads = [
            i.parameter.grad for i in self.items if i.role is not Role.HEAD and i.parameter.grad is not None
        ]
        if self.following and grads:
            torch._foreach_mul_(grads, 1 / (1 + self.ratio))

    def after_step(self, step: int) -> None:
        if step + 1 != self.start:
            return
        with torch.no_grad():
            for layer in self.layers.values():
                for before, now in zip(factors(layer, _BEFORE), factors(layer), strict=True):
                    before.copy_(now)
        self.following.fill_(1)
        self._activate()

    def disabled(self) -> AbstractContextManager[None]:
        return self.lora.disabled()

    def state(self) -> dict[str, Tensor]:
        """A and B now and when W began to follow, and whether it does."""
        weights = {item.name: item.parameter.detach() for item in self.items}
        before = {
            f"before|{name}|{factor}": tensor.detach()
            for name, layer in self.layers.items()
            if self.start
            for factor, tensor in zip("AB", factors(layer, _BEFORE), strict=True)
        }
        return weights | before | {"following": self.following}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")
        self._activate()

    def write(self, folder: Path, base_name: str) -> None:
        """Plain LoRA, exactly: of rank 2r, or r where W does not follow yet or did from the start."""
        before = _BEFORE if self.following and self.start else None
        found = {name: as_one(layer, before) for name, layer in self.layers.items()}
        write_plain(folder, self, found, self.train_also, base_name)

    def _activate(self) -> None:
        """The terms that count now, with gradients for A and B alone."""
        follows = bool(self.following)
        for name, layer in self.layers.items():
            layer.scaling[NAME] = self.scales[name] * (1 + self.ratio if follows else 1)
            if self.start:
                activate(layer, *([_BEFORE] if follows else []))
