"""The matrix of the optimizers: each with {LoRA, AdaLoRA, full} x {resumed bit for bit, two processes are
one}, generated from the registry; and with every other method.

A cell goes the way of those of the methods (tests/adapters/matrix.py), through the grammar and the loop, on
layers that are large enough for 8 bits.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import optim
from lorakit.recipe.optimizer import OPTIMIZERS, elsewhere
from lorakit.tasks.causal_lm import CausalLmTask
from tests.adapters import matrix
from tests.adapters.matrix import STEPS, VARIANTS, Attached, Cell
from tests.adapters.test_matrix import Shared, distance, in_two_processes, once, same

METHODS = ("lora", "adalora", "full")


def on_a_cpu(name: str) -> bool:
    return not list(elsewhere(OPTIMIZERS[name].section(name=name), "cpu"))


HERE = [name for name in OPTIMIZERS if on_a_cpu(name)]
CELLS = [Cell(method, "linear", "fp32", name) for name in HERE for method in METHODS]
every_cell = pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.variant}, {cell.optimizer}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small threads only wait for each other
    yield Shared(tmp_path_factory.mktemp("optimizers"))
    torch.set_num_threads(before)


def test_every_optimizer_is_in_the_matrix() -> None:
    assert set(OPTIMIZERS) == set(matrix.OPTIMIZERS) - {""}
    assert set(OPTIMIZERS) - set(HERE) == {"paged_adamw_8bit"}  # refused below


@every_cell
def test_a_cell_trains_what_it_declares_with_the_state_that_the_registry_says(
    cell: Cell, shared: Shared
) -> None:
    run = shared.trained(cell)
    losses = [line["loss"] for line in run.lines]
    assert min(losses[3:]) < losses[0]
    for name, parameter in run.declared.items():
        assert not torch.equal(parameter, run.start[name]), name
    found = optim.state(run.optimizer, run.adapter.trained())
    held = sum(t.numel() * t.element_size() for label, t in found.items() if not label.startswith("step|"))
    section, traits = run.recipe.optimizer, OPTIMIZERS[cell.optimizer]
    assert held == sum(traits.state_bytes(section, tuple(p.shape)) for p in run.declared.values())
    dtypes = {t.dtype for label, t in found.items() if t.dim()}
    eight = cell.optimizer == "adamw_8bit"
    assert dtypes == ({torch.uint8, torch.float32} if eight else {torch.float32})
    shares = [line.get("clipped_share") for line in run.lines]
    assert all(share is not None and 0 <= share <= 1 for share in shares) == (cell.optimizer == "sophia")


# Sophia (every: 2) estimates in steps 0, 2 and 4; AdaLoRA takes away after steps 2, 3 and 4.
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 3])
@every_cell
def test_interrupted_is_uninterrupted(cell: Cell, step: int, shared: Shared) -> None:
    """From a checkpoint on the disk, on a new base: every bit of adapter and optimizer, and every loss."""
    run = shared.trained(cell)
    other = Attached(cell, shared.bench)
    other.train(resume=shared.checkpoints(cell) / f"step-{step:06d}")
    assert same(run.adapter.state(), other.adapter.state())
    states = [optim.state(one.optimizer, one.adapter.trained()) for one in (run, other)]
    assert same(*states)
    assert {n: t.dtype for n, t in states[0].items()} == {n: t.dtype for n, t in states[1].items()}
    assert [line["loss"] for line in run.lines][step:] == [line["loss"] for line in other.lines]
    assert torch.equal(run.final_logits, other.final_logits)


def compare_ranks(cells: list[Cell], shared: Shared) -> None:
    """Rounding may turn the sign of what is nearly zero, and a code of 8 bits into its neighbour."""
    for cell in cells:
        shared.trained(cell)
    found = in_two_processes(cells, shared)
    for cell in cells:
        run = shared.trained(cell)
        losses, norms, parameters = found[str(cell)]
        assert losses == pytest.approx([line["loss"] for line in run.lines], rel=1e-4), str(cell)
        assert norms == pytest.approx([line["grad_norm"] for line in run.lines], rel=1e-3), str(cell)
        assert distance(run, parameters) <= 0.02, str(cell)


def test_two_processes_draw_the_labels_of_one(shared: Shared) -> None:
    """Sophia's estimate is one of the whole step; the rest in the slow suite."""
    compare_ranks([cell for cell in CELLS if cell.optimizer == "sophia"], shared)


@pytest.mark.slow
def test_two_processes_are_one(shared: Shared) -> None:
    compare_ranks([cell for cell in CELLS if cell.optimizer != "sophia"], shared)


REFUSED = {"lora-fa projected", "delta-lora"}  # with sophia: tests/recipe/test_optimizer.py
OTHERS = [variant for variant in VARIANTS if variant not in METHODS]


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(
            Cell(variant, "linear", once(variant).base, name),
            marks=[] if name == "sophia" else pytest.mark.slow,
        )
        for name in HERE
        for variant in OTHERS
        if name != "sophia" or variant not in REFUSED
    ],
    ids=str,
)
def test_every_method_trains_with_every_optimizer(cell: Cell, shared: Shared) -> None:
    run = shared.trained(cell)
    assert len(run.lines) == STEPS
    losses = [line["loss"] for line in run.lines]
    assert min(losses[2:]) < losses[0]


def test_paging_is_refused_on_a_cpu_before_the_data_are_read(cli, write_recipe, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("this is no JSON\n")
    recipe = write_recipe(data={"train": str(data)}, optimizer={"name": "paged_adamw_8bit"})
    code, out, err = cli("train", recipe, "--output", tmp_path / "run")
    assert code == 2
    line = next(n for n, text in enumerate(recipe.read_text().splitlines(), 1) if "paged" in text)
    assert f"{recipe}:{line}:" in err
    assert (
        "optimizer.name: pages state out of a GPU's memory, but this run is on the cpu; write adamw_8bit"
        in err
    )
    assert "JSON" not in out + err
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("base", ["bf16", "nf4"])
def test_sophia_on_bases_of_fewer_bits(base: str, shared: Shared) -> None:
    """In 16 bits under autocast, and over 4-bit weights: state is in fp32, and a resumed run is the same."""
    cell = Cell("lora", "linear", base, "sophia")
    run = shared.trained(cell)
    losses = [line["loss"] for line in run.lines]
    assert min(losses[3:]) < losses[0]
    found = optim.state(run.optimizer, run.adapter.trained())
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    other = Attached(cell, shared.bench)
    other.train(resume=shared.checkpoints(cell) / "step-000003")
    assert same(found, optim.state(other.optimizer, other.adapter.trained()))
    assert [line["loss"] for line in other.lines] == losses[3:]


@pytest.mark.parametrize("name", ["sophia", "adamw"])
def test_memory_for_the_estimate_is_tried_before_step_0(
    name: str, cli, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits may be the most that a run needs."""

    def full(*inputs: Any) -> None:
        raise torch.OutOfMemoryError("no room for the logits")

    monkeypatch.setattr(CausalLmTask, "drawn_loss_sum", full)
    recipe = write_recipe(optimizer={"name": name}, training={"max_steps": 2})
    code, _, err = cli("train", recipe, "--output", tmp_path / "run")
    assert code == (1 if name == "sophia" else 0), err
    assert ("out of memory: no room for the logits" in err) == (name == "sophia")
    assert (tmp_path / "run" / "metrics.jsonl").exists() == (name != "sophia")


def test_a_run_with_sophia_logs_how_much_was_clipped(cli, write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe(
        optimizer={"name": "sophia", "lr": 1e-3, "every": 2}, training={"max_steps": 4}, log={"every": 1}
    )
    code, _, err = cli("train", recipe, "--output", tmp_path / "run")
    assert code == 0, err
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    training = [line for line in lines if "loss" in line]
    assert len(training) == 4
    assert all(0 < line["clipped_share"] <= 1 for line in training)
