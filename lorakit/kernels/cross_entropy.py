"""The loss of an output head without its logits: sum over M of -log softmax(f(h W^T + b))[target].

The head and the cross-entropy are one step over a few hundred trained tokens at a time. The gradient of the
hidden states, and that of a trained head, is computed while the logits of the piece are still there, so that
neither (M, V) logits nor their gradient ever exist: the backward pass only multiplies by a number. f is
what some models do to their logits: a factor (Cohere, Granite), then softcap * tanh(logits / softcap)
(Gemma 2). The plain twin is the model's own forward pass followed by torch's cross_entropy in fp32.

Shapes: M trained tokens, H hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.kernels import repeating

_PIECE_BYTES = 64 * 2**20  # of logits at once: enough rows to keep the products busy, few enough for a cache
_BLOCK_BYTES = 4 * 2**20  # of fp32 logits at once, on a CPU: what stays in its cache between two passes


def summed(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (M,)
    bias: Tensor | None = None,  # (V,)
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """A scalar in fp32 (fp64 for fp64 hidden states): the summed loss, differentiable once in hidden, weight
    and bias.

    Products are computed in the dtype of autocast where it is on, else in that of `hidden`.
    """
    dtype = hidden.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    wanted = torch.is_grad_enabled()  # an evaluation pays for no gradient
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = _Summed.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, scale, softcap, dtype, wanted
        )
    return loss


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
        wanted: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (wanted and needed for needed in ctx.needs_input_grad[:3])
        h, w = hidden.to(dtype), weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        num_rows = max(16, _PIECE_BYTES // (w.shape[0] * w.element_size()))
        h = nn.functional.pad(h, (0, 0, 0, repeating(len(h)) - len(h)))  # rows of zeros, left out of the loss
        grad_h = torch.empty_like(h) if needs_hidden else None
        grad_w = torch.zeros_like(w, dtype=exact) if needs_weight else None
        grad_b = torch.zeros(w.shape[0], dtype=exact, device=w.device) if needs_bias else None
        buffer = torch.empty(min(num_rows, len(h)), w.shape[0], dtype=dtype, device=h.device)
        total = torch.zeros((), dtype=exact, device=h.device)
        for start in range(0, len(h), num_rows):
            rows = slice(start, start + num_rows)
            logits = buffer[: len(h[rows])]
            if b is None:
                torch.mm(h[rows], w.T, out=logits)
            else:
                torch.addmm(b, h[rows], w.T, out=logits)
            goals = targets[rows]
            logits[len(goals) :] = 0
            # From here on `logits` holds the gradient of the loss with respect to the logits.
            total += _loss_and_gradient_(logits[: len(goals)], goals, scale, softcap, exact)
            if grad_h is not None:
                torch.mm(logits, w, out=grad_h[rows])
            if grad_w is not None and grad_w.dtype == dtype:
                grad_w.addmm_(logits.T, h[rows])
            elif grad_w is not None:
                grad_w += logits.T @ h[rows]
            if grad_b is not None:
                grad_b += logits.sum(0, dtype=exact)
        grad_h = None if grad_h is None else grad_h[: len(targets)]
        ctx.save_for_backward(grad_h, grad_w, grad_b)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if tensor is None else tensor.mul(grad).to(dtype)
            for tensor, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


def _loss_and_gradient_(
    logits: Tensor, targets: Tensor, scale: float, softcap: float | None, exact: torch.dtype
) -> Tensor:
    """The summed loss of a piece; `logits` (M, V) is overwritten by its gradient, computed in `exact`.

    A block of rows at a time, in the same two buffers: what is small stays in the cache of a CPU.
    """
    num_rows, width = max(1, len(logits)), logits.shape[1]  # a piece may be all padding
    if logits.device.type == "cpu":
        num_rows = min(num_rows, max(4, _BLOCK_BYTES // (width * exact.itemsize)))
    wide, log_p = (torch.empty(num_rows, width, dtype=exact, device=logits.device) for _ in range(2))
    total = torch.zeros((), dtype=exact, device=logits.device)
    for start in range(0, len(logits), num_rows):
        block, goals = logits[start : start + num_rows], targets[start : start + num_rows, None]
        x, y = wide[: len(block)], log_p[: len(block)]
        x.copy_(block)
        if scale != 1.0:
            x.mul_(scale)
        if softcap is not None:
            slope = 1 - x.div_(softcap).tanh_().square()
            x.mul_(softcap)
        torch.log_softmax(x, dim=-1, out=y)
        total -= y.gather(1, goals).sum()
        y.exp_()
        y.scatter_add_(1, goals, torch.full_like(y[:, :1], -1.0))
        if softcap is not None:
            y.mul_(slope)
        block.copy_(y if scale == 1.0 else y.mul_(scale))
    return total
