"""LoRA-FA: y = W x + scale * B A x with A as it was drawn; B alone is trained.

A's gradient is the only thing that needs x in the backward pass, so that of a layer's input only A x is held
for it (kernels/lora.py), unless the operation that made x holds it anyway. Source: Zhang et al. 2023, arXiv
2308.03303. Dropout is refused: its mask would have to be held, and x with it.

A step along B's gradient g = scale * G A^T moves W by scale^2 * G A^T A, with G the gradient of W: A decides
how far each direction goes, and scale counts twice. `projected` (version 2 of the paper) takes

    g <- g (A A^T)^-1 / scale^2,   so that   scale * g A = G A^T (A A^T)^-1 A,

which is G projected on the rows of A, whatever A's lengths and the scale are. It is done on the gradients
summed over ranks and before clipping: the norm that is logged and clipped is that of the projected gradient.
What to expect of it: the rows of a random A are nearly orthogonal and of one length, so that A A^T is nearly
a multiple of the identity (a third of it, for the default init), and Adam divides a gradient by its own size.
With Adam and a new A the two versions differ little; with SGD by 3 / scale^2.

PEFT's optimizer multiplies in bf16 (2e-3 off) and inverts A A^T again in every step. Here the inverse is
computed once, in fp64, and where rows of A depend on each other it is the pseudoinverse, which projects on
what they span.

A is (rank, in), B is (out, rank). The adapter's file holds both: it is a LoRA.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained
from lorakit.adapters.lora import LoraAdapter
from lorakit.recipe.methods import LoraFa
from lorakit.targets import Target


def inverse_of(a: Tensor, scale: float) -> Tensor:
    """(R, R) in fp64: the pseudoinverse of A A^T, divided by scale^2. a: (R, I)."""
    wide = a.detach().double()
    found: Tensor = torch.linalg.pinv(wide @ wide.T, hermitian=True) / scale**2
    return found


class LoraFaAdapter(Adapter):
    def __init__(
        self,
        section: LoraFa,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        train_also: Sequence[str] = (),
    ) -> None:
        """Attaches in place: A and B start as LoRA's of the same seed."""
        self.targets, self.projected = tuple(targets), section.projected
        self.lora = LoraAdapter(section, model, targets, seed, train_also)
        for item in self.lora.trained():
            item.parameter.requires_grad_(item.role is not Role.A)
        base = self.lora.peft.get_base_model()
        self.layers: list[Any] = [base.get_submodule(target.layer.name) for target in targets]
        self._invert()

    def trained(self) -> list[Trained]:
        return self.lora.trained()

    def before_step(self, step: int) -> None:
        """Where `projected`, B's gradient becomes that of the projection, in place."""
        for b, inverse in self.inverses:
            if b.grad is not None:
                b.grad.copy_(b.grad.double() @ inverse)

    def disabled(self) -> AbstractContextManager[None]:
        return self.lora.disabled()

    def state(self) -> dict[str, Tensor]:
        """A and B: A is a function of the seed and of the versions it was drawn with."""
        return self.lora.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.lora.load_state(tensors)
        self._invert()

    def config(self, base_name: str) -> dict[str, Any]:
        return self.lora.config(base_name)

    def write(self, folder: Path, base_name: str) -> None:
        self.lora.write(folder, base_name)

    def _invert(self) -> None:
        """(B, the matrix that its gradient is multiplied with) of every layer; none where not `projected`."""
        self.inverses = [
            (
                layer.lora_B["default"].weight,
                inverse_of(layer.lora_A["default"].weight, layer.scaling["default"]),
            )
            for layer in (self.layers if self.projected else ())
        ]
