"""VeRA: counts as published, forward and gradients by hand in fp64, the export, dtypes, whole runs.

The oracles are the paper's equation, PEFT's own VeRA on an fp32 model, and published counts.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lorakit.adapters import Role
from lorakit.adapters.vera import VeraAdapter, projections
from lorakit.errors import LorakitError
from lorakit.layers import layers_of
from lorakit.recipe.methods import Vera
from lorakit.recipe.traits import TRAITS
from lorakit.targets import Target, select
from tests import architectures
from tests.conftest import as_a_kill_left_it, metrics

IDS = torch.arange(3, 15)[None]
SEED = 5


def section(**fields: Any) -> Vera:
    return Vera(method="vera", **{"rank": 24} | fields)


def built(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return architectures.build(architectures.CONFIGS[name]()).to(dtype)


def attached(model: Any, vera: Vera, names: Any = "all-linear", seed: int = SEED) -> VeraAdapter:
    chosen, problems = select(layers_of(model)[0], names)
    assert not problems
    return VeraAdapter(vera, model, [Target(layer, vera.rank, 1.0) for layer in chosen], seed)


def randomise(adapter: VeraAdapter, spread: float = 0.3) -> None:
    draw = torch.Generator().manual_seed(7)
    for item in adapter.trained():
        item.parameter.data.copy_(torch.randn(item.parameter.shape, generator=draw) * spread)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def weight_of(layer: Any) -> torch.Tensor:
    base = layer.base_layer
    return base.weight.T if isinstance(base, Conv1D) else base.weight


@pytest.mark.parametrize(
    ("layers", "rank", "expected"),
    [
        pytest.param([(768, 768)] * 24, 1024, 43_008, id="RoBERTa-base"),
        pytest.param([(1024, 1024)] * 48, 256, 61_440, id="RoBERTa-large"),
        pytest.param([(1024, 1024)] * 48, 1024, 98_304, id="GPT-2-medium"),
        pytest.param([(1280, 1280)] * 72, 1024, 165_888, id="GPT-2-large"),
        pytest.param([(3072, 3072), (3072, 1024)] * 28, 256, 129_024, id="Llama-3.2-3B"),
    ],
)
def test_published_counts(layers: list[tuple[int, int]], rank: int, expected: int) -> None:
    """Queries and values, as in the paper's tables and PEFT's benchmark."""
    assert sum(TRAITS["vera"].num_trained(inside, outside, rank) for inside, outside in layers) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_step_0_is_the_base_and_only_d_and_b_move(name: str) -> None:
    model = built(name)
    before = logits(model)
    adapter = attached(model, section())
    assert torch.equal(logits(model), before)
    trained = adapter.trained()
    assert {item.role for item in trained} == {Role.SCALE}
    assert all(item.parameter.dtype == torch.float32 for item in trained)
    assert sum(item.parameter.numel() for item in trained) == sum(
        24 + target.layer.out_features for target in adapter.targets
    )
    d = [item.parameter for item in trained if "lambda_d" in item.name]
    assert len(d) == len(adapter.targets) and all((vector == 0.1).all() for vector in d)
    model(IDS).logits.logsumexp(-1).sum().backward()
    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {item.name for item in trained}
    randomise(adapter)
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with adapter.disabled():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("model", "name"), [("llama", "down_proj"), ("llama", "k_proj"), ("gpt2", "c_fc")])
@pytest.mark.parametrize("rank", [3, 80])  # 80: above both sides of every layer
def test_forward_and_gradients_by_hand_in_fp64(model: str, name: str, rank: int) -> None:
    """y = W x + bias + b * (B (d * (A x))) with the first columns of A and rows of B; and by the chain rule
    dL/db = sum_n g * B (d * A x), dL/dd = sum_n (B^T (b * g)) * A x, dL/dx = W^T g + A^T (d * B^T (b g))."""
    adapted = built(model, torch.float64)
    adapter = attached(adapted, section(rank=rank))
    randomise(adapter)
    adapter.a, adapter.b = adapter.a.double(), adapter.b.double()
    found = next(layer for path, layer in adapter.layers.items() if path.endswith(name))
    for layer in adapter.layers.values():
        layer.vera_A["default"], layer.vera_B["default"] = adapter.a, adapter.b
    found.double()
    inside, outside = found.in_features, found.out_features
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(7, inside, generator=draw, dtype=torch.float64, requires_grad=True)
    g = torch.randn(7, outside, generator=draw, dtype=torch.float64)
    y = found(x)
    (y * g).sum().backward()

    widest_in = max(target.layer.in_features for target in adapter.targets)
    widest_out = max(target.layer.out_features for target in adapter.targets)
    a, b_matrix = (matrix.double() for matrix in projections(SEED, rank, widest_in, widest_out))
    a, b_matrix = a[:, :inside], b_matrix[:outside]
    d, b = found.vera_lambda_d["default"], found.vera_lambda_b["default"]
    weight, bias, rows = weight_of(found), found.base_layer.bias, x.detach()
    z = rows @ a.T
    expected = rows @ weight.T + (0 if bias is None else bias) + b * ((d * z) @ b_matrix.T)
    back = (b * g) @ b_matrix
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert torch.allclose(b.grad, (g * ((d * z) @ b_matrix.T)).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(d.grad, (back * z).sum(0), rtol=1e-12, atol=1e-12)
    assert torch.allclose(x.grad, g @ weight + (d * back) @ a, rtol=1e-12, atol=1e-12)


def test_the_projections_are_those_of_peft_and_of_the_seed() -> None:
    model = built()
    names = [layer.name for layer in select(layers_of(model)[0], "all-linear")[0]]
    config = VeraConfig(r=24, projection_prng_key=SEED, target_modules=names, task_type="CAUSAL_LM")
    theirs = get_peft_model(model, config).base_model
    a, b = projections(SEED, 24, 48, 48)
    assert torch.equal(theirs.vera_A["default"], a)
    assert torch.equal(theirs.vera_B["default"], b)
    assert not torch.equal(projections(SEED + 1, 24, 48, 48)[0], a)
    bound = math.sqrt(6 / 24)
    assert b.abs().max() <= bound
    assert b.var().item() == pytest.approx(bound**2 / 3, rel=0.1)


@pytest.mark.parametrize("rank", [24, 80])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_computes_the_same_from_the_export(name: str, rank: int, tmp_path: Path) -> None:
    """O12: the LoRA that is written is the VeRA, also at a rank above every side."""
    model = built(name)
    before = logits(model)
    adapter = attached(model, section(rank=rank))
    randomise(adapter)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(built(name), tmp_path).eval()
    assert (logits(model) - before).abs().max() > 0.05
    assert torch.allclose(logits(theirs), logits(model), rtol=0, atol=2e-5)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (rank, rank, {})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_bf16_base_keeps_projections_and_vectors_in_fp32(name: str) -> None:
    """PEFT rounds A and B to bf16 beside a bf16 base: for all layers at once, for they are shared."""
    adapter = attached(built(name, torch.bfloat16), section())
    widest = [
        max(getattr(t.layer, side) for t in adapter.targets) for side in ("in_features", "out_features")
    ]
    a, b = projections(SEED, 24, *widest)
    for layer in adapter.layers.values():
        assert torch.equal(layer.vera_A["default"], a) and torch.equal(layer.vera_B["default"], b)
        assert layer.vera_A["default"].data_ptr() == adapter.a.data_ptr()  # one for all


def test_what_peft_does_that_is_put_right_here() -> None:
    """When this fails, PEFT no longer does it, and VeraAdapter can be shorter."""
    config = VeraConfig(r=4, projection_prng_key=SEED, target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(built("llama", torch.bfloat16), config).base_model
    a, _ = projections(SEED, 4, 32, 32)
    assert torch.equal(theirs.vera_A["default"], a.bfloat16().float())  # rounded, and then called fp32
    layer = get_peft_model(built(), config).get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 32)).dtype == torch.float32
        assert layer.base_layer(torch.ones(2, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_step_0_is_the_base_under_autocast_and_in_bf16(name: str, dtype: torch.dtype) -> None:
    """PEFT's layer returns its input's dtype, the base layer bf16: what follows computes otherwise."""
    model = built(name, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(model)
        adapter = attached(model, section())
        assert torch.equal(logits(model), before)
        with adapter.disabled():
            assert torch.equal(logits(model), before)
    plain = logits(model)
    with adapter.disabled():
        assert torch.equal(logits(model), plain)
    randomise(adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(logits(model), before)
    for layer in adapter.layers.values():
        x = torch.ones(2, layer.in_features, dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == layer.base_layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == layer.base_layer(x).dtype == dtype


def test_dropout_is_on_the_input_of_the_update_alone() -> None:
    """With x = 1, a layer without dropout gives one value; with it, W x plus the update of a masked x."""
    adapter = attached(built(), section(dropout=0.5), ["model.layers.0.mlp.up_proj"])
    randomise(adapter)
    (layer,) = adapter.layers.values()
    x = torch.ones(400, 32)
    layer.eval()
    still = layer(x)
    layer.train()
    torch.manual_seed(0)
    moved = layer(x)
    with adapter.disabled():
        base = layer(x)
    assert not torch.equal(moved, still)
    spread = (moved - base).std(0) / math.sqrt(400)
    assert ((moved.mean(0) - still.mean(0)).abs() < 5 * spread).all()


def test_state_is_d_b_and_a_sum_that_refuses_other_projections() -> None:
    model = built()
    adapter = attached(model, section())
    randomise(adapter)
    wanted = logits(model)
    state = {name: tensor.clone() for name, tensor in adapter.state().items()}
    assert sum(tensor.numel() for tensor in state.values()) == 32 + sum(
        24 + target.layer.out_features for target in adapter.targets
    )
    fresh = built()
    again = attached(fresh, section())
    again.load_state(state)
    assert torch.equal(logits(fresh), wanted)
    other = attached(built(), section(), seed=SEED + 1)
    for changed in (other, attached(built(), section(), ["q_proj", "v_proj"])):
        with pytest.raises(LorakitError, match="other projections"):
            changed.load_state(state)
    with pytest.raises(LorakitError, match="is missing"):
        again.load_state({name: tensor for name, tensor in state.items() if name != "projections"})


# ------------------------------------------------------------------------------------------------------------
# Whole runs

VERA = {"method": "vera", "rank": 64}
FILE = "adapter/adapter_model.safetensors"


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny: Path) -> Callable[..., Path]:
    held_out = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}

    def write(**sections: Any) -> Path:
        values: dict[str, Any] = {
            "adapter": VERA,
            "data": held_out,
            "optimizer": {"lr": 5e-2},
            "training": {"max_steps": 10, "batch_size": 8},
            "eval": {"every": 5},
            "checkpoint": {"every": 5},
        }
        return write_recipe(**values | sections)

    return write


def test_a_run_learns_counts_ships_and_merges(recipe, cli, tiny: Path, tmp_path: Path) -> None:
    path = recipe()
    code, _, err = cli("train", path)
    assert code == 0, err
    run = tmp_path / "run"
    params = json.loads((run / "params.json").read_text())
    assert params["trainable"] == sum(64 + module["out"] for module in params["modules"])
    code, out, err = cli("count-params", path, "--json")
    assert code == 0, err
    assert json.loads(out)["modules"] == params["modules"]
    losses = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.1
    code, _, err = cli("eval", run)
    assert code == 0, err
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    theirs = logits(PeftModel.from_pretrained(base, run / "adapter").eval())
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), theirs, atol=1e-4
    )


def test_a_run_that_was_stopped_ends_with_the_same_bits(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe())[0] == 0
    run, copy = tmp_path / "run", tmp_path / "copy"
    as_a_kill_left_it(run, copy, step=5, later=10)
    code, _, err = cli("train", recipe(), "--output", copy, "--resume", "auto")
    assert code == 0, err
    assert [line["step"] for line in metrics(copy)] == [line["step"] for line in metrics(run)]
    one, other = (load_file(folder / FILE) for folder in (run, copy))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_bf16_base_and_a_4_bit_one(recipe, cli, tiny: Path, quantize: str, tmp_path: Path) -> None:
    model = {"path": str(tiny / "model"), "quantize": quantize}
    model |= {"dtype": "bf16"} if quantize == "none" else {}
    code, _, err = cli("train", recipe(model=model))
    assert code == 0, err
    assert "switched off" not in err
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0] - 0.05
    code, _, err = cli("merge", tmp_path / "run", "--output", tmp_path / "merged")
    assert code == 0, err


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        ({"targets": ["embed_tokens"]}, "which vera cannot adapt"),
        ({"alpha": 4}, "VeRA has no scale"),
        ({"rank": 0}, "rank"),
    ],
)
def test_what_vera_cannot_do_is_refused(recipe, cli, adapter: dict[str, Any], text: str) -> None:
    code, out, _ = cli("validate", recipe(adapter=VERA | adapter))
    assert code == 2
    assert text in out


def test_a_ratio_for_b_is_refused(recipe, cli) -> None:
    code, out, _ = cli("validate", recipe(optimizer={"lr": 1e-2, "lr_ratio": 4}))
    assert code == 2 and "neither moves" in out
