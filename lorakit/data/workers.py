"""Rows -> tokens on all cores.

Workers are forks: they have the tokenizer without it being sent, and touch neither torch nor a GPU.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lorakit.data.tokenize import Done, Piece, Setting, tokenize
from lorakit.errors import RunError

_IN_FLIGHT = 3  # chunks for each worker: enough to keep it busy, few enough to hold in memory


def num_cores() -> int:
    """Cores that this process may use; those of a machine are shared by its ranks of a torchrun."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def tokenize_all(pieces: Iterable[Piece], setting: Setting, num_workers: int) -> Iterator[Done]:
    """tokenize() of every piece, in order; few are in memory at a time.

    Raises: LorakitError as tokenize(); RunError when a worker was killed, or cannot be started.
    """
    if num_workers < 2 or sys.platform != "linux":  # elsewhere a fork may meet locks that are never freed
        for piece in pieces:
            yield tokenize(piece, setting)
        return
    # Where it is set, the tokenizers of a fork do not warn that they will not run in parallel.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pool = ProcessPoolExecutor(
        num_workers, multiprocessing.get_context("fork"), initializer=_start, initargs=(setting, os.getpid())
    )
    waiting: deque[Future[Done]] = deque()
    others = multiprocessing.active_children()
    try:
        for piece in pieces:
            waiting.append(_submit(pool, piece, others))
            if len(waiting) >= _IN_FLIGHT * num_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RunError("a process that tokenized rows was killed", "Was there enough memory?") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, piece: Piece, others: list[Any]) -> "Future[Done]":
    """The first starts all workers. `others`: processes that are none of them."""
    try:
        return pool.submit(_work, piece)
    except OSError as error:
        for child in multiprocessing.active_children():
            if child not in others:  # the pool does not know it yet, and Python would wait for it at its end
                child.kill()
        raise RunError(
            f"cannot start processes to tokenize rows: {error.strerror or error}",
            "ulimit -u and the limits of a container say how many there may be.",
        ) from None


_setting: Setting | None = None  # of a worker, from its birth on


def _start(setting: Setting, parent: int) -> None:
    """Make a fork a worker: it leaves signals to its parent, and goes when its parent is gone."""
    global _setting
    _setting = setting
    # Whatever a user set: the threads of the parent's tokenizers are not in the fork; it would wait for them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(piece: Piece) -> Done:
    assert _setting is not None
    return tokenize(piece, _setting)
