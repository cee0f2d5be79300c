"""The table of shapes against the models themselves: transformers on the meta device, and PEFT's counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

from lorakit.errors import LorakitError
from lorakit.layers import shapes_on_meta
from lorakit.model_files import shapes
from lorakit.recipe.traits import TRAITS
from lorakit.shapes import TABLE, Shapes, shapes_of
from lorakit.targets import select

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 24}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 24,
}
BIASES: list[dict[str, Any]] = [{"attention_bias": True}, {"attention_bias": False}]
KEY_VALUES: list[dict[str, Any]] = [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
TIES: list[dict[str, Any]] = [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
LLAMA = [{}, *BIASES, *KEY_VALUES, *TIES, {"head_dim": 16}]
NO_HEAD = [{}, *KEY_VALUES, *TIES]
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 24}
# type -> (sizes, what is written over them in turn)
VARIANTS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "llama": (SMALL, [*LLAMA, {"mlp_bias": True}, {"num_key_value_heads": None}, {"head_dim": None}]),
    "mistral": (SMALL, [*LLAMA, {"head_dim": None}, {"mlp_bias": True}]),
    "qwen2": (SMALL, [*LLAMA, {"num_key_value_heads": None}]),
    "qwen3": (SMALL, [*LLAMA, {"num_key_value_heads": None}]),
    "gemma": (SMALL, LLAMA),
    "gemma2": (SMALL, LLAMA),
    "gemma3_text": (SMALL, LLAMA),
    "phi3": (SMALL, [*NO_HEAD, {"head_dim": 16}, {"num_key_value_heads": None}, *BIASES]),
    "smollm3": (SMALL, [*LLAMA, {"mlp_bias": True}, {"num_key_value_heads": None}]),
    "mixtral": (SMALL, [*LLAMA, {"num_local_experts": 3}, {"num_local_experts": 16}, {"head_dim": None}]),
    "qwen3_moe": (
        SMALL,
        [
            EXPERTS,
            {**EXPERTS, "attention_bias": True},
            {**EXPERTS, "mlp_only_layers": [0]},
            {**EXPERTS, "num_hidden_layers": 3, "decoder_sparse_step": 2},
            {**EXPERTS, "tie_word_embeddings": True},
            {**EXPERTS, "head_dim": 16},
            {**EXPERTS, "num_experts": 16},  # as wide as keys and values
            {"moe_intermediate_size": 8},
            {"num_experts": 4},
        ],
    ),
    "glm": (SMALL, LLAMA),
    "glm4": (SMALL, LLAMA),
    "gpt2": (GPT2, [{}, *TIES, {"n_inner": 40}, {"n_inner": None}]),
    "gpt_neox": (
        {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
        [{}, *BIASES, *TIES],
    ),
    "opt": (
        OPT,
        [
            {},
            *TIES,
            {"word_embed_proj_dim": 16},
            {"word_embed_proj_dim": 16, "tie_word_embeddings": False},
            {"do_layer_norm_before": False},
            {"_remove_final_layer_norm": True},
            {"enable_bias": False},
            {"layer_norm_elementwise_affine": False},
        ],
    ),
}
CASES = [
    pytest.param(kind, {**sizes, **more}, id=f"{kind}-{'-'.join(f'{k}={v}' for k, v in more.items())}")
    for kind, (sizes, variants) in VARIANTS.items()
    for more in variants
]


def write(folder: Path, kind: str, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **values}))
    return folder


def test_every_type_of_the_table_is_proved() -> None:
    assert set(VARIANTS) == set(TABLE)


@pytest.mark.parametrize(("kind", "values"), CASES)
def test_the_table_is_the_model(kind: str, values: dict[str, Any], tmp_path: Path) -> None:
    """Names, kinds, order, roles and shapes of layers; names, order and shapes of parameters; ties."""
    folder = write(tmp_path, kind, values)
    expected = shapes_on_meta(folder)
    found = shapes_of({"model_type": kind, **values})
    assert found is not None
    assert found.layers == expected.layers
    assert list(found.parameters.items()) == list(expected.parameters.items())
    assert found.tied == expected.tied
    assert found.experts == expected.experts


@pytest.mark.parametrize("kind", TABLE)
def test_the_table_is_the_model_as_transformers_writes_it(kind: str, tmp_path: Path) -> None:
    """The configuration that save_pretrained writes, with every default of this version of transformers."""
    sizes, variants = VARIANTS[kind]
    hf.CONFIG_MAPPING[kind](**{**sizes, **variants[0]}).save_pretrained(tmp_path)
    found, expected = shapes(tmp_path), shapes_on_meta(tmp_path)
    assert found.layers == expected.layers
    assert dict(found.parameters) == dict(expected.parameters)


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("preset", ["all-linear", "attention", "mlp"])
def test_counts_are_those_of_peft(kind: str, preset: str, tmp_path: Path) -> None:
    sizes, variants = VARIANTS[kind]
    found = shapes(write(tmp_path, kind, {**sizes, **variants[0]}))
    layers, problems = select(found.layers, preset)
    if kind in ("mixtral", "qwen3_moe") and preset == "mlp":
        assert problems  # experts are parameters, which nothing adapts
        return
    config = hf.AutoConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
        total = sum(p.numel() for p in model.parameters())
        lora = LoraConfig(r=3, target_modules=[layer.name for layer in layers], task_type="CAUSAL_LM")
        adapted = get_peft_model(model, lora)
    count = sum(TRAITS["lora"].num_trained(layer.in_features, layer.out_features, 3) for layer in layers)
    assert adapted.get_nb_trainable_parameters() == (count, total + count)
    assert found.num_parameters == total


def test_a_type_outside_the_table_is_built_on_the_meta_device(tmp_path: Path) -> None:
    assert shapes_of({"model_type": "phi"}) is None
    hf.PhiConfig(**SMALL).save_pretrained(tmp_path)
    found = shapes(tmp_path)
    names = [layer.name for layer in found.layers if ".1." in layer.name]
    assert "model.layers.1.self_attn.dense" in names
    assert found.num_parameters == sum(
        p.numel() for p in hf.AutoModelForCausalLM.from_config(hf.PhiConfig(**SMALL)).parameters()
    )


def test_a_model_of_text_and_images_is_built_on_the_meta_device(tmp_path: Path) -> None:
    text = {**SMALL, "head_dim": 8}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    config.architectures = ["Gemma3ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    assert shapes_of(json.loads((tmp_path / "config.json").read_text())) is None
    found = shapes(tmp_path)
    assert any("vision" in layer.name for layer in found.layers)
    assert any(layer.name.endswith("language_model.layers.1.self_attn.q_proj") for layer in found.layers)


def test_a_gpt2_that_reads_an_encoder_is_left_to_the_meta_device() -> None:
    assert shapes_of({"model_type": "gpt2", **GPT2, "add_cross_attention": True}) is None


def test_keys_as_wide_as_there_are_experts_are_no_routers(tmp_path: Path) -> None:
    """Qwen3-Next has 512 experts, and keys, values and a shared expert of 512 features."""
    config = hf.Qwen3NextConfig(
        **{**SMALL, "head_dim": 16, "num_key_value_heads": 1},
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    )
    config.save_pretrained(tmp_path)
    roles = {layer.name: layer.role for layer in shapes(tmp_path).layers}
    assert roles["model.layers.1.self_attn.k_proj"] == ""
    assert roles["model.layers.1.mlp.shared_expert.up_proj"] == ""
    assert roles["model.layers.1.mlp.shared_expert_gate"] == "router"


def test_others_are_all_that_is_no_matrix_of_a_layer() -> None:
    found = shapes_of({"model_type": "qwen3_moe", **SMALL, **EXPERTS, "num_hidden_layers": 1, "head_dim": 8})
    assert isinstance(found, Shapes)
    assert found.others == {
        "model.layers.0.self_attn.q_norm.weight": 8,
        "model.layers.0.self_attn.k_norm.weight": 8,
        "model.layers.0.mlp.gate.weight": 4 * 32,
        "model.layers.0.mlp.experts.gate_up_proj": 4 * 48 * 32,
        "model.layers.0.mlp.experts.down_proj": 4 * 32 * 24,
        "model.layers.0.input_layernorm.weight": 32,
        "model.layers.0.post_attention_layernorm.weight": 32,
        "model.norm.weight": 32,
    }


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hidden_size": "32"}, "/m/config.json: hidden_size: expected a whole number above 0, got '32'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected a whole number above 0, got 0"),
        ({"vocab_size": True}, "vocab_size: expected a whole number above 0, got True"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"attention_bias": 1}, "attention_bias: expected true or false, got 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: expected true or false, got 'no'"),
        ({"num_attention_heads": 5, "head_dim": None}, "hidden_size 32 is no multiple of 5 attention heads"),
        ({"head_dim": 8.0}, "head_dim: expected a whole number above 0, got 8.0"),
    ],
)
def test_a_wrong_value_is_named_with_its_file_and_key(more: dict[str, Any], words: str) -> None:
    with pytest.raises(LorakitError) as caught:
        shapes_of({"model_type": "llama", **SMALL, **more}, "/m/config.json")
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object"),
        ('{"hidden_size": 4}', "model_type is missing"),
        ('{"model_type": "no-such-type"}', "no model can be made of it"),
        ('{"model_type": "phi", "hidden_size": "wide"}', "no model can be made of it"),
    ],
)
def test_a_configuration_that_describes_no_model(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(LorakitError, match=r"config\.json") as caught:
        shapes(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("key", ["num_key_value_heads", "head_dim", "word_embed_proj_dim"])
def test_a_key_that_is_missing_has_the_default_of_transformers(kind: str, key: str, tmp_path: Path) -> None:
    """Some types have a number as their default, so that heads enough for it are written."""
    sizes = {**VARIANTS[kind][0], "hidden_size": 64, "num_attention_heads": 32}
    if kind == "gpt2":
        sizes = GPT2
    folder = write(tmp_path, kind, {name: value for name, value in sizes.items() if name != key})
    assert shapes(folder) == shapes_on_meta(folder)
