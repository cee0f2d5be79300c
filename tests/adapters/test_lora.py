"""LoRA on every architecture and layer kind: step 0 is the base, counts, PEFT's files, disabled()."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from lorakit.adapters import METHODS, Role, attach
from lorakit.errors import LorakitError
from lorakit.layers import layers_of
from lorakit.recipe.adapter import METHOD_SECTIONS
from lorakit.recipe.methods import Lora
from lorakit.targets import Target, assign, select
from tests import architectures

IDS = torch.arange(3, 15)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def attached(name: str, section: Lora, targets="all-linear"):
    model = architectures.build(architectures.CONFIGS[name]())
    before = logits(model)
    layers, _ = layers_of(model)
    chosen, problems = select(layers, targets)
    assert not problems
    found, problems = assign(chosen, section.rank, section.alpha, section.rank_pattern, section.alpha_pattern)
    assert not problems
    return model, attach(section, model, found, seed=5), before


def randomise(adapter) -> None:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for item in adapter.trained():
            item.parameter.copy_(torch.randn(item.parameter.shape, generator=draw) * 0.1)


def test_the_registry_and_the_grammar_name_the_same_methods() -> None:
    assert METHODS.keys() == METHOD_SECTIONS.keys()


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_step_0_is_the_base_and_the_count_is_the_closed_form(name: str) -> None:
    model, adapter, before = attached(name, Lora(rank=4))
    assert torch.equal(logits(model), before)
    assert sum(item.parameter.numel() for item in adapter.trained()) == sum(
        4 * (t.layer.in_features + t.layer.out_features) for t in adapter.targets
    )
    assert {item.role for item in adapter.trained()} == {Role.A, Role.B}
    assert all(item.parameter.dtype == torch.float32 for item in adapter.trained())
    randomise(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_peft_computes_the_same_with_our_files(name: str, scaling: str, tmp_path: Path) -> None:
    section = Lora(
        rank=4, alpha=6.0, scaling=scaling, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 3.0}
    )
    model, adapter, _ = attached(name, section)
    randomise(adapter)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(architectures.build(architectures.CONFIGS[name]()), tmp_path).eval()
    assert torch.equal(logits(theirs), logits(model))
    found = {key for key in theirs.state_dict() if ".lora_" in key}
    assert len(found) == len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(adapter.targets)


def test_the_scale_is_what_the_equations_say() -> None:
    """Against W x + scale B A x by hand, in fp64, on one layer."""
    for scaling, scale in (("standard", 6 / 4), ("rank_stabilized", 6 / 4**0.5)):
        model, adapter, _ = attached(
            "llama", Lora(rank=4, alpha=6.0, scaling=scaling), ["model.layers.0.mlp.up_proj"]
        )
        randomise(adapter)
        layer = model.model.layers[0].mlp.up_proj
        x = torch.randn(5, 32)
        a, b = (item.parameter.double() for item in adapter.trained())
        expected = x.double() @ layer.weight.double().T + scale * (x.double() @ a.T @ b.T)
        assert torch.allclose(layer(x).double(), expected, atol=1e-5)
        assert [item.role for item in adapter.trained()] == [Role.A, Role.B]


def test_the_start_is_a_function_of_the_seed() -> None:
    section = Lora(rank=4)
    model = architectures.build(architectures.CONFIGS["llama"]())
    layers, _ = layers_of(model)
    targets = [Target(layer, 4, 8.0) for layer in select(layers, "attention")[0]]

    def start(seed: int) -> torch.Tensor:
        torch.randn(3)  # whatever was drawn before does not matter
        fresh = architectures.build(architectures.CONFIGS["llama"]())
        return attach(section, fresh, targets, seed).trained()[0].parameter.detach().clone()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))
    bound = 1 / 32**0.5  # Kaiming-uniform with a = sqrt(5): U(-1/sqrt(in), 1/sqrt(in))
    assert start(1).abs().max() <= bound
    assert start(1).var() == pytest.approx(bound**2 / 3, rel=0.5)


def test_embeddings_conv1d_and_the_head_by_name() -> None:
    model, adapter, before = attached("gpt2", Lora(rank=2), ["wte", "c_attn"])
    assert torch.equal(logits(model), before)
    assert [(t.layer.kind, t.layer.in_features, t.layer.out_features) for t in adapter.targets] == [
        ("embedding", 64, 32),
        ("conv1d", 32, 96),
        ("conv1d", 32, 96),
    ]
    roles = {item.name: item.role for item in adapter.trained() if "embedding" in item.name}
    assert list(roles.values()) == [Role.A, Role.B]


def test_state_round_trip_and_strict_loading() -> None:
    model, adapter, _ = attached("llama", Lora(rank=4))
    randomise(adapter)
    wanted = logits(model)
    state = {name: tensor.clone() for name, tensor in adapter.state().items()}
    model, other, _ = attached("llama", Lora(rank=4))
    other.load_state(state)
    assert torch.equal(logits(model), wanted)
    first = next(iter(state))
    for broken, text in (
        ({k: v for k, v in state.items() if k != first}, "is missing"),
        (state | {"extra": torch.ones(1)}, "belongs to no adapted layer"),
        (state | {first: torch.ones(3, 3)}, r"is \(3, 3\), expected"),
    ):
        with pytest.raises(LorakitError, match=text):
            other.load_state(broken)
    assert torch.equal(logits(model), wanted)  # a refused state changes nothing


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    """PEFT keeps target names in a set, whose order changes from process to process."""
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        _, adapter, _ = attached("llama", Lora(rank=4))
        adapter.write(folder, "base")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_peft_gives_every_tensor_the_name_that_lorakit_expects() -> None:
    """Roles come from PEFT's parameter names: this fails when they change."""
    model = architectures.build(architectures.CONFIGS["llama"]())
    peft = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    )
    names = {
        name.split(".default")[0].rsplit(".", 1)[-1] for name, p in peft.named_parameters() if p.requires_grad
    }
    assert names == {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}
