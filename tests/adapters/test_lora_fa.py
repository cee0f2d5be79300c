"""LoRA-FA: A never moves, the projected gradient is the full one's projection, and less is held."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.optimizers import create_lorafa_optimizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.adapters import Role, attach
from lorakit.adapters.lora_fa import inverse_of
from lorakit.kernels import lora
from lorakit.layers import layers_of
from lorakit.recipe.methods import Lora, LoraFa
from lorakit.recipe.traits import TRAITS
from lorakit.targets import assign, select
from tests import architectures
from tests.conftest import killed_at

IDS = torch.arange(3, 60)[None]


def attached(name: str, section: Any, targets: Any = "all-linear") -> tuple[Any, Any]:
    model = architectures.build(architectures.CONFIGS[name]())
    chosen, problems = select(layers_of(model)[0], targets)
    found, more = assign(chosen, section.rank, section.alpha, section.rank_pattern, section.alpha_pattern)
    assert not problems and not more
    return model, attach(section, model, found, seed=5)


def fa(**fields: Any) -> LoraFa:
    return LoraFa(method="lora-fa", **({"rank": 4} | fields))


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def moved(adapter: Any, seed: int = 7) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in adapter.trained():
            item.parameter.copy_(0.1 * torch.randn(item.parameter.shape, generator=draw))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_b_alone_is_trained_and_gets_lora_s_gradient(name: str) -> None:
    model, adapter = attached(name, fa())
    closed = TRAITS["lora-fa"].num_trained
    assert {item.role for item in adapter.trained()} == {Role.B}
    assert sum(item.parameter.numel() for item in adapter.trained()) == sum(
        closed(t.layer.in_features, t.layer.out_features, t.rank) for t in adapter.targets
    )
    other, full = attached(name, Lora(rank=4))
    moved(adapter)
    full.load_state(adapter.state())
    loss_of(model).backward()
    loss_of(other).backward()
    wanted = {item.name: item.parameter.grad for item in full.trained()}
    for item in adapter.trained():
        assert torch.equal(item.parameter.grad, wanted[item.name])


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_o15_the_projected_step_is_the_projected_gradient(name: str, scaling: str) -> None:
    """s g A = G A^T (A A^T)^-1 A in fp64, for every layer and whatever its scale; G by autograd on W."""
    found = []
    for alpha in (8.0, 1.5):
        model, adapter = attached(name, fa(projected=True, alpha=alpha, scaling=scaling))
        moved(adapter)  # B away from zero: G is then not the same for both scales, P A is
        model.double()
        adapter.load_state(adapter.state())
        for layer in adapter.layers:
            layer.get_base_layer().weight.requires_grad_(True)
        loss_of(model).backward()
        adapter.before_step(0)
        for layer, target in zip(adapter.layers, adapter.targets, strict=True):
            a, b = (getattr(layer, f"lora_{letter}")["default"].weight for letter in "AB")
            gradient = layer.get_base_layer().weight.grad
            gradient = gradient if target.layer.kind == "linear" else gradient.T
            scale = alpha / 4 if scaling == "standard" else alpha / 2
            wanted = gradient @ torch.linalg.pinv(a) @ a
            off = (scale * b.grad @ a - wanted).abs().max() / wanted.abs().max()
            assert off < 1e-13
            found.append(off)
    assert found


def test_peft_projects_in_bf16() -> None:
    """The same gradient through PEFT's optimizer is 2e-3 off; here it is exact in fp32."""
    model, adapter = attached("llama", fa(projected=True), ["q_proj"])
    moved(adapter)
    loss_of(model).backward()
    layer = adapter.layers[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    raw = b.grad.clone()
    exact = raw.double() @ torch.linalg.inv(a.double() @ a.double().T) / 2.0**2
    optimizer = create_lorafa_optimizer(adapter.lora.peft, r=4, lora_alpha=8, lr=1e-3)
    with pytest.MonkeyPatch.context() as patch:  # as on a machine with bf16
        patch.setattr("peft.optimizers.lorafa.is_bf16_available", lambda: True)
        patch.setattr("peft.optimizers.lorafa.infer_device", lambda: "cpu")
        optimizer.step()
    state = next(iter(optimizer.state.values()))
    theirs = state["exp_avg_B"].double() / 0.1  # the first average is (1 - beta1) of the gradient
    assert 5e-4 < float((theirs - exact).norm() / exact.norm()) < 2e-2
    adapter.before_step(0)
    assert float((b.grad.double() - exact).norm() / exact.norm()) < 1e-7


def test_rows_of_a_that_depend_on_each_other_project_on_what_they_span() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(4, 9, generator=draw)
    a[3], a[2] = 2 * a[0] - a[1], 0.0
    inverse = inverse_of(a, 0.5)
    gradient = torch.randn(5, 9, generator=draw, dtype=torch.float64)
    step = 0.5 * (0.5 * gradient @ a.double().T @ inverse) @ a.double()
    basis = torch.linalg.qr(a[:2].double().T).Q
    assert torch.allclose(step, gradient @ basis @ basis.T, atol=1e-6)  # a[3] is rounded to fp32


def test_the_inverse_belongs_to_the_a_that_was_loaded() -> None:
    _, adapter = attached("llama", fa(projected=True), ["q_proj"])
    adapter.load_state({name: 2 * tensor for name, tensor in adapter.state().items()})
    layer = adapter.layers[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.grad = torch.ones_like(b)
    adapter.before_step(0)
    wanted = torch.ones_like(b).double() @ torch.linalg.inv(a.double() @ a.double().T) / 2.0**2
    assert torch.allclose(b.grad.double(), wanted, rtol=1e-6)


def test_a_random_a_is_nearly_orthogonal() -> None:
    """What the module says of Adam: A A^T is about a third of the identity."""
    a = torch.empty(8, 4096)
    torch.manual_seed(0)
    torch.nn.init.kaiming_uniform_(a, a=5**0.5)
    assert torch.allclose(inverse_of(a, 1.0), 3 * torch.eye(8, dtype=torch.float64), atol=0.4)


@pytest.mark.parametrize("projected", [False, True])
def test_a_run_leaves_a_as_it_was_drawn_and_resumes_to_the_same_bits(
    projected: bool, write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    section = {"method": "lora-fa", "rank": 4, "projected": projected, "train_also": ["norm"]}
    recipe = write_recipe(adapter=section, checkpoint={"every": 2}, optimizer={"lr": 1e-2})
    assert cli("train", recipe, "--output", tmp_path / "whole")[0] == 0
    tensors = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    lora_start = write_recipe(adapter={"rank": 4}, optimizer={"lr": 1e-30})
    assert cli("train", lora_start, "--output", tmp_path / "start")[0] == 0
    drawn = load_file(tmp_path / "start/adapter/adapter_model.safetensors")
    for name, tensor in tensors.items():
        assert ".lora_A." not in name or torch.equal(tensor, drawn[name])
        assert ".lora_B." not in name or tensor.any()
    assert sum(".lora_A." in name for name in tensors) == sum(".lora_B." in name for name in tensors) > 0

    recipe = write_recipe(adapter=section, checkpoint={"every": 2}, optimizer={"lr": 1e-2})
    with killed_at(4):
        cli("train", recipe, "--output", tmp_path / "part")
    assert cli("train", recipe, "--output", tmp_path / "part", "--resume", "auto")[0] == 0
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "part" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()

    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    PeftModel.from_pretrained(base, tmp_path / "whole/adapter")  # plain LoRA
    config = json.loads((tmp_path / "whole/adapter/adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == ("LORA", False)


def test_a_stays_frozen_after_the_adapter_was_disabled() -> None:
    """PEFT lets every parameter of the adapter move when it switches it on again."""
    _, adapter = attached("llama", fa())
    names = [item.name for item in adapter.trained()]
    with adapter.disabled():
        pass
    assert [item.name for item in adapter.trained()] == names
    assert {item.role for item in adapter.trained()} == {Role.B}


# ------------------------------------------------------------------------------------------------------------
# What is held for the backward pass


def held_bytes(model: Any) -> int:
    """Of all tensors that one forward holds beside parameters, each memory once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()
        if place.data_ptr() not in own:
            held[place.data_ptr()] = place.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    loss.backward()
    return sum(held.values())


def test_the_input_is_held_no_more() -> None:
    """For each block of a llama: what q, k, v read, what gate and up read, and what down reads are held for A
    alone; what o reads is attention's own output, which attention holds."""
    sizes = {}
    for section in (Lora(rank=4), fa()):
        model, adapter = attached("llama", section)
        model.train()
        for group in lora.groups_of(model, lambda model=model: model(IDS)):
            group.switch_on()
        sizes[section.method] = held_bytes(model)
        assert all((item.parameter.grad is not None) for item in adapter.trained())
    num_tokens, num_layers, hidden, intermediate, fp32 = IDS.numel(), 2, 32, 48, 4
    saved = num_tokens * num_layers * (2 * hidden + intermediate) * fp32
    assert sizes["lora"] - sizes["lora-fa"] == saved
