"""lorakit as a contestant: its recipe, what its run says, and its steps under a profiler."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_rivals.job import Job, Result
from bench_rivals.workload import ALPHA, LEARNING_RATE, RANK, SEED


def recipe_of(job: Job) -> dict[str, Any]:
    """The recipe that says what the job says."""
    setting = job.setting
    model: dict[str, Any] = {"path": job.model}
    if setting.quantize != "none":
        model["quantize"] = setting.quantize
    if setting.dtype == "fp32":
        model["dtype"] = "fp32"
    rows = {
        "train": str(Path(job.rows) / "rows.jsonl"),
        "format": "text" if setting.all_trained else "prompt-completion",
        "max_length": max(setting.longest, 2048),
    }
    training = {
        "max_steps": job.steps,
        "batch_size": setting.batch_size,
        "seed": SEED,
        "precision": setting.dtype,
        "gradient_checkpointing": setting.checkpointing,
    }
    return {
        "model": model,
        "adapter": {"rank": RANK, "alpha": ALPHA},
        "data": rows,
        "optimizer": {"lr": LEARNING_RATE},
        "schedule": {"name": "constant", "warmup": 0},
        "training": training,
        "checkpoint": {"every": job.steps},
        "log": {"every": 1},
        "output": str(Path(job.output) / "run"),
    }


def result_of(job: Job, first_stamp: float) -> Result:
    """What metrics.jsonl says of a run of lorakit whose first step ended at `first_stamp`."""
    lines = [json.loads(line) for line in (Path(job.output) / "run" / "metrics.jsonl").open()]
    lines = [line for line in lines if "loss" in line]
    found: Result = {
        "stamps": [first_stamp + line["seconds"] - lines[0]["seconds"] for line in lines],
        "losses": [line["loss"] for line in lines],
        "grad_norms": [line["grad_norm"] for line in lines],
    }
    for name, field in (("tokens", "tokens"), ("trained", "trained_tokens")):
        sums = [0, *(line[field] for line in lines)]
        found[name] = [after - before for before, after in pairwise(sums)]
    return found


def inside(job: Job, fast: str = "") -> Result:
    """lorakit in this process, which can then ask CUDA for its peak; `result_of` has the rest."""
    from lorakit import load_recipe, train

    train(load_recipe(write_recipe(job), [fast] if fast else []))
    return {}


def profile(job: Job, fast: str = "") -> str:
    """A table by operator of where the time of lorakit's steps goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    from lorakit import load_recipe, loop, train

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if job.device == "cuda" else [])
    run, table = loop.run, []

    def profiled(**values: Any) -> Any:
        with profiler(activities=activities, acc_events=True) as seen:
            outcome = run(**values)
        column = "self_cpu_time_total" if job.device == "cpu" else "self_device_time_total"
        table.append(seen.key_averages().table(sort_by=column, row_limit=30, max_name_column_width=48))
        return outcome

    loop.run = profiled
    train(load_recipe(write_recipe(job), [fast] if fast else []))
    return table[0]


def write_recipe(job: Job) -> Path:
    path = Path(job.output) / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(job)))  # JSON is YAML
    return path
