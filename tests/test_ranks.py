"""Two processes under torchrun, on a CPU with gloo: the same losses and the same adapter as one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorakit.adapters import adalora
from tests.conftest import metrics

ADAPTER = "adapter/adapter_model.safetensors"
STATE = ("adapter_model", "optimizer")  # of a checkpoint


def torchrun(recipe: Path, output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*command, "-m", "lorakit", "train", str(recipe), "--output", str(output), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def values(run: Path) -> list[float]:
    return [line.get("loss", line.get("eval_loss")) for line in metrics(run)]


def vector(run: Path) -> torch.Tensor:
    tensors = load_file(run / ADAPTER)
    return torch.cat([tensors[name].flatten().double() for name in sorted(tensors)])


@pytest.mark.parametrize("batch_size", [8, 3, 1])
def test_two_processes_equal_one(batch_size: int, write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    """With 3 samples the ranks hold 1 and 2; with 1 sample, one of them has nothing to do in every step."""
    recipe = write_recipe(
        data={"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128},
        adapter={"rank": 8},
        training={"max_steps": 20, "batch_size": batch_size},
        eval={"every": 10},
        checkpoint={"every": 10},
    )
    assert cli("train", recipe, "--output", tmp_path / "one")[0] == 0
    done = torchrun(recipe, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    assert values(tmp_path / "two") == pytest.approx(values(tmp_path / "one"), abs=1e-5)
    one, two = vector(tmp_path / "one"), vector(tmp_path / "two")
    assert (one - two).norm() <= 1e-5 * one.norm()
    keys = ("tokens", "trained_tokens", "lr", "step")
    assert [[line.get(k) for k in keys] for line in metrics(tmp_path / "one")] == [
        [line.get(k) for k in keys] for line in metrics(tmp_path / "two")
    ]
    record = json.loads((tmp_path / "two" / "run.json").read_text())
    assert record["num_ranks"] == 2
    assert record["status"] == "finished"
    assert done.stdout.count("held-out loss") == 2  # rank 0 alone speaks


def recorded_gaps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Filled with, for every cut in this process, the distance between the last triplet that stays and the
    first that goes, relative to the former's score."""
    gaps: list[float] = []

    def largest(scores: Sequence[torch.Tensor], budget: int) -> list[torch.Tensor]:
        ordered = torch.cat(list(scores)).sort(descending=True).values
        gaps.append(float((ordered[budget - 1] - ordered[budget]) / ordered[budget - 1]))
        return adalora_largest(scores, budget)

    adalora_largest = adalora.largest
    monkeypatch.setattr(adalora, "largest", largest)
    return gaps


def test_adalora_takes_the_same_away_in_two_processes(
    write_recipe, cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty counts once, not once per process, and importance sees the gradients of both.

    No choice is a near tie, which rounding alone could turn.
    """
    gaps = recorded_gaps(monkeypatch)
    recipe = write_recipe(
        data={"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128},
        adapter={"method": "adalora", "init_rank": 6, "target_rank": 2, "interval": 2, "warmup": 0.2},
        training={"max_steps": 20, "batch_size": 5, "micro_batch_tokens": 64},
        optimizer={"lr": 1e-2},
        checkpoint={"every": 4, "keep": 9},
    )
    assert cli("train", recipe, "--output", tmp_path / "one")[0] == 0
    assert min(gaps) > 1e-3  # rounding moves a score by less than a hundredth of that
    done = torchrun(recipe, tmp_path / "two")
    assert done.returncode == 0, done.stderr
    *one, ranks = metrics(tmp_path / "one")
    *two, same = metrics(tmp_path / "two")
    assert ranks == same
    assert len(set(ranks["ranks"].values())) > 1
    assert [line.get("budget") for line in one] == [line.get("budget") for line in two]
    for key in ("loss", "eval_loss", "grad_norm"):
        assert [line[key] for line in two if key in line] == pytest.approx(
            [line[key] for line in one if key in line], abs=1e-5
        )
    first, second = vector(tmp_path / "one"), vector(tmp_path / "two")
    assert (first - second).norm() <= 1e-5 * first.norm()
    resumed_in_the_middle(recipe, tmp_path)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines]


def resumed_in_the_middle(recipe: Path, folder: Path) -> None:
    """The same run in two processes, stopped after step 8 while the budget falls (of 20 steps 4 are warm-up,
    14 bring the ranks to rest): from there on bit for bit the run that was not stopped."""
    straight, resumed = folder / "two", folder / "resumed"
    shutil.copytree(straight, resumed)
    record = json.loads((resumed / "run.json").read_text())
    (resumed / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    shutil.rmtree(resumed / "adapter")
    done = torchrun(recipe, resumed, "--resume", "step-000008")
    assert done.returncode == 0, done.stderr
    for file in (ADAPTER, *(f"checkpoints/step-000020/{name}.safetensors" for name in STATE)):
        assert (resumed / file).read_bytes() == (straight / file).read_bytes(), file
    *before, told = metrics(straight)
    *after, same = metrics(resumed)
    assert told == same
    assert without_times(before) == without_times(after)
    budgets = {line["step"]: line["budget"] for line in before if "budget" in line}
    assert budgets[4] > budgets[8] > budgets[20]


def test_errors_are_told_once_and_a_changed_number_of_processes_is_refused(
    write_recipe, cli, tmp_path: Path
) -> None:
    recipe = write_recipe(training={"max_steps": 6, "batch_size": 4})
    assert cli("train", recipe, "--output", tmp_path / "run")[0] == 0
    done = torchrun(recipe, tmp_path / "run")
    assert done.returncode != 0
    assert done.stderr.count("already holds a run") == 1
    assert "gloo" not in done.stderr  # the other rank has no message of its own
    path = tmp_path / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "interrupted"}))
    done = torchrun(recipe, tmp_path / "run", "--resume", "auto")
    assert done.returncode != 0
    assert "processes: 1 then, 2 now" in done.stderr
