"""LoRA-drop: what a layer is worth and which are kept, by hand; what is shared; whole runs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.adapters import Role, attach
from lorakit.adapters.lora_drop import added, keep, shared
from lorakit.data.tokens import Part
from lorakit.errors import LorakitError, RunError
from lorakit.layers import layers_of
from lorakit.micro_batch import MicroBatch
from lorakit.probe import draw_samples
from lorakit.recipe.methods import LoraDrop
from lorakit.shapes import Layer
from lorakit.targets import Target, select
from tests import architectures
from tests.conftest import killed_at, metrics

IDS = torch.arange(3, 15)[None]
FILE = "adapter/adapter_model.safetensors"


# ------------------------------------------------------------------------------------------------------------
# The choice


@pytest.mark.parametrize(
    ("worth", "threshold", "kept"),
    [
        ([1.0, 5.0, 4.0], 0.9, [0, 1, 1]),  # 9 of 10 is enough
        ([1.0, 5.0, 4.0], 0.91, [1, 1, 1]),
        ([1.0, 5.0, 4.0], 0.5, [0, 1, 0]),
        ([1.0, 5.0, 4.0], 1e-9, [0, 1, 0]),
        ([2.0, 2.0, 2.0, 2.0], 0.5, [1, 1, 0, 0]),  # of equals the earlier
        ([0.0, 3.0, 0.0], 1.0, [0, 1, 0]),  # what adds nothing is never needed
        ([1e-30, 1.0, 0.0], 1.0, [1, 1, 0]),  # and what adds little is, however little
        ([0.1] * 10, 0.7, [1] * 7 + [0] * 3),
        ([0.0, 0.0], 0.9, [0, 0]),
        ([3.0], 0.9, [1]),
    ],
)
def test_the_fewest_layers_that_make_up_the_threshold(
    worth: list[float], threshold: float, kept: list[int]
) -> None:
    assert keep(worth, threshold) == [bool(own) for own in kept]


def test_what_a_layer_adds_is_the_square_of_its_output() -> None:
    draw = torch.Generator().manual_seed(1)
    x, a, b = (torch.randn(*shape, generator=draw).double() for shape in ((50, 7), (3, 7), (5, 3)))
    assert float(added(x, a, b, 1.5)) == pytest.approx(float(((1.5 * x @ a.T @ b.T) ** 2).sum()), rel=1e-12)


def test_layers_share_within_their_kind() -> None:
    """Same last name and same sides; the first of a kind that is not kept lends its own."""
    shapes = {"q": (8, 8), "k": (8, 4), "w": (8, 8)}
    layers = [Layer(f"m.{i}.{n}", "linear", *side) for i in range(3) for n, side in shapes.items()]
    layers.append(Layer("other.q", "linear", 8, 6))
    targets = [Target(layer, 2, 4.0) for layer in layers]
    own = [layer.name in ("m.0.q", "m.1.k") for layer in layers]
    assert shared(targets, own) == {
        "m.1.q": "m.1.q",
        "m.2.q": "m.1.q",
        "m.0.k": "m.0.k",
        "m.2.k": "m.0.k",
        "m.0.w": "m.0.w",
        "m.1.w": "m.0.w",
        "m.2.w": "m.0.w",
        "other.q": "other.q",
    }


def test_the_sample_is_drawn_by_the_seed_each_row_once() -> None:
    parts = (Part(0, 40), Part(40, 60, weight=0.5))
    drawn = draw_samples(parts, 0.2, 7)
    assert len(drawn) == len(set(drawn)) == 10  # of the 40 + 10 samples of an epoch
    assert drawn == draw_samples(parts, 0.2, 7)
    assert drawn != draw_samples(parts, 0.2, 8)
    assert sorted(draw_samples((Part(0, 30),), 30, 1)) == list(range(30))
    assert len(draw_samples(parts, 1e-9, 7)) == 1
    assert len(draw_samples((Part(0, 100),), 0.575, 7)) == 58  # as floats the product is below 57.5
    with pytest.raises(ValueError, match="51 samples, but an epoch has 50"):
        draw_samples(parts, 51, 7)


# ------------------------------------------------------------------------------------------------------------
# The adapter


class Planted:
    """A probe that puts given updates into the adapter instead of training, and gives given rows."""

    def __init__(self, model: Any, adapter: Any, plant: Any, micros: list[MicroBatch]) -> None:
        self.model, self.adapter, self.plant, self.micros = model, adapter, plant, micros

    def train(self, share: float) -> None:
        with torch.no_grad():
            for item in self.adapter.trained():
                self.plant(item)

    def micro_batches(self) -> Iterator[MicroBatch]:
        yield from self.micros

    def forward(self, micro: MicroBatch) -> None:
        self.model(input_ids=micro.input_ids, attention_mask=micro.attention_mask, use_cache=False)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        return tensor


def rows(ids: Tensor, mask: Tensor | None) -> MicroBatch:
    nothing = torch.zeros(0, dtype=torch.long)
    return MicroBatch(ids, torch.zeros_like(ids), None, mask, nothing, nothing, ())


def attached(name: str = "llama", threshold: float = 0.9, targets: Any = "all-linear") -> tuple[Any, Any]:
    model = architectures.build(architectures.CONFIGS[name]())
    chosen, _ = select(layers_of(model)[0], targets)
    section = LoraDrop(method="lora-drop", rank=4, threshold=threshold)
    return model, attach(section, model, [Target(layer, 4, 8.0) for layer in chosen], seed=5)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


SIZES = {"q_proj": 3.0, "k_proj": 0.1, "v_proj": 1.0, "o_proj": 0.2, "gate_proj": 2.0, "up_proj": 0.3}


def plant(item: Any) -> None:
    """A like the identity, B with `size` in one entry: layer 1's are half of layer 0's; down_proj's zero."""
    size = SIZES.get(item.name.split(".")[4], 0.0) / (1 + int(item.name.split(".")[2]))
    item.parameter.zero_()
    if item.role is Role.A:
        item.parameter[:, :4] = torch.eye(4)
    else:
        item.parameter[0, 0] = size


@pytest.mark.parametrize("padded", [False, True])
def test_importance_is_what_the_adapters_add_to_the_real_tokens(padded: bool) -> None:
    """|s B A x|^2 = (2 size x_0)^2 by hand, with the x that a plain hook on the bare model sees."""
    ids = torch.arange(3, 23).reshape(2, 10)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, 6:] = 0
    model, adapter = attached()
    seen: dict[str, Tensor] = {}

    class WithHooks(Planted):
        def train(self, share: float) -> None:
            super().train(share)
            modules = {t.layer.name: model.get_submodule(t.layer.name) for t in adapter.targets}
            hooks = [
                module.register_forward_hook(
                    lambda m, x, y, name=name: seen.update({name: x[0].detach().double()})
                )
                for name, module in modules.items()
            ]
            self.forward(self.micros[0])
            for hook in hooks:
                hook.remove()

    adapter.prepare(WithHooks(model, adapter, plant, [rows(ids, mask if padded else None)]))
    worth = []
    for target in adapter.targets:
        name = target.layer.name
        size = SIZES.get(name.split(".")[4], 0.0) / (1 + int(name.split(".")[2]))
        worth.append(float(((2 * size * seen[name][..., 0]) ** 2 * mask).sum()))
    expected = np.array(worth) / sum(worth)
    assert adapter.importance.numpy() == pytest.approx(expected, rel=1e-5)
    assert adapter.kept.tolist() == keep(worth, 0.9)
    assert 0 < int(adapter.kept.sum()) < 14


def decided(name: str = "llama", targets: Any = "all-linear") -> tuple[Any, Any]:
    """A model of which only q_proj of layer 0 (c_attn of block 1) keeps an adapter of its own."""
    model, adapter = attached(name, 0.9, targets)
    chosen = ".0.self_attn.q_proj" if name == "llama" else "h.1.attn.c_attn"

    def only(item: Any) -> None:
        item.parameter.normal_() if chosen in item.name else item.parameter.zero_()

    adapter.prepare(Planted(model, adapter, only, [rows(IDS, None)]))
    return model, adapter


def randomise(adapter: Any) -> None:
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for item in adapter.trained():
            item.parameter.copy_(torch.randn(item.parameter.shape, generator=draw) * 0.1)


def test_counts_are_those_kept_and_one_per_kind() -> None:
    """Llama: I 32, H 32, M 48; k and v give 16. One layer keeps its own, seven kinds share one each."""
    _, adapter = decided()
    sides = [(32, 32), (32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert sum(item.parameter.numel() for item in adapter.trained()) == sum(4 * (i + o) for i, o in sides)
    assert len({id(item.parameter) for item in adapter.trained()}) == len(adapter.trained()) == 16
    notes = adapter.notes()
    assert notes["model.layers.0.self_attn.q_proj"] == {"importance": 1.0}
    assert notes["model.layers.1.mlp.up_proj"]["shared_with"] == "model.layers.0.mlp.up_proj"
    assert "shared_with" not in notes["model.layers.1.self_attn.q_proj"]  # the only one of its kind
    assert sum("shared_with" in note for note in notes.values()) == 6


def test_after_the_probe_all_is_as_it_was_drawn() -> None:
    model, adapter = decided()
    _, fresh = attached()
    start = {item.name: item.parameter for item in fresh.trained()}
    assert all(torch.equal(item.parameter, start[item.name]) for item in adapter.trained())
    assert torch.equal(logits(model), logits(architectures.build(architectures.CONFIGS["llama"]())))


def test_the_gradient_of_a_shared_adapter_is_the_sum_of_its_layers() -> None:
    """Against the same model in which every layer has a copy."""
    model, adapter = decided()
    randomise(adapter)
    twin, apart = attached()
    with torch.no_grad():
        for name, layer in apart.layers.items():
            layer.lora_A["default"].weight.copy_(adapter.layers[name].lora_A["default"].weight)
            layer.lora_B["default"].weight.copy_(adapter.layers[name].lora_B["default"].weight)
    for one in (model, twin):
        one(IDS, use_cache=False).logits.square().mean().backward()
    kind = "mlp.up_proj"
    of = [apart.layers[f"model.layers.{i}.{kind}"].lora_B["default"].weight.grad for i in (0, 1)]
    ours = adapter.layers[f"model.layers.1.{kind}"].lora_B["default"].weight.grad
    assert torch.allclose(ours, of[0] + of[1], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, of[1], rtol=1e-1)


@pytest.mark.parametrize(("name", "targets"), [("llama", "all-linear"), ("gpt2", "all-linear")])
def test_ties_survive_state_disabling_and_peft(name: str, targets: Any, tmp_path: Path) -> None:
    model, adapter = decided(name, targets)
    randomise(adapter)
    wanted = logits(model)
    state = {key: tensor.clone() for key, tensor in adapter.state().items()}
    other_model, other = attached(name, 0.9, targets)
    other.load_state(state)
    assert torch.equal(logits(other_model), wanted)
    assert other.notes() == adapter.notes()
    assert [item.name for item in other.trained()] == [item.name for item in adapter.trained()]
    other.load_state(state)  # once more
    assert torch.equal(logits(other_model), wanted)
    with pytest.raises(LorakitError, match="among other layers"):
        other.load_state(state | {"kept": ~state["kept"]})
    with pytest.raises(LorakitError, match="is missing"):
        attached(name, 0.9, targets)[1].load_state({k: v for k, v in state.items() if k != "kept"})

    with adapter.disabled():
        assert torch.equal(logits(model), logits(architectures.build(architectures.CONFIGS[name]())))
    assert torch.equal(logits(model), wanted)
    adapter.write(tmp_path, "somewhere")
    theirs = PeftModel.from_pretrained(architectures.build(architectures.CONFIGS[name]()), tmp_path).eval()
    assert torch.allclose(logits(theirs), wanted, atol=2e-5)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 2 * len(adapter.targets)


def test_a_probe_that_changes_nothing_is_refused() -> None:
    model, adapter = attached()
    for value, text in ((0.0, "add nothing"), (float("nan"), "nan")):
        with pytest.raises(RunError, match=text):
            adapter.prepare(
                Planted(model, adapter, lambda item, v=value: item.parameter.fill_(v), [rows(IDS, None)])
            )


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture
def recipe(write_recipe: Any, tiny: Path) -> Any:
    def write(**sections: Any) -> Path:
        data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
        values: dict[str, Any] = {
            "data": data,
            "adapter": {"method": "lora-drop", "rank": 4, "probe": 40, "threshold": 0.7},
            "training": {"max_steps": 8, "batch_size": 8},
            "optimizer": {"lr": 1e-2},
            "checkpoint": {"every": 3},
            "eval": {"every": 4},
        }
        return write_recipe(**values | sections)

    return write


def losses(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in metrics(run)]


def test_with_a_threshold_of_one_it_is_lora(recipe: Any, cli: Any, tmp_path: Path) -> None:
    """All are kept, and nothing of the probe is left: the same bits as LoRA."""
    drop = {"method": "lora-drop", "rank": 4, "threshold": 1.0, "dropout": 0.1}
    for name, adapter in {"drop": drop, "lora": {"rank": 4, "dropout": 0.1}}.items():
        code, _, err = cli("train", recipe(adapter=adapter), "--output", tmp_path / name)
        assert code == 0, err
    assert losses(tmp_path / "drop") == losses(tmp_path / "lora")
    one, two = (load_file(tmp_path / name / FILE) for name in ("drop", "lora"))
    for name in one:
        scale = 2.0 if ".lora_B." in name else 1.0  # alpha / rank
        assert torch.equal(one[name], scale * two[name])


def test_the_probe_sees_its_rows_once_at_a_constant_rate(
    recipe: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 samples in 5 steps of 8, whatever the schedule of the run that follows."""
    import lorakit.loop
    import lorakit.probe

    seen: list[list[int]] = []
    rates: list[float] = []
    step_of, set_lr = lorakit.probe.step_of, lorakit.loop.set_lr
    monkeypatch.setattr(lorakit.probe, "step_of", lambda s, *more: seen.append(s) or step_of(s, *more))
    monkeypatch.setattr(lorakit.loop, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    assert cli("train", recipe(schedule={"name": "linear", "warmup": 2}))[0] == 0
    assert [len(samples) for samples in seen] == [8] * 5
    assert len({sample for samples in seen for sample in samples}) == 40
    assert rates[:5] == [1e-2] * 5
    assert len(set(rates[5:])) > 4


def test_the_layout_of_rows_and_the_fast_paths_change_no_decision(
    recipe: Any, cli: Any, tmp_path: Path
) -> None:
    """Neither padding nor what fast paths fill rows up with counts."""
    layouts = {
        "packed": {"training": {"max_steps": 1, "batch_size": 8}},
        "plain": {"training": {"max_steps": 1, "batch_size": 8, "fast": "off"}},
        "padded": {"training": {"max_steps": 1, "batch_size": 8, "micro_batch_tokens": 50}},
    }
    found = {}
    for name, sections in layouts.items():
        adapter = {"method": "lora-drop", "rank": 4, "probe": 37}  # 592 tokens, which are filled up to 640
        path = recipe(adapter=adapter, **sections)
        more = ["--set", "data.packing=false"] if name == "padded" else []
        assert cli("train", path, "--output", tmp_path / name, *more)[0] == 0
        params = json.loads((tmp_path / name / "params.json").read_text())
        found[name] = [module["importance"] for module in params["modules"]]
    assert found["packed"] == pytest.approx(found["plain"], rel=1e-3)
    assert found["padded"] == pytest.approx(found["plain"], rel=1e-3)


@pytest.mark.parametrize("kill_at", [3, 7, 10])
def test_a_resumed_run_ends_with_the_same_bits(kill_at: int, recipe: Any, cli: Any, tmp_path: Path) -> None:
    """Killed in the probe (5 steps), when its result alone is saved, and later on."""
    path = recipe()
    assert cli("train", path, "--output", tmp_path / "straight")[0] == 0

    with killed_at(kill_at):
        cli("train", path, "--output", tmp_path / "killed")
    saved = [folder.name for folder in (tmp_path / "killed").glob("checkpoints/*")]
    assert saved == {3: [], 7: ["step-000000"]}.get(kill_at, saved)
    code, _, err = cli("train", path, "--output", tmp_path / "killed", "--resume", "auto")
    assert code == 0, err
    assert ("samples in 5 steps" in err) == (kill_at == 3)
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "killed"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")
    params = [(tmp_path / name / "params.json").read_text() for name in ("straight", "killed")]
    assert params[0] == params[1]


def test_a_run_tells_who_shares_and_ships_copies(recipe: Any, cli: Any, tiny: Path, tmp_path: Path) -> None:
    code, _, err = cli("train", recipe())
    assert code == 0, err
    run = tmp_path / "run"
    params = json.loads((run / "params.json").read_text())
    modules = {m["name"]: m for m in params["modules"]}
    lent = {name: m["shared_with"] for name, m in modules.items() if "shared_with" in m}
    assert len(modules) == 14
    assert lent
    assert all(modules[name]["trainable"] == 0 for name in lent)
    assert params["trainable"] == sum(m["trainable"] for m in modules.values())
    assert all(m["trainable"] == 4 * (m["in"] + m["out"]) for name, m in modules.items() if name not in lent)
    assert sum(m["importance"] for m in modules.values()) == pytest.approx(1)
    layers = layers_of(AutoModelForCausalLM.from_pretrained(tiny / "model"))[0]
    assert list(modules) == [layer.name for layer in select(layers, "all-linear")[0]]
    text = (run / "params.md").read_text()
    name, first = next(iter(lent.items()))
    assert f"| that of {first} |" in next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    tensors = load_file(run / FILE)
    for side in ("A", "B"):
        key = "base_model.model.{}.lora_" + side + ".weight"
        assert torch.equal(tensors[key.format(name)], tensors[key.format(first)])
    code, _, err = cli("merge", run, "--output", tmp_path / "merged")
    assert code == 0, err


def test_too_many_samples_and_streams_are_refused(recipe: Any, cli: Any, tiny: Path, tmp_path: Path) -> None:
    adapter = {"method": "lora-drop", "probe": 5000}
    code, _, err = cli("train", recipe(adapter=adapter))
    assert code == 2
    assert "adapter.probe" in err
    assert "5000 samples, but an epoch has" in err and "a share of them" in err
    assert "loaded in" not in err  # the model
    data = {"train": str(tiny / "train.jsonl"), "streaming": True, "max_length": 128}
    code, out, _ = cli("validate", recipe(data=data))
    assert code == 2
    assert "needs rows to draw a sample from" in out


def test_counts_before_a_run_are_upper_bounds(recipe: Any, cli: Any) -> None:
    code, out, err = cli("count-params", recipe())
    assert code == 0, err
    assert "at most" in out


@pytest.mark.slow
def test_two_processes_decide_as_one_does(recipe: Any, cli: Any, tmp_path: Path) -> None:
    from tests.test_ranks import torchrun

    training = {"max_steps": 8, "batch_size": 8, "gradient_checkpointing": True}
    path = recipe(training=training)
    assert cli("train", path, "--output", tmp_path / "one")[0] == 0
    done = torchrun(path, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "params.json").read_text()) for name in ("one", "two"))
    assert [m.get("shared_with") for m in one["modules"]] == [m.get("shared_with") for m in two["modules"]]
    assert [m["importance"] for m in one["modules"]] == pytest.approx(
        [m["importance"] for m in two["modules"]], abs=1e-5
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
