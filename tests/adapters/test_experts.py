"""LoRA on the experts of a mixture, which are one 3-D parameter: by hand in fp64, PEFT's files, whole runs.

E experts, r rank. PEFT keeps the A of all experts in one (E r, in) matrix, one after the other, and their B
in one (out, r E) matrix, interleaved.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn import functional

from lorakit.adapters import attach
from lorakit.adapters.lora_files import read_adapter
from lorakit.layers import layers_of
from lorakit.recipe.methods import Lora
from lorakit.report import parameters
from lorakit.targets import assign, select, select_experts
from tests import architectures
from tests.conftest import as_a_kill_left_it, metrics

IDS = torch.arange(3, 15)[None]
E, RANK = 4, 3
UP, DOWN = "gate_up_proj", "down_proj"


def built(name: str) -> Any:
    if name == "gpt_oss":  # stores (E, in, out)
        return architectures.build(architectures.with_attention_sinks())
    if name == "qwen3_moe":
        sizes = {"num_experts": E, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
        return architectures.build(hf.Qwen3MoeConfig(**architectures._LLAMA, **sizes))
    return architectures.build(architectures.CONFIGS[name]())


def attached(model: Any, patterns: Any = (UP, DOWN), names: Any = "attention", **fields: Any) -> Any:
    section = Lora(**{"rank": RANK, "alpha": 6.0, "target_parameters": patterns} | fields)
    layers, _ = layers_of(model)
    chosen = [*select(layers, names)[0], *select_experts(layers, section.target_parameters)[0]]
    chosen = [layer for layer in layers if layer in chosen]
    targets, problems = assign(
        chosen, section.rank, section.alpha, section.rank_pattern, section.alpha_pattern
    )
    assert not problems
    return attach(section, model, targets, seed=5)


def randomise(adapter: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    for item in adapter.trained():
        item.parameter.data.copy_(torch.randn(item.parameter.shape, generator=draw) * 0.2)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_a_mixture_by_hand_in_fp64() -> None:
    """y_t = sum_e p_te D_e (silu(g) * u), (g, u) = U_e x_t, with U_e + s B_e A_e and D_e + s B_e A_e; output
    and the gradients of every A, B and of x, against autograd through the formula written out."""
    model = built("mixtral").double()
    model.set_experts_implementation("eager")  # the kernel of grouped_mm has no fp64
    adapter = attached(model)
    randomise(adapter)
    for item in adapter.trained():
        item.parameter.data = item.parameter.data.double()
    outer = model.model.layers[0].mlp.experts
    experts = outer.get_base_layer()
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(9, 32, generator=draw, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(E, generator=draw)[:2] for _ in range(9)])
    share = torch.rand(9, 2, generator=draw, dtype=torch.float64)
    g = torch.randn(9, 32, generator=draw, dtype=torch.float64)

    own = [item for item in adapter.trained() if item.layer.startswith("model.layers.0.mlp")]
    found_x = x.clone().requires_grad_(True)
    found = outer(found_x, chosen, share)
    (found * g).sum().backward()

    # Which is which is told by the sizes: up maps 32 to 96, down 48 to 32.
    hand = [item.parameter.detach().clone().requires_grad_(True) for item in own]
    assert [tuple(t.shape) for t in hand] == [(E * RANK, 32), (96, E * RANK), (E * RANK, 48), (32, E * RANK)]
    up_a, up_b, down_a, down_b = hand
    by_hand_x = x.clone().requires_grad_(True)
    scale, rows = 6.0 / RANK, []
    for t in range(9):
        total = torch.zeros(32, dtype=torch.float64)
        for e, p in zip(chosen[t].tolist(), share[t], strict=True):
            part = slice(e * RANK, (e + 1) * RANK)
            up = experts.gate_up_proj[e] + scale * up_b[:, e::E] @ up_a[part]
            down = experts.down_proj[e] + scale * down_b[:, e::E] @ down_a[part]
            gate, value = (up @ by_hand_x[t]).split(48)
            total = total + p * (down @ (functional.silu(gate) * value))
        rows.append(total)
    expected = torch.stack(rows)
    (expected * g).sum().backward()

    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert torch.allclose(found_x.grad, by_hand_x.grad, rtol=0, atol=1e-12)
    for item, tensor in zip(own, hand, strict=True):
        assert tensor.grad.abs().max() > 1e-3
        assert torch.allclose(item.parameter.grad, tensor.grad, rtol=0, atol=1e-12), item.name
    assert experts.gate_up_proj.grad is None and experts.down_proj.grad is None


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_the_adapter_is_there_however_transformers_runs_experts(name: str, implementation: str) -> None:
    """Step 0 is the base; only A and B have gradients, all of them; disabled() is the base."""
    model = built(name)
    model.set_experts_implementation(implementation)
    hashes = {path: parameter.clone() for path, parameter in model.named_parameters()}
    before = logits(model)
    adapter = attached(model, names=())
    assert torch.equal(logits(model), before)
    model(IDS).logits.logsumexp(-1).sum().backward()
    b = [item for item in adapter.trained() if ".lora_B." in item.name]
    assert len(b) == 4 and all(item.parameter.grad.abs().max() > 0 for item in b)
    randomise(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    model.zero_grad()
    model(IDS).logits.logsumexp(-1).sum().backward()
    moved = {path for path, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {item.name for item in adapter.trained()} and len(moved) == 8
    with adapter.disabled():
        assert torch.equal(logits(model), before)
    base = {path.replace(".base_layer", ""): p for path, p in model.named_parameters()}
    assert all(torch.equal(base[path], tensor) for path, tensor in hashes.items())


def test_the_ways_to_run_experts_agree() -> None:
    model = built("mixtral")
    randomise(attached(model))
    found = []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        found.append(logits(model))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = []
    for recomputed in (False, True):
        model = built("mixtral")
        adapter = attached(model)
        randomise(adapter)
        if recomputed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
        found.append([item.parameter.grad for item in adapter.trained()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*found, strict=True))


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # PEFT: untrue
@pytest.mark.parametrize("patterns", [(UP,), (DOWN,), (UP, DOWN), (r".*\.0\.mlp\.experts\..*", DOWN)])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_peft_and_lorakit_read_the_file(name: str, patterns: Any, tmp_path: Path) -> None:
    """The names in the file depend on how many parameters of a module are adapted."""
    model = built(name)
    adapter = attached(
        model, patterns, rank_pattern={r".*\.1\.mlp.*": 2}, alpha_pattern={r".*\.0\.mlp.*": 5.0}
    )
    randomise(adapter)
    wanted = logits(model)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(built(name), tmp_path)
    assert torch.equal(logits(theirs.eval()), wanted)

    fresh = built(name)
    contents = read_adapter(tmp_path, layers_of(fresh)[0])
    assert contents.targets == list(adapter.targets)
    again = attach(Lora(), fresh, contents.targets, seed=0)
    again.load_state(contents.tensors)
    assert torch.equal(logits(fresh), wanted)

    # what the merge adds, by lorakit's own formula, against PEFT's
    wrapped = [module for module in fresh.modules() if isinstance(module, ParamWrapper)]
    by_peft = {id(module.get_param()): module.get_delta_weight("default") for module in wrapped}
    experts = [item for item in contents.factors if item.target.layer.kind == "experts"]
    assert len(experts) == len(wrapped) == len(by_peft) > 0
    for item in experts:
        module, _, leaf = item.target.layer.name.rpartition(".")
        own = getattr(fresh.get_submodule(module).get_base_layer(), leaf)
        assert torch.allclose(item.update(), by_peft[id(own)], atol=1e-6)
        assert contents.changes[item.target.layer.name](torch.zeros_like(own)).shape == own.shape


def test_a_bf16_base_rounds_small_updates_of_experts() -> None:
    """What LoraAdapter's docstring warns of: PEFT adds the update to the weight in the weight's dtype."""
    off = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = built("mixtral").to(dtype)
        draw = torch.Generator().manual_seed(1)
        for item in attached(model, names=()).trained():
            item.parameter.data = torch.randn(item.parameter.shape, generator=draw) * 0.01
        wrapper = model.model.layers[0].mlp.experts.base_layer
        experts = wrapper.get_base_layer()
        base, update = experts.gate_up_proj.detach().clone(), wrapper.get_delta_weight("default").float()
        with wrapper._activate_lora(["default"]):
            moved = experts.gate_up_proj.float() - base.float()
        assert 1e-3 < update.norm() / base.float().norm() < 3e-3
        off[dtype] = ((moved - update).norm() / update.norm()).item()
    assert off[torch.float32] < 1e-4
    assert 0.4 < off[torch.bfloat16] < 0.8


def test_params_json_counts_every_expert() -> None:
    model = built("mixtral")
    found = parameters(attached(model), 1000)["modules"]
    experts = [entry for entry in found if ".experts." in entry["name"]]
    assert [(m["name"], m["in"], m["out"], m["rank"], m["trainable"]) for m in experts] == [
        (f"model.layers.{block}.mlp.experts.{leaf}", inside, outside, RANK, E * RANK * (inside + outside))
        for block in range(2)
        for leaf, inside, outside in ((UP, 32, 96), (DOWN, 48, 32))
    ]


# ------------------------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(scope="module")
def mixture(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral with the tiny tokenizer, in files as the hub has them: a matrix for each expert."""
    folder = Path(shutil.copytree(tiny / "model", tmp_path_factory.mktemp("mixture") / "model"))
    for path in (*folder.glob("*.safetensors"), folder / "config.json"):
        path.unlink()
    sizes = architectures._LLAMA | {"vocab_size": 368, "bos_token_id": 0, "eos_token_id": 1}
    model = architectures.build(hf.MixtralConfig(**sizes, num_local_experts=E))
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert any(".experts.0.w1.weight" in key for key in file.keys())  # noqa: SIM118
    return folder


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny: Path, mixture: Path) -> Callable[..., Path]:
    held_out = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}

    def write(adapter: dict[str, Any] | None = None, **sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": {"path": str(mixture)},
            "adapter": {"rank": 4, "targets": [], "target_parameters": [UP, DOWN]} | (adapter or {}),
            "data": held_out,
            "optimizer": {"lr": 5e-2},
            "training": {"max_steps": 6, "batch_size": 4},
            "eval": {"every": 3},
            "checkpoint": {"every": 3},
        }
        return write_recipe(**values | sections)

    return write


def losses(run: Path) -> list[float]:
    return [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]


def test_a_run_on_experts_alone(recipe, cli, mixture: Path, tmp_path: Path) -> None:
    """Trained, counted, read by eval, merged into per-expert files and proved, continued to the same bits."""
    path = recipe()
    code, out, err = cli("train", path)
    assert code == 0, err
    assert "not adapted" not in out + err
    run = tmp_path / "run"
    assert losses(run)[-1] < losses(run)[0] - 0.1
    params = json.loads((run / "params.json").read_text())
    assert params["trainable"] == 2 * E * 4 * ((32 + 96) + (48 + 32))
    for place in (path, run / "adapter"):
        code, out, err = cli("count-params", place, "--json")
        assert code == 0, err
        assert json.loads(out)["modules"] == params["modules"]
    assert cli("eval", run)[0] == 0

    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    base = hf.AutoModelForCausalLM.from_pretrained(mixture)
    theirs = logits(PeftModel.from_pretrained(base, run / "adapter").eval())
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(logits(merged), theirs, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture, tmp_path / "merged"))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {key for key in before if ".experts." in key} and len(changed) == 2 * E * 3

    again = tmp_path / "again"
    as_a_kill_left_it(run, again, step=3, later=6)
    code, _, err = cli("train", path, "--output", again, "--resume", "auto")
    assert code == 0, err
    file = "adapter/adapter_model.safetensors"
    assert (run / file).read_bytes() == (again / file).read_bytes()


def test_a_run_continues_from_experts(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe({"targets": ["q_proj"], "target_parameters": [DOWN]}))[0] == 0
    start = {"method": "lora", "start_from": str(tmp_path / "run" / "adapter")}
    path = recipe()
    values = json.loads(path.read_text())
    for adapter, message in (
        (start, ""),
        (start | {"dropout": 0.1}, "adapter.dropout"),
        (start | {"target_parameters": [UP]}, "not the layers of start_from"),
        (start | {"method": "adalora", "init_rank": 8, "target_rank": 4}, "which adalora cannot"),
    ):
        path.write_text(json.dumps(values | {"adapter": adapter}))
        code, _, err = cli("train", path, "--output", tmp_path / ("refused" if message else "next"))
        assert (code, message in err) == (2 if message else 0, True), err
    assert losses(tmp_path / "next")[0] == pytest.approx(losses(tmp_path / "run")[-1], abs=1e-5)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_bf16_base_and_a_4_bit_one(recipe, cli, mixture: Path, quantize: str, tmp_path: Path) -> None:
    """bitsandbytes packs Linear layers; experts stay as they are."""
    model = {"path": str(mixture), "dtype": "bf16"}
    model = model if quantize == "none" else {"path": str(mixture), "quantize": quantize}
    code, _, err = cli("train", recipe({"targets": "attention"}, model=model))
    assert code == 0, err
    assert "switched off" not in err
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0] - 0.1
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"dropout": 0.1}, "adapter.dropout: experts cannot have it"),
        ({"target_parameters": ["up_proj"]}, 'adapter.target_parameters: "up_proj" matches nothing'),
        ({"target_parameters": []}, "adapter.targets: must not be empty"),
        ({"method": "dora"}, "target_parameters: not a field of"),
        ({"rank": 40}, "above the smaller side of model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_what_experts_cannot_have_is_refused(recipe, cli, adapter: dict[str, Any], words: str) -> None:
    code, out, _ = cli("validate", recipe(adapter))
    assert code == 2
    assert words in out


def test_a_model_without_experts(recipe, cli, tiny: Path) -> None:
    code, out, _ = cli("validate", recipe(model={"path": str(tiny / "model")}))
    assert code == 2
    assert "adapter.target_parameters: this model has no 3-D expert weights" in out


def test_targets_never_mean_experts() -> None:
    layers, names = layers_of(built("mixtral"))
    for targets in ("all-linear", "mlp", [r".*experts.*"], [UP]):
        assert not {layer.name for layer in select(layers, targets)[0]} & set(names)
    assert [layer.name for layer in select_experts(layers, [UP, DOWN])[0]] == list(names)
