"""What a verb imports: what makes it fast, held without a clock."""

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from lorakit import startup
from lorakit.data import tokens
from lorakit.recipe import load_recipe

# Runs the command of its arguments, then prints facts of the process.
PROCESS = """
import sys
from lorakit.cli import main
sys.argv = ["lorakit", *sys.argv[1:]]
try: main()
except SystemExit as end: assert not end.code, end.code
import gc
print("FACTS", *sorted({name.partition(".")[0] for name, module in sys.modules.items() if module}))
print("FACTS", gc.isenabled(), gc.get_freeze_count() > 100_000)
"""

NOT_FOR_LORA = {"bitsandbytes", "pandas", "datasets", "tensorboard", "sklearn", "scipy", "torchvision"}


def facts_of(*arguments: str | Path) -> tuple[set[str], list[str]]:
    """(top-level packages that the command imports, the state of garbage collection at its end)."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", PROCESS, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    packages, collector = (line.split()[1:] for line in done.stdout.splitlines() if line.startswith("FACTS"))
    return set(packages), collector


def test_a_lora_run_imports_only_what_it_needs_and_trains_the_same(cli, write_recipe, tmp_path: Path) -> None:
    """The oracle is a run in this process, which has bitsandbytes and collects garbage as always."""
    import bitsandbytes  # noqa: F401

    recipe = write_recipe(training={"max_steps": 2, "batch_size": 4})
    packages, collector = facts_of("train", recipe, "--output", tmp_path / "apart")
    assert not NOT_FOR_LORA & packages
    assert {"torch", "transformers", "peft"} <= packages
    assert collector == ["True", "True"]  # collects again, but not what the imports made
    assert cli("train", recipe, "--output", tmp_path / "here")[0] == 0
    apart, here = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("apart", "here"))
    assert apart.read_bytes() == here.read_bytes()


def test_an_optimizer_in_8_bits_has_bitsandbytes(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe(optimizer={"name": "adamw_8bit"}, training={"max_steps": 1})
    assert "bitsandbytes" in facts_of("train", recipe, "--output", tmp_path / "run")[0]


def test_a_quantized_run_has_bitsandbytes(write_recipe, tiny: Path) -> None:
    recipe = write_recipe(model={"path": str(tiny / "model"), "quantize": "nf4"}, training={"max_steps": 1})
    packages, _ = facts_of("train", recipe)
    assert "bitsandbytes" in packages
    assert "pandas" not in packages


def test_light_verbs_import_no_model_library(write_recipe) -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "pandas", "tokenizers"}
    for arguments in (["validate", write_recipe()], ["count-params", write_recipe()], ["recipes", "list"]):
        assert not heavy & facts_of(*arguments)[0], arguments


@pytest.mark.parametrize(
    "model, hidden",
    [
        ({}, True),
        ({"quantize": "nf4"}, False),
        ({"trust_remote_code": True}, False),
    ],
)
def test_bitsandbytes_is_hidden_where_nothing_may_want_it(
    model: dict[str, Any], hidden: bool, write_recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(write_recipe())
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update=model)})
    modules: dict[str, None] = {}
    monkeypatch.setattr(startup, "sys", SimpleNamespace(modules=modules))
    startup.without_bitsandbytes(recipe)
    assert modules == ({"bitsandbytes": None} if hidden else {})


def test_a_process_that_has_torch_is_left_as_it_is(write_recipe) -> None:
    """Its next training may quantize."""
    import bitsandbytes

    frozen = gc.get_freeze_count()
    startup.trainer(load_recipe(write_recipe()))
    assert sys.modules["bitsandbytes"] is bitsandbytes
    assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


def test_garbage_is_collected_again_when_an_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with pytest.raises(ImportError), startup.importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("kind", ["int32", "uint8", "int64", "uint64"])
def test_arrow_and_numpy_share_memory_as_arrow_itself_would_do_it(kind: str) -> None:
    numbers = np.array([3, 0, 255, 7, 1], kind)
    for array in (pa.array(numbers), pa.array(numbers)[1:4], pa.array(numbers)[5:], pa.array([], kind)):
        view, expected = tokens._view(array), array.to_numpy()
        assert view.dtype == expected.dtype
        assert view.tolist() == expected.tolist()
        assert not view.flags.writeable
    for values in (numbers, numbers[::2], numbers[:0]):
        assert tokens._arrow(values).equals(pa.array(values))
