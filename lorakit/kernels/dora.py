"""DoRA's rows: y = f * v + bias with v = x W^T + s x A^T B^T and f = m / |W + s B A|, row by row of W.

The lengths come from three small products, |W|^2 + 2 s (W A^T . B) + s^2 (B A A^T . B), where PEFT's layer
forms B A (out, in) through an identity matrix. Lengths and f are fp32 whatever W is held in: near one bf16
has steps of 0.8 %, more than training moves a length by. v alone is held for the backward pass.

Liu et al. 2024, arXiv 2402.09353: equation 5; the lengths are constants in the backward pass (section 4.3).
Shapes: N tokens of all rows, I in, O out, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

VARIANT = ("peft.tuners.lora.variants", "DoraLinearVariant")


def row_squares(weight: Tensor) -> Tensor:
    """(O,) squared lengths of the rows of weight (O, I), in fp32 at least."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.to(wide).square().sum(dim=1)


def row_lengths(squares: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """(O,) |weight + scale b a|, row by row. squares: those of weight (O, I); a: (R, I); b: (O, R)."""
    a, b = a.to(weight.dtype), (scale * b).to(weight.dtype)  # as v is made of them
    cross = (weight @ a.T).to(squares.dtype)  # (O, R)
    a, b = a.to(squares.dtype), b.to(squares.dtype)
    return (squares + ((2 * cross + b @ (a @ a.T)) * b).sum(dim=1)).clamp_min(0).sqrt()


def rescaled(v: Tensor, m: Tensor, lengths: Tensor, bias: Tensor | None) -> Tensor:
    """v * m / lengths + bias. v: (..., O); m, bias: (O,); lengths: (O,), a constant in the backward pass."""
    y: Tensor = _Rescaled.apply(v, m, lengths)  # type: ignore[no-untyped-call]
    return y if bias is None else y + bias.to(y.dtype)


class _Rescaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, m: Tensor, lengths: Tensor) -> Tensor:
        inverse = 1 / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)  # a row of zeros stays one
        ctx.save_for_backward(v, m, inverse)
        return torch.mul(v, m * inverse, out=torch.empty_like(v))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        v, m, inverse = ctx.saved_tensors
        of_m = (grad * v).reshape(-1, v.shape[-1]).sum(dim=0, dtype=inverse.dtype) * inverse
        return torch.mul(grad, m * inverse, out=torch.empty_like(grad)), of_m.to(m.dtype), None
