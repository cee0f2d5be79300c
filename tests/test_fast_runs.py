"""Whole runs with fast paths: the numbers of plain runs, verdicts that are kept, bits that come again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorakit import fast
from lorakit.fast import PATHS
from lorakit.kernels import norm
from tests.conftest import killed_at, metrics
from tests.test_ranks import torchrun, values, vector
from tests.test_train import ADAPTER, same_but_time, sha

ADALORA = {
    "method": "adalora",
    "init_rank": 6,
    "target_rank": 2,
    "warmup": 0.2,
    "final": 0.3,
    "interval": 2,
    "dropout": 0.1,
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], tiny: Path) -> Callable[..., Path]:
    """10 steps of several micro-batches with held-out rows; sections given replace single fields."""

    def write(**sections: Any) -> Path:
        values: dict[str, dict[str, Any]] = {
            "model": {"path": str(tiny / "model")},
            "data": {
                "train": str(tiny / "train.jsonl"),
                "eval": str(tiny / "eval.jsonl"),
                "max_length": 128,
                "limit": 30,
            },
            "adapter": {"rank": 4},
            "optimizer": {"lr": 5e-3},
            "training": {"max_steps": 10, "batch_size": 8, "micro_batch_tokens": 60},
            "eval": {"every": 5},
            "checkpoint": {"every": 2},
        }
        for name, section in sections.items():
            values[name] = section if name == "adapter" else values.get(name, {}) | section
        return write_recipe(**values)

    return write


def decided(run: Path) -> dict[str, Any]:
    """The verdicts in run.json: {path: {"value", "why"}}."""
    decisions = json.loads((run / "run.json").read_text())["decisions"]
    return {name: verdict for name, verdict in decisions.items() if name.startswith("fast.")}


def equal_to_rounding(first: Path, second: Path, losses: float = 1e-5, adapter: float = 1e-3) -> None:
    """Losses of training and of held-out rows differ by at most `losses`, all of the adapter by a share."""
    assert values(first) == pytest.approx(values(second), abs=losses)
    one, two = vector(first), vector(second)
    assert (one - two).norm() <= adapter * two.norm()


# ------------------------------------------------------------------------------------------------------------
# The same numbers


KINDS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"data": {"packing": False}},
    "checkpointing": {"training": {"gradient_checkpointing": True}},
    "adalora": {"adapter": ADALORA | {"dropout": 0.0}},
    "head and norm": {"adapter": {"rank": 4, "train_also": ["lm_head", "model.norm"]}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_and_off_train_alike(kind: str, recipe, cli, tmp_path: Path) -> None:
    path = recipe(**KINDS[kind])
    for choice in ("auto", "off"):
        output = tmp_path / choice
        code, _, err = cli("train", path, "--output", output, "--set", f"training.fast={choice}")
        assert code == 0, err
        assert "warning" not in err
        resolved = yaml.safe_load((output / "resolved.yaml").read_text())
        assert resolved["training"]["fast"] == choice
    found = decided(tmp_path / "auto")
    expected = set(PATHS) - {"fast.attention"}  # the rows are fp32
    assert {name for name, verdict in found.items() if verdict["value"]} == expected
    assert all(verdict["why"].startswith("loss ") for verdict in found.values())
    off = decided(tmp_path / "off")
    assert off == {name: {"value": False, "why": "as the recipe says"} for name in PATHS}
    equal_to_rounding(tmp_path / "auto", tmp_path / "off")
    held_out = [line["eval_loss"] for line in metrics(tmp_path / "off") if "eval_loss" in line]
    assert held_out[-1] < held_out[0] - 0.02  # it learns


def test_the_default_is_auto(recipe, cli, tmp_path: Path) -> None:
    assert cli("train", recipe(training={"max_steps": 1}))[0] == 0
    assert yaml.safe_load((tmp_path / "run" / "resolved.yaml").read_text())["training"]["fast"] == "auto"
    assert all(verdict["value"] for verdict in decided(tmp_path / "run").values())


def test_bf16_runs_train_alike(recipe, cli, tmp_path: Path) -> None:
    """A base in bf16, where the fast run needs no autocast."""
    path = recipe(model={"dtype": "bf16"}, training={"precision": "bf16"})
    for choice in ("auto", "off"):
        code, _, err = cli("train", path, "--output", tmp_path / choice, "--set", f"training.fast={choice}")
        assert code == 0, err
    assert all(verdict["value"] for verdict in decided(tmp_path / "auto").values())
    equal_to_rounding(tmp_path / "auto", tmp_path / "off", losses=0.02, adapter=0.2)
    dtypes = {tensor.dtype for tensor in load_file(tmp_path / "auto" / ADAPTER).values()}
    assert dtypes == {torch.float32}


def test_a_quantized_base_trains_alike(recipe, cli, tmp_path: Path) -> None:
    path = recipe(model={"quantize": "nf4"}, training={"max_steps": 5})
    for choice in ("auto", "off"):
        code, _, err = cli("train", path, "--output", tmp_path / choice, "--set", f"training.fast={choice}")
        assert code == 0, err
    assert all(verdict["value"] for verdict in decided(tmp_path / "auto").values())
    equal_to_rounding(tmp_path / "auto", tmp_path / "off", losses=0.02, adapter=0.2)


@pytest.mark.parametrize("change", ["data.packing=false", "training.gradient_checkpointing=true"])
def test_how_rows_lie_and_what_is_kept_changes_no_fast_run(change: str, recipe, cli, tmp_path: Path) -> None:
    path = recipe()
    assert cli("train", path, "--output", tmp_path / "first")[0] == 0
    assert cli("train", path, "--output", tmp_path / "second", "--set", change)[0] == 0
    for run in ("first", "second"):
        assert all(verdict["value"] for verdict in decided(tmp_path / run).values())
    equal_to_rounding(tmp_path / "first", tmp_path / "second")


def test_evaluations_in_between_change_no_bit(recipe, cli, tmp_path: Path) -> None:
    path = recipe(adapter={"rank": 4, "dropout": 0.1})
    for every in ("1", "100"):
        changes = ("--set", f"eval.every={every}", "--set", "checkpoint.best=false")
        assert cli("train", path, "--output", tmp_path / every, *changes)[0] == 0
    assert sha(tmp_path / "1" / ADAPTER) == sha(tmp_path / "100" / ADAPTER)


def test_two_processes_equal_one(recipe, cli, tmp_path: Path) -> None:
    """Three samples a step: one process has two of them; and both go by the verdict of the first."""
    path = recipe(training={"max_steps": 6, "batch_size": 3})
    assert cli("train", path, "--output", tmp_path / "one")[0] == 0
    done = torchrun(path, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert all(verdict["value"] for verdict in decided(tmp_path / "two").values())
    equal_to_rounding(tmp_path / "two", tmp_path / "one", adapter=1e-4)


# ------------------------------------------------------------------------------------------------------------
# Verdicts are kept


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every run of the guard."""
    runs: list[int] = []
    real = fast.choose

    def choose(*given: Any) -> Any:
        runs.append(1)
        return real(*given)

    monkeypatch.setattr(fast, "choose", choose)
    return runs


RESUMED: dict[str, dict[str, Any]] = {
    "packed": {"adapter": {"rank": 4, "dropout": 0.1}},
    "padded": {"adapter": {"rank": 4, "dropout": 0.1}, "data": {"packing": False}},
    "adalora": {"adapter": ADALORA},
    "bf16": {"model": {"dtype": "bf16"}, "training": {"precision": "bf16"}},
    "off": {"training": {"fast": "off"}},
}


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits_and_no_second_guard(
    kind: str, recipe, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(**RESUMED[kind])
    guarded = counted(monkeypatch)
    once = 0 if kind == "off" else 1
    assert cli("train", path, "--output", tmp_path / "straight")[0] == 0
    assert len(guarded) == once
    with killed_at(6):
        cli("train", path, "--output", tmp_path / "killed")
    assert len(guarded) == 2 * once
    before = decided(tmp_path / "killed")
    code, _, err = cli("train", path, "--output", tmp_path / "killed", "--resume", "auto")
    assert code == 0, err
    assert len(guarded) == 2 * once
    assert decided(tmp_path / "killed") == before == decided(tmp_path / "straight")
    assert all(verdict["value"] is (kind != "off") for verdict in before.values())
    assert sha(tmp_path / "killed" / ADAPTER) == sha(tmp_path / "straight" / ADAPTER)
    same_but_time(tmp_path / "straight", tmp_path / "killed")


def test_a_path_that_was_switched_off_stays_off(
    recipe, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong norm, cured before the run is continued: it goes on as it began, and its bits are those of a
    run that never had it."""
    path = recipe()
    real = norm.rms_norm
    with monkeypatch.context() as patch:
        patch.setattr(norm, "rms_norm", lambda x, *more: 1.5 * real(x, *more))
        patch.setattr(norm, "_form", lambda *given: False)
        code, _, err = cli("train", path, "--output", tmp_path / "straight")
        assert code == 0, err
        assert err.count("warning: norms in one step (fast path) is switched off: loss ") == 1
        with killed_at(6):
            cli("train", path, "--output", tmp_path / "killed")
    assert {n: v["value"] for n, v in decided(tmp_path / "killed").items()} == {
        name: name != "fast.norm" for name in PATHS if name != "fast.attention"
    }
    code, _, err = cli("train", path, "--output", tmp_path / "killed", "--resume", "auto")
    assert code == 0, err
    assert "is switched off" not in err
    assert sha(tmp_path / "killed" / ADAPTER) == sha(tmp_path / "straight" / ADAPTER)
    assert decided(tmp_path / "killed") == decided(tmp_path / "straight")
    assert cli("train", path, "--output", tmp_path / "right", "--set", "training.fast=off")[0] == 0
    equal_to_rounding(tmp_path / "straight", tmp_path / "right")


def test_another_choice_is_another_recipe(recipe, cli, tmp_path: Path) -> None:
    """A run does not change its arithmetic half way."""
    path = recipe()
    with killed_at(6):
        cli("train", path, "--output", tmp_path / "run")
    code, _, err = cli("train", path, "--resume", "auto", "--set", "training.fast=off")
    assert code == 2
    assert "training.fast" in err


def test_anything_else_is_an_error_with_its_line(recipe, cli) -> None:
    code, out, _ = cli("validate", recipe(training={"fast": "maybe"}))
    assert code == 2
    assert "training.fast" in out and "auto" in out and "off" in out
