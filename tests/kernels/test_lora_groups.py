"""When grouped layers take the fast forward, which calls belong together, and what is held for backward.

The twin is PEFT's own forward, as in test_lora.py, whose models are used here.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit.kernels import lora
from tests import architectures
from tests.kernels.test_lora import check, compare, distance, observed, parallel, tokens


@pytest.mark.parametrize("members", [[0], [1], [2], [0, 2], [1, 2]])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_output_that_takes_no_part_gets_no_gradient(members: list[int], dropout: float) -> None:
    """None, not zeros, with which an optimizer would move what has momentum or decays."""
    model, group = parallel(dropout=dropout)
    x = tokens(6)
    wanted = observed(model, x, members)
    group.switch_on()
    check(observed(model, x, members), wanted, 1e-5)
    assert sum(value is None for value in wanted.values()) == 2 * (3 - len(members))


@pytest.mark.parametrize("skipped", [0, 1, 2])
def test_a_member_that_is_not_called(skipped: int) -> None:
    """Its output waits for it, and is not taken for that of another input."""
    model, group = parallel()
    parts = list(model.parts.values())

    def most(x: Tensor) -> list[Tensor]:
        return [layer(x) for n, layer in enumerate(parts) if n != skipped]

    first, second = tokens(6), -2.0 * tokens(6)
    expected = [
        observed(model, first, forward=most),
        observed(model, second, forward=most),
        observed(model, first),
    ]
    group.switch_on()
    check(observed(model, first, forward=most), expected[0], 1e-5)
    check(observed(model, second, forward=most), expected[1], 1e-5)
    check(observed(model, first), expected[2], 1e-5)


@pytest.mark.parametrize(
    "order", ["012", "210", "0012", "012012", "01x2", "0x0x12", "0+12", "01+2", "0n12", "n012"]
)
def test_every_order_of_calls(order: str) -> None:
    """A digit: that member is called; x: member 0 is given another tensor in between; +: the input is changed
    in place; n: member 1 is called with the input where no gradient is recorded."""
    model, group = parallel()
    parts = list(model.parts.values())

    def forward(x: Tensor) -> list[Tensor]:
        x, other, outputs = x * 1.0, -2.0 * x, []
        for call in order:
            if call == "+":
                with torch.no_grad():
                    x.add_(1.0)
            elif call == "n":
                with torch.no_grad():
                    parts[1](x)
            else:
                outputs.append(parts[0](other) if call == "x" else parts[int(call)](x))
        return outputs

    x = tokens(6)
    if "+" in order:  # what PEFT's layers hold may not change either: forwards only
        with torch.no_grad():
            wanted = forward(x)
            group.switch_on()
            found = forward(x)
        assert all(distance(y, z) <= 1e-5 for y, z in zip(found, wanted, strict=True))
        return
    wanted_all = observed(model, x, forward=forward)
    group.switch_on()
    check(observed(model, x, forward=forward), wanted_all, 1e-5)


def test_nothing_is_kept_once_all_members_were_called() -> None:
    model, group = parallel()
    group.switch_on()
    model(tokens(6))
    assert group.source is None and not group.waiting


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(dropout: float) -> None:
    """The input is computed again, and all members from it, with the same masks."""
    model, group = parallel(dropout=dropout)

    def checkpointed(x: Tensor) -> list[Tensor]:
        def body(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(y.tanh() for y in model(x.sin()))

        return list(checkpoint(body, x, use_reentrant=False))

    def plain(x: Tensor) -> list[Tensor]:
        return [y.tanh() for y in model(x.sin())]

    x = tokens(6)
    wanted = observed(model, x, forward=plain)
    group.switch_on()
    check(observed(model, x, forward=checkpointed), wanted, 1e-5)


def test_outputs_may_be_changed_in_place() -> None:
    """As a residual is added by some models: the others are not touched, and gradients flow."""
    model, group = parallel()

    def forward(x: Tensor) -> list[Tensor]:
        first, second, third = model(x)
        return [first.mul_(2.0), second.add_(1.0), third]

    wanted = observed(model, tokens(6), forward=forward)
    group.switch_on()
    check(observed(model, tokens(6), forward=forward), wanted, 1e-5)


# ------------------------------------------------------------------------------------------------------------
# When PEFT's own forward is asked for


def second_adapter(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.update_layer("second", 3, 2.0, LoraConfig(r=3, lora_alpha=2.0, init_lora_weights=False))
        layer.set_adapter(["default", "second"])


def merged(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.merge()


def one_member_merged(model: Any, group: lora.Group) -> None:
    group.layers[1].merge()


def disabled(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.enable_adapters(False)


def second_with_bias(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.update_layer("second", 3, 2.0, LoraConfig(r=3, lora_bias=True, init_lora_weights=False))
        layer.set_adapter(["default", "second"])


def second_of_dora(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.update_layer("second", 3, 2.0, LoraConfig(r=3, use_dora=True, init_lora_weights=False))
        layer.set_adapter(["default", "second"])


def second_beside_dropout(model: Any, group: lora.Group) -> None:
    for layer in group.layers:
        layer.lora_dropout["default"] = nn.Dropout(0.0)
    second_adapter(model, group)


BESIDE = [second_with_bias, second_of_dora, second_beside_dropout]


@pytest.mark.parametrize("state", [*BESIDE, merged, one_member_merged, disabled])
def test_what_the_fast_forward_does_not_do_is_left_to_peft(
    state: Callable[[Any, lora.Group], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bits, and without the fast function."""
    model, group = parallel("bias")
    group.switch_on()
    before = observed(model, tokens(6))
    state(model, group)
    monkeypatch.setattr(lora, "outputs", None)
    found = model(tokens(6))
    group.switch_off()
    for n, (y, expected) in enumerate(zip(found, model(tokens(6)), strict=True)):
        assert torch.equal(y, expected)
        assert n == 0 or "merged" in state.__name__ or distance(y, before[f"output{n}"]) > 0.1  # type: ignore


def test_the_adapter_is_disabled_and_enabled_again() -> None:
    peft: Any = get_peft_model(nn.Sequential(nn.Linear(64, 4)), LoraConfig(target_modules=["0"], r=2))
    (alone,) = lora.groups_of(peft, lambda: peft(tokens(3)))
    nn.init.normal_(alone.layers[0].lora_B["default"].weight)
    alone.switch_on()
    with peft.disable_adapter():
        assert torch.equal(peft(tokens(3)), alone.layers[0].base_layer(tokens(3)))
    assert distance(peft(tokens(3)), alone.layers[0].base_layer(tokens(3))) > 0.1
    # names of adapters for each row of a batch, here the base alone
    found = alone.layers[0](tokens(3), adapter_names=["__base__"] * 3)
    torch.testing.assert_close(found, alone.layers[0].base_layer(tokens(3)))


def test_a_quantized_base_is_multiplied_as_the_recipe_says() -> None:
    """In fp32 under autocast, or in bf16 without: PEFT's own forward does that."""
    for compute, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model, group = parallel("nf4")
        for layer in group.layers:
            layer.base_layer.compute_dtype = compute
        x = tokens(6)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            wanted = model(x)
            group.switch_on()
            assert all(torch.equal(y, z) for y, z in zip(model(x), wanted, strict=True))


@pytest.mark.parametrize("kind", ["bias", "conv1d", "nf4"])
def test_several_adapters_are_one_of_a_larger_rank(kind: str) -> None:
    """All trained, and the first alone: the others get no gradient then."""
    model, group = parallel(kind)
    second_adapter(model, group)
    compare(model, group, tokens(6))
    for layer in group.layers:
        layer.lora_A["second"].requires_grad_(False)
        layer.lora_B["second"].requires_grad_(False)
    assert not any("second" in name for name in compare(model, group, tokens(6)))


def test_a_second_adapter_that_is_not_active_changes_nothing() -> None:
    model, group = parallel()
    wanted = observed(model, tokens(6))
    second_adapter(model, group)
    for layer in group.layers:
        layer.set_adapter("default")
    group.switch_on()
    found = observed(model, tokens(6))
    check({name: found[name] for name in wanted}, wanted, 1e-5)


def test_an_evaluation_gives_the_same_without_gradients_or_masks() -> None:
    model, group = parallel(dropout=0.5)
    model.eval()
    with torch.no_grad():
        wanted = model(tokens(6))
        group.switch_on()
        found = model(tokens(6))
    with torch.inference_mode():
        found += model(tokens(6, leaf=False) + 0)
    assert not any(y.requires_grad for y in found)
    assert all(distance(y, z) <= 1e-5 for y, z in zip(found, wanted * 2, strict=True))


def test_switching_off_leaves_no_trace() -> None:
    _, group = parallel()
    for _ in range(2):
        group.switch_on()
        assert all("forward" in vars(layer) for layer in group.layers)
        group.switch_off()
        assert not any("forward" in vars(layer) for layer in group.layers)


def adapted(layer: nn.Module, **options: Any) -> Any:
    model: Any = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2, **options))
    return model.get_base_model()[0]


def test_what_is_supported() -> None:
    assert lora.is_supported(adapted(nn.Linear(8, 8)))
    assert not lora.is_supported(nn.Linear(8, 8))
    assert lora.is_supported(adapted(nn.Linear(8, 8), use_dora=True))
    assert not lora.is_supported(adapted(nn.Linear(8, 8), use_dora=True, lora_dropout=0.1))
    assert not lora.is_supported(adapted(nn.Linear(8, 8), lora_bias=True))
    assert not lora.is_supported(adapted(nn.Linear(8, 8, bias=True), bias="all"))
    assert not lora.is_supported(adapted(nn.Embedding(8, 8)))
    assert not lora.is_supported(adapted(nn.Conv1d(8, 8, 1)))
    two = adapted(nn.Linear(8, 8))
    two.update_layer("second", 3, 2.0, LoraConfig(r=3))
    assert lora.is_supported(two)
    two.delete_adapter("default")
    assert not lora.is_supported(two)


# ------------------------------------------------------------------------------------------------------------
# The groups of a model


def groups_by_name(model: nn.Module, run: Callable[[], object]) -> list[list[str]]:
    names = {module: name for name, module in model.named_modules()}
    return [[names[layer] for layer in group.layers] for group in lora.groups_of(model, run)]


def adapted_model(name: str, targets: list[str]) -> Any:
    model = architectures.build(architectures.CONFIGS[name]())
    config = LoraConfig(target_modules=targets, r=2, fan_in_fan_out=name == "gpt2", init_lora_weights=False)
    return get_peft_model(model, config).get_base_model()


LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", LLAMA, ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("llama", ["q_proj", "v_proj", "up_proj"], ["q_proj v_proj", "up_proj"]),
        ("gpt2", ["c_attn", "c_proj", "c_fc"], ["c_attn", "c_proj", "c_fc", "c_proj"]),
    ],
)
def test_groups_of_a_model(name: str, targets: list[str], expected: list[str]) -> None:
    """In both of its layers; logits and gradients are those of PEFT, and no hook stays behind."""
    model, ids = adapted_model(name, targets), torch.arange(3, 12)[None]
    found = groups_by_name(model, lambda: model(input_ids=ids))
    assert [" ".join(path.rsplit(".", 1)[1] for path in group) for group in found] == expected * 2
    groups = lora.groups_of(model, lambda: model(input_ids=ids))
    assert not any(module._forward_pre_hooks for module in model.modules())

    def forward(x: Tensor) -> list[Tensor]:
        return [model(inputs_embeds=x, use_cache=False).logits]

    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(6)).requires_grad_()
    wanted = observed(model, x, forward=forward)
    for group in groups:
        group.switch_on()
    check(observed(model, x, forward=forward), wanted, 1e-4)  # of the largest, through two layers


def test_a_run_that_fails_leaves_no_hook() -> None:
    model, _ = parallel()
    with pytest.raises(IndexError):
        lora.groups_of(model, lambda: [].pop())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Experts(nn.Module):
    """Each token goes to one of three: gate and up read what went there, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
        self.experts = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}) for _ in range(3)
        )

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows) or number == 2:  # the last is called with no tokens, too
                here = x[rows]
                there = expert["down"](expert["gate"](here).tanh() * expert["up"](here))
                out = out.index_add(0, rows, there)
        return out


def test_experts_that_are_not_called() -> None:
    """They are groups of their own, and compute the same when their turn comes."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=["gate", "up", "down"], r=2, init_lora_weights=False)
    model: Any = get_peft_model(Experts(), config).get_base_model()  # type: ignore[arg-type]
    x = torch.randn(5, 8, requires_grad=True)
    first = torch.tensor([0, 0, 2, 0, 2])
    together = groups_by_name(model, lambda: model(x, first))
    assert sorted(len(group) for group in together) == [1, 1, 1, 1, 1, 2, 2]
    assert {tuple(group) for group in together if "experts.1" in group[0]} == {
        (f"experts.1.{name}",) for name in ("gate", "up", "down")
    }
    groups = lora.groups_of(model, lambda: model(x, first))
    for chosen in (first, torch.tensor([1, 2, 1, 1, 0]), torch.tensor([1, 1, 1, 0, 0])):

        def forward(x: Tensor, chosen: Tensor = chosen) -> list[Tensor]:
            return [model(x, chosen)]

        for group in groups:
            group.switch_off()
        wanted = observed(model, x, forward=forward)
        for group in groups:
            group.switch_on()
        check(observed(model, x, forward=forward), wanted, 1e-5)


def test_a_layer_that_is_called_twice_is_a_group_of_its_own() -> None:
    model, _ = parallel(ranks=(2, 2))
    first, second = model.parts.values()
    x, other = tokens(3), tokens(4)
    assert groups_by_name(model, lambda: (first(x), second(x), first(other))) == [
        ["parts.part1"],
        ["parts.part0"],
    ]
    assert groups_by_name(model, lambda: (first(x), second(other))) == [["parts.part0"], ["parts.part1"]]


# ------------------------------------------------------------------------------------------------------------
# What is held for the backward pass


def held_by(model: Any, x: Tensor) -> list[Tensor]:
    """What one forward holds beside parameters, each once."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16),
    ):
        outputs = model(x)
    assert all(y.dtype == torch.bfloat16 for y in outputs)
    own = {p.data_ptr() for p in model.parameters()}
    return [tensor for tensor in held.values() if tensor.data_ptr() not in own]


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_a_group_holds_its_input_once_and_nothing_in_fp32(given: torch.dtype) -> None:
    """The input in bf16 and its products with A; PEFT's layers hold a copy of the input for each."""
    model, group = parallel(ranks=(4, 2, 3))
    for layer in group.layers:
        layer.base_layer.to(torch.bfloat16)
    x = tokens(50, dtype=given) * 1  # no leaf: autocast remembers the copies of those
    usual = held_by(model, x)
    assert sum(t.shape == x.shape for t in usual) >= 3
    group.switch_on()
    held = held_by(model, x)
    assert {t.dtype for t in held} == {torch.bfloat16}
    assert sorted(t.shape[1] for t in held if len(t) == len(x)) == [4 + 2 + 3, x.shape[1]]
    assert (given == torch.bfloat16) == any(t.data_ptr() == x.data_ptr() for t in held)


def test_a_quantized_weight_is_not_held_in_full() -> None:
    model, group = parallel("nf4", ranks=(4,))
    base = group.layers[0].base_layer
    base.compute_dtype = torch.bfloat16
    group.switch_on()
    sizes = [t.shape for t in held_by(model, tokens(50))]
    assert base.weight.quant_state.shape not in sizes and len(sizes) == 4


def test_no_gradient_of_the_input_no_product_for_it() -> None:
    """An input that takes no gradient costs no product with the weight of the base."""
    model, group = parallel(ranks=(2, 2))
    group.switch_on()
    read: list[nn.Module] = []
    original = lora.dense

    def counted(base: nn.Module, dtype: torch.dtype) -> Tensor:
        read.append(base)
        return original(base, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "dense", counted)
        observed(model, tokens(4, leaf=False))
        assert len(read) == 2
        observed(model, tokens(4))
        assert len(read) == 2 + 4
