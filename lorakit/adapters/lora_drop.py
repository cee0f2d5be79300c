"""LoRA-drop: layers whose adapter adds little share one, those whose adapter adds much keep their own.

A probe trains plain LoRA, y = W x + s B A x, on a sample of the data. Layer i is then worth

    I_i = g_i / sum over all layers of g,    g_i = sum over the tokens x of the sample of |s B_i A_i x|^2,

what its adapter adds to its own output. From the largest I_i downwards, the layers whose I sum up to
`threshold` keep an adapter of their own; of the others, those of one kind (same last name, same sides) share
A and B. All adapters go back to where they were drawn, and training begins: where all are kept it is LoRA,
bit for bit. Source: Zhou et al. 2024, arXiv 2402.07721.

What is decided here: every adapted matrix is a layer of its own, and so there is a shared adapter per kind of
matrix, because A and B must fit. The sample is drawn at random; the paper takes the same share of every
class, which text has not. PEFT has no such method; its layers compute this one when they are given the same A
and B. In the file every layer has a copy, so that it is no smaller than LoRA's.

A is (rank, in), B is (out, rank).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Probe, Trained, copy_into
from lorakit.adapters.inputs import see_inputs
from lorakit.adapters.lora import LoraAdapter
from lorakit.adapters.lora_files import write_plain
from lorakit.errors import LorakitError, RunError
from lorakit.recipe.methods import LoraDrop
from lorakit.targets import Target
from lorakit.terminal import say

NAME = "default"  # of the adapter in PEFT's layers


# ------------------------------------------------------------------------------------------------------------
# What a layer is worth, and the choice: pure functions


def added(x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Sum over the rows of x (N, in) of |scale * B A x|^2, from two products of (rank, rank):
    |B z|^2 = z^T (B^T B) z."""
    z = x.to(a.dtype) @ a.T  # (N, rank)
    return scale**2 * ((z.T @ z).double() * (b.T @ b).double()).sum()


def keep(worth: Sequence[float], threshold: float) -> list[bool]:
    """A mask of the fewest layers that make up `threshold` of the sum of `worth`, the largest first; of
    equals the earlier. Added up as fractions, so that 0.9 of 10 is 9."""
    exact = [Fraction(value) for value in worth]
    wanted, reached = Fraction(repr(threshold)) * sum(exact), Fraction(0)
    kept = [False] * len(worth)
    for index in sorted(range(len(worth)), key=lambda index: -worth[index]):
        if reached >= wanted:
            break
        kept[index], reached = True, reached + exact[index]
    return kept


def shared(targets: Sequence[Target], kept: Sequence[bool]) -> dict[str, str]:
    """Layer that is not kept -> the first of its kind that is not, whose A and B it has."""
    firsts: dict[Any, str] = {}
    found = {}
    for target, own in zip(targets, kept, strict=True):
        layer = target.layer
        if not own:
            kind = layer.name.rsplit(".", 1)[-1], layer.kind, layer.in_features, layer.out_features
            found[layer.name] = firsts.setdefault(kind, layer.name)
    return found


# ------------------------------------------------------------------------------------------------------------
# The adapter


class LoraDropAdapter(Adapter):
    prepares = True

    def __init__(
        self,
        section: LoraDrop,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        train_also: Sequence[str] = (),
    ) -> None:
        """Attaches in place: LoRA on all layers, until prepare() or load_state() decides."""
        self.section, self.targets, self.train_also = section, tuple(targets), list(train_also)
        self.lora = LoraAdapter(section, model, targets, seed, train_also)
        base = self.lora.peft.get_base_model()
        self.layers: dict[str, Any] = {t.layer.name: base.get_submodule(t.layer.name) for t in targets}
        self.kept = torch.ones(len(targets), dtype=torch.bool)
        self.importance = torch.zeros(len(targets), dtype=torch.float64)  # sums to one, once known

    def prepare(self, probe: Probe) -> None:
        """Raises: RunError when the probe leaves nothing to compare."""
        start = {item.name: item.parameter.detach().clone() for item in self.trained()}
        probe.train(self.section.probe)
        worth = probe.sum_over_ranks(self._worth(probe)).cpu()
        with torch.no_grad():
            for item in self.trained():
                item.parameter.copy_(start[item.name])
        total = float(worth.sum())
        if not (isfinite(total) and total > 0):
            cause = "nothing" if total == 0 else f"|dW x|^2 = {total}"
            raise RunError(
                f"adapter.probe: after it the adapters add {cause}, so that no layer can be chosen",
                "Write a larger adapter.probe, or another optimizer.lr.",
            )
        self.importance.copy_(worth / total)
        self._share(torch.tensor(keep(worth.tolist(), self.section.threshold)))
        own, num_shared = int(self.kept.sum()), len(set(shared(self.targets, self.kept.tolist()).values()))
        told = f"{own} of {len(self.layers)} layers make up {self.section.threshold:.0%} of what is added"
        say(f"probe     {told} and keep an adapter of their own; the others share {num_shared}")

    def trained(self) -> list[Trained]:
        """What several layers share is there once, under the name of the first."""
        return self.lora.trained()

    def notes(self) -> dict[str, dict[str, Any]]:
        if not self.importance.any():
            return {}
        values = zip(self.layers, self.importance.tolist(), strict=True)
        found: dict[str, dict[str, Any]] = {name: {"importance": value} for name, value in values}
        for name, first in shared(self.targets, self.kept.tolist()).items():
            found[name] |= {"shared_with": first} if name != first else {}
        return found

    def disabled(self) -> AbstractContextManager[None]:
        return self.lora.disabled()

    def state(self) -> dict[str, Tensor]:
        """A and B, each once, and what was decided on."""
        weights = {item.name: item.parameter.detach() for item in self.trained()}
        return weights | {"importance": self.importance, "kept": self.kept}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Shares as the state says, where nothing is shared yet; trained() is another from then on."""
        kept = tensors.get("kept", self.kept)
        if self.kept.all() and kept.shape == self.kept.shape:
            self._share(kept.bool())
        if not torch.equal(kept.bool(), self.kept):
            raise LorakitError("the adapter shares A and B among other layers than this state says")
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def write(self, folder: Path, base_name: str) -> None:
        """Plain LoRA, exactly: every layer has a copy of what it shares."""
        factors = {
            name: (
                layer.lora_A[NAME].weight.detach(),
                layer.scaling[NAME] * layer.lora_B[NAME].weight.detach(),
            )
            for name, layer in self.layers.items()
        }
        write_plain(folder, self, factors, self.train_also, base_name)

    def _share(self, kept: Tensor) -> None:
        self.kept.copy_(kept)
        for name, first in shared(self.targets, kept.tolist()).items():
            layer, source = self.layers[name], self.layers[first]
            layer.lora_A[NAME], layer.lora_B[NAME] = source.lora_A[NAME], source.lora_B[NAME]

    def _worth(self, probe: Probe) -> Tensor:
        """(layers,) in fp64: what every adapter adds on this rank's part of the sample."""
        layers = list(self.layers.values())
        worth = torch.zeros(len(layers), dtype=torch.float64, device=layers[0].lora_A[NAME].weight.device)

        def see(index: int, given: Tensor, rows: Tensor) -> None:
            layer = layers[index]
            worth[index] += added(
                rows, layer.lora_A[NAME].weight, layer.lora_B[NAME].weight, layer.scaling[NAME]
            )

        see_inputs(layers, probe, see)
        return worth
