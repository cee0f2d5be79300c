"""Delta-LoRA: the base's weight follows what training adds to B A.

After every step t from K on, W <- W + lambda s (B_{t+1} A_{t+1} - B_t A_t), with s the scale of LoRA and no
dropout, so that the gradient of B A is that of W. Source: Zi et al. 2023, arXiv 2309.02411, algorithm 1.

Here W is never touched. The sum telescopes, so that from K on a layer computes

    y = W x + s B A x + lambda s sg(B A) x - lambda s B_K A_K x

where sg(.) passes the gradient to x, but none to A and B, and B_K A_K is what stood when W began to follow.
That is the paper's update exactly, on a 4-bit base too, without rounding small changes to bf16, and with an
adapter that is saved by itself: it is a LoRA of rank 2r at most,

    A' = [A; A_K],    B' = s [(1 + lambda) B, -lambda B_K].

What it is worth: with K = 0 the weight is W + (1 + lambda) s B A, while the gradients of A and B are 1 +
lambda times smaller than those of a LoRA of that scale, which Adam does not see. So Delta-LoRA is then LoRA
with (1 + lambda) times the alpha at the same learning rate: to the last digits without Adam's eps, to about
1e-6 with the usual one, with weight decay too. Clipping makes a difference where only the larger gradients
are above the limit. Compare it with that LoRA, not with one of the same alpha.

A is (rank, in), B is (out, rank); for an Embedding A is (rank, vocabulary).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapters import Adapter, Trained, copy_into
from lorakit.adapters.lora import LoraAdapter
from lorakit.adapters.lora_files import write_plain
from lorakit.errors import LorakitError
from lorakit.recipe.methods import DeltaLora
from lorakit.targets import Target

# Names of the three terms as adapters of PEFT's layers: s B A, lambda s sg(B A), -lambda s B_K A_K.
_MOVING, _FOLLOWED, _BEFORE = "default", "followed", "before"


def first_step(start: float, total_steps: int) -> int:
    """K: steps before W begins to follow. `start`: below 1 a share of `total_steps`, from 1 a number of
    steps.

    Raises: LorakitError where no step is left.
    """
    steps = start if isinstance(start, int) else round(start * total_steps)
    if steps >= total_steps:
        raise LorakitError(
            f"adapter.start: W would begin to follow after {steps} steps, but the run has {total_steps}",
            "Write a smaller adapter.start, or train for more steps.",
        )
    return steps


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
        """Attaches in place: A and B start as LoRA's of the same seed. Raises: LorakitError for a start that
        the run does not reach."""
        self.start = first_step(section.start, total_steps)
        self.ratio, self.targets, self.train_also = section.delta_ratio, tuple(targets), list(train_also)
        self.lora = LoraAdapter(section, model, targets, seed, train_also)
        self.items = self.lora.trained()
        base = self.lora.peft.get_base_model()
        self.layers: dict[str, Any] = {t.layer.name: base.get_submodule(t.layer.name) for t in targets}
        self.following = torch.zeros(1, dtype=torch.uint8)
        for layer in self.layers.values():
            scale = self.ratio * layer.scaling[_MOVING]
            a, b = factors(layer, _MOVING)
            _add(layer, _FOLLOWED, a.data, b.data, scale)  # the memory of A and B
            _add(layer, _BEFORE, torch.zeros_like(a.data), torch.zeros_like(b.data), -scale)
        self._activate()
        if self.start == 0:
            self._follow()

    def trained(self) -> list[Trained]:
        return list(self.items)

    def after_step(self, step: int) -> None:
        if step + 1 == self.start:
            self._follow()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.lora.disabled():
            yield
        self._activate()  # PEFT switches back on with gradients everywhere

    def state(self) -> dict[str, Tensor]:
        """A and B now and when W began to follow, and whether it does."""
        every = dict(self.lora.peft.get_base_model().named_parameters())
        weights = {item.name: item.parameter.detach() for item in self.items}
        pairs = {name: name.replace(f".{_MOVING}", f".{_BEFORE}") for name in weights if ".lora_" in name}
        before = {f"before|{name}": every[pair].data for name, pair in pairs.items()}
        return weights | before | {"following": self.following}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")
        self._activate()

    def write(self, folder: Path, base_name: str) -> None:
        """Plain LoRA, exactly: of rank 2r, or r where W does not follow yet or did from B A = 0 on."""
        found = {}
        for name, layer in self.layers.items():
            scale, follows = layer.scaling[_MOVING], bool(self.following)
            a, b = (factor.detach() for factor in factors(layer, _MOVING))
            a_before, b_before = (factor.detach() for factor in factors(layer, _BEFORE))
            b = scale * (1 + self.ratio) * b if follows else scale * b
            if follows and a_before.any() and b_before.any():
                a, b = torch.cat([a, a_before]), torch.cat([b, -self.ratio * scale * b_before], dim=1)
            found[name] = a, b
        write_plain(folder, self, found, self.train_also, base_name)

    def _follow(self) -> None:
        """From here on W follows B A, starting at what B A is now."""
        with torch.no_grad():
            for layer in self.layers.values():
                for before, now in zip(factors(layer, _BEFORE), factors(layer, _MOVING), strict=True):
                    before.copy_(now)
        self.following.fill_(1)
        self._activate()

    def _activate(self) -> None:
        """The terms that count now, with gradients for A and B alone."""
        terms = [_MOVING, _FOLLOWED, _BEFORE] if self.following else [_MOVING]
        for layer in self.layers.values():
            layer.set_adapter(terms)
            for followed, moving in zip(factors(layer, _FOLLOWED), factors(layer, _MOVING), strict=True):
                followed.data = moving.data  # one memory, also after something has moved A and B
            for frozen in (*factors(layer, _FOLLOWED), *factors(layer, _BEFORE)):
                frozen.requires_grad_(False)


def factors(layer: Any, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the adapter `name` of one of PEFT's layers."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _add(layer: Any, name: str, a: Tensor, b: Tensor, scale: float) -> None:
    """A further adapter on one of PEFT's layers, frozen, in the memory of `a` and `b`."""
    frozen = nn.Parameter(a, requires_grad=False), nn.Parameter(b, requires_grad=False)
    layer.scaling[name], layer.lora_dropout[name] = scale, nn.Identity()
    layer.r[name], layer.lora_alpha[name] = len(a), scale * len(a)
    if _MOVING in layer.lora_embedding_A:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = frozen
        return
    for modules, weight in zip((layer.lora_A, layer.lora_B), frozen, strict=True):
        modules[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        modules[name].weight = weight
