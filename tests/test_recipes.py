"""The shipped recipes: all here, valid, and planned against the configurations of the models they name.

The configurations are those the models are published with, as far as shapes go; the totals are the published
numbers of parameters.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.plan import make_plan
from lorakit.recipe import load_recipe
from tests.conftest import ROOT

RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".yaml", ".yml"))

_LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8}
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
    **_HEADS,
}
LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, **_LLAMA_8B, **_HEADS}
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32768, **_LLAMA_8B, **_HEADS}
GEMMA_1B = {
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
}
GPT2_MEDIUM = {
    "model_type": "gpt2",
    "n_embd": 1024,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 1024,
    "vocab_size": 50257,
}
GLM_9B = {
    "model_type": "glm4",
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
    "vocab_size": 151552,
    "tie_word_embeddings": False,
}


def rank_16(hidden: int, inner: int, queries: int, keys: int, layers: int) -> int:
    """LoRA of rank 16 on the seven matrices of a gated decoder, by hand."""
    attention = 2 * (hidden + queries) + 2 * (hidden + keys)
    return 16 * layers * (attention + 3 * (hidden + inner))


# recipe -> (configuration, parameters of the model, trained parameters)
KNOWN: dict[str, tuple[dict[str, Any], int, int]] = {
    "smollm2-135m-lora": (SMOL, 134_515_008, rank_16(576, 1536, 576, 192, 30)),
    "smollm2-135m-full": (SMOL, 134_515_008, 134_515_008),
    "smollm2-135m-adalora": (SMOL, 134_515_008, rank_16(576, 1536, 576, 192, 30) * 12 // 16 + 30 * 7 * 12),
    "qwen3-0.6b-lora": (QWEN3, 596_049_920, rank_16(1024, 3072, 2048, 1024, 28)),
    "qwen3-0.6b-qlora": (QWEN3, 596_049_920, rank_16(1024, 3072, 2048, 1024, 28)),
    "llama-3.2-1b-qlora": (LLAMA_1B, 1_235_814_400, rank_16(2048, 8192, 2048, 512, 16)),
    "llama-3.1-8b-qlora": (LLAMA_8B, 8_030_261_248, rank_16(4096, 14336, 4096, 1024, 32)),
    "mistral-7b-qlora": (MISTRAL_7B, 7_248_023_552, rank_16(4096, 14336, 4096, 1024, 32)),
    "gemma-3-1b-lora": (GEMMA_1B, 999_885_952, rank_16(1152, 6912, 1024, 256, 26)),
    "gpt2-medium-e2e": (GPT2_MEDIUM, 354_823_168, 393_216),
    # gate and up are one matrix there
    "glm-4-9b-qlora": (GLM_9B, 9_400_279_040, rank_16(4096, 13696, 4096, 256, 40) - 16 * 40 * 4096),
}


def name_of(path: Path) -> str:
    """What `lorakit recipes` calls it: the file, or the folder of a recipe with its own model and data."""
    return path.parent.name if path.name == "recipe.yaml" else path.stem


def test_the_recipes_are_all_here() -> None:
    others = [
        path for path in RECIPES if path.parent.name != "methods"
    ]  # tests/test_method_docs.py has those
    assert {name_of(path) for path in others} == {*KNOWN, "quickstart"}
    assert len(others) == 12
    assert len({name_of(path) for path in RECIPES}) == len(RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_is_valid_and_says_purpose_command_and_what_was_measured(path: Path, cli) -> None:
    code, out, _ = cli("validate", path)
    assert code == 0, out
    lines = path.read_text().splitlines()
    assert max(map(len, lines)) <= 110
    assert lines[0].startswith("# yaml-language-server: $schema=")
    assert (path.parent / lines[0].split("=")[1]).is_file()
    comments = "\n".join(line for line in lines if line.startswith("#"))
    assert f"lorakit train {path.relative_to(ROOT)}" in comments
    assert "easured" in comments


@pytest.mark.parametrize("name", KNOWN)
def test_a_recipe_is_planned_against_its_model(name: str, cli, tmp_path: Path) -> None:
    config, num_base, num_trained = KNOWN[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = ROOT / "recipes" / f"{name}.yaml"
    code, out, err = cli("count-params", path, "--set", f"model.path={tmp_path}", "--json")
    assert code == 0, err
    params = json.loads(out)
    assert params["trainable"] == num_trained
    full = "full" in name
    assert params["total"] == num_base + (0 if full else num_trained)
    recipe = load_recipe(path)
    plan = make_plan(recipe, num_samples=15_011, decisions={})
    assert plan.total_steps == -(-15_011 // recipe.training.batch_size) * recipe.training.epochs
    assert plan.warmup_steps < plan.total_steps
