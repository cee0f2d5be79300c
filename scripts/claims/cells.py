"""A cell: one training, or one quantized base, with its result as a small file that is whole or not there.

kind        what runs
task        `Runs.steps` steps on the task, held-out loss after the last one
early       `Runs.early_steps` steps on the task at a constant rate, without a warm-up: the loss of every step
pairs       `Runs.pair_steps` steps on random pairs; how many of them the model then says without a mistake
quantized   no training: loss of every held-out row, the linear layers of the base quantized
"""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims import quantized
from claims.files import read_json, write_json
from claims.made import random_pairs, whole_words, write_rows
from claims.sweep import rate

Sections = dict[str, Any]  # of a recipe


@dataclass(frozen=True)
class Runs:
    """How long the cells are."""

    steps: int = 100
    batch: int = 8
    warmup: int = 10
    early_steps: int = 20
    pairs: int = 512
    words: int = 2  # of a value, 7 bits each
    pair_steps: int = 200
    pair_batch: int = 64


QUICK = Runs(steps=3, batch=2, warmup=1, early_steps=2, pairs=6, words=2, pair_steps=3, pair_batch=6)


@dataclass(frozen=True)
class Cell:
    kind: str
    method: str  # a name of METHODS in claims/registered.py; of a quantized base the format
    number: int = 0  # of the learning rate
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.method}.lr{self.number:+d}.seed{self.seed}".replace(" ", "-")


def recipe_of(cell: Cell, method: Sections, runs: Runs, work: Path) -> Sections:
    """The recipe of a training. `method`: its section adapter, and model where it is not as it is stored."""
    rows = work / "pairs.jsonl" if cell.kind == "pairs" else work / "task.jsonl"
    held_out = rows if cell.kind == "pairs" else work / "task-held-out.jsonl"
    steps = {"task": runs.steps, "early": runs.early_steps, "pairs": runs.pair_steps}[cell.kind]
    early = {"name": "constant", "warmup": 0}
    batch = runs.pair_batch if cell.kind == "pairs" else runs.batch
    return {
        "model": {"path": str(work / "base")} | method.get("model", {}),
        "adapter": method["adapter"],
        "data": {
            "train": str(rows),
            "eval": str(held_out),
            "format": "prompt-completion",
            "max_length": 512,
        },
        "optimizer": {"lr": rate(cell.number)},
        "schedule": early if cell.kind == "early" else {"name": "cosine", "warmup": runs.warmup},
        "training": {"max_steps": steps, "batch_size": batch, "seed": cell.seed, "precision": "fp32"},
        "eval": {"every": steps, "at_start": False},
        "checkpoint": {"every": steps, "best": False},
        "log": {"every": 1},
    }


def done(cell: Cell, wanted: Sections, work: Path) -> Sections | None:
    """The result of a cell that has run as `wanted` says; None where it has not."""
    path = work / "cells" / f"{cell.name}.json"
    if not path.exists():
        return None
    found: Sections = read_json(path)
    return found if all(found[key] == value for key, value in wanted.items()) else None


def wanted_of(cell: Cell, method: Sections, runs: Runs, base: str) -> Sections:
    """What a result must have been made from to count: the recipe without places, and the base."""
    sections = {} if cell.kind == "quantized" else recipe_of(cell, method, runs, Path("."))
    sections.pop("data", None)
    sections.get("model", {}).pop("path", None)
    return {"cell": asdict(cell), "base": base, "recipe": sections} | (
        {"pairs": [runs.pairs, runs.words]} if cell.kind == "pairs" else {}
    )


def run(cell: Cell, method: Sections, runs: Runs, base: str, work: Path) -> Sections:
    """Run a cell and keep its result below `work`/cells. A training that diverges has no held-out loss."""
    began = time.perf_counter()
    result = wanted_of(cell, method, runs, base)
    folder = work / "running" / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if cell.kind == "quantized":
        result |= quantized.losses(work / "base", cell.method, work)
    else:
        result |= trained(cell, recipe_of(cell, method, runs, work) | {"output": str(folder / "run")}, folder)
    if cell.kind == "pairs" and result["held_out"] is not None:
        result["recalled"] = recalled(
            work / "base", folder / "run" / "adapter", read_rows(work / "pairs.jsonl")
        )
    result["seconds"] = round(time.perf_counter() - began, 1)
    (work / "cells").mkdir(exist_ok=True)
    write_json(work / "cells" / f"{cell.name}.json", result)
    shutil.rmtree(folder)
    return result


def trained(cell: Cell, recipe: Sections, folder: Path) -> Sections:
    """Losses of a training, by lorakit."""
    import lorakit
    from lorakit.errors import RunError

    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    diverged = ""
    try:
        lorakit.train(folder / "recipe.yaml")
    except RunError as error:  # a loss or gradient that is no number
        diverged = str(error)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [round(line["loss"], 6) for line in lines if "loss" in line]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return {
        "trained": read_json(folder / "run" / "params.json")["trainable"],
        "held_out": held_out[-1] if held_out and not diverged else None,
        "losses": losses if cell.kind == "early" else [losses[0], losses[-1]] if losses else [],
    } | ({"diverged": diverged} if diverged else {})


def read_rows(path: Path) -> list[Mapping[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def recalled(base: Path, adapter: Path, rows: list[Mapping[str, str]]) -> int:
    """Rows whose whole completion is what the model holds for most likely, token by token, given the prompt
    and the completion before it. That is what greedy decoding would say."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    right = 0
    with torch.no_grad():
        for row in rows:
            start = tokenizer(row["prompt"])["input_ids"]
            answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([[*start, *answer]])
            said = model(input_ids=ids).logits[0, len(start) - 1 : -1].argmax(-1)
            right += said.tolist() == answer
    return right


def make_pairs(runs: Runs, work: Path) -> None:
    """The pairs, of words of the base's tokenizer."""
    from transformers import AutoTokenizer

    words = whole_words(AutoTokenizer.from_pretrained(work / "base").get_vocab())
    write_rows(work / "pairs.jsonl", random_pairs(words, runs.pairs, runs.words))
