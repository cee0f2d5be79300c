"""Root-mean-square normalisation as one autograd function: y = w * x / sqrt(mean(x^2) + eps).

The models write it as six operations on fp32 copies of their activations, four of which are kept for the
backward pass. Here x and one number per token are kept: with n = x / rms(x) and g = w * dy, dx = (g - n *
mean(g * n)) / rms(x). Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.

A module is switched when it gives, on random numbers, what one of the two known forms gives: `w * round(n)`
(Llama) or `round(n * (1 + w))` (Gemma), rounded to the dtype of x. Its plain twin is its own forward.

Shapes: N tokens (and heads), I features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def rms_norm(x: Tensor, weight: Tensor, eps: float, around_one: bool = False) -> Tensor:
    """(..., I) normalised over the last dimension; `around_one`: the weight is stored as a difference from 1.

    Differentiable once in x; the weight is frozen.
    """
    normalised: Tensor = _RmsNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, eps, around_one
    )
    return normalised


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, around_one: bool) -> Tensor:
        wide = x.to(_exact(x))
        rms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        inverse = rms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.around_one = around_one
        y: Tensor = wide * inverse
        return y.mul_(weight.to(wide.dtype) + 1.0).to(x.dtype) if around_one else y.to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        exact = inverse.dtype
        normal = x.to(exact) * inverse
        one = 1.0 if ctx.around_one else 0.0
        scaled = grad.to(exact) * (weight.to(exact) + one)
        mean = torch.linalg.vecdot(scaled, normal).div_(x.shape[-1]).unsqueeze(-1)
        return scaled.addcmul_(normal, mean, value=-1.0).mul_(inverse).to(x.dtype), None, None, None


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# ------------------------------------------------------------------------------------------------------------
# The modules of a model


def norms_of(model: nn.Module) -> list[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """(module, its fast forward) of every frozen RMS norm of a model."""
    kinds: dict[tuple[type, float], bool | None] = {}  # the form is the class's: tried once
    found = []
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(weight, Tensor) or weight.requires_grad or not isinstance(eps, float):
            continue
        if (type(module), eps) not in kinds:
            kinds[type(module), eps] = _form(module, weight, eps)
        form = kinds[type(module), eps]
        if form is not None:
            found.append((module, _forward(module, weight, eps, form)))
    return found


def _forward(module: nn.Module, weight: Tensor, eps: float, around_one: bool) -> Callable[[Tensor], Tensor]:
    plain = type(module).forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype:  # what comes out has the wider of the two: the module's own affair
            output: Tensor = plain(module, x)
            return output
        return rms_norm(x, weight, eps, around_one)

    return forward


@torch.no_grad()
def _form(module: nn.Module, weight: Tensor, eps: float) -> bool | None:
    """False for Llama's form, True for Gemma's, None for another one."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, len(weight), generator=draw).to(weight.device, weight.dtype)
    try:
        expected = module(x)
    except (TypeError, ValueError, RuntimeError):
        return None
    rounding = 1e-5 if weight.dtype == torch.float32 else 0.02
    for around_one in (False, True):
        if torch.allclose(rms_norm(x, weight, eps, around_one), expected, rtol=rounding, atol=rounding):
            return around_one
    return None
