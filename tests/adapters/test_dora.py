"""DoRA against the paper's equations, PEFT and its own files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit.adapters import Role, attach
from lorakit.layers import layers_of
from lorakit.recipe.methods import TRAITS, Dora
from lorakit.targets import assign, select
from tests import architectures
from tests.test_merge import save

IDS = torch.arange(3, 15)[None]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def attached(model: Any, targets: Any = "all-linear", **fields: Any) -> Any:
    chosen, problems = select(layers_of(model)[0], targets)
    found, more = assign(chosen, fields.get("rank", 4), "auto", {}, {})
    assert not problems and not more
    return attach(Dora(method="dora", **({"rank": 4} | fields)), model, found, seed=5)


def build(name: str) -> Any:
    return architectures.build(architectures.CONFIGS[name]())


def randomise(adapter: Any, seed: int = 7) -> None:
    """A and B anywhere, m within a third of what it was."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for item in adapter.trained():
            moved = torch.randn(item.parameter.shape, generator=draw)
            if item.role is Role.SCALE:
                item.parameter.mul_(1 + 0.3 * moved.clamp(-1, 1))
            else:
                item.parameter.copy_(0.1 * moved)


TARGETS = {"llama": "all-linear", "gpt2": ["c_attn", "c_fc"], "embedding": ["embed_tokens", "q_proj"]}


def case(name: str) -> tuple[Any, Any]:
    model = build("llama" if name == "embedding" else name)
    return model, attached(model, TARGETS[name])


# ------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize("name", TARGETS)
def test_file_merge_and_count(name: str, cli, tmp_path: Path) -> None:
    """PEFT loads the file; lorakit's merge is what PEFT computes; the file's numbers are the closed form."""
    base = save(architectures.CONFIGS["llama" if name == "embedding" else name](), tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    adapter = attached(model, TARGETS[name])
    randomise(adapter)
    (tmp_path / "adapter").mkdir()
    adapter.write(tmp_path / "adapter", "somewhere")
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    ).eval()
    assert torch.equal(logits(theirs), logits(model))

    code, out, err = cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code == 0, err
    assert f"{len(adapter.targets)} layers" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(merged), logits(model), atol=1e-5)
    for target in adapter.targets:  # O18
        layer, weight = target.layer, merged.get_submodule(target.layer.name).weight.detach().double()
        lengths = (weight if layer.kind == "linear" else weight.T).norm(dim=1)
        m = model.get_submodule(layer.name).lora_magnitude_vector["default"].weight.double()
        assert torch.allclose(lengths, m, rtol=1e-6)

    code, out, _ = cli("count-params", tmp_path / "adapter", "--base", base, "--json")
    assert code == 0
    closed = TRAITS["dora"].num_trained
    assert [entry["trainable"] for entry in json.loads(out)["modules"]] == [
        closed(t.layer.in_features, t.layer.out_features, t.rank) for t in adapter.targets
    ]
    assert sum(item.parameter.numel() for item in adapter.trained()) == json.loads(out)["trainable"]


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.001])
def test_a_merge_that_is_not_the_adapter_is_refused(factor: float, cli, tmp_path: Path, monkeypatch) -> None:
    from lorakit.adapters.lora_files import Factors

    base = save(architectures.CONFIGS["llama"](), tmp_path / "base")
    adapter = attached(AutoModelForCausalLM.from_pretrained(base), ["down_proj"])
    randomise(adapter)
    (tmp_path / "adapter").mkdir()
    adapter.write(tmp_path / "adapter", "somewhere")
    right = Factors.applied
    monkeypatch.setattr(Factors, "applied", lambda self, weight: factor * right(self, weight))
    code, _, err = cli("merge", tmp_path / "adapter", "--base", base, "--output", tmp_path / "merged")
    assert code != 0
    assert "is off by more than rounding" in err
    assert not (tmp_path / "merged").exists()


def test_a_run_is_continued_evaluated_and_told_from_lora(
    write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    section = {"method": "dora", "rank": 4, "targets": "attention", "scaling": "rank_stabilized"}
    recipe = write_recipe(data=data, adapter=section, optimizer={"lr": 1e-2})
    assert cli("train", recipe, "--set", "checkpoint.best=false")[0] == 0
    start = tmp_path / "run" / "adapter"
    again = write_recipe(data=data, adapter={"method": "dora", "start_from": str(start)})
    code, _, err = cli("train", again, "--output", tmp_path / "second")
    assert code == 0, err

    def losses(run: str) -> list[float]:
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [line["eval_loss"] for line in lines if "eval_loss" in line]

    assert losses("second")[0] == pytest.approx(losses("run")[-1], abs=1e-6)
    code, out, err = cli("eval", tmp_path / "run", "--json")
    assert code == 0, err
    assert json.loads(out)["adapter"]["loss"] == pytest.approx(losses("run")[-1], abs=1e-6)

    for method in ("lora", "adalora"):
        wrong = write_recipe(data=data, adapter={"method": method, "start_from": str(start)})
        for verb in ("validate", "train", "count-params"):
            code, out, err = cli(verb, wrong)
            assert (code, f"whose lengths of rows {method} does not have" in out + err) == (2, True), err
    lora = write_recipe(data=data, adapter={"rank": 4}, output=str(tmp_path / "lora"))
    assert cli("train", lora)[0] == 0
    wrong = write_recipe(data=data, adapter={"method": "dora", "start_from": str(tmp_path / "lora/adapter")})
    for verb in ("validate", "train", "count-params"):
        code, out, err = cli(verb, wrong)
        assert (code, "has no lengths of rows" in out + err) == (2, True), err
