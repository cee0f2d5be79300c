"""Loading: what is found and refused, what a quantized base is; layers and targets of many architectures."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lorakit import base_model, model_files
from lorakit.errors import LorakitError
from lorakit.layers import layers_of, num_parameters
from lorakit.recipe.model import Model
from lorakit.targets import select
from tests import architectures
from tests.conftest import ROOT

CPU = torch.device("cpu")

ATTENTION = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gemma": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "gpt2": {"c_attn", "c_proj"},
    "phi": {"q_proj", "k_proj", "v_proj", "dense"},
    "gpt_neox": {"query_key_value", "dense"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
}
MLP = {
    "llama": {"gate_proj", "up_proj", "down_proj"},
    "qwen3": {"gate_proj", "up_proj", "down_proj"},
    "gemma": {"gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_fc", "c_proj"},
    "phi": {"fc1", "fc2"},
    "gpt_neox": {"dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"fc1", "fc2"},
    "mixtral": set(),
}


@pytest.mark.parametrize("name", ATTENTION)
def test_presets_on_every_architecture(name: str) -> None:
    layers, experts = layers_of(architectures.build(architectures.CONFIGS[name]()))

    def last_names(preset: str) -> set[str]:
        return {layer.name.rsplit(".", 1)[-1] for layer in select(layers, preset)[0]}

    assert last_names("attention") == ATTENTION[name]
    assert last_names("mlp") == MLP[name]
    assert last_names("all-linear") == ATTENTION[name] | MLP[name]
    assert [layer.role for layer in layers if layer.name.endswith(("lm_head", "embed_out"))] == ["head"]
    assert len(experts) == (4 if name == "mixtral" else 0)
    if name == "mixtral":
        _, problems = select(layers, "mlp")
        assert "matches nothing" in problems[0]


def test_a_router_is_never_in_a_preset() -> None:
    """A linear router, as in OLMoE or older mixtures, found by its name and by its width."""

    class Config:
        num_experts = 4

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = Config()
            self.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"gate": torch.nn.Linear(8, 4)})])
            self.layers[0]["chooser"] = torch.nn.Linear(8, 4)
            self.layers[0]["up_proj"] = torch.nn.Linear(8, 16)

    layers, _ = layers_of(Mixture())
    assert [layer.name for layer in select(layers, "all-linear")[0]] == ["layers.0.up_proj"]
    assert [layer.name for layer in select(layers, ["gate"])[0]] == [
        "layers.0.gate"
    ]  # by name it is the user's wish


def model_copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


@pytest.mark.parametrize("cut", [4, 200, -100])
def test_weights_cut_short(tiny: Path, tmp_path: Path, cut: int) -> None:
    folder = model_copy(tiny, tmp_path)
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[:cut])
    with pytest.raises(LorakitError):
        model_files.stored_dtype(folder)
        base_model.load(folder, Model(path=str(folder)), "AutoModelForCausalLM", "fp32", CPU)


def test_a_configuration_that_does_not_fit_the_weights(tiny: Path, tmp_path: Path) -> None:
    folder = model_copy(tiny, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(LorakitError, match="tensors of the model are not in the files"):
        base_model.load(folder, Model(path=str(folder)), "AutoModelForCausalLM", "fp32", CPU)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 97}))
    with pytest.raises(LorakitError):
        base_model.load(folder, Model(path=str(folder)), "AutoModelForCausalLM", "fp32", CPU)


def test_base_dropout_is_off_unless_kept(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    GPT2LMHeadModel(architectures.CONFIGS["gpt2"]()).save_pretrained(tmp_path / "m")
    for keep, expected in ((0.0, 0.0), ("keep", 0.1)):
        base = base_model.load(
            tmp_path / "m", Model(path="x", dropout=keep), "AutoModelForCausalLM", "fp32", CPU
        )
        found = {m.p for m in base.model.modules() if isinstance(m, torch.nn.Dropout)}
        assert found == {expected}
        assert base.config.attn_pdrop == 0.1  # as stored


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantized_base_counts_as_what_it_stands_for(kind: str, tiny: Path) -> None:
    section = Model(path=str(tiny / "model"))
    plain = base_model.load(tiny / "model", section, "AutoModelForCausalLM", "fp32", CPU)
    quantized = base_model.load(
        tiny / "model", section.model_copy(update={"quantize": kind}), "AutoModelForCausalLM", "fp32", CPU
    )
    small = [p for p in quantized.model.parameters() if p.dtype in (torch.uint8, torch.int8)]
    assert len(small) == 14  # every linear layer but the head
    count = num_parameters(plain.model, plain.layers)
    assert count == sum(p.numel() for p in plain.model.parameters())
    assert num_parameters(quantized.model, quantized.layers) == count
    if kind != "int8":
        import bitsandbytes

        layer, exact = (m.model.layers[0].mlp.up_proj.weight for m in (quantized.model, plain.model))
        held = bitsandbytes.functional.dequantize_4bit(layer.data, layer.quant_state)
        error = (held.float() - exact).norm() / exact.norm()
        assert 0.05 < error < 0.2  # NF4 0.09, FP4 0.12 on normal numbers
        assert layer.quant_state.nested  # double quantization
        assert layer.quant_state.quant_type == kind


def test_evaluation_does_not_break_a_4_bit_layer_for_training(tiny: Path) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on CPUs with AVX512-BF16, without a backward."""
    section = Model(path="x", quantize="nf4")
    base = base_model.load(tiny / "model", section, "AutoModelForCausalLM", "fp32", CPU)
    embeddings = base.model.get_input_embeddings()(torch.arange(10)[None]).detach()

    def gradient() -> torch.Tensor:
        inputs = embeddings.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            base.model(inputs_embeds=inputs, use_cache=False).logits.float().square().sum().backward()
        return inputs.grad

    before = gradient()
    base.model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        base.model(inputs_embeds=embeddings, use_cache=False)
    base.model.train()
    assert torch.equal(gradient(), before)


def test_remote_code_is_off_at_every_call() -> None:
    """trust_remote_code is always passed: from the recipe, or as False."""
    import ast

    for path in (ROOT / "lorakit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("from_pretrained"):
                passed = {k.arg: ast.unparse(k.value) for k in node.keywords}
                allowed = ("section.trust_remote_code", "False")
                assert passed.get("trust_remote_code") in allowed, f"{path}:{node.lineno}"


def test_misread_widths_are_told() -> None:
    """bitsandbytes 0.50.2 gives rows that are no multiple of a block wrong constants on some CPUs. When this
    fails because nothing is found, the warning can go."""
    import bitsandbytes

    def layer(width: int) -> torch.nn.Module:
        linear = bitsandbytes.nn.Linear4bit(width, 96, bias=False, quant_type="nf4")
        linear.load_state_dict({"weight": torch.randn(96, width, generator=torch.Generator().manual_seed(0))})
        return linear.to("cpu")

    found = base_model.misread_widths(torch.nn.ModuleList([layer(48), layer(64), layer(128)]))
    assert set(found) <= {48}
    if torch.cpu._is_avx512_bf16_supported():
        assert found == [48]
