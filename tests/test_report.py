"""The commands that a run tells its user to type."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import report
from lorakit.saved import find, open_saved


def commands(text: str) -> list[list[str]]:
    """The words of every `lorakit ...` in `text`, as a shell would read them."""
    return [
        shlex.split(found) for found in re.findall(r"(?:^|\s)(lorakit (?:train|generate|merge) .*)", text)
    ]


def test_paths_with_a_blank_are_quoted_wherever_a_command_is_shown(
    write_recipe, cli, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(training={"max_steps": 1, "batch_size": 1})
    code, out, err = cli("train", recipe, "--output", "my run")
    assert code == 0, err
    assert commands(out) == [
        ["lorakit", "generate", "my run", "-p", "a prompt"],
        ["lorakit", "merge", "my run", "--output", "my run/merged"],
    ]
    run = tmp_path / "my run"
    assert commands(cli("train", recipe, "--output", "my run")[2]) == [
        ["lorakit", "train", str(run / "resolved.yaml"), "--resume", "auto"],
        ["lorakit", "train", "RECIPE", "--output", f"{run}-2"],
    ]
    moved = run.rename(tmp_path / "your run")
    assert commands(cli("train", "your run/resolved.yaml", "--resume", "auto")[2]) == [
        ["lorakit", "train", "your run/resolved.yaml", "--resume", "auto", "--output", str(moved)]
    ]


def test_the_account_of_the_rows_cannot_leave_its_block() -> None:
    text = report.account_markdown(["rows  training", "first bad: ```# x\x1b[1m.jsonl:3"])
    lines = text.splitlines()
    assert lines[:3] == ["# Data", "", "````"]
    assert lines[3:] == ["rows  training", "first bad: ```# x\\x1b[1m.jsonl:3", "````"]


@pytest.mark.parametrize(
    ("method", "before", "best", "told"),
    [
        ("lora", 2.0, 1.0, ["1.0000 at step 3, the lowest"]),
        ("adalora", 2.0, 1.0, ["1.0000 at step 3, the lowest since the ranks were settled"]),
        ("lora", 2.0, 3.0, ["3.0000 at step 3, the lowest", "worse than before training"]),
        ("lora", None, 3.0, ["3.0000 at step 3, the lowest"]),
    ],
)
def test_the_summary_calls_a_bad_end_one(
    method: str, before: float | None, best: float, told: list[str], tmp_path: Path
) -> None:
    record = {
        "status": "finished",
        "step": 4,
        "steps": 4,
        "seconds": 1.0,
        "recipe": {"adapter.method": method},
    }
    losses = {"base_eval_loss": before, "best_loss": best, "best_step": 3}
    (tmp_path / "run.json").write_text(json.dumps(record | losses))
    lines = report.summary(tmp_path).splitlines()
    assert any(line.endswith(told[0]) for line in lines)
    assert any("worse than" in line for line in lines) == (len(told) == 2)


@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_the_python_of_the_model_card_loads_what_was_trained(
    quantize: str, write_recipe, cli, tiny: Path, tmp_path: Path
) -> None:
    """Its lines, run as they stand but for the two places: the adapter on the base as it was held."""
    held = {"quantize": quantize} | ({"compute_dtype": "fp32"} if quantize == "nf4" else {})
    recipe = write_recipe(
        model={"path": str(tiny / "model"), **held},
        training={"max_steps": 2, "batch_size": 2, "precision": "fp32"},
    )
    code, _, err = cli("train", recipe)
    assert code == 0, err
    adapter = tmp_path / "run" / "adapter"
    card = (adapter / "README.md").read_text().replace("path/to/this/folder", str(adapter))
    lines = (
        card.replace("path/to/the/base/model", str(tiny / "model")).split("```python\n")[1].split("```")[0]
    )
    names: dict[str, Any] = {}
    exec(lines, names)
    ours = open_saved(find(adapter), None, torch.device("cpu")).base.model
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():  # in eval mode bitsandbytes multiplies by a faster, coarser way on some CPUs
        found, wanted = (model.train()(ids).logits.float() for model in (names["model"], ours))
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
