"""The fused loss against the plain one: logits in fp64, then torch's cross_entropy.

How far products in fp32 and bf16 may be away is derived, element by element: u is the unit roundoff (2^-8 in
bf16, which has 8 bits), sums are added up in fp32 or better. A logit z is off by at most
d = u |z| + H u32 (|h| |W|^T), so softmax p is off by the factor exp(2 d) and the gradient of the logits by
2 d p; every tensor that is stored is rounded once more.

Shapes: M trained tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.kernels import cross_entropy

ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
# Pieces of 16 rows and blocks of 4, the smallest that there are.
in_pieces = patch.multiple(cross_entropy, _PIECE_BYTES=1, _BLOCK_BYTES=1)


@dataclass
class Case:
    hidden: Tensor  # (M, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (M,)
    bias: Tensor | None  # (V,)
    scale: float
    softcap: float | None
    upstream: float

    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]

    def loss(self) -> Tensor:
        return cross_entropy.summed(
            self.hidden, self.weight, self.targets, self.bias, self.scale, self.softcap
        )


def draw(
    tokens: int,
    vocabulary: int,
    size: int = 6,
    dtype: torch.dtype = torch.float64,
    biased: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    upstream: float = 1.0,
    trained: bool = True,
) -> Case:
    """Logits of a standard deviation of about two; `trained`: weight and bias take a gradient."""
    torch.manual_seed(tokens * 1000 + vocabulary)
    hidden = torch.randn(tokens, size, dtype=torch.float64)
    weight = 2 / size**0.5 * torch.randn(vocabulary, size, dtype=torch.float64)
    bias = torch.randn(vocabulary, dtype=torch.float64).to(dtype).requires_grad_(trained) if biased else None
    return Case(
        hidden.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(trained),
        torch.randint(vocabulary, (tokens,)),
        bias,
        scale,
        softcap,
        upstream,
    )


def twin(case: Case, products: torch.dtype | None = None) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """In fp64: loss, gradients of the leaves, logits before scale and softcap (M, V), softmax (M, V).

    `products`: the dtype to which the leaves are rounded before.
    """
    leaves = [x.detach().to(products or x.dtype).double().requires_grad_() for x in case.leaves()]
    raw = leaves[0] @ leaves[1].T + (leaves[2] if case.bias is not None else 0)
    x = raw * case.scale
    if case.softcap is not None:
        x = case.softcap * torch.tanh(x / case.softcap)
    loss = torch.nn.functional.cross_entropy(x, case.targets, reduction="sum")
    return loss.detach(), list(torch.autograd.grad(loss * case.upstream, leaves)), raw.detach(), x.softmax(-1)


def check(case: Case, products: torch.dtype) -> None:
    """Loss, and gradients of what takes one, are within the bound of the module's docstring."""
    expected, wanted, raw, p = twin(case, products)
    u = ROUNDOFF[products]
    exact = ROUNDOFF[torch.float64 if products == torch.float64 else torch.float32]
    leaves = case.leaves()
    h, w = (x.detach().to(products).double().abs() for x in leaves[:2])
    sums = (h.shape[1] + 2) * exact * (h @ w.T + raw.abs())
    off = 1.01 * abs(case.scale) * (u * raw.abs() + sums)
    off += 8 * exact * (1 + abs(case.scale) * raw.abs())  # tanh, exp and log
    worst = off.amax(-1, keepdim=True)  # (M, 1)

    loss = case.loss()
    assert loss.dtype == (torch.float64 if products == torch.float64 else torch.float32)
    # also the sum itself is rounded, once a block
    slack = 2 * worst.sum() + (len(h) + 2) * exact * (expected.abs() + 1)
    assert (loss.detach().double() - expected).abs() <= slack

    taking = [x for x in leaves if x.requires_grad]
    assert loss.requires_grad == bool(taking)
    found = iter(torch.autograd.grad(loss * case.upstream, taking) if taking else ())
    goal = torch.zeros_like(p).scatter_(1, case.targets[:, None], 1.0)
    size = abs(case.scale) * (p + goal)  # (M, V), at least that of the gradient of the logits
    error = 2.02 * worst * abs(case.scale) * p + (u + 4 * exact) * size
    if case.softcap is not None:
        error += size * 2 * off / case.softcap  # of 1 - tanh^2
    terms = max(p.shape) * exact  # additions of a product
    bounds = [
        error @ w + (terms + u) * (size @ w),
        error.T @ h + (terms + u) * (size.T @ h),
        error.sum(0) + terms * size.sum(0),
    ]
    for leaf, exact_gradient, bound in zip(leaves, wanted, bounds, strict=False):
        if not leaf.requires_grad:
            continue
        gradient = next(found)
        assert gradient.dtype == leaf.dtype
        stored = ROUNDOFF[leaf.dtype] + u
        allowed = abs(case.upstream) * 1.01 * bound + 2 * stored * exact_gradient.abs()
        assert ((gradient.double() - exact_gradient).abs() <= allowed).all()


cases = st.builds(
    draw,
    tokens=st.sampled_from([0, 1, 2, 15, 16, 17, 37]),
    vocabulary=st.sampled_from([1, 2, 7, 64, 97]),
    size=st.sampled_from([1, 6, 33]),
    dtype=st.sampled_from(list(ROUNDOFF)),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 0.0625, 2.5]),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    upstream=st.sampled_from([1.0, -0.3]),
    trained=st.booleans(),
)


@given(case=cases, small=st.booleans())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_loss_and_gradients_are_those_of_the_logits(case: Case, small: bool) -> None:
    """In one piece, and in many of 16 rows that do not divide M."""
    if small:
        with in_pieces:
            check(case, case.hidden.dtype)
    else:
        check(case, case.hidden.dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
@in_pieces
def test_products_in_the_dtype_of_autocast(stored: torch.dtype, biased: bool) -> None:
    """fp32 hidden states meet a head in fp32 or bf16; gradients come back in the dtype of each."""
    case = draw(37, 97, dtype=torch.float32, biased=biased, softcap=30.0)
    case.weight = case.weight.detach().to(stored).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        check(case, torch.bfloat16)
        rounded = case.loss()
    if stored == torch.float32:
        assert rounded != case.loss()  # else autocast was not noticed


def test_fp64_stays_fp64_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(draw(9, 50, biased=True), torch.float64)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tokens", [1, 18])
@in_pieces
def test_gradcheck(tokens: int, softcap: float | None, scale: float) -> None:
    case = draw(tokens, 5, size=3, biased=True)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return cross_entropy.summed(hidden, weight, case.targets, bias, scale, softcap)

    assert torch.autograd.gradcheck(loss, case.leaves())


def test_known_losses() -> None:
    """Equal logits: log V for each token. Two tokens apart by log 3: a probability of 3/4."""
    hidden, targets = torch.zeros(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 6])
    found = cross_entropy.summed(hidden, torch.randn(7, 3, dtype=torch.float64), targets)
    assert found.item() == pytest.approx(5 * torch.tensor(7.0).double().log().item(), rel=1e-14)
    weight = torch.tensor([[3.0], [1.0]], dtype=torch.float64).log()
    hidden = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy.summed(hidden, weight, torch.tensor([0]))
    loss.backward()
    assert loss.exp().item() == pytest.approx(4 / 3, rel=1e-14)
    assert hidden.grad is not None and hidden.grad.item() == pytest.approx(-weight[0].item() / 4, rel=1e-14)


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("sign", [1, -1])
def test_huge_logits(dtype: torch.dtype, sign: int) -> None:
    """Logits of +-1e4: a loss of 0 or 2e4 for each token, and a gradient of nothing or of one whole row."""
    weight = torch.tensor([[100.0], [-100.0]], dtype=dtype, requires_grad=True)
    hidden = torch.full((3, 1), 100.0 * sign, dtype=dtype, requires_grad=True)
    height = (hidden @ weight.T)[0, 0].abs().item()  # 1e4 as near as the dtype comes
    loss = cross_entropy.summed(hidden, weight, torch.tensor([0, 0, 0]))
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert loss.item() == (0 if sign > 0 else 6 * height)
    assert hidden.grad.tolist() == [[0 if sign > 0 else -200.0]] * 3
    total = torch.tensor(0 if sign > 0 else 300.0, dtype=dtype).item()
    assert weight.grad.tolist() == [[total], [-total]]


# ------------------------------------------------------------------------------------------------------------
# What is computed, and what is held


class Made(TorchDispatchMode):
    """The shapes of all tensors that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(x.shape) for x in tree_leaves(made) if isinstance(x, Tensor)}
        return made

    def largest(self) -> int:
        return max(torch.Size(shape).numel() for shape in self.shapes)


@pytest.mark.parametrize("trained", [False, True])
@in_pieces
def test_the_logits_never_exist(trained: bool) -> None:
    """Forwards and backwards of 400 tokens: nothing is larger than a piece, not even their gradient."""
    case = draw(400, 1000, size=8, dtype=torch.float32, biased=True, softcap=30.0, trained=trained)
    with Made() as made:
        case.loss().backward()
    assert made.largest() == 16 * 1000
    with Made() as made:  # the recorder sees what the plain twin makes
        twin(case)
    assert made.largest() >= 400 * 1000


@in_pieces
def test_an_evaluation_computes_the_same_loss_and_no_gradient() -> None:
    """In bits; (M, H) and (V, H) are the shapes of the gradients."""
    case = draw(20, 50, size=3, biased=True)
    with Made() as made:
        loss = case.loss()
    assert {(20, 3), (50, 3)} <= made.shapes
    with Made() as made, torch.no_grad():
        found = case.loss()
    assert not {(20, 3), (50, 3)} & made.shapes
    assert torch.equal(found, loss) and not found.requires_grad


@in_pieces
def test_only_what_takes_a_gradient_is_computed() -> None:
    for number, shape in enumerate([(20, 3), (50, 3)]):
        case = draw(20, 50, size=3, biased=True)
        for other in case.leaves()[:number] + case.leaves()[number + 1 :]:
            other.requires_grad_(False)
        with Made() as made:
            case.loss()
        assert {(20, 3), (50, 3)} & made.shapes == {shape}
        check(case, torch.float64)


@in_pieces
def test_the_graph_can_be_walked_twice() -> None:
    case = draw(20, 50)
    loss = case.loss()
    first = torch.autograd.grad(loss, case.hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(3 * loss, case.hidden)[0], 3 * first)


def test_second_derivatives_are_refused() -> None:
    case, factor = draw(3, 5), torch.ones((), dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(case.loss() * factor, case.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
