"""Starts in whole runs: what the registry refuses is refused, a kill leaves nothing behind, and what is
written is what was trained, read by PEFT."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from lorakit.adapters import Adapter, attach, inits
from lorakit.layers import layers_of
from lorakit.recipe.inits import INITS
from lorakit.recipe.methods import Lora
from lorakit.targets import assign, select
from tests import architectures
from tests.conftest import Killed, killed_at, metrics

FILE = "adapter/adapter_model.safetensors"
UP = "mlp.experts.gate_up_proj"

# ------------------------------------------------------------------------------------------------------------
# What is refused

# Kind of INITS' refusals -> what a recipe with it has beside `init`. An embedding with a layer beside it:
# alone it has no start to choose.
SITUATIONS: dict[str, dict[str, Any]] = {
    "quantized": {"model": {"quantize": "nf4"}},
    "unquantized": {"model": {"quantize": "none"}},
    "dropout": {"adapter": {"dropout": 0.1}},
    "embedding": {"adapter": {"targets": ["embed_tokens", "q_proj"]}},
    "experts": {"adapter": {"target_parameters": [UP]}},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which only config.json is there."""
    folder = tmp_path_factory.mktemp("mixture")
    architectures.CONFIGS["mixtral"]().save_pretrained(folder)
    return folder


@pytest.fixture
def written(write_recipe: Any, tiny: Path, mixture: Path) -> Any:
    """(init, situation) -> path of a recipe; a base in few bits where the start needs one."""

    def write(name: str, kind: str = "", **more: Any) -> Path:
        there = SITUATIONS.get(kind, {})
        held = "nf4" if "unquantized" in INITS[name].refuses else "none"
        model = {"path": str(mixture if kind == "experts" else tiny / "model"), "quantize": held}
        sections: dict[str, Any] = {
            "model": model | there.get("model", {}),
            "adapter": {"rank": 4, "init": name} | there.get("adapter", {}),
        }
        for section, values in more.items():
            sections[section] = sections.get(section, {}) | values
        path: Path = write_recipe(**sections)
        return path

    return write


def test_every_refusal_is_tried() -> None:
    """And what must be one is one: an embedding and an expert start otherwise; what is taken away from W has
    no dropout; LoftQ alone needs few bits."""
    layers, taken = {"embedding", "experts"}, {"quantized", "dropout"}
    assert {name: set(init.refuses) for name, init in INITS.items()} == {
        "default": set(),
        "gaussian": set(),
        "orthogonal": layers,
        "pissa": layers | taken,
        "olora": layers | taken,
        "eva": layers,
        "loftq": layers | {"unquantized"},
    }
    assert layers | taken | {"unquantized"} == set(SITUATIONS)


@pytest.mark.parametrize("kind", SITUATIONS)
@pytest.mark.parametrize("name", INITS)
def test_what_the_registry_refuses_is_refused_and_nothing_else(
    name: str, kind: str, written: Any, cli: Any, tmp_path: Path
) -> None:
    recipe = written(name, kind)
    why = INITS[name].refuses.get(kind)
    code, out, err = cli("validate", recipe)
    if why is None:
        assert code == 0, out + err
        return
    field = {"dropout": "adapter.dropout"}.get(kind, "adapter.init")
    assert code == 2
    assert re.search(rf"recipe\.yaml:\d+:\d+  {re.escape(field)}: ", out), out
    assert why.format("nf4") in out
    assert f"init: {name}" in out
    code, out, err = cli("train", recipe)
    assert code == 2
    assert why.format("nf4") in out + err
    assert not (tmp_path / "run" / "checkpoints").exists()


VALUES = {"init_svd": "fast", "probe": 5, "rank_spread": 1.5}
OWNERS = {"init_svd": ("pissa", "loftq"), "probe": ("eva",), "rank_spread": ("eva",)}
FOREIGN = [(name, field) for name in INITS for field, owners in OWNERS.items() if name not in owners]


def test_every_field_of_a_start_is_below() -> None:
    assert {field for init in INITS.values() for field in init.fields} == set(OWNERS) == set(VALUES)


@pytest.mark.parametrize(("name", "field"), FOREIGN)
def test_a_field_of_another_start_is_told_once(name: str, field: str, written: Any, cli: Any) -> None:
    code, out, _ = cli("validate", written(name, adapter={field: VALUES[field]}))
    assert code == 2
    whose = " and ".join(OWNERS[field])
    assert f"adapter.{field}: has no effect with init: {name} (it is of {whose}); delete it" in out
    assert out.count("has no effect with init") == 1


@pytest.mark.parametrize("name", INITS)
def test_what_a_plain_lora_cannot_hold(name: str, written: Any, cli: Any) -> None:
    """Rows of the embedding beside a start that is shipped as plain LoRA."""
    code, out, err = cli("validate", written(name, adapter={"train_tokens": [3]}))
    if INITS[name].exported:
        assert code == 2
        assert f"adapter.train_tokens: init: {name} writes a plain LoRA, which holds no rows" in out
    else:
        assert code == 0, out + err


@pytest.mark.parametrize("name", INITS)
def test_a_start_beside_weights_that_are_there(name: str, written: Any, cli: Any, tmp_path: Path) -> None:
    there = {"init": name, "start_from": str(tmp_path)}
    code, out, _ = cli("validate", written(name, adapter=there))
    assert code == 2
    assert "adapter.init: has no effect with start_from: the weights come from there; delete it" in out


# ------------------------------------------------------------------------------------------------------------
# Kills

RUNS: dict[str, dict[str, Any]] = {
    "pissa": {"init": "pissa"},
    "fast pissa": {"init": "pissa", "init_svd": "fast"},
    "olora": {"init": "olora"},
    "loftq": {"init": "loftq"},
}


def stop_in_prepare(patch: pytest.MonkeyPatch, layers: int) -> None:
    """A kill when `layers` layers have their start."""
    real, calls = inits.from_weight, []

    def stop(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > layers:
            raise Killed
        return real(*given)

    patch.setattr(inits, "from_weight", stop)


@pytest.mark.parametrize(
    "name",
    [name if name in ("pissa", "loftq") else pytest.param(name, marks=pytest.mark.slow) for name in RUNS],
)
def test_killed_and_resumed_is_uninterrupted(name: str, written: Any, cli: Any, tmp_path: Path) -> None:
    """In the middle of prepare, where it starts over; before step 1 and after it, where nothing is computed
    from the weights again. Every byte of adapter and checkpoint, and every loss."""
    recipe = written(RUNS[name]["init"], adapter=RUNS[name], checkpoint={"every": 1, "keep": 9})
    run = {kind: tmp_path / kind for kind in ("straight", "prepare", "start", "middle")}
    code, _, err = cli("train", recipe, "--output", run["straight"])
    assert code == 0, err
    with pytest.MonkeyPatch.context() as patch:
        stop_in_prepare(patch, 3)
        with pytest.raises(Killed):
            cli("train", recipe, "--output", run["prepare"])
    assert not list(run["prepare"].glob("checkpoints/*"))
    assert cli("train", recipe, "--output", run["prepare"], "--resume", "auto")[0] == 0
    for kind, step in (("start", 1), ("middle", 3)):
        with killed_at(step):
            cli("train", recipe, "--output", run[kind])
        with pytest.MonkeyPatch.context() as patch:
            stop_in_prepare(patch, 0)
            code, _, err = cli("train", recipe, "--output", run[kind], "--resume", "auto")
        assert code == 0, err
    files = [FILE] + [
        f"checkpoints/step-{step:06d}/{part}.safetensors"
        for step in range(5)
        for part in ("adapter_model", "optimizer")
    ]
    for kind in ("prepare", "start", "middle"):
        for file in files:
            assert (run[kind] / file).read_bytes() == (run["straight"] / file).read_bytes(), (kind, file)
        losses = [[line["loss"] for line in metrics(run[each])] for each in (kind, "straight")]
        assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------------------
# What is written

IDS = torch.arange(3, 60)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def started(name: str, **fields: Any) -> tuple[Any, Adapter]:
    """A model with a start on all its linear layers, some of another rank and alpha, which is moved away."""
    model = architectures.build(architectures.CONFIGS[name]()).requires_grad_(False)
    patterns = {"rank_pattern": {r".*\.1\..*": 3}, "alpha_pattern": {r".*\.1\.mlp.*": 5.0}}
    section = Lora(**({"rank": 4, "alpha": 8.0} | patterns | fields))  # type: ignore[arg-type]
    chosen = select(layers_of(model)[0], "all-linear")[0]
    patterns = section.rank_pattern, section.alpha_pattern  # type: ignore[assignment]
    targets, problems = assign(chosen, section.rank, 8.0, *patterns)
    assert not problems
    adapter = attach(section, model, targets, seed=0)
    adapter.prepare(None)  # type: ignore[arg-type]
    return model, adapter


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_reads_what_was_trained(name: str, init: str, scaling: str, tmp_path: Path) -> None:
    """On a base that nobody touched: plain LoRA of twice the largest rank and a scale of one. Before anything
    is trained it adds nothing."""
    base = logits(architectures.build(architectures.CONFIGS[name]()))
    model, adapter = started(name, init=init, scaling=scaling)
    largest = float(base.abs().max())
    assert float((logits(model) - base).abs().max()) < 2e-5 * largest
    draw = torch.Generator().manual_seed(1)
    for item in adapter.trained():
        item.parameter.data += 0.05 * torch.randn(item.parameter.shape, generator=draw)
    wanted = logits(model)
    assert float((wanted - base).abs().max()) > 0.01 * largest
    adapter.write(tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 8, True)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    theirs = PeftModel.from_pretrained(architectures.build(architectures.CONFIGS[name]()), str(tmp_path))
    assert float((logits(theirs) - wanted).abs().max()) < 2e-5 * largest


def test_peft_s_own_fast_pissa_comes_back_as_another_model(tmp_path: Path) -> None:
    """Why lorakit ships the start with what was trained: PEFT decomposes the base again when it loads, with
    other random numbers. If this fails, PEFT does not any more: README and inits.py should not say so."""

    def base() -> Any:
        return architectures.build(architectures.CONFIGS["llama"]())

    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights="pissa_niter_2")
    trained = get_peft_model(base(), config)
    wanted = logits(trained)
    trained.save_pretrained(str(tmp_path))
    unlike = base()
    torch.manual_seed(7)
    found = logits(PeftModel.from_pretrained(unlike, str(tmp_path)))
    assert float((found - wanted).abs().max()) > 0.01 * float(wanted.abs().max())


def test_a_run_ships_twice_the_rank_and_another_begins_with_it(
    written: Any, write_recipe: Any, cli: Any, tmp_path: Path
) -> None:
    """What PiSSA wrote is an adapter as any other: merged, and gone on with."""
    recipe = written("pissa")
    code, _, err = cli("train", recipe)
    assert code == 0, err
    run = tmp_path / "run"
    tensors = load_file(run / FILE)
    assert {min(tensor.shape) for tensor in tensors.values()} == {8}
    params = json.loads((run / "params.json").read_text())
    assert sum(tensor.numel() for tensor in tensors.values()) == 2 * params["trainable"]
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err
    on = write_recipe(adapter={"start_from": str(run / "adapter")})
    code, _, err = cli("train", on, "--output", tmp_path / "on")
    assert code == 0, err
    assert {min(tensor.shape) for tensor in load_file(tmp_path / "on" / FILE).values()} == {8}
