"""Lion: every number of a parameter moves by the learning rate, in the direction of the sign of

    c = beta1 m + (1 - beta1) g,       theta <- theta (1 - lr weight_decay) - lr sign(c)
                                       m <- beta2 m + (1 - beta2) g

Source: Chen et al. 2023, arXiv 2302.06675, algorithm 2. The same update is in bitsandbytes, whose step waits
for the GPU after every parameter and knows no precision but fp32; PyTorch has none.
"""

from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """State of a parameter: `momentum`, of its shape and dtype."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float]) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Moves every parameter that has a gradient, in place."""
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                momentum = state.setdefault("momentum", torch.zeros_like(parameter))
                direction = torch.lerp(gradient, momentum, beta1).sign_()
                parameter.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-lr)
                momentum.lerp_(gradient, 1 - beta2)
