"""Attention by plain products against torch's scaled_dot_product_attention on each document by itself.

In fp64 to 1e-12 of the largest value. In fp32 and bf16 scores and probabilities are rounded as in the usual
attention by two products and a softmax in fp32; so the bound is three times the distance of that one from
fp64, or one rounding of the largest value: what a wrong sum gives is far beyond.

Shapes: H query heads, K key heads, T tokens of the row, D and E head sizes of keys and values.
"""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.kernels import products, repeating
from lorakit.kernels.products import _BLOCK, attend

Tensors = tuple[Tensor, Tensor, Tensor]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def draw(
    lengths: tuple[int, ...],
    heads: int = 2,
    key_heads: int = 1,
    size: int = 8,
    value_size: int = 8,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """(H, T, D), (K, T, D), (K, T, E) that take gradients; scores of a standard deviation of about one."""
    torch.manual_seed(sum(lengths))
    shapes = ((heads, size), (key_heads, size), (key_heads, value_size))
    q, k, v = (
        torch.randn(h, sum(lengths), d, dtype=torch.float64).to(dtype).requires_grad_() for h, d in shapes
    )
    return q, k, v


def upstream_of(inputs: Tensors) -> Tensor:  # (T, H, E)
    torch.manual_seed(1)
    query, _, value = inputs
    return torch.randn(query.shape[1], query.shape[0], value.shape[2], dtype=torch.float64).to(query.dtype)


def one_by_one(inputs: Tensors, lengths: tuple[int, ...], scale: float, two_products: bool = False) -> Tensor:
    """(T, H, E) in the dtype of `inputs`: SDPA, or `two_products` with a softmax in fp32 between them."""
    groups = len(inputs[0]) // len(inputs[1])
    outputs = []
    for q, k, v in zip(*(x.split(list(lengths), dim=1) for x in inputs), strict=True):
        k, v = k.repeat_interleave(groups, dim=0), v.repeat_interleave(groups, dim=0)
        if two_products:
            scores = (q @ k.mT) * scale
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            output = scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
        else:
            output = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=scale)[0]
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


def with_gradients(output: Tensor, inputs: Tensors) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream_of(inputs).to(output.dtype))]


def exactly(inputs: Tensors, lengths: tuple[int, ...], scale: float) -> list[Tensor]:
    """Output and gradients of SDPA in fp64."""
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    output = one_by_one((q, k, v), lengths, scale)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), upstream_of(inputs).double())]


def distance(x: Tensor, y: Tensor) -> float:
    return (x.double() - y).abs().max().item() if x.numel() else 0.0


def check(inputs: Tensors, lengths: tuple[int, ...], scale: float) -> None:
    wanted, dtype = exactly(inputs, lengths, scale), inputs[0].dtype
    found = with_gradients(attend(*inputs, lengths, scale), inputs)
    rounded = wanted
    if dtype != torch.float64:
        rounded = with_gradients(one_by_one(inputs, lengths, scale, two_products=True), inputs)
    for x, exact, usual in zip(found, wanted, rounded, strict=True):
        assert x.dtype == dtype and x.shape == exact.shape
        largest = exact.abs().max().item()
        if dtype == torch.float64:
            assert distance(x, exact) <= 1e-12 * (1 + largest)
        else:
            assert distance(x, exact) <= 3 * distance(usual, exact) + ROUNDOFF[dtype] * largest


lengths_of_rows = st.one_of(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 19]), min_size=1, max_size=6),
    st.lists(st.sampled_from([3, 40, 72, 77, 80]), min_size=1, max_size=6),
).map(tuple)


@given(
    lengths=lengths_of_rows,
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (4, 1)]),
    size=st.sampled_from([1, 4, 9]),
    value_size=st.sampled_from([1, 4, 5]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    scale=st.sampled_from([0.5, 1.3, 0.02]),
    block=st.sampled_from([4, 8, _BLOCK]),
    kept=st.sampled_from([0, 8, _BLOCK]),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_documents_are_attended_to_as_if_alone(
    lengths: tuple[int, ...],
    heads: tuple[int, int],
    size: int,
    value_size: int,
    dtype: torch.dtype,
    scale: float,
    block: int,
    kept: int,
) -> None:
    """Blocks much shorter than the documents, probabilities kept for none, some or all, and documents of
    about the same length, which are padded to the longest."""
    inputs = draw(lengths, *heads, size, value_size, dtype)
    with patch.multiple(products, _BLOCK=block, _KEPT=kept):
        check(inputs, lengths, scale)


@pytest.mark.parametrize("length", [_BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK, 2 * _BLOCK + 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_around_the_borders_of_blocks(length: int, dtype: torch.dtype) -> None:
    lengths = (3, length, 1)
    check(draw(lengths, 4, 2, 16, 8, dtype), lengths, 0.25)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts_of_a_model(dtype: torch.dtype) -> None:
    """Heads beside each other in one row of a fused projection, (T, H * D), and gradients in that layout."""
    lengths = (5, 30, 1, 9)
    contiguous = draw(lengths, 4, 2, 8, 8, dtype)
    row = torch.cat([x.detach().transpose(0, 1).flatten(1) for x in contiguous], dim=1)  # (T, (H + 2 K) * D)
    parts = row.split([x.shape[0] * x.shape[2] for x in contiguous], dim=1)
    strided = [x.unflatten(1, (-1, 8)).transpose(0, 1).requires_grad_() for x in parts]
    assert not any(x.is_contiguous() for x in strided)
    found = attend(*strided, lengths, 0.3)
    expected = attend(*contiguous, lengths, 0.3)
    assert torch.equal(found, expected)
    upstream = upstream_of(contiguous).transpose(0, 1).contiguous().transpose(0, 1)
    assert not upstream.is_contiguous()
    of_strided = torch.autograd.grad(found, strided, upstream)
    of_contiguous = torch.autograd.grad(expected, contiguous, upstream_of(contiguous))
    # other strides may be multiplied in another order
    tolerance = 1e-12 if dtype == torch.float64 else 4 * ROUNDOFF[dtype]
    for x, y in zip(of_strided, of_contiguous, strict=True):
        assert (x - y).abs().max() <= tolerance * y.abs().max()


def test_a_broadcast_key_gets_the_whole_gradient() -> None:
    """One key for all heads, expanded without a copy."""
    lengths = (4, 6)
    q, k, v = draw(lengths, 2, 1)
    once = with_gradients(attend(q, k, v, lengths, 0.3), (q, k, v))
    expanded = attend(q, k.expand(2, -1, -1), v.expand(2, -1, -1), lengths, 0.3)
    for x, y in zip(with_gradients(expanded, (q, k, v)), once, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lengths", [(1, 1, 3), (9,), (4, 5)])
def test_gradcheck(lengths: tuple[int, ...]) -> None:
    """Also where probabilities are computed again: documents of more than two tokens in blocks of three."""
    with patch.multiple(products, _BLOCK=3, _KEPT=2):
        assert torch.autograd.gradcheck(
            lambda q, k, v: attend(q, k, v, lengths, 0.6), draw(lengths, 4, 2, 3, 2)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_changing_a_document_changes_no_bit_of_the_others(changed: int, dtype: torch.dtype) -> None:
    """Nor of the gradients of the others; its own change."""
    lengths = (17, 300, 40)
    inputs = draw(lengths, 4, 2, 8, 8, dtype)
    rows = torch.zeros(sum(lengths), dtype=torch.bool)
    start = sum(lengths[:changed])
    rows[start : start + lengths[changed]] = True
    others = [torch.where(rows[:, None], -1.5 * x.detach(), x.detach()).requires_grad_() for x in inputs]
    before = with_gradients(attend(*inputs, lengths, 0.3), inputs)
    after = with_gradients(attend(*others, lengths, 0.3), (others[0], others[1], others[2]))
    for number, (x, y) in enumerate(zip(before, after, strict=True)):
        x, y = (z if number == 0 else z.transpose(0, 1) for z in (x, y))  # tokens first
        assert torch.equal(x[~rows], y[~rows]) and not torch.equal(x[rows], y[rows])


def test_no_gradient_reaches_what_comes_later() -> None:
    """Nor another document: the output of one token depends on itself and on those before it."""
    lengths, token = (5, 9, 4), 5 + 6
    inputs = draw(lengths)
    output = attend(*inputs, lengths, 0.3)
    for x in torch.autograd.grad(output[token].sum(), inputs[1:]):
        reached = x.abs().sum((0, 2)) > 0
        assert reached.tolist() == [5 <= other <= token for other in range(sum(lengths))]


def test_known_outputs() -> None:
    """Equal scores: the mean of all values so far. A single token: its own value."""
    lengths = (3, 1)
    values = torch.tensor([3.0, 6.0, 0.0, 5.0], dtype=torch.float64)[None, :, None]
    zeros = torch.zeros(2, 4, 4, dtype=torch.float64)
    found = attend(zeros, zeros[:1], values, lengths, 1.0)
    torch.testing.assert_close(found[:, 0, 0].tolist(), [3.0, 4.5, 3.0, 5.0], rtol=1e-15, atol=1e-15)
    assert torch.equal(found[:, 0], found[:, 1])


def test_huge_scores() -> None:
    """One key wins by far: its value, and no gradient that is not a number."""
    inputs = tuple((x.detach() * 1e4).requires_grad_() for x in draw((20,), 1, 1, dtype=torch.float32))
    found = attend(*inputs, (20,), 1.0)
    expected = one_by_one(tuple(x.detach().double() for x in inputs), (20,), 1.0)
    torch.testing.assert_close(found.detach().double(), expected, rtol=1e-6, atol=1e-6)
    for gradient in torch.autograd.grad(found.sum(), inputs):
        assert gradient.isfinite().all()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def held_by(inputs: Tensors, lengths: tuple[int, ...]) -> tuple[Tensor, list[tuple[int, ...]]]:
    """The output, and the shapes of what is held for the backward pass."""
    held: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        held.append(tuple(x.shape))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = attend(*inputs, lengths, 0.5)
    return output, held


@pytest.mark.parametrize("lengths", [(2000,), (1000, 990)])
def test_no_square_of_long_documents_is_made_or_held(lengths: tuple[int, ...]) -> None:
    """Forwards and backwards: the largest is a block of queries over all keys; held are the inputs alone."""
    inputs, longest = draw(lengths, 2, 1, 4, 4, torch.float32), repeating(max(lengths), 4)
    with Largest() as largest:
        output, held = held_by(inputs, lengths)
        output.sum().backward()
    padded = len(lengths) * longest
    assert largest.elements <= 2 * _BLOCK * padded < 2 * longest**2
    assert sum(torch.Size(shape).numel() for shape in held) == (2 + 1 + 1) * padded * 4
    with Largest() as largest:  # the recorder sees the square that two products make
        one_by_one(inputs, lengths, 0.5, two_products=True)
    assert largest.elements >= 2 * max(lengths) ** 2


def test_probabilities_of_short_documents_are_held_for_the_backward_pass() -> None:
    """So that they are not computed twice: two heads over 30 and 50 tokens side by side, to 64."""
    lengths = (30, 300, 50)
    _, held = held_by(draw(lengths, 2, 1, 4, 4, torch.float32), lengths)
    assert [shape for shape in held if shape[-1] > 4] == [(2, 2 * 64, 64)]
