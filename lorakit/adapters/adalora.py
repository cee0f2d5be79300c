"""AdaLoRA: y = W x + alpha / init_rank * P diag(lambda) Q dropout(x), with ranks that go where they matter.

P is (out, rank), Q is (rank, in), both start at N(0, 0.02^2); lambda starts at zero, so that step 0 is the
base model exactly. A triplet (lambda_i, column i of P, row i of Q) is judged by the importance of its
entries; the budget of triplets over all layers falls from init_rank to target_rank per layer, and the lambda
of those outside it are set to zero. Source: Zhang et al. 2023, arXiv 2303.10512, algorithm 1.

Where paper and released code differ, this follows the code, in which the published weights were found: the
penalty is the mean over all P and Q of the Frobenius norm itself (equation 4 prints its square, summed), and
the cubic schedule counts from the end of the warm-up (equation 14 prints a numerator that jumps).

The layers are PEFT's. Budget, importance, masks, penalty and export are here: PEFT's allocator forgets its
state in checkpoints, fails where nothing is to be pruned, and its penalty leaks into evaluation.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained, base_alone, copy_into, in_dtype_of_base
from lorakit.adapters.lora_files import Factors, decompose, write_plain
from lorakit.errors import LorakitError
from lorakit.recipe.methods import AdaLora, phases
from lorakit.targets import Target

_ROLES = {".lora_A.": Role.A, ".lora_B.": Role.B, ".lora_E.": Role.SCALE}


# ------------------------------------------------------------------------------------------------------------
# The schedule and the choice: pure functions


def budget_at(done: int, start: int, settled: int, first: int, last: int) -> int:
    """Triplets that may stay after `done` steps: `first` up to step `start`, `last` from step `settled` on, a
    cubic fall between them, rounded down (equation 14, as the code has it)."""
    if done >= settled:
        return last
    if done <= start:
        return first
    return last + (first - last) * (settled - done) ** 3 // (settled - start) ** 3


def smoothed(
    sensitivities: list[Tensor],
    uncertainties: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    beta1: float,
    beta2: float,
) -> None:
    """Equations 8 to 10, in place and for all matrices at once: I = |w dL/dw|; sensitivity <- beta1 * it
    + (1 - beta1) * I; uncertainty <- beta2 * it + (1 - beta2) |I - sensitivity|, with the sensitivity just
    updated, as in the code."""
    now = torch._foreach_mul(weights, gradients)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(sensitivities, now, 1 - beta1)
    torch._foreach_sub_(now, sensitivities)
    torch._foreach_abs_(now)
    torch._foreach_lerp_(uncertainties, now, 1 - beta2)


def largest(scores: Sequence[Tensor], budget: int) -> list[Tensor]:
    """Per layer a mask of the triplets that are among the `budget` best of all; of equals the earlier stays.

    scores: (rank,) per layer.
    """
    together = torch.cat(list(scores))
    mask = torch.zeros_like(together, dtype=torch.bool)
    mask[together.argsort(descending=True, stable=True)[:budget]] = True
    return [part.clone() for part in mask.split([len(score) for score in scores])]


def off_orthogonal(matrices: Sequence[Tensor]) -> Tensor:
    """Mean over `matrices` of |M M^T - I| (Frobenius); M is (rank, features)."""
    alike: dict[torch.Size, list[Tensor]] = {}  # one product per shape, not per layer: a sixth of the kernels
    for matrix in matrices:
        alike.setdefault(matrix.shape, []).append(matrix)
    norms = []
    for stacked in map(torch.stack, alike.values()):
        identity = torch.eye(stacked.shape[1], device=stacked.device, dtype=stacked.dtype)
        norms.append(torch.linalg.matrix_norm(stacked @ stacked.mT - identity))
    return torch.cat(norms).mean()


# ------------------------------------------------------------------------------------------------------------
# The adapter


class AdaLoraAdapter(Adapter):
    moves_ranks = True

    def __init__(
        self,
        section: AdaLora,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        total_steps: int,
        train_also: Sequence[str] = (),
    ) -> None:
        """Attaches in place. Raises: LorakitError for too few steps to settle ranks."""
        self.section, self.targets, self.train_also = section, tuple(targets), list(train_also)
        self.start, self.settled_at = phases(total_steps, section.warmup, section.final)
        if section.init_rank > section.target_rank and not 0 <= self.start < self.settled_at:
            raise LorakitError(f"adapter: {total_steps} steps are too few for AdaLoRA's three phases")
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, tied weights: decided and tested here
            self.peft: PeftModel = get_peft_model(model, _config(section, targets, train_also, total_steps))
        base = self.peft.get_base_model()
        self.layers: dict[str, Any] = {t.layer.name: base.get_submodule(t.layer.name) for t in targets}
        for layer in self.layers.values():  # a part of the scale: PEFT rounds it to the base's dtype, and
            layer.ranknum.requires_grad_(False)  # its 4-bit layers would train it
            layer.ranknum["default"].data = torch.full_like(
                layer.ranknum["default"], section.init_rank, dtype=torch.float32
            )
            layer.register_forward_hook(in_dtype_of_base)  # of an 8-bit layer PEFT returns fp32
        for item in self.trained():
            item.parameter.data = item.parameter.data.float()
        self.p = {name: layer.lora_B["default"] for name, layer in self.layers.items()}  # (out, rank)
        self.lambda_ = {name: layer.lora_E["default"] for name, layer in self.layers.items()}  # (rank, 1)
        self.q = {name: layer.lora_A["default"] for name, layer in self.layers.items()}  # (rank, in)
        decides = section.init_rank > section.target_rank
        self.judged = [item for item in self.trained() if decides and item.role is not Role.HEAD]
        self.importance = {
            (kind, item.name): torch.zeros_like(item.parameter)
            for item in self.judged
            for kind in ("sensitivity", "uncertainty")
        }
        self.kept = {
            name: torch.ones(len(q), dtype=torch.bool, device=q.device) for name, q in self.q.items()
        }

    def trained(self) -> list[Trained]:
        base = self.peft.get_base_model()
        return [Trained(name, p, _role(name)) for name, p in base.named_parameters() if p.requires_grad]

    def penalty(self) -> Tensor | None:
        if self.section.orthogonal_weight == 0:
            return None
        matrices = [*self.q.values(), *(p.T for p in self.p.values())]
        return self.section.orthogonal_weight * off_orthogonal(matrices)

    def before_step(self, step: int) -> None:
        """Importance at the weights at which the gradient was taken, before clipping scales it; as long as
        there is something to decide."""
        if self.settled(step):
            return
        gradients = [  # none: a layer that the model did not use
            torch.zeros_like(item.parameter) if item.parameter.grad is None else item.parameter.grad
            for item in self.judged
        ]
        with torch.no_grad():
            smoothed(
                [self.importance["sensitivity", item.name] for item in self.judged],
                [self.importance["uncertainty", item.name] for item in self.judged],
                [item.parameter for item in self.judged],
                gradients,
                self.section.beta1,
                self.section.beta2,
            )

    def after_step(self, step: int) -> None:
        """Take away what the budget does not hold; from the settled step on the choice stands."""
        done = step + 1
        if self.section.init_rank == self.section.target_rank:
            return
        due = self.start < done < self.settled_at and done % self.section.interval == 0
        if done == self.settled_at or due:
            masks = largest([self._scores(name) for name in self.layers], self.budget(done))
            self.kept = dict(zip(self.layers, masks, strict=True))
            self._mask()
        elif done > self.settled_at:
            self._mask()  # the optimizer's momentum would bring them back

    def budget(self, done: int) -> int:
        first, last = (rank * len(self.layers) for rank in (self.section.init_rank, self.section.target_rank))
        return budget_at(done, self.start, self.settled_at, first, last)

    def ranks(self) -> dict[str, int]:
        return {name: int(mask.sum()) for name, mask in self.kept.items()}

    def settled(self, step: int) -> bool:
        return step >= self.settled_at or self.section.init_rank == self.section.target_rank

    def measures(self) -> dict[str, float]:
        return {"budget": sum(self.ranks().values())}

    def disabled(self) -> AbstractContextManager[None]:
        return base_alone(self.peft)

    def state(self) -> dict[str, Tensor]:
        """P, lambda and Q, what the allocator remembers, and which triplets it kept."""
        weights = {item.name: item.parameter.detach() for item in self.trained()}
        memory = {f"{kind}|{name}": tensor for (kind, name), tensor in self.importance.items()}
        return weights | memory | {f"kept|{name}": mask for name, mask in self.kept.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def write(self, folder: Path, base_name: str) -> None:
        """Plain LoRA, exactly: A = Q and B = scale * P diag(lambda) of the triplets that are not zero."""
        factors = {}
        for name in self.layers:
            lambda_ = self.lambda_[name].detach().flatten()
            living = lambda_.nonzero().flatten()
            p, q = self.p[name].detach(), self.q[name].detach()
            factors[name] = q[living], p[:, living] * lambda_[living] * self._scale(name)
        write_plain(folder, self, factors, self.train_also, base_name)

    def continue_from(self, factors: Sequence[Factors], whole: dict[str, Tensor]) -> None:
        """Start with the update of a LoRA: its singular value decomposition, and fresh triplets beside it.

        Raises: LorakitError when a layer's update has a rank above init_rank.
        """
        with torch.no_grad():
            for item in factors:
                name = item.target.layer.name
                u, s, vh = decompose(item.a, item.b, item.scale)
                if len(s) > self.section.init_rank:
                    raise LorakitError(
                        f"adapter.start_from: {name} has rank {len(s)}, above init_rank"
                        f" {self.section.init_rank}; write a larger adapter.init_rank"
                    )
                self.p[name][:, : len(s)] = u
                self.q[name][: len(s)] = vh
                self.lambda_[name][: len(s), 0] = s / self._scale(name)
            base = dict(self.peft.get_base_model().named_parameters())
            for name, tensor in whole.items():
                module, _, leaf = name.rpartition(".")
                base[f"{module}.modules_to_save.default.{leaf}"].copy_(tensor)

    def _scale(self, name: str) -> float:
        """What PEFT's layer multiplies with: alpha / (init_rank + 1e-5)."""
        layer = self.layers[name]
        return float(layer.scaling["default"]) / (float(layer.ranknum["default"]) + 1e-5)

    def _scores(self, layer: str) -> Tensor:
        """(rank,) importance of the triplets: that of lambda_i, and the means over column i of P and row i of
        Q (equation 11)."""

        def entries(factor: str) -> Tensor:
            name = f"{layer}.lora_{factor}.default"
            return self.importance["sensitivity", name] * self.importance["uncertainty", name]

        return entries("E")[:, 0] + entries("B").mean(0) + entries("A").mean(1)

    def _mask(self) -> None:
        with torch.no_grad():
            for name, mask in self.kept.items():
                self.lambda_[name].mul_(mask[:, None])


def _role(name: str) -> Role:
    return next((role for mark, role in _ROLES.items() if mark in f"{name}."), Role.HEAD)


def _config(
    section: AdaLora, targets: Sequence[Target], train_also: Sequence[str], total_steps: int
) -> AdaLoraConfig:
    return AdaLoraConfig(
        init_r=section.init_rank,
        target_r=section.target_rank,
        lora_alpha=targets[0].alpha,  # type: ignore[arg-type]
        lora_dropout=section.dropout,
        target_modules=[target.layer.name for target in targets],
        modules_to_save=list(train_also) or None,
        fan_in_fan_out=any(target.layer.kind == "conv1d" for target in targets),
        total_step=total_steps,
        task_type="CAUSAL_LM",
    )
