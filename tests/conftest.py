"""Fixtures: a tiny model with data on disk, and the command line in this process. Nothing here touches a
network."""

import importlib.util
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# A shell that starts the tests in the background has them ignore Ctrl-C, and so would what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.setdefault("LORAKIT_CACHE", tempfile.mkdtemp(prefix="lorakit-cache-"))

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real data beside the checkout")


LONGEST_FILES = ("test_readme.py", "test_real_data.py", "test_wheel.py", "test_ranks.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, or one of two workers would wait for the other at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


def load_script(name: str) -> Any:
    """A module from scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Killed(BaseException):
    """Stands for a kill: nothing in lorakit catches it but the bookkeeping of the failed run."""


@contextmanager
def killed_at(step: int) -> Iterator[None]:
    """Within it a training dies when it has begun its `step`-th step, the first being 1."""
    import lorakit.loop

    real, calls = lorakit.loop.set_lr, []

    def kill(optimizer: Any, lr: float) -> None:
        calls.append(lr)
        if len(calls) == step:
            raise Killed
        real(optimizer, lr)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lorakit.loop, "set_lr", kill)
        with pytest.raises(Killed):
            yield


def as_a_kill_left_it(run: Path, copy: Path, step: int, later: int) -> None:
    """A copy of a finished run as if it had been killed between its checkpoints of `step` and `later`."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{later:06d}")
    shutil.rmtree(copy / "adapter")
    record = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(record | {"status": "running", "step": step}))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, train.jsonl, eval.jsonl and recipe.yaml. Read only: tests write elsewhere."""
    folder = tmp_path_factory.mktemp("tiny")
    load_script("make_tiny").make(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny / "model")


@pytest.fixture
def write_recipe(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """write_recipe(**sections) -> path of a recipe on the tiny model; a section given replaces the default
    one."""

    def write(**sections: Any) -> Path:
        values: dict[str, Any] = {
            "model": {"path": str(tiny / "model")},
            "data": {"train": str(tiny / "train.jsonl"), "max_length": 128},
            "optimizer": {"lr": 1e-3},
            "training": {"max_steps": 4, "batch_size": 4},
            "log": {"every": 1},
            "output": str(tmp_path / "run"),
        } | sections
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
        return path

    return write


@pytest.fixture
def cli() -> Callable[..., Any]:
    """cli("train", ...) -> (exit code, stdout, stderr) of the lorakit command in this process."""
    import contextlib
    import io

    import torch  # noqa: F401  (a verb that needs none would keep it out of this process for good)

    from lorakit import cli as module

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        argv, sys.argv = sys.argv, ["lorakit", *map(str, arguments)]
        code: Any = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                module.main()
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = argv
        return code, out.getvalue(), err.getvalue()

    return call


@pytest.fixture(scope="session")
def pairs_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on prompts and completions, in fp32, that learned them. Read only: change a copy."""
    return trained(tiny, tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def chats_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions as chats. Read only."""
    folder = tmp_path_factory.mktemp("chats")
    for name in ("train", "eval"):
        rows = [json.loads(line) for line in (tiny / f"{name}.jsonl").read_text().splitlines()]
        chats = [
            [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
            for row in rows
        ]
        lines = [json.dumps({"messages": chat}) for chat in chats]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return trained(tiny, folder, [f"data.train={folder}/train.jsonl", f"data.eval={folder}/eval.jsonl"])


def trained(tiny: Path, folder: Path, overrides: list[str] | None = None) -> Path:
    """The run directory of the tiny recipe with `overrides`, below `folder`."""
    from lorakit.recipe import load_recipe
    from lorakit.train import train

    return train(load_recipe(tiny / "recipe.yaml", [f"output={folder / 'run'}", *(overrides or [])]))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
