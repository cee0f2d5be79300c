"""Causal attention of documents by plain matrix products: what CPUs do faster than a fused kernel.

On CPUs that multiply bf16 in hardware, PyTorch's fused attention spends most of its time outside of the
products. Here a block of queries meets all keys before it in one product, which leaves out what is masked
away whole; the backward pass has its gradients in closed form. Probabilities of short blocks are kept for it,
those of long ones computed again: never is a T x T matrix held.

With S = scale * Q K^T and P = softmax(S): dV = P^T dO; dS = P * (dO V^T - rowsum(P * dO V^T)); dQ = scale *
dS K; dK = scale * dS^T Q. Source: Dao et al. 2022, arXiv 2205.14135, appendix B.2. The twin is
scaled_dot_product_attention on each document by itself.

Shapes: H query heads, K key heads, G = H / K, T tokens of the row, D head size, B queries of a block.
"""

import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = (
    256  # queries at once: long enough for the products, short enough to leave out half of a long document
)
_KEPT = 256  # tokens of a document up to which its probabilities are kept for the backward pass


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
    """(T, H, D) from (H, T, D) and two of (K, T, D): every document of `lengths` attends to itself."""
    output: Tensor = _Attend.apply(  # type: ignore[no-untyped-call]
        query, key, value, lengths, scale
    )
    return output


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scale: float
    ) -> Tensor:
        output = query.new_empty(query.shape[1], query.shape[0], value.shape[2])  # (T, H, D)
        kept = []
        for start, first, stop in _blocks(lengths):
            p = _probabilities(query, key, start, first, stop, scale)
            output[first:stop] = _heads(p @ value[:, start:stop], query.shape[0]).transpose(0, 1)
            kept += [p] if stop - start <= _KEPT else []
        ctx.save_for_backward(query, key, value, *kept)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        grad_q = torch.empty_like(query)
        grad_k, grad_v = torch.zeros_like(key), torch.zeros_like(value)
        num_heads, num_keys = len(query), len(key)
        for start, first, stop in _blocks(ctx.lengths):
            short = stop - start <= _KEPT
            p = kept.pop(0) if short else _probabilities(query, key, start, first, stop, ctx.scale)
            g = _groups(grad[first:stop].transpose(0, 1), num_keys)  # (K, G * B, D)
            q = _groups(query[:, first:stop], num_keys)
            k, v = key[:, start:stop], value[:, start:stop]
            ds = torch.ops.aten._softmax_backward_data(g @ v.mT, p, -1, p.dtype)
            grad_q[:, first:stop] = _heads(ds @ k, num_heads).mul_(ctx.scale)
            grad_v[:, start:stop] += p.mT @ g
            grad_k[:, start:stop] += (ds.mT @ q).mul_(ctx.scale)
        return grad_q, grad_k, grad_v, None, None


def _blocks(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(start of the document, first query, one after the last) of every block of queries."""
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        start = end - length
        for first in range(start, end, _BLOCK):
            yield start, first, min(first + _BLOCK, end)


def _probabilities(query: Tensor, key: Tensor, start: int, first: int, stop: int, scale: float) -> Tensor:
    """(K, G * B, stop - start): those of the queries from `first` to `stop` over the keys from `start` on."""
    num_keys, num_seen = len(key), stop - start
    q = _groups(query[:, first:stop], num_keys)
    hidden = _hidden(stop - first, num_seen, query.dtype, query.device)
    scores = torch.baddbmm(
        hidden.repeat(q.shape[1] // (stop - first), 1), q, key[:, start:stop].mT, alpha=scale
    )
    return torch.softmax(scores, dim=-1)


@lru_cache(maxsize=64)
def _hidden(num_queries: int, num_seen: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, num_seen): -inf where a key comes after the query, which stand at the end of the keys; else 0."""
    with torch.inference_mode(False):
        full = torch.full((num_queries, num_seen), -torch.inf, dtype=dtype, device=device)
        return full.triu_(num_seen - num_queries + 1)


def _groups(heads: Tensor, num_keys: int) -> Tensor:
    """(H, B, D) -> (K, G * B, D): the query heads of one key head side by side."""
    return heads.reshape(num_keys, -1, heads.shape[-1])


def _heads(groups: Tensor, num_heads: int) -> Tensor:
    """(K, G * B, D) -> (H, B, D)."""
    return groups.view(num_heads, -1, groups.shape[-1])


# ------------------------------------------------------------------------------------------------------------
# Which is faster


def seconds_of(
    shape: tuple[int, int, int],  # (H, K, D)
    length: int,
    dtype: torch.dtype,
    repeat: int = 5,
) -> tuple[float, float]:
    """(by products, by PyTorch's fused attention): seconds forwards and backwards over a document of `length`
    tokens on a CPU, the best of `repeat` that take turns."""
    num_heads, num_keys, size = shape
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(n, length, size, generator=draw).to(dtype).requires_grad_()
        for n in (num_heads, num_keys, num_keys)
    ]

    def products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, (length,), size**-0.5)

    def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeated = (x.repeat_interleave(num_heads // num_keys, dim=0) for x in (k, v))
        q, k, v = (x[None] for x in (q, *repeated))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    best = [float("inf")] * 2
    for _ in range(repeat):
        for number, attention in enumerate((products, fused)):
            began = time.perf_counter()
            output = attention(*inputs)
            torch.autograd.grad(output, inputs, torch.ones_like(output))
            best[number] = min(best[number], time.perf_counter() - began)
    return best[0], best[1]
