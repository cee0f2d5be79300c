"""`lorakit inspect` on files: what it tells of a layer is what numpy finds in the model that PEFT merges."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorakit.inspection_view import as_text, heat_map, ratio
from tests import architectures
from tests.conftest import ROOT

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
    config = architectures.with_attention_sinks() if name == "gpt_oss" else architectures.CONFIGS[name]()
    architectures.build(config).save_pretrained(folder)
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
            "gpt_oss",
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
        ),
        (
            "mixtral",
            {
                "target_modules": ["q_proj"],
                "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            },
        ),
    ],
    ids=[
        "patterns",
        "rslora",
        "dora",
        "whole",
        "conv1d",
        "conv1d dora",
        "tied",
        "experts stored (in, out)",
        "experts",
    ],
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


@pytest.mark.parametrize(
    ("name", "config"),
    [
        (
            "llama",
            OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
        ),
        ("llama", VeraConfig(r=6, target_modules=["q_proj", "v_proj"], init_weights=True)),
        ("gpt2", IA3Config(target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True)),
    ],
    ids=["oft", "vera", "ia3 on conv1d"],
)
@pytest.mark.filterwarnings("ignore")
def test_other_tuners_are_what_the_merged_model_says(name: str, config: Any, told, tmp_path: Path) -> None:
    base = save(name, tmp_path / "base")
    by_peft(base, tmp_path / "adapter", config)
    found = told(tmp_path / "adapter", "--base", base)
    kind = config.peft_type.value
    assert found["method"] == kind and {e["trained_as"] for e in found["layers"]} <= {kind, "whole"}
    check(found, *before_and_after(base, tmp_path / "adapter"), tolerance=2e-5)
    for entry in found["layers"]:
        assert entry["directions"] == math.ceil(entry["effective_rank"] - 1e-6)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_an_embedding_are_a_matrix_of_their_own(told, cli, tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 9, 13])
    by_peft(base, tmp_path / "adapter", config)
    found = told(tmp_path / "adapter", "--base", base)
    (rows,) = (entry for entry in found["layers"] if entry["trained_as"] == "rows")
    old, new = before_and_after(base, tmp_path / "adapter")
    name = "model.embed_tokens.weight"
    assert (rows["name"], rows["in"], rows["out"]) == ("model.embed_tokens", 3, 32)
    changed = new[name] - old[name]
    assert rows["norm"] == pytest.approx(np.linalg.norm(changed), rel=1e-6)
    assert rows["weight_norm"] == pytest.approx(np.linalg.norm(old[name][[5, 9, 13]]), rel=1e-6)
    wanted = np.linalg.svd(changed, compute_uv=False)[:3]
    assert rows["singular_values"] == pytest.approx(wanted.tolist(), rel=1e-5)
    shutil.rmtree(base)
    code, _, err = cli("inspect", tmp_path / "adapter")
    assert code == 2 and "rows of an embedding" in err and "--base PATH" in err


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_in_few_bits_the_weight_is_the_matrix_they_mean(
    quantize: str, told, cli, write_recipe, tmp_path: Path, tiny: Path
) -> None:
    recipe = write_recipe(
        model={"path": str(tiny / "model"), "quantize": quantize}, training={"max_steps": 1, "batch_size": 2}
    )
    assert cli("train", recipe)[0] == 0
    found = told(tmp_path / "run")
    assert cli("merge", tmp_path / "run", "--output", tmp_path / "merged", "--dtype", "fp32")[0] == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    stored = load_file(tiny / "model" / "model.safetensors")
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    for entry in found["layers"]:
        a, b = (adapter[f"base_model.model.{entry['name']}.lora_{end}.weight"].double() for end in "AB")
        weight = merged[f"{entry['name']}.weight"].double() - entry["scale"] * b @ a
        assert entry["weight_norm"] == pytest.approx(float(weight.norm()), rel=1e-6)
        assert entry["weight_norm"] != pytest.approx(
            float(stored[f"{entry['name']}.weight"].norm()), rel=1e-6
        )
        assert entry["norm"] == pytest.approx(entry["scale"] * float((b @ a).norm()), rel=1e-6)


def test_full_fine_tuning_is_the_difference_of_two_models(
    told, cli, write_recipe, tiny: Path, tmp_path: Path
) -> None:
    adapter = {"method": "full", "train_only": ["layers.1", "norm"]}
    assert cli("train", write_recipe(adapter=adapter))[0] == 0
    found = told(tmp_path / "run")
    old, new = (
        {name: tensor.double().numpy() for name, tensor in load_file(folder / "model.safetensors").items()}
        for folder in (tiny / "model", tmp_path / "run" / "model")
    )
    moved = {name.removesuffix(".weight") for name in new if not np.array_equal(old[name], new[name])}
    assert {entry["name"] for entry in found["layers"]} == moved
    assert {"model.norm", "model.layers.1.mlp.up_proj"} <= moved
    check(found, old, new, tolerance=1e-4)
    assert found["method"] == "full" and {entry["trained_as"] for entry in found["layers"]} == {"full"}


def test_where_ranks_were_decided_the_map_is_told(told, cli, write_recipe, tmp_path: Path) -> None:
    adapter = {"method": "adalora", "init_rank": 4, "target_rank": 2, "interval": 1}
    recipe = write_recipe(adapter=adapter, training={"max_steps": 10, "batch_size": 2})
    assert cli("train", recipe)[0] == 0
    found = told(tmp_path / "run")
    modules = {m["name"]: m for m in json.loads((tmp_path / "run" / "params.json").read_text())["modules"]}
    assert len({entry["rank"] for entry in found["layers"]}) > 1
    for entry in found["layers"]:
        told_there = modules[entry["name"]]
        assert (entry["rank"], entry["init_rank"]) == (told_there["rank"], 4)
        assert entry["directions"] == entry["rank"], "the export is filled up with zeros, which are none"
        if not entry["rank"]:
            assert entry["norm"] == entry["effective_rank"] == entry["amplification"] == 0
    assert sum(entry["rank"] for entry in found["layers"]) == 2 * len(found["layers"])
    assert f"{found['layers'][0]['rank']} from 4" in cli("inspect", tmp_path / "run")[1]
    for entry in modules.values():
        entry |= {"importance": 0.25, "shared_with": "another"}
    (tmp_path / "run" / "params.json").write_text(json.dumps({"modules": list(modules.values())}))
    shared = told(tmp_path / "run")["layers"][0]
    assert (shared["importance"], shared["shared_with"]) == (0.25, "another")
    assert "from 4, shared" in cli("inspect", tmp_path / "run")[1]


@pytest.mark.parametrize(
    ("adapter", "own"),
    [
        ({"rank": 4, "alpha": 12, "init": "pissa"}, (4, 12, 3)),
        ({"rank": 4, "init": "olora", "scaling": "rank_stabilized"}, (4, 16, 8)),
        ({"rank": 4, "init": "eva", "probe": 4, "alpha_pattern": {".*": 2}}, (None, 2, 0.5)),
        ({"method": "delta-lora", "rank": 4, "start": 1}, (4, 8, 2)),
    ],
    ids=lambda case: str(case.get("init", case.get("method"))) if isinstance(case, dict) else "",
)
def test_a_methods_own_rank_alpha_and_scale_are_told_where_its_run_is_known(
    adapter: Found, own: tuple[int | None, float, float], told, cli, write_recipe, tmp_path: Path
) -> None:
    """The files, by themselves, are a LoRA of another rank and of scale 1."""
    code, _, err = cli(
        "train", write_recipe(adapter=adapter, training={"max_steps": 2, "batch_size": 2}), "--resume", "auto"
    )
    assert code == 0, err
    shutil.copytree(tmp_path / "run" / "adapter", tmp_path / "alone")
    rank, alpha, scale = own
    for here, alone in zip(told(tmp_path / "run")["layers"], told(tmp_path / "alone")["layers"], strict=True):
        assert (here["alpha"], here["scale"]) == (alpha, scale)
        assert rank is None or here["rank"] == rank
        assert alone["scale"] == 1 and alone["alpha"] == alone["rank"] > here["rank"] - 1
        assert here["norm"] == alone["norm"]
    (tmp_path / "run" / "resolved.yaml").unlink()
    assert {entry["scale"] for entry in told(tmp_path / "run")["layers"]} == {1}


def test_a_small_amplification_has_digits_too(told, pairs_run: Path) -> None:
    found = told(pairs_run)
    for value, shown in ((0.0123, "0.012"), (0.0, "0"), (21.5, "22"), (99.6, "100"), (1234.5, "1,234")):
        for entry in found["layers"]:
            entry["amplification"] = value
        head, first = as_text(found).splitlines()[4:6]
        assert "amplified" in head and f" {shown} " in first


# ------------------------------------------------------------------------------------------------------------
# With the base, with its configuration alone, and without


def test_a_run_its_adapter_and_its_checkpoint_are_all_read(told, pairs_run: Path) -> None:
    run, adapter = told(pairs_run), told(pairs_run / "adapter")
    assert run == adapter
    last = sorted((pairs_run / "checkpoints").glob("step-*"))[-1]
    checkpoint = told(last)
    assert checkpoint["method"] == "lora" and checkpoint["base"] == run["base"] is not None
    names = [entry["name"] for entry in run["layers"]]
    assert [entry["name"] for entry in checkpoint["layers"]] == names and len(names) > 7


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_what_the_base_is_needed_for_is_left_out_without_it(told, cli, tmp_path: Path) -> None:
    base = save("llama", tmp_path / "base")
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    by_peft(base, tmp_path / "adapter", config)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    whole = told(tmp_path / "adapter", "--base", base)
    alone = told(tmp_path / "adapter")
    assert alone["base"] is None and "which base it was trained on" in alone["without_base"]
    assert "1 tensors trained beside the adapter are left out" in alone["without_base"]
    assert settings["base_model_name_or_path"] == str(base), "what a file of others says is not followed"
    (base / "model.safetensors").unlink()
    shapes = told(tmp_path / "adapter", "--base", base)
    assert shapes["base"] == str(base) and "no weights" in shapes["without_base"]
    wanted = {e["name"]: e for e in whole["layers"] if e["trained_as"] != "whole"}
    for found in (alone, shapes):
        assert found["weight_norm"] is None and found["relative"] is None
        assert {entry["name"] for entry in found["layers"]} == wanted.keys()
        for entry in found["layers"]:
            full = wanted[entry["name"]]
            assert entry["weight_norm"] is entry["relative"] is entry["amplification"] is None
            for key in ("norm", "in", "out", "rank", "scale", "singular_values", "effective_rank"):
                assert entry[key] == full[key]
        assert math.fsum(entry["share"] for entry in found["layers"]) == pytest.approx(1)
    code, out, _ = cli("inspect", tmp_path / "adapter")
    assert code == 0 and "not read: " in out and "|D|/|W|" not in out


def test_layers_that_no_model_puts_in_order_are_in_order_of_their_numbers(told, tmp_path: Path) -> None:
    source = by_peft(
        save("llama", tmp_path / "base"), tmp_path / "source", LoraConfig(target_modules=["q_proj"])
    )
    names = [f"model.layers.{number}.{leaf}" for number in (0, 2, 10) for leaf in ("mlp.up", "self_attn.q")]
    plant(tmp_path / "one", source, dict.fromkeys(names, (np.ones((2, 8)), np.ones((8, 2)))), 2)
    assert [entry["name"] for entry in told(tmp_path / "one")["layers"]] == names


def test_a_base_in_several_files_is_read_tensor_by_tensor(told, tmp_path: Path) -> None:
    model = architectures.build(architectures.CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    by_peft(tmp_path / "one", tmp_path / "adapter", LoraConfig(r=4, target_modules="all-linear"))
    one, many = (told(tmp_path / "adapter", "--base", tmp_path / name) for name in ("one", "many"))
    assert one["layers"] == many["layers"] and one["relative"]


@pytest.mark.filterwarnings("ignore")
def test_no_model_is_loaded_where_the_files_have_every_weight(told, tmp_path: Path, monkeypatch) -> None:
    """Also of a head that is the embedding, under a name that no file has."""
    base = save("gemma2", tmp_path / "base")
    by_peft(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))
    monkeypatch.setattr("lorakit.base_model.load", None)
    found = told(tmp_path / "adapter", "--base", base)
    (head,) = (entry for entry in found["layers"] if entry["name"] == "lm_head")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert head["weight_norm"] == pytest.approx(float(table.double().norm()))


# ------------------------------------------------------------------------------------------------------------
# Two adapters


def plant(folder: Path, source: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], rank: int) -> Path:
    """An adapter like that in `source`, with only the layers of `pairs`: name -> (A, B)."""
    folder.mkdir()
    config = json.loads((source / "adapter_config.json").read_text())
    config |= {"r": rank, "lora_alpha": rank, "target_modules": list(pairs)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        f"base_model.model.{name}.lora_{end}.weight": torch.from_numpy(np.ascontiguousarray(matrix)).float()
        for name, both in pairs.items()
        for end, matrix in zip("AB", both, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_two_adapters_of_other_rank_and_targets_are_compared_where_both_are(
    told, cli, tmp_path: Path
) -> None:
    base = save("llama", tmp_path / "base")
    source = by_peft(base, tmp_path / "source", LoraConfig(r=4, target_modules=["q_proj"]))
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0]
    names = [f"model.layers.{n}.self_attn.{m}_proj" for n, m in ((0, "q"), (1, "q"), (0, "o"), (1, "o"))]
    # (A, B): rank 4 reads directions 0..3 and writes 0..3; the other reads 2, 3 and writes 10, 11
    ours = (np.diag([4.0, 3.0, 2.0, 1.0]) @ q[:, :4].T, q[:, :4])
    theirs = (np.diag([5.0, 2.0]) @ q[:, 2:4].T, q[:, 10:12])
    one = plant(tmp_path / "one", source, dict.fromkeys([names[0], names[1]], ours), 4)
    other = plant(tmp_path / "other", source, dict.fromkeys([names[0], names[2]], theirs), 2)
    against = told(one, "--against", other, "--base", base)["against"]
    assert against["adapter"] == str(other)
    assert (against["only_here"], against["only_there"]) == ([names[1]], [names[2]])
    (entry,) = against["layers"]
    wanted = {
        "name": names[0],
        "expert": None,
        "ranks": [4, 2],
        "shared_rank": 2,
        "left": 0,
        "right": 1,  # their two are among our four
        "shared_left": 0,
        "shared_right": 0,  # our two largest are 0 and 1
        "first_left": 0,
        "first_right": 0,
        "chance_left": 4 / 32,
        "chance_right": 4 / 32,
        "cosine": 0,
    }
    assert entry.keys() == wanted.keys()
    for key, value in wanted.items():
        assert entry[key] == (value if key == "name" or value is None else pytest.approx(value, abs=1e-6)), (
            key
        )
    (same,) = (e for e in told(one, "--against", one)["against"]["layers"] if e["name"] == names[0])
    for key in ("left", "right", "shared_left", "first_right", "cosine"):
        assert same[key] == pytest.approx(1)
    out = cli("inspect", one, "--against", other)[1]
    explained = out.splitlines()[-1]
    assert all(f"{word}:" in explained for word in ("left, right", "first", "chance", "cosine"))
    assert f"not there {names[1]}" in out and f"not here  {names[2]}" in out

    apart = plant(tmp_path / "apart", source, {names[3]: ours}, 4)
    code, _, err = cli("inspect", one, "--against", apart)
    assert code == 2 and "adapt no layer of the same name and sides" in err
    assert f"begins with {names[0]}, the other with {names[3]}" in err


def test_two_adapters_of_other_models_are_told_so(cli, tiny: Path, pairs_run: Path, tmp_path: Path) -> None:
    def against(other: Path) -> tuple[int, str]:
        code, _, err = cli("inspect", pairs_run, "--against", other)
        return code, err

    twin, narrow = tmp_path / "twin", tmp_path / "narrow"
    for folder in (twin, narrow):
        shutil.copytree(pairs_run / "adapter", folder)
    assert against(twin) == (0, "")

    record = json.loads((twin / "lorakit.json").read_text())
    record["base"]["fingerprint"] = "0" * 64
    (twin / "lorakit.json").write_text(json.dumps(record))
    code, err = against(twin)
    assert code == 0
    assert f"warning: {twin} was trained on another base than {pairs_run / 'adapter'}" in err

    (narrow / "lorakit.json").unlink()  # nothing is known of its base
    tensors = load_file(narrow / "adapter_model.safetensors")
    tensors = {
        name: (tensor[:, :8] if "lora_A" in name else tensor[:8]).clone() for name, tensor in tensors.items()
    }
    save_file(tensors, narrow / "adapter_model.safetensors")
    code, err = against(narrow)
    first = "model.layers.0.self_attn.q_proj"
    width = AutoModelForCausalLM.from_pretrained(tiny / "model").get_submodule(first).weight.shape
    assert code == 2 and f"{first} is {width[0]} x {width[1]} in one and 8 x 8 in the other" in err
    assert "different models" in err and "warning" not in err


@pytest.mark.filterwarnings("ignore")
def test_a_dora_whose_lengths_are_those_of_its_sum_is_the_lora_in_it(told, tmp_path: Path) -> None:
    """m = |W + s B A|: by way of the dense matrix in one, of the factors in the other."""
    base = save("llama", tmp_path / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    lora = by_peft(base, tmp_path / "lora", LoraConfig(**config))
    dora = by_peft(base, tmp_path / "dora", LoraConfig(**config, use_dora=True))
    tensors = load_file(lora / "adapter_model.safetensors")
    _, new = before_and_after(base, lora)
    for key in [key for key in tensors if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").replace(".lora_A", "")
        lengths = np.linalg.norm(new[name], axis=1)
        magnitude = key.replace("lora_A.weight", "lora_magnitude_vector")
        tensors[magnitude] = torch.from_numpy(lengths).float()
    save_file(tensors, dora / "adapter_model.safetensors")
    found = told(dora, "--against", lora, "--base", base)
    assert found["method"] == "dora" and len(found["against"]["layers"]) == 4
    for entry, plain in zip(found["layers"], told(lora, "--base", base)["layers"], strict=True):
        assert entry["singular_values"][:4] == pytest.approx(plain["singular_values"], rel=1e-5)
        assert entry["singular_values"][4] < 1e-5 * entry["singular_values"][0]
    for entry in found["against"]["layers"]:
        assert entry["ranks"] == [4, 4]
        for key in ("left", "right", "first_left", "cosine"):
            assert entry[key] == pytest.approx(1, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------
# What is written


KEYS = {
    *("name", "expert", "kind", "depth", "trained_as", "in", "out", "rank", "alpha", "scale", "norm"),
    *("weight_norm", "relative", "share", "singular_values", "directions", "effective_rank", "stable_rank"),
    "amplification",
}


def test_the_json_keeps_its_shape_and_its_sums(told, pairs_run: Path) -> None:
    found = told(pairs_run)
    assert list(found) == [
        *("adapter", "method", "base", "without_base", "norm", "weight_norm", "relative"),
        *("layers", "kinds", "depths", "against"),
    ]
    assert all(entry.keys() == KEYS for entry in found["layers"])
    assert found["against"] is found["without_base"] is None
    for groups, key in ((found["kinds"], "kind"), (found["depths"], "depth")):
        assert len(groups) > 1
        for group in groups:
            inside = [entry for entry in found["layers"] if entry[key] == group["name"]]
            assert group["number"] == len(inside) > 1
            assert group["norm"] == pytest.approx(math.hypot(*(e["norm"] for e in inside)))
            assert group["relative"] == pytest.approx(
                group["norm"] / math.hypot(*(e["weight_norm"] for e in inside))
            )
            assert group["share"] == pytest.approx(group["norm"] ** 2 / found["norm"] ** 2)
        assert sum(group["number"] for group in groups) == len(found["layers"])


def test_the_table_has_a_line_for_each_layer_and_says_its_numbers(told, cli, pairs_run: Path) -> None:
    found, (_, out, _) = told(pairs_run), cli("inspect", pairs_run)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    for entry in found["layers"]:
        cells = lines[entry["name"]].split()
        assert cells[1:5] == [f"{entry[key]:.4g}" for key in ("rank", "alpha", "scale", "norm")]
    for entry in (*found["kinds"], *found["depths"]):
        assert f"{100 * entry['share']:.1f} %" in lines[entry["name"]]


def test_a_change_of_a_weight_of_zeros_has_no_ratio() -> None:
    assert (ratio(3.0, 2.0), ratio(3.0, 0.0), ratio(0.0, 0.0), ratio(3.0, None)) == (1.5, None, 0.0, None)


@pytest.mark.parametrize("known", [True, False])
def test_the_picture_has_a_cell_for_each_layer(known: bool, told, cli, tmp_path: Path) -> None:
    base = save("mixtral", tmp_path / "base")
    config = {"target_parameters": ["experts.down_proj"]} if known else {}
    by_peft(base, tmp_path / "adapter", LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **config))
    more = ["--base", base] if known else []
    found = told(tmp_path / "adapter", *more, "--svg", tmp_path / "change.svg")
    svg = "{http://www.w3.org/2000/svg}"
    root = ElementTree.fromstring((tmp_path / "change.svg").read_text("utf-8"))
    cells = {}
    for group in root.iter(f"{svg}g"):
        if title := group.findtext(f"{svg}title"):
            assert title.endswith(", rank 4")
            cells[title.partition(":")[0]] = group.findtext(f"{svg}text")
    assert cells.keys() == {entry["name"] for entry in found["layers"]}
    for name, text in cells.items():
        inside = [entry for entry in found["layers"] if entry["name"] == name]
        assert len(inside) == (4 if "experts" in name else 1)
        norm = math.hypot(*(e["norm"] for e in inside))
        size = math.hypot(*(e["weight_norm"] for e in inside)) if known else None
        assert text == f"{100 * (norm / size if size else norm**2 / found['norm'] ** 2):.2g} %"
    assert "|D| / |W|" in root.findtext(f"{svg}title") if known else "share" in root.findtext(f"{svg}title")


def test_the_picture_of_the_readme_is_what_the_code_draws_from_the_numbers_beside_it() -> None:
    found = json.loads((ROOT / "docs" / "quickstart-change.json").read_text())
    assert (ROOT / "docs" / "quickstart-change.svg").read_text("utf-8") == heat_map(found)
    readme = (ROOT / "README.md").read_text()
    assert "](docs/quickstart-change.svg)" in readme
    assert (
        as_text(found).splitlines()[:6]
        == readme[readme.index("adapter   runs/first/adapter: lora") :].splitlines()[:6]
    )


# ------------------------------------------------------------------------------------------------------------
# Bad calls


def test_bad_calls(cli, tmp_path: Path, pairs_run: Path) -> None:
    def refused(*arguments: str | Path) -> str:
        code, out, err = cli("inspect", *arguments)
        assert code == 2 and not out and "Traceback" not in err
        return str(err)

    assert "no such directory" in refused(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "neither a run nor an adapter" in refused(tmp_path / "empty")
    assert "no such directory" in refused(pairs_run, "--against", tmp_path / "nothing")
    assert "no such directory" in refused(pairs_run, "--base", tmp_path / "nothing")
    assert "has no config.json" in refused(pairs_run, "--base", tmp_path / "empty")
    file = pairs_run / "resolved.yaml"
    for bad in ([file], [pairs_run, "--against", file]):
        assert f"{file} is a file" in refused(*bad)
    nowhere = refused(pairs_run, "--base", "nosuch")
    assert "--base PATH" in nowhere and "relative to the current directory" in nowhere
    assert "model.path" not in nowhere and "recipe" not in nowhere
    for name in ("change.png", "change"):
        assert "ends in .svg" in refused(pairs_run, "--svg", tmp_path / name)
    assert "--svg" in refused(pairs_run, "--svg", tmp_path / "empty")
    assert "no such directory" in refused(pairs_run, "--svg", tmp_path / "nowhere" / "x.svg")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(pairs_run, unfinished)
    shutil.rmtree(unfinished / "adapter")
    assert "has no adapter yet" in (err := refused(unfinished)) and "--resume auto" in err

    diverged = tmp_path / "diverged"
    shutil.copytree(pairs_run / "adapter", diverged)
    tensors = load_file(diverged / "adapter_model.safetensors")
    for broken in (float("nan"), float("inf")):
        tensors[min(tensors)][0, 0] = broken
        save_file(tensors, diverged / "adapter_model.safetensors")
        assert "is not finite" in refused(diverged)

    other = save("llama", tmp_path / "other")
    assert "but" in (err := refused(pairs_run, "--base", other)) and "in this model" in err


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_told_without_the_base_says_so(cli, tmp_path: Path) -> None:
    llama, mixture = save("llama", tmp_path / "llama"), save("mixtral", tmp_path / "mixtral")
    by_peft(llama, tmp_path / "dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    by_peft(llama, tmp_path / "oft", OFTConfig(oft_block_size=4, target_modules=["q_proj"]))
    by_peft(
        mixture,
        tmp_path / "experts",
        LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]),
    )
    for name, what in (("dora", "DoRA depends on its base"), ("oft", "which base"), ("experts", "experts")):
        code, _, err = cli("inspect", tmp_path / name)
        assert code == 2 and what in err and "--base PATH" in err, err


def test_a_base_that_is_another_now_is_not_measured_against(told, tiny: Path, tmp_path: Path) -> None:
    from tests.conftest import trained

    shutil.copytree(tiny / "model", tmp_path / "base")
    run = trained(tiny, tmp_path, [f"model.path={tmp_path / 'base'}", "training.max_steps=1"])
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, tmp_path / "base" / "model.safetensors")
    found = told(run)
    assert found["weight_norm"] is None and "not those that" in found["without_base"]
    assert told(run, "--base", tmp_path / "base")["weight_norm"] > 0
    (tmp_path / "base").rename(tmp_path / "moved")
    assert "not where it was" in told(run)["without_base"]
