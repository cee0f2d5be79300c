"""How A and B start: what the decompositions say in fp64, what PEFT makes of the same weight, and whole runs.

W is (out, in), s the scale, sigma_i the singular values, the largest first.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import attach, inits
from lorakit.adapters.pairs import factors
from lorakit.errors import LorakitError
from lorakit.recipe.methods import Dora, Lora, LoraFa
from lorakit.shapes import Layer
from lorakit.targets import Target

OUT, IN = 48, 40


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """In fp64, with singular values that fall off."""
    draw = np.random.default_rng(seed)
    decay = 0.8 ** np.arange(min(shape))
    u, v = (np.linalg.qr(draw.normal(size=(side, len(decay))))[0] for side in shape)
    return torch.from_numpy(u * decay @ v.T + 0.01 * draw.normal(size=shape))


def sigma(matrix: Tensor) -> np.ndarray:
    found: np.ndarray = np.linalg.svd(matrix.numpy(), compute_uv=False)
    return found


# ------------------------------------------------------------------------------------------------------------
# The decompositions, in fp64


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (4, 2.0), (7, 0.3), (40, 2.0)])
def test_o24_pissa_leaves_the_singular_values_past_its_rank(rank: int, scale: float) -> None:
    """sigma(W - s B A) = sigma_{r+1}, ..., sigma_n, 0, ...; either factor has half of those taken."""
    weight = drawn(OUT, IN)
    a, b = inits.pissa(weight, rank, scale)
    assert (a.shape, b.shape) == ((rank, IN), (OUT, rank))
    of_weight, rest = sigma(weight), sigma(weight - scale * b @ a)
    assert np.abs(rest[: IN - rank] - of_weight[rank:]).max(initial=0) < 1e-14
    assert rest[IN - rank :].max() < 1e-14
    half = torch.from_numpy(of_weight[:rank] / scale)
    assert torch.allclose(a @ a.T, torch.diag(half), rtol=0, atol=1e-14)
    assert torch.allclose(b.T @ b, torch.diag(half), rtol=0, atol=1e-14)


def test_fast_pissa_leaves_little_more_and_is_a_function_of_the_seed() -> None:
    """Against the best that any matrix of the rank can leave: sigma_{r+1}. One pass alone leaves more."""
    weight, rank = drawn(OUT, IN), 6
    before = torch.get_rng_state()
    a, b = inits.pissa(weight, rank, 2.0, fast=True, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    best = sigma(weight)[rank]
    assert best <= sigma(weight - 2 * b @ a)[0] * (1 + 1e-12)
    assert sigma(weight - 2 * b @ a)[0] < 1.001 * best
    again, other = (inits.pissa(weight, rank, 2.0, fast=True, seed=seed) for seed in (5, 6))
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    assert not torch.equal(a, other[0])


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (4, 2.0), (7, 0.3)])
def test_olora_takes_the_first_columns_of_q(rank: int, scale: float) -> None:
    """Against numpy's QR, whose signs may be others: the product has none. B^T B = I, and what is left of W
    is zero in its first `rank` columns."""
    weight = drawn(OUT, IN)
    a, b = inits.olora(weight, rank, scale)
    q, r = np.linalg.qr(weight.numpy())
    assert np.abs((scale * b @ a).numpy() - q[:, :rank] @ r[:rank]).max() < 1e-14
    assert torch.allclose(b.T @ b, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-14)
    assert (weight - scale * b @ a)[:, :rank].abs().max() < 1e-14


@pytest.mark.parametrize(("rank", "scale"), [(1, 1.0), (4, 2.0), (7, 0.3)])
def test_o23_loftq_leaves_what_is_past_its_rank(rank: int, scale: float) -> None:
    """|W - Q - s B A|_F = sqrt(sum of sigma_i(W - Q)^2 over i > r) <= |W - Q|_F, at every scale. Q is W
    rounded to sixteenths."""
    weight = drawn(OUT, IN)
    held = (weight * 16).round() / 16
    lost = inits.taken("w", weight, held)
    assert torch.equal(lost, weight - held)
    a, b = inits.from_weight(Lora(init="loftq"), lost, rank, scale, seed=0)
    left = float((weight - held - scale * b @ a).norm())
    assert left == pytest.approx(math.sqrt((sigma(weight - held)[rank:] ** 2).sum()), rel=1e-12)
    assert left < float((weight - held).norm())


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_o23_fast_loftq_leaves_little_more(rank: int) -> None:
    """Rounding leaves noise, whose singular values fall slowly, which is the hardest case: of the squares of
    the `rank` largest at most a tenth is missed."""
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(3 * OUT, 3 * IN)))
    lost = weight - (weight * 16).round() / 16
    a, b = inits.from_weight(Lora(init="loftq", init_svd="fast"), lost, rank, 2.0, seed=0)
    values = sigma(lost)
    left, best = float((lost - 2 * b @ a).square().sum()), (values[rank:] ** 2).sum()
    assert best * (1 + 1e-6) < left <= best + 0.1 * (values[:rank] ** 2).sum()
    assert left < float(lost.square().sum())


def test_what_is_no_weight_of_the_layer_is_refused() -> None:
    weight, square = drawn(OUT, IN), drawn(IN, IN)
    held = (weight * 16).round() / 16
    assert torch.equal(inits.taken("w", weight.T, held), weight - held)  # a Conv1D's file
    assert torch.equal(inits.taken("w", square.T, square), torch.zeros_like(square))
    for wrong in (drawn(OUT, IN, seed=1), drawn(OUT, IN - 1)):
        with pytest.raises(LorakitError, match=r"a\.b\.weight in the base's files, \(48, \d\d\)") as refused:
            inits.taken("a.b.weight", wrong, held)
        assert "init: default" in refused.value.hint


@pytest.mark.parametrize("rank", [1, 5, 40])
def test_orthogonal_rows_have_the_length_of_the_defaults(rank: int) -> None:
    """A A^T = I / 3: the default's rows, uniform in +-1/sqrt(in), have in * 1/(3 in) on average."""
    torch.manual_seed(0)
    a = inits.orthogonal(torch.empty(rank, IN, dtype=torch.float64))
    assert torch.allclose(a @ a.T, torch.eye(rank, dtype=torch.float64) / 3, rtol=0, atol=1e-14)


def test_rows_drawn_at_random_are_nearly_orthogonal_where_there_are_few() -> None:
    """What INITS says of `orthogonal`: singular values of the default's A lie within 1 +- sqrt(r / in) of a
    row's length, so that there is little to gain at rank 16 of 4096 and much at 2048."""
    torch.manual_seed(0)
    few, many = (torch.empty(r, 4096).uniform_(-1, 1) / 4096**0.5 * 3**0.5 for r in (16, 2048))
    of_few, of_many = (torch.linalg.svdvals(a) for a in (few, many))
    assert of_few[0] / of_few[-1] < 1.2
    assert of_many[0] / of_many[-1] > 4


# ------------------------------------------------------------------------------------------------------------
# On layers, against PEFT


class Toy(nn.Module):
    """A Linear and a Conv1D, whose weight is (in, out), both from IN to OUT."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(IN, OUT, bias=False), Conv1D(OUT, IN)
        self.linear.weight.data = drawn(OUT, IN).to(dtype)
        self.conv.weight.data = drawn(OUT, IN, seed=1).T.contiguous().to(dtype)
        self.to(dtype).requires_grad_(False)

    prepare_inputs_for_generation = None  # which PEFT looks for in a causal model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + self.conv(x)
        return out


X = torch.from_numpy(np.random.default_rng(2).normal(size=(6, IN))).float()
NAMES = ("linear", "conv")


def on_toy(section: Any, rank: int, alpha: float, dtype: torch.dtype = torch.float32) -> tuple[Toy, Any]:
    toy = Toy(dtype)
    layers = [Layer("linear", "linear", IN, OUT), Layer("conv", "conv1d", IN, OUT)]
    adapter: Any = attach(section, toy, [Target(layer, rank, alpha) for layer in layers], seed=4)
    if adapter.prepares:
        adapter.prepare(None)
    return toy, adapter


def wide(layer: Any) -> Tensor:
    """(OUT, IN): what the base layer holds, in fp32."""
    weight: Tensor = layer.get_base_layer().weight.float()
    return weight if weight.shape == (OUT, IN) else weight.T


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("init", "rank", "alpha"), [("pissa", 4, 8.0), ("pissa", 3, 1.0), ("olora", 4, 4.0)])
def test_a_layer_is_peft_s(name: str, init: str, rank: int, alpha: float) -> None:
    """s B A, and what is left of W: PEFT writes it into its base, which here is untouched. Of a Conv1D PEFT
    takes OLoRA from W^T, as if it were (out, in): what is right there is numpy's."""
    toy, _ = on_toy(Lora(rank=rank, alpha=alpha, init=init), rank, alpha)
    layer = getattr(toy, name)
    a, b = factors(layer)
    started = factors(layer, "start")
    assert torch.equal(a, started[0]) and torch.equal(b, started[1])
    assert torch.equal(wide(layer), wide_of(Toy(), name))
    theirs = Toy()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=[name],
        init_lora_weights=init,  # type: ignore[arg-type]
        fan_in_fan_out=name == "conv",
    )
    peft = get_peft_model(theirs, config)  # type: ignore[arg-type]
    other: Any = getattr(theirs, name)
    if init == "olora" and name == "conv":
        assert other.lora_A["default"].weight.shape == (rank, OUT)  # which no input fits
        q, r = np.linalg.qr(wide(layer).double().numpy())
        assert np.abs((b @ a).detach().double().numpy() - q[:, :rank] @ r[:rank]).max() < 1e-6
        return
    scale = alpha / rank
    product = scale * other.lora_B["default"].weight @ other.lora_A["default"].weight
    assert torch.allclose(scale * b @ a, product, rtol=0, atol=1e-6)
    assert torch.allclose(wide(layer) - scale * b @ a, wide(other), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(peft(X), toy(X), rtol=0, atol=1e-5)


def wide_of(toy: Toy, name: str) -> Tensor:
    weight: Tensor = getattr(toy, name).weight
    return weight if weight.shape == (OUT, IN) else weight.T


def test_peft_takes_more_than_q_and_r_at_another_scale() -> None:
    """Why olora here divides by the scale: at 2 PEFT subtracts 2 Q_r R_r, so that the first columns of W
    change their sign in its base. If this fails, PEFT divides now too, and inits.py should not say otherwise.
    """
    theirs = Toy()
    config: Any = LoraConfig(r=4, lora_alpha=8, target_modules=["linear"], init_lora_weights="olora")
    get_peft_model(theirs, config)  # type: ignore[arg-type]
    assert torch.allclose(wide(theirs.linear)[:, :4], -wide_of(Toy(), "linear")[:, :4], atol=1e-5)


@pytest.mark.parametrize("svd", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_step_0_is_the_base_but_for_rounding(init: Any, dtype: torch.dtype, svd: Any) -> None:
    """Where W is bf16, PEFT rounds W - s B A to it; here nothing but the output is."""
    section = Lora(rank=4, alpha=8.0, init=init, **({"init_svd": svd} if init == "pissa" else {}))
    toy, adapter = on_toy(section, 4, 8.0, dtype)
    x = X.to(dtype)
    with torch.no_grad():
        found, wanted = toy(x), Toy(dtype)(x)
        with adapter.disabled():
            assert torch.equal(toy(x), wanted)
    off = float((found - wanted).abs().max() / wanted.abs().max())
    assert off <= (1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_what_has_no_strongest_part_is_trained_all_the_same(init: Any) -> None:
    """A weight of zeros, as a layer that was added has: with A = B = 0 nothing would ever move (O5)."""
    toy = Toy()
    toy.linear.weight.data.zero_()
    adapter: Any = attach(Lora(init=init), toy, [Target(Layer("linear", "linear", IN, OUT), 4, 8.0)], seed=4)
    before = toy(X)
    adapter.prepare(None)
    assert torch.allclose(toy(X), before, rtol=0, atol=1e-6)
    toy(X).square().sum().backward()
    assert any(item.parameter.grad.any() for item in adapter.trained())


@pytest.mark.parametrize("section", [Lora(init="orthogonal"), LoraFa(method="lora-fa", init="orthogonal")])
def test_orthogonal_on_layers(section: Any) -> None:
    """Drawn when the adapter is attached, from the seed; B is zero, and so step 0 the base."""
    toy, _ = on_toy(section, 5, 10.0)
    for name in NAMES:
        a, b = factors(getattr(toy, name))
        assert torch.allclose(a @ a.T, torch.eye(5) / 3, rtol=0, atol=1e-6)
        assert not b.any()
    assert not torch.equal(factors(toy.linear)[0], factors(toy.conv)[0])
    assert torch.equal(toy(X), Toy()(X))
    again, _ = on_toy(section, 5, 10.0)
    assert torch.equal(factors(again.linear)[0], factors(toy.linear)[0])


def test_orthogonal_beside_the_lengths_of_dora() -> None:
    toy, _ = on_toy(Dora(method="dora", init="orthogonal"), 5, 10.0)
    a, _ = factors(toy.linear)
    assert torch.allclose(a @ a.T, torch.eye(5) / 3, rtol=0, atol=1e-6)
    assert torch.allclose(toy(X), Toy()(X), rtol=0, atol=1e-5)
