"""`lorakit inspect` on files: what it tells of a layer is what numpy finds in the model that PEFT merges."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests import architectures

Found = dict[str, Any]


@pytest.fixture
def told(cli) -> Callable[..., Found]:
    """told(place, ...) -> the JSON of `lorakit inspect`."""

    def call(*arguments: str | Path) -> Found:
        code, out, err = cli("inspect", *arguments, "--json")
        assert code == 0, err
        found: Found = json.loads(out)
        return found

    return call


def save(name: str, folder: Path) -> Path:
    architectures.build(architectures.CONFIGS[name]()).save_pretrained(folder)
    return folder


def by_peft(base: Path, folder: Path, config: Any) -> Path:
    """An adapter as PEFT writes it, moved away from its start."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "magnitude" in name else 0.1))
    peft.save_pretrained(folder)
    return folder


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def before_and_after(base: Path, adapter: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """All weights without and with the adapter; PEFT's own merge, in fp64."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    old = {name: value.copy() for name, value in weights(plain).items()}
    return old, weights(PeftModel.from_pretrained(plain, adapter).merge_and_unload())


def of_layer(tensors: dict[str, np.ndarray], entry: Found) -> np.ndarray:
    tensor = tensors.get(f"{entry['name']}.weight", tensors.get(entry["name"]))
    assert tensor is not None
    tensor = tensor if entry["expert"] is None else tensor[entry["expert"]]
    return tensor if tensor.ndim == 2 else tensor[:, None]


def check(
    found: Found, old: dict[str, np.ndarray], new: dict[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """Every number of every layer against the SVD of the dense difference; transposed it has the same."""
    for entry in found["layers"]:
        w = of_layer(old, entry)
        d = of_layer(new, entry) - w
        u, s, vt = np.linalg.svd(d, full_matrices=False)
        k = entry["directions"]
        same = partial_approx(tolerance)
        assert entry["norm"] == same(np.linalg.norm(d)), entry["name"]
        assert entry["weight_norm"] == same(np.linalg.norm(w))
        assert entry["relative"] == same(np.linalg.norm(d) / np.linalg.norm(w))
        size = min(len(s), len(entry["singular_values"]))
        assert size >= k > 0
        assert entry["singular_values"][:size] == pytest.approx(s[:size].tolist(), abs=tolerance * s[0])
        assert s[size:].max(initial=0) < tolerance * s[0]
        share = s**2 / np.sum(s**2)
        assert entry["effective_rank"] == same(math.exp(-sum(p * math.log(p) for p in share if p > 1e-30)))
        assert entry["stable_rank"] == same(np.sum(s**2) / s[0] ** 2)
        inside = np.linalg.norm(u[:, :k].T @ w @ vt[:k].T)
        assert entry["amplification"] == pytest.approx(np.linalg.norm(s[:k]) / inside, rel=20 * tolerance)
    total = math.hypot(*(np.linalg.norm(of_layer(new, e) - of_layer(old, e)) for e in found["layers"]))
    assert found["norm"] == pytest.approx(total, rel=tolerance)
    for entry in found["layers"]:
        assert entry["share"] == pytest.approx(entry["norm"] ** 2 / total**2, rel=10 * tolerance)


def partial_approx(tolerance: float) -> Callable[[float], Any]:
    return lambda wanted: pytest.approx(wanted, rel=tolerance)


# ------------------------------------------------------------------------------------------------------------
# Every kind of layer and of adapter


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "llama",
            {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        ),
        ("llama", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
        ("llama", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
        ("gpt2", {"target_modules": ["c_attn", "wte"], "fan_in_fan_out": True}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        ("gemma2", {"target_modules": ["q_proj"]}),
        (
            "mixtral",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            },
        ),
    ],
    ids=["patterns", "rslora", "dora", "whole", "conv1d", "conv1d dora", "tied", "experts"],
)
@pytest.mark.filterwarnings("ignore")
def test_loras_are_what_the_merged_model_says(name: str, config: Found, told, tmp_path: Path) -> None:
    base = save(name, tmp_path / "base")
    by_peft(base, tmp_path / "adapter", LoraConfig(r=4, lora_alpha=8, **config))
    found = told(tmp_path / "adapter", "--base", base)
    old, new = before_and_after(base, tmp_path / "adapter")
    changed = {key for key in old if not np.array_equal(old[key], new[key])}
    names = {entry["name"] for entry in found["layers"]}
    assert {f"{n}.weight" if f"{n}.weight" in old else n for n in names} >= changed - {"lm_head.weight"}
    check(found, old, new)
    assert found["method"] == ("dora" if config.get("use_dora") else "lora")
    for entry in found["layers"]:
        rank = 2 if "q_proj" in entry["name"] and "rank_pattern" in config else 4
        alpha = 32 if "v_proj" in entry["name"] and "alpha_pattern" in config else 8
        if entry["trained_as"] == "whole":
            assert (entry["rank"], entry["alpha"], entry["scale"]) == (0, None, None)
            continue
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        assert (entry["rank"], entry["alpha"], entry["scale"]) == (rank, alpha, scale)
    if name == "mixtral":
        experts = [
            entry["expert"] for entry in found["layers"] if entry["name"].endswith("experts.down_proj")
        ]
        assert experts == [0, 1, 2, 3] * 2
