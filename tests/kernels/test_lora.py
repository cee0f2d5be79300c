"""Grouped adapted layers against PEFT's own forward and backward on the same objects.

In fp64 to 1e-12 and in fp32 to 1e-5 of the largest value: sums in another order. In bf16 both round, so both
are compared with fp64: the fast layers may be twice as far away as PEFT's, or one rounding (2^-8) of the
largest value. Under dropout the same seed must give the same masks, or nothing of this would hold.

Shapes: N tokens, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.kernels import dora, lora

I = 64  # noqa: E741  (a block of NF4: some CPUs read other widths wrongly)


Forward = Callable[[Tensor], Sequence[Tensor]]
Observed = dict[str, Tensor | None]
TIGHT = {torch.float64: 1e-12, torch.float32: 1e-5}


class Parallel(nn.Module):
    """Layers that read the same tensor."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({f"part{n}": layer for n, layer in enumerate(layers)})

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.parts.values()]


def base_layer(kind: str, out: int) -> nn.Module:
    """A layer whose outputs have a standard deviation of about one."""
    weight, bias = torch.randn(out, I) / I**0.5, torch.randn(out)
    layer: Any
    if kind == "conv1d":
        layer, weight = Conv1D(out, I), weight.T.contiguous()
    elif kind.startswith("nf4"):
        double = kind == "nf4_double"
        layer = bitsandbytes.nn.Linear4bit(I, out, True, torch.float32, double, quant_type="nf4")
    else:
        layer = nn.Linear(I, out, bias=kind == "bias")
    layer.load_state_dict({"weight": weight} if kind == "linear" else {"weight": weight, "bias": bias})
    if kind.startswith("nf4"):
        layer.support_avx512bf16_for_cpu = False  # else an evaluation reorders the weight, here as in a run
        return layer.to("cpu")  # quantizes
    return layer


def parallel(
    kind: str = "linear",
    ranks: Sequence[int] = (4, 2, 3),
    stabilized: bool = False,
    dropout: float = 0.0,
    method: str = "lora",
) -> tuple[Parallel, lora.Group]:
    """As many layers as `ranks`, 5, 7 and 9 wide (32, 34, 36 where they are quantized), adapted by PEFT with
    different scales and moved off their start, in training mode; and the group of them."""
    torch.manual_seed(len(ranks))
    wide = 32 if kind.startswith("nf4") else 5
    model: Any = Parallel([base_layer(kind, wide + 2 * n) for n in range(len(ranks))])
    model.is_loaded_in_4bit = kind.startswith("nf4")
    targets = [f"part{n}" for n in range(len(ranks))]
    shared: dict[str, Any] = {"target_modules": targets, "lora_dropout": dropout, "lora_alpha": 5.0}
    shared["fan_in_fan_out"] = kind == "conv1d"
    config: Any
    if method == "adalora":
        config = AdaLoraConfig(**shared, init_r=ranks[0], target_r=1, total_step=100)
    else:
        patterns = {"rank_pattern": dict(zip(targets, ranks, strict=True)), "alpha_pattern": {"part0": 3.0}}
        config = LoraConfig(**shared, **patterns, use_rslora=stabilized, use_dora=method == "dora")
    model = get_peft_model(model, config).get_base_model().train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
        if "ranknum" in name:
            parameter.requires_grad_(False)  # as the adapter does: PEFT's 4-bit layers would train it
    assert all(map(lora.is_supported, model.parts.values()))
    return model, lora.Group(tuple(model.parts.values()))


def observed(
    model: Any, x: Tensor, members: Sequence[int] | None = None, forward: Forward | None = None
) -> Observed:
    """Outputs and gradients (None: there is none) of a random loss on the outputs of `members`, or of all."""
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = (forward or model)(x)
    torch.manual_seed(4)
    upstream = [torch.randn(y.shape, dtype=torch.float64).to(y.dtype) for y in outputs]
    chosen = range(len(outputs)) if members is None else members
    torch.autograd.backward([outputs[n] for n in chosen], [upstream[n] for n in chosen])
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    found = {f"output{n}": y.detach() for n, y in enumerate(outputs)} | {"x": x.grad} | trained
    return {name: None if value is None else value.clone() for name, value in found.items()}


def distance(x: Tensor, y: Tensor) -> float:
    return (x.double() - y.double()).abs().max().item() if x.numel() else 0.0


def check(found: Observed, wanted: Observed, tolerance: float) -> None:
    """The same values, dtypes and missing gradients."""
    assert found.keys() == wanted.keys()
    for name, expected in wanted.items():
        value = found[name]
        if expected is None or value is None:
            assert value is expected, name
            continue
        assert value.dtype == expected.dtype and value.shape == expected.shape, name
        largest = expected.abs().max().item() if expected.numel() else 0.0
        assert distance(value, expected) <= tolerance * (largest + 1e-3), name


def compare(model: Any, group: lora.Group, x: Tensor, tolerance: float = 1e-5) -> Observed:
    """Of PEFT's forward; the fast one gave the same."""
    wanted = observed(model, x)
    group.switch_on()
    found = observed(model, x)
    group.switch_off()
    check(found, wanted, tolerance)
    return wanted


def tokens(*shape: int, dtype: torch.dtype = torch.float32, leaf: bool = True) -> Tensor:
    return torch.randn(*shape, I, generator=torch.Generator().manual_seed(5)).to(dtype).requires_grad_(leaf)


# ------------------------------------------------------------------------------------------------------------
# The same numbers


@given(
    kind=st.sampled_from(["linear", "bias", "conv1d"]),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    stabilized=st.booleans(),
    dropout=st.sampled_from([0.0, 0.3]),
    shape=st.sampled_from([(1,), (7,), (2, 5), (2, 3, 2), (0,), (2, 0)]),
    leaf=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_outputs_and_gradients_are_those_of_peft(
    kind: str,
    ranks: list[int],
    stabilized: bool,
    dropout: float,
    shape: tuple[int, ...],
    leaf: bool,
    dtype: torch.dtype,
) -> None:
    model, group = parallel(kind, ranks, stabilized, dropout)
    wanted = compare(model.to(dtype), group, tokens(*shape, dtype=dtype, leaf=leaf), TIGHT[dtype])
    assert (wanted["x"] is None) != leaf


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_quantized_bases(kind: str, dropout: float) -> None:
    compare(*parallel(kind, dropout=dropout), tokens(3, 4))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "nf4", "nf4_double"])
def test_adalora(kind: str, dropout: float) -> None:
    """Singular values among them, one of which is masked."""
    model, group = parallel(kind, (4, 4), dropout=dropout, method="adalora")
    for layer in group.layers:
        layer.lora_E["default"].data[1] = 0
    wanted = compare(model, group, tokens(3, 4))
    assert sum("lora_E" in name and g is not None and bool(g.any()) for name, g in wanted.items()) == 2


def test_adalora_in_fp64() -> None:
    model, group = parallel("bias", (3, 3), method="adalora")
    compare(model.double(), group, tokens(3, 4, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d", "nf4_double"])
@pytest.mark.parametrize("method", ["lora", "adalora", "dora"])
def test_bf16_rounds_no_more_than_peft(method: str, kind: str, stored: torch.dtype) -> None:
    """Under autocast, of a base stored in bf16 or fp32 (or 4 bits); trained in fp32."""
    model, group = parallel(kind, (4, 4), method=method)
    if kind.startswith("nf4"):
        for layer in group.layers:
            layer.base_layer.compute_dtype = torch.bfloat16
    else:
        for layer in group.layers:
            layer.base_layer.to(stored)
    x = tokens(20, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        usual = observed(model, x)
        group.switch_on()
        found = observed(model, x)
        group.switch_off()
    exact = observed(model.double(), x.double(), forward=exactly(model))
    assert found.keys() == usual.keys() == exact.keys()
    for name, value in found.items():
        same, right = usual[name], exact[name]
        assert value is not None and same is not None and right is not None
        assert value.dtype == same.dtype, name
        assert distance(value, right) <= 2 * distance(same, right) + 2**-8 * right.abs().max(), name


def exactly(model: Any) -> Forward:
    """The equation itself in fp64: y = x W^T + b + s (x A^T) B^T, A with AdaLoRA's singular values."""
    read = [
        (lora.dense(layer.base_layer, torch.float64), layer.base_layer.bias) for layer in model.parts.values()
    ]

    def forward(x: Tensor) -> list[Tensor]:
        outputs = []
        for layer, (weight, bias) in zip(model.parts.values(), read, strict=True):
            a, b, scale = layer.lora_A["default"], layer.lora_B["default"], layer.scaling["default"]
            if hasattr(layer, "lora_E"):
                a, scale = a * layer.lora_E["default"], scale / (layer.ranknum["default"].item() + 1e-5)
            else:
                a, b = a.weight, b.weight
            y, factor = x @ weight.T + scale * (x @ a.T) @ b.T, 1.0
            if method_of(layer) == "dora":  # equation 5, the norm a constant
                lengths = (weight + scale * b @ a).norm(dim=1).detach()
                factor = layer.lora_magnitude_vector["default"].weight / lengths
            outputs.append(factor * y + (0 if bias is None else bias))
        return outputs

    return forward


def method_of(layer: Any) -> str:
    return "dora" if layer.use_dora.get("default") else "adalora" if hasattr(layer, "lora_E") else "lora"


@given(
    kind=st.sampled_from(["linear", "bias", "conv1d"]),
    ranks=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    stabilized=st.booleans(),
    shape=st.sampled_from([(1,), (7,), (2, 3, 2), (0,)]),
    leaf=st.booleans(),
)
@settings(max_examples=30, deadline=None, derandomize=True)
def test_dora_is_its_equation_and_what_peft_computes(
    kind: str, ranks: list[int], stabilized: bool, shape: tuple[int, ...], leaf: bool
) -> None:
    model, group = parallel(kind, ranks, stabilized, method="dora")
    model.double()
    x = tokens(*shape, dtype=torch.float64, leaf=leaf)
    found = compare(model, group, x, 1e-12)
    check(found, observed(model, x, forward=exactly(model)), 1e-12)


@pytest.mark.parametrize("kind", ["nf4", "nf4_double"])
def test_dora_on_quantized_bases(kind: str) -> None:
    compare(*parallel(kind, method="dora"), tokens(3, 4))


def test_rows_of_zeros_stay_zero_under_dora() -> None:
    """PEFT divides zero by zero there."""
    model, group = parallel("bias", (2,), method="dora")
    layer = group.layers[0]
    with torch.no_grad():
        layer.base_layer.weight[1] = 0
        layer.lora_B["default"].weight[1] = 0
        layer.lora_magnitude_vector["default"].weight[1] = 0
    group.switch_on()
    x = tokens(6)
    assert torch.equal(model(x)[0][:, 1], layer.base_layer.bias[1].expand(6))
    group.switch_off()
    assert model(x)[0][:, 1].isnan().all()


def test_dora_in_bf16_starts_at_the_base() -> None:
    """B = 0 and m the lengths of the rows: the output is the base's, bit for bit."""
    model, group = parallel("linear", (4, 4), method="dora")
    x = tokens(20, dtype=torch.bfloat16)
    with torch.no_grad():
        for layer in group.layers:
            layer.base_layer.to(torch.bfloat16)
            layer.lora_B["default"].weight.zero_()
            squares = dora.row_squares(layer.base_layer.weight)
            layer.lora_magnitude_vector["default"].weight.copy_(squares.sqrt())
    wanted = [layer.base_layer(x) for layer in group.layers]
    with torch.autocast("cpu", torch.bfloat16):
        group.switch_on()
        assert all(map(torch.equal, model(x), wanted))


def test_gradcheck() -> None:
    model, group = parallel("bias", (2, 3))
    model.double()
    group.switch_on()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x))

    assert torch.autograd.gradcheck(outputs, (tokens(3, dtype=torch.float64), *parameters))


def test_a_frozen_factor_gets_no_gradient() -> None:
    """LoRA-FA trains B alone."""
    model, group = parallel()
    for layer in group.layers:
        layer.lora_A["default"].weight.requires_grad_(False)
    assert not any("lora_A" in name for name in compare(model, group, tokens(6)))


def test_dropout_differs_between_members_and_calls() -> None:
    """Two members with the same factors; and it is gone in an evaluation."""
    model, group = parallel(ranks=(2, 2), dropout=0.5)
    first, second = group.layers
    second.lora_A["default"].weight.data = first.lora_A["default"].weight.data
    second.lora_B["default"].weight.data[:5] = first.lora_B["default"].weight.data
    second.scaling = first.scaling
    group.switch_on()
    x = tokens(8)

    def updates() -> list[Tensor]:
        return [(y - layer.base_layer(x))[:, :5] for y, layer in zip(model(x), group.layers, strict=True)]

    (one, other), (later, _) = updates(), updates()
    assert distance(one, other) > 0.1 and distance(one, later) > 0.1
    model.eval()
    (one, other), (later, _) = updates(), updates()
    assert torch.equal(one, later) and distance(one, other) < 1e-5


def test_dropout_of_one_member_alone() -> None:
    model, group = parallel(dropout=0.3)
    group.layers[1].lora_dropout["default"].eval()
    compare(model, group, tokens(6))


@pytest.mark.parametrize(("scale", "taken"), [(2.0, 2.0), (1.5, 0.5)])
def test_what_is_taken_away_is_subtracted_before_it_is_rounded(scale: float, taken: float) -> None:
    """The product is that of the two pairs in fp64; in bf16 it is as near as one product is, where that of
    [A; A_0] and [scale B, -taken B_0] is off by what the two have in common."""
    draw = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    a_before, b_before = drawn(4, 24), drawn(16, 4)
    a, b = a_before + 1e-3 * drawn(4, 24), b_before + 1e-3 * drawn(16, 4)
    wanted = scale * b @ a - taken * b_before @ a_before
    wide, tall = lora.difference((a, b), (a_before, b_before), scale, taken)
    assert torch.allclose(tall @ wide, wanted, rtol=0, atol=1e-14)

    def off(tall: Tensor, wide: Tensor) -> float:
        rounded = tall.bfloat16().double() @ wide.bfloat16().double()
        return float((rounded - wanted).norm() / wanted.norm())

    apart = off(torch.cat([scale * b, -taken * b_before], dim=1), torch.cat([a, a_before]))
    assert off(tall, wide) < 0.005
    if scale == taken:
        assert apart > 0.5
