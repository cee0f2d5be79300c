"""Causal attention of documents by plain matrix products: what CPUs do faster than a fused kernel.

On CPUs that multiply bf16 in hardware, PyTorch's fused attention spends most of its time outside of the
products. Here documents of about the same length are attended to together, padded to a length that repeats,
and a block of queries meets all keys before it in one product, which leaves out what is masked away whole.
The backward pass has its gradients in closed form. Probabilities of short documents are kept for it, those of
long ones computed again: never is a T x T matrix held.

With S = scale * Q K^T and P = softmax(S): dV = P^T dO; dS = P * (dO V^T - rowsum(P * dO V^T)); dQ = scale *
dS K; dK = scale * dS^T Q. Source: Dao et al. 2022, arXiv 2205.14135, appendix B.2. The twin is
scaled_dot_product_attention on each document by itself.

Shapes: H query heads, K key heads, G = H / K, T tokens of the row, D head size, N documents of a bundle, L
tokens that each is padded to, B queries of a block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lorakit.kernels import repeating

_BLOCK = 256  # queries at once: long enough for the products, short enough to leave out what is masked
_KEPT = 256  # tokens of a document up to which its probabilities are kept for the backward pass
_ALIKE = 0.9  # shares a bundle: at least so long as the longest, or within 32 tokens of it


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
        bundles, back = _bundles(lengths, query.device)
        outputs, held = [], []
        for bundle in bundles:
            q, k, v = (bundle.take(x, len(key)) for x in (query, key, value))
            blocks = []
            for first, stop in _blocks(bundle.length):
                p = _probabilities(q[:, :, first:stop], k[:, 0, :stop], scale)
                blocks.append((p @ v[:, 0, :stop]).view(len(q), -1, stop - first, v.shape[-1]))
                held += [p] if bundle.length <= _KEPT else []
            outputs.append(bundle.heads(torch.cat(blocks, dim=2) if len(blocks) > 1 else blocks[0]))
            held += [q, k, v]
        ctx.save_for_backward(*held)
        ctx.lengths, ctx.scale = lengths, scale
        return torch.cat(outputs, dim=1).transpose(0, 1).index_select(0, back)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        bundles, back = _bundles(ctx.lengths, grad.device)
        held = list(ctx.saved_tensors)
        grads: tuple[list[Tensor], ...] = ([], [], [])
        for bundle in bundles:
            blocks = list(_blocks(bundle.length))
            kept = [held.pop(0) for _ in blocks] if bundle.length <= _KEPT else []
            q, k, v = held.pop(0), held.pop(0), held.pop(0)
            g = bundle.take(grad.transpose(0, 1), len(k) // bundle.number, padded_with_zeros=True)
            grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            for first, stop in blocks:
                keys, values = k[:, 0, :stop], v[:, 0, :stop]
                p = kept.pop(0) if kept else _probabilities(q[:, :, first:stop], keys, ctx.scale)
                rows, sent = (x[:, :, first:stop].flatten(1, 2) for x in (q, g))  # (K * N, G * B, D)
                ds = torch.ops.aten._softmax_backward_data(sent @ values.mT, p, -1, p.dtype).mul_(ctx.scale)
                grad_q[:, :, first:stop] = (ds @ keys).view(len(q), -1, stop - first, q.shape[-1])
                _gather(grad_v[:, 0], p.mT @ sent, first, stop)
                _gather(grad_k[:, 0], ds.mT @ rows, first, stop)
            for found, tensor in zip(grads, (grad_q, grad_k, grad_v), strict=True):
                found.append(bundle.heads(tensor))
        together = (torch.cat(found, dim=1).index_select(1, back) for found in grads)
        return (*together, None, None)


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    """Within it blocks, and what is kept, are of `size` tokens: a few documents then take every branch."""
    global _BLOCK, _KEPT
    before = _BLOCK, _KEPT
    _BLOCK = _KEPT = size
    try:
        yield
    finally:
        _BLOCK, _KEPT = before


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    """(first query, one after the last) of every block of queries."""
    for first in range(0, length, _BLOCK):
        yield first, min(first + _BLOCK, length)


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(K * N, G * B, S) from (K * N, G, B, D) and (K * N, S, D): the queries are the last B of S tokens."""
    groups, size = query.shape[1:3]
    hidden = _hidden(size, query.dtype, query.device)
    if groups == 1 and size == key.shape[1]:
        scores = torch.baddbmm(hidden, query[:, 0], key.mT, alpha=scale)
    else:
        none = hidden.new_zeros(1, 1, 1)
        scores = torch.baddbmm(none, query.flatten(1, 2), key.mT, beta=0, alpha=scale)
        scores.view(len(query), groups, size, -1)[..., -size:] += hidden
    return torch.softmax(scores, dim=-1)


def _gather(total: Tensor, part: Tensor, first: int, stop: int) -> None:
    """Add a block's share of a gradient to the keys that earlier blocks have seen, and set the others."""
    if first:
        total[:, :first] += part[:, :first]
    total[:, first:stop] = part[:, first:]


@lru_cache(maxsize=64)
def _hidden(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(B, B): -inf where a key comes after the query, else 0."""
    with torch.inference_mode(False):
        return torch.full((size, size), -torch.inf, dtype=dtype, device=device).triu_(1)


# ------------------------------------------------------------------------------------------------------------
# Documents of about the same length


@dataclass(frozen=True)
class Bundle:
    number: int  # of documents
    length: int  # of the longest, rounded up
    places: Tensor  # (N * L,) of their tokens in the row; behind a shorter document any
    padding: Tensor  # those of the N * L that are none

    def take(self, tensor: Tensor, num_keys: int, padded_with_zeros: bool = False) -> Tensor:
        """(K * N, G, L, D) from (H, T, D), heads of one key head side by side; a copy.

        What follows a shorter document comes after all of its tokens, so that no query of it sees it.
        """
        taken = tensor.index_select(1, self.places)  # (H, N * L, D)
        if padded_with_zeros and len(self.padding):
            taken.index_fill_(1, self.padding, 0.0)
        split = taken.view(num_keys, -1, self.number, self.length, tensor.shape[-1])
        return split.transpose(1, 2).reshape(num_keys * self.number, -1, self.length, tensor.shape[-1])

    def heads(self, tensor: Tensor) -> Tensor:
        """(H, N * L, D) from (K * N, G, L, D)."""
        _, groups, length, size = tensor.shape
        split = tensor.view(-1, self.number, groups, length, size).transpose(1, 2)
        return split.reshape(-1, self.number * length, size)


@lru_cache(maxsize=8)  # a step asks once for every layer, forwards and backwards
def _bundles(lengths: tuple[int, ...], device: torch.device) -> tuple[list[Bundle], Tensor]:
    """(the documents of a row in bundles; the place of each of its tokens in all bundles side by side)."""
    starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
    groups: list[list[int]] = []
    for document in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and lengths[document] >= min(_ALIKE * longest, longest - 32):
            groups[-1].append(document)
        else:
            groups.append([document])
    bundles, back, offset = [], [0] * sum(lengths), 0
    for group in groups:
        longest = repeating(lengths[group[0]], per_octave=4)
        places: list[int] = []
        padding: list[int] = []
        for document in group:
            start, length = starts[document], lengths[document]
            back[start : start + length] = range(offset + len(places), offset + len(places) + length)
            padding += range(len(places) + length, len(places) + longest)
            places += [*range(start, start + length), *[start] * (longest - length)]
        bundles.append(
            Bundle(
                len(group),
                longest,
                torch.tensor(places, device=device),
                torch.tensor(padding, dtype=torch.long, device=device),
            )
        )
        offset += len(places)
    return bundles, torch.tensor(back, device=device)
