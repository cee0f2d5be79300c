"""RMS norms against torch's rms_norm in fp64, and against the modules of transformers.

In fp64 to 1e-12 and in fp32 to 1e-5 of the largest value. In bf16 all is computed in fp32 and rounded (unit
roundoff u = 2^-8): the gradient once, the output once (Gemma's form) or twice (Llama's, before the weight).

Shapes: N tokens, I features.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorakit.kernels.norm import norms_of, rms_norm
from tests import architectures

TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5}
ROUNDOFF = {torch.float64: 0.0, torch.float32: 0.0, torch.bfloat16: 2.0**-8}


def draw(*shape: int, dtype: torch.dtype = torch.float64, size: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """x (..., I) of a standard deviation of `size`, weight (I,), the gradient of the output."""
    torch.manual_seed(len(shape))
    x, weight, upstream = torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape)
    return (size * x).to(dtype).requires_grad_(), weight.to(dtype), upstream.to(dtype)


def exactly(x: Tensor, weight: Tensor, upstream: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Output and gradient of x, in fp64."""
    x = x.detach().double().requires_grad_()
    y = nn.functional.rms_norm(x, weight.shape, weight.double(), eps)
    return y.detach(), torch.autograd.grad(y, x, upstream.double())[0]


def near(found: Tensor, exact: Tensor, roundings: int) -> bool:
    """Element by element, so many roundings away, beside the noise of the sums."""
    noise = TIGHT[found.dtype] * (exact.abs().max() if exact.numel() else 0.0)
    return bool(
        (
            (found.double() - exact).abs() <= 1.01 * roundings * ROUNDOFF[found.dtype] * exact.abs() + noise
        ).all()
    )


@given(
    shape=st.sampled_from([(1, 1), (1, 7), (5, 64), (2, 3, 33), (2, 3, 4, 8), (0, 8)]),
    dtype=st.sampled_from(list(TIGHT)),
    size=st.sampled_from([1e-4, 1.0, 300.0]),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    around_one=st.booleans(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_output_and_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, size: float, eps: float, around_one: bool
) -> None:
    """Also where eps is larger than the mean square."""
    x, weight, upstream = draw(*shape, dtype=dtype, size=size)
    exact, wanted = exactly(x, weight.double() + around_one, upstream, eps)
    found = rms_norm(x, weight, eps, around_one)
    (gradient,) = torch.autograd.grad(found, x, upstream)
    assert found.dtype == gradient.dtype == dtype and found.shape == gradient.shape == x.shape
    assert near(found, exact, 1 if around_one else 2)
    # the terms of a gradient may cancel, and their own rounding in fp32 is then seen
    scale = (weight.double() + around_one).abs().max() * upstream.double().abs().amax() if x.numel() else 0.0
    inverse = (x.detach().double().square().mean(-1, keepdim=True) + eps).rsqrt()
    allowed = 1.01 * ROUNDOFF[dtype] * wanted.abs() + 4 * TIGHT[dtype] * scale * inverse
    assert ((gradient.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("around_one", [False, True])
def test_gradcheck(around_one: bool) -> None:
    x, weight, _ = draw(3, 2, 5)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 1e-2, around_one), x)


def test_known_outputs() -> None:
    """[3, 4] has a mean square of 12.5; zeros stay zeros, with a gradient of w / sqrt(eps)."""
    weight = torch.tensor([1.0, 2.0], dtype=torch.float64)
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    y = rms_norm(x, weight, 0.0625)
    y.sum().backward()
    root = (12.5 + 0.0625) ** 0.5
    torch.testing.assert_close(y[0].tolist(), [3 / root, 8 / root], rtol=1e-14, atol=0)
    assert y[1].tolist() == [0.0, 0.0]
    assert x.grad is not None
    torch.testing.assert_close(x.grad[1].tolist(), [4.0, 8.0], rtol=1e-14, atol=0)


def test_strided_inputs_and_gradients() -> None:
    """Heads of a projection before they are transposed, and after."""
    x, weight, upstream = draw(2, 3, 4, 8)
    expected = rms_norm(x, weight, 1e-6)
    (wanted,) = torch.autograd.grad(expected, x, upstream)
    swapped = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = rms_norm(swapped, weight, 1e-6)
    expanded = torch.ones((), dtype=torch.float64).expand(2, 3, 4, 8)
    assert torch.equal(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, swapped, upstream.transpose(1, 2).contiguous().transpose(1, 2), True)[0],
        wanted,
    )
    torch.testing.assert_close(
        torch.autograd.grad(found, swapped, expanded)[0],
        exactly(x, weight, torch.ones(2, 3, 4, 8), 1e-6)[1],
    )


def test_what_is_held() -> None:
    """The input itself and one number for each token."""
    x, weight, _ = draw(50, 32, dtype=torch.bfloat16)
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rms_norm(x, weight, 1e-6)
    assert [t.data_ptr() for t in held[:2]] == [x.data_ptr(), weight.data_ptr()]
    assert [tuple(t.shape) for t in held[2:]] == [(50, 1)]


def test_the_input_is_not_changed() -> None:
    for dtype in TIGHT:
        x, weight, upstream = draw(4, 8, dtype=dtype)
        before = [t.detach().clone() for t in (x, weight, upstream)]
        rms_norm(x, weight, 1e-6).backward(upstream)
        assert all(torch.equal(t, b) for t, b in zip((x, weight, upstream), before, strict=True))


# ------------------------------------------------------------------------------------------------------------
# The modules of a model


def module_of(kind: Any, dtype: torch.dtype) -> Any:
    module = kind(32, eps=1e-3)
    torch.manual_seed(1)
    module.weight.data = torch.randn(32).to(dtype)
    return module.requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm])
def test_the_forms_of_transformers(kind: Any, dtype: torch.dtype) -> None:
    """The output to a rounding of the module's own; the gradient, which it rounds in between, to three."""
    module = module_of(kind, dtype)
    ((found_module, forward),) = norms_of(module)
    assert found_module is module
    x, _, upstream = draw(3, 6, 32, dtype=dtype)
    expected, found = module(x), forward(x)
    (wanted,), (gradient,) = (torch.autograd.grad(y, x, upstream) for y in (expected, found))
    assert found.dtype == expected.dtype == dtype
    assert near(found, expected.detach().double(), 1)
    rounding = ROUNDOFF[dtype] + TIGHT[dtype]
    assert (gradient - wanted).abs().max() <= 3 * rounding * wanted.abs().max()


def test_another_dtype_than_the_weights_is_the_modules_own_affair() -> None:
    module = module_of(LlamaRMSNorm, torch.float32)
    ((_, forward),) = norms_of(module)
    x = draw(3, 32, dtype=torch.bfloat16)[0]
    assert torch.equal(forward(x), module(x)) and forward(x).dtype == torch.float32


class ShiftedRMSNorm(LlamaRMSNorm):
    """Neither of the two forms."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + 0.1


class GatedRMSNorm(LlamaRMSNorm):
    """Takes another tensor, too."""

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return super().forward(hidden_states) * gate


def test_what_is_switched() -> None:
    """Frozen norms of a known form, tried on the module itself, not taken on trust of its name."""
    assert len(norms_of(module_of(LlamaRMSNorm, torch.float32))) == 1
    for kind in (ShiftedRMSNorm, GatedRMSNorm):
        assert norms_of(module_of(kind, torch.float32)) == []
    assert norms_of(module_of(LlamaRMSNorm, torch.float32).requires_grad_(True)) == []
    assert norms_of(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).requires_grad_(False)) == []
    mixed = nn.ModuleList(
        [module_of(kind, torch.float32) for kind in (ShiftedRMSNorm, GemmaRMSNorm, LlamaRMSNorm)]
    )
    assert [type(module) for module, _ in norms_of(mixed)] == [GemmaRMSNorm, LlamaRMSNorm]


@pytest.mark.parametrize(
    ("name", "number"), [("llama", 5), ("qwen3", 9), ("gemma", 5), ("gemma2", 9), ("gpt2", 0)]
)
def test_whole_models(name: str, number: int) -> None:
    """All norms of a model, those of queries and keys among them: logits and gradients are its own."""
    model: Any = architectures.build(architectures.CONFIGS[name]()).requires_grad_(False)
    found = norms_of(model)
    assert len(found) == number
    torch.manual_seed(2)
    x, weights = torch.randn(2, 9, 32, requires_grad=True), torch.randn(2, 9, architectures.VOCABULARY)

    def logits_and_gradient() -> tuple[Tensor, Tensor]:
        logits = model(inputs_embeds=x, use_cache=False).logits
        return logits.detach(), torch.autograd.grad(logits, x, weights)[0]

    expected = logits_and_gradient()
    calls = []
    for module, forward in found:
        module.forward = lambda x, forward=forward: calls.append(forward) or forward(x)  # type: ignore
    for y, wanted in zip(logits_and_gradient(), expected, strict=True):
        assert (y - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert len(calls) == number
