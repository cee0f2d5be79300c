"""Sophia-G: momentum over an estimate of the diagonal curvature; no number moves by more than the rate.

    m <- beta1 m + (1 - beta1) g
    h <- beta2 h + (1 - beta2) N g' g'                  every `every` steps, the first included
    theta <- theta (1 - lr weight_decay) - lr clip(m / max(rho h, eps), 1)

g is the gradient of the step's loss, a mean over its N trained tokens on all ranks. g' is that of the same
mean with labels drawn from the model's own predictions in place of the data's, before the update: over these
labels N g' g' is on average the diagonal of the Gauss-Newton matrix of that mean, as the gradients of the
tokens are independent and on average zero (Bartlett's identity).

Source: Liu et al. 2023, arXiv 2305.14342, algorithms 2 and 3. What differs from the authors' code: N is the
number of trained tokens of the very step, where theirs is a constant of the call (480 x 1024 tokens in their
pre-training; any other makes of rho something else); the estimate comes before the update as in the paper,
so that the first steps do not all move along bare signs; and every token of the step takes part in it. h
starts at zero and is not corrected for it, here as there: the first steps are clipped the more. What has no
curvature at the first estimate, as LoRA's A while B is zero, moves along signs until the next. Adapters'
regularisers and the clipping of the gradient to a norm are no part of the estimate.
"""

from typing import Any

import torch
from torch import Tensor


class Sophia(torch.optim.Optimizer):
    """State of a parameter: `m` and `h`, of its shape and dtype."""

    def __init__(
        self, params: Any, lr: float, betas: tuple[float, float], rho: float, every: int, eps: float
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": 0.0}
        super().__init__(params, defaults)
        self.every = every
        self.clipped: list[Tensor] = []  # numbers of each parameter that the last step clipped
        self.moved = 0  # numbers that it moved

    def estimates_at(self, step: int) -> bool:
        """Whether step `step` (from 0) begins with an estimate of the curvature."""
        return step % self.every == 0

    @torch.no_grad()
    def estimate(self, num_targets: int) -> None:
        """Takes the gradients of the loss of drawn labels, a mean over `num_targets`, into h."""
        for group in self.param_groups:
            beta2 = group["betas"][1]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is not None:
                    h = self._state(parameter)["h"]
                    h.mul_(beta2).addcmul_(gradient, gradient, value=(1 - beta2) * num_targets)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient, in place."""
        self.clipped, self.moved = [], 0
        for group in self.param_groups:
            lr = group["lr"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                m, h = (self._state(parameter)[key] for key in ("m", "h"))
                m.lerp_(gradient, 1 - group["betas"][0])
                ratio = m / (group["rho"] * h).clamp_(min=group["eps"])
                self.clipped.append((ratio.abs() >= 1).sum())
                self.moved += ratio.numel()
                parameter.mul_(1 - lr * group["weight_decay"]).sub_(ratio.clamp_(-1, 1), alpha=lr)

    def measures(self) -> dict[str, float]:
        """Share of the numbers that the last step clipped; one minus the paper's win rate."""
        return {"clipped_share": int(torch.stack(self.clipped).sum()) / self.moved} if self.clipped else {}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(m=torch.zeros_like(parameter), h=torch.zeros_like(parameter))
        return state
