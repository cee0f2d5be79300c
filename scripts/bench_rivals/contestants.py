"""The contestants by name, each run in a process of its own: same rows, order, rank, targets and masks."""

import importlib.metadata
import os
from collections.abc import Callable

from bench_rivals import loops, ours, trainers
from bench_rivals.job import Job, Result

LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "trl",
    "llamafactory",
    "unsloth",
    "liger_kernel",
)

CONTESTANTS: dict[str, Callable[[Job], Result]] = {
    "lorakit": ours.inside,
    "lorakit-off": lambda job: ours.inside(job, "training.fast=off"),
    "plain": loops.plain,
    "plain-flash": loops.plain_flash,
    "trl": trainers.trl,
    "llama-factory": trainers.llama_factory,
    "unsloth": loops.unsloth,
    "liger": loops.liger,
}


def run(name: str, job: Job) -> Result:
    """What a contestant saw, with the versions that it ran and, on CUDA, the most memory it allocated."""
    found = CONTESTANTS[name](job)
    if job.device == "cuda":
        import torch

        found["bytes"] = torch.cuda.max_memory_allocated()
    return found | {"versions": versions(), "threads": os.environ.get("OMP_NUM_THREADS")}


def versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
