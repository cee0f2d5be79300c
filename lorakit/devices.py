"""What this machine has, and the processes of a run on it. Accelerate's plumbing, and nothing else of it."""

import ctypes
import os
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    broadcast_object_list,
    gather_object,
)

from lorakit.errors import LorakitError
from lorakit.plan import Decisions, Hardware

Result = TypeVar("Result")

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def start_ranks(folder: Path, deterministic: bool, trackers: tuple[str, ...]) -> Accelerator:
    """Devices and processes, under torchrun or alone. Accumulation, schedule and data order are ours.

    On a CPU this process keeps the memory that it frees from here on.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    wrapping = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    ranks = Accelerator(
        # Said outright: a variable of the environment must not change precision or compile the model.
        mixed_precision="no",
        dynamo_backend="no",
        cpu=not torch.cuda.is_available(),
        log_with=list(trackers) or None,
        project_dir=folder,
        kwargs_handlers=[wrapping],
    )
    if ranks.device.type == "cpu":
        keep_freed_memory()
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if ranks.distributed_type not in plain:
        raise LorakitError(
            f"started for {ranks.distributed_type}: lorakit runs alone or data-parallel",
            "Start it with torchrun, without an Accelerate configuration.",
        )
    return ranks


def keep_freed_memory() -> None:
    """Let freed tensors of this process stay its own, for the next ones of the same size.

    glibc takes every large block from the system and gives it back: each step then waits for the same pages
    to be mapped and zeroed again, which cost a fifth to a half of a CPU's step. A preloaded tcmalloc or
    another C library has no such settings, and does as it always does.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # no block of its own for what is large
        mallopt(_TRIM_THRESHOLD, -1)  # nothing is given back
        mallopt(_TOP_PAD, 64 * 2**20)  # grow in steps


def pick_device() -> torch.device:
    """Where a verb that is no run computes."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware_of(device: torch.device) -> Hardware:
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Hardware("cuda", torch.cuda.is_bf16_supported(including_emulation=False), memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        "cpu", torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(), memory
    )


def describe(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16)


def peak_bytes() -> int:
    """Most memory held: on the GPU when there is one, else by this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ------------------------------------------------------------------------------------------------------------
# Ranks


def on_rank_0(ranks: Accelerator, act: Callable[[], Result]) -> Result | None:
    """act() on rank 0 alone; when it fails there, all ranks raise, and only rank 0 has something to say.

    Raises: LorakitError as `act` raised it.
    """
    outcome: list[Any] = [None]
    result = None
    if ranks.is_main_process:
        try:
            result = act()
        except LorakitError as error:
            outcome = [error]
        except OSError as error:
            outcome = [LorakitError(f"cannot write: {error}")]
    if ranks.num_processes > 1:
        told = [None if outcome[0] is None else str(outcome[0])]
        broadcast_object_list(told)
        if told[0] is not None and outcome[0] is None:
            outcome = [LorakitError(told[0])]
    if outcome[0] is not None:
        raise outcome[0]
    return result


def unanimous(ranks: Accelerator, verdicts: Decisions) -> Decisions:
    """Yes where every rank says so; else the first no, on every rank."""
    if ranks.num_processes == 1:
        return verdicts
    said: list[Decisions] = gather_object([verdicts])
    return {
        name: next((own[name] for own in said if not own[name].value), verdict)
        for name, verdict in said[0].items()
    }


def agree(ranks: Accelerator, decisions: Decisions) -> Decisions:
    """Rank 0's decisions on every rank: machines may differ, and a run has one layout."""
    if ranks.num_processes == 1:
        return decisions
    box = [decisions]
    broadcast_object_list(box)
    return box[0]
