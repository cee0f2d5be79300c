"""Forks that tokenize: they end whatever the environment says, and what befalls them is told as it is."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import workers
from lorakit.data.reading import Reading
from lorakit.data.tokenize import Piece, Setting
from lorakit.errors import RunError
from lorakit.recipe.data import Data, Source
from tests.conftest import ROOT

LOAD = """
import sys
import lorakit.data
from transformers import AutoTokenizer
from lorakit.recipe.data import Data
lorakit.data.num_cores = lambda: 2
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(len(lorakit.data.load(sys.argv[2], Data(train=sys.argv[2]), tokenizer, "auto").tokens))
"""


def rows(folder: Path, number: int) -> Path:
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} ", "completion": "1"}) + "\n" for n in range(number)))
    return path


def test_threads_of_tokenizers_neither_stop_the_forks_nor_are_spoken_of(tiny: Path, tmp_path: Path) -> None:
    """The first rows start them in the parent; a fork has their locks without them."""
    path, found = rows(tmp_path, 2500), {}
    for value in ("", "true"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "LORAKIT_CACHE": str(tmp_path / (value or "0"))}
        environment |= {"TOKENIZERS_PARALLELISM": value, "RAYON_NUM_THREADS": "2"}
        if not value:
            del environment["TOKENIZERS_PARALLELISM"]
        command = [sys.executable, "-c", LOAD, str(tiny / "model"), str(path)]
        pipe = subprocess.PIPE
        found[value] = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        for value, process in found.items():
            out, told = process.communicate(timeout=60)
            assert (process.returncode, out) == (0, "2500\n"), (value, told)
            assert "fork" not in told, value
    finally:
        for process in found.values():
            process.kill()
            process.wait()


@pytest.mark.parametrize(("ranks", "number"), [(None, 8), ("1", 8), ("2", 4), ("3", 2), ("16", 1)])
def test_the_ranks_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, ranks: str | None, number: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    assert workers.num_cores() == number


@pytest.fixture
def endless(tokenizer: Any, tmp_path: Path) -> tuple[Iterator[Piece], Setting]:
    source = Source(path=str(rows(tmp_path, 50)))
    setting = Setting(tokenizer, Data(train=source), "auto")
    return repeat(next(Reading((source,), setting).pieces())), setting


def none_is_left() -> bool:
    deadline = time.monotonic() + 20
    while multiprocessing.active_children():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def test_a_killed_worker_is_told_and_takes_the_others_along(
    endless: tuple[Iterator[Piece], Setting],
) -> None:
    dones = workers.tokenize_all(*endless, 3)
    next(dones)
    one, *others = multiprocessing.active_children()
    assert len(others) == 2
    assert one.pid is not None
    os.kill(one.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    with pytest.raises(RunError, match="a process that tokenized rows was killed"):
        while time.monotonic() < deadline:
            next(dones)
    assert none_is_left()


def test_a_fork_that_fails_is_told_and_leaves_none(
    endless: tuple[Iterator[Piece], Setting], monkeypatch: pytest.MonkeyPatch
) -> None:
    fork, calls = os.fork, []

    def scarce() -> int:
        calls.append(1)
        if len(calls) > 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork()

    monkeypatch.setattr(os, "fork", scarce)
    with pytest.raises(RunError, match="cannot start processes to tokenize rows: Resource"):
        next(workers.tokenize_all(*endless, 4))
    assert len(calls) == 3
    assert none_is_left()
