"""The method matrix: every method x {Linear, Conv1D, Embedding} x {fp32, bf16, nf4}, generated from TRAITS.

A cell is either trained and held to every promise, or refused with its reason before anything loads: none is
left out. What a cell is, and how it runs, is in matrix.py.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorakit import optim, report, saved
from lorakit.adapters import METHODS
from lorakit.count import count
from lorakit.errors import LorakitError
from lorakit.inspection import inspect
from lorakit.merge import merge
from lorakit.recipe.inits import INITS
from lorakit.recipe.traits import TRAITS, is_exported
from tests.adapters.matrix import (
    BASES,
    CELLS,
    CPU,
    HIDDEN,
    IDS,
    INNER,
    KINDS,
    RANK,
    STEPS,
    VARIANTS,
    VOCABULARY,
    Attached,
    Bench,
    Cell,
    digest,
    make_bases,
    write_recipe,
)
from tests.conftest import ROOT

# What mathematics or PEFT forbids: all of it. A method that refuses more, or less, changes this table too.
REFUSED = {
    ("lora-fa", "embedding"),  # its A starts at zero
    ("adalora", "embedding"),  # PEFT has no layer for it
    ("vera", "embedding"),  # PEFT has no layer for it
    ("lora-drop", "embedding"),  # importance compares products with inputs
    ("peft OFT", "conv1d"),  # PEFT has no layer for it
    ("peft IA3", "embedding"),  # PEFT has no layer for it
    ("full", "quantized"),  # 4-bit weights have no gradient
    ("lora gaussian", "embedding"),  # whose A starts at zero, whatever is written
    ("lora orthogonal", "embedding"),
    ("lora pissa", "quantized"),  # what is left of W is another matrix
    ("lora pissa", "embedding"),
    ("lora pissa fast", "quantized"),
    ("lora pissa fast", "embedding"),
    ("lora olora", "quantized"),
    ("lora olora", "embedding"),
    ("lora eva", "embedding"),  # tokens have no directions
    ("lora loftq", "unquantized"),  # nothing was taken away
    ("lora loftq", "embedding"),
}


def marks(cell: Cell) -> list[pytest.MarkDecorator]:
    """In the fast suite: every method on every kind of layer, and on every base; every start once."""
    started = cell.init != "default" and cell != once(cell.variant)
    return [pytest.mark.slow] if started or (cell.kind != "linear" and cell.base != "fp32") else []


def once(variant: str) -> Cell:
    """The cell that stands for a variant where one must."""
    return next(cell for cell in ALLOWED if cell.variant == variant)


ALLOWED = [cell for cell in CELLS if not cell.reasons]
every_cell = pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=str(cell), marks=marks(cell)) for cell in ALLOWED]
)


class Shared:
    """Runs of the cells, each made once."""

    def __init__(self, folder: Path) -> None:
        make_bases(folder)
        self.folder, self.bench = folder, Bench(folder)
        self.runs: dict[Cell, Attached] = {}

    def checkpoints(self, cell: Cell) -> Path:
        return self.folder / "checkpoints" / str(cell)

    def trained(self, cell: Cell) -> Attached:
        if cell not in self.runs:
            self.checkpoints(cell).mkdir(parents=True)
            run = Attached(cell, self.bench)
            self.runs[cell] = run.train(checkpoints=self.checkpoints(cell))
        return self.runs[cell]

    def saved(self, cell: Cell) -> Path:
        place = self.folder / "saved" / str(cell)
        if not place.exists():
            self.trained(cell).save(place)
        return place


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of matrices this small threads only wait for each other
    yield Shared(tmp_path_factory.mktemp("matrix"))
    torch.set_num_threads(before)


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def scale(logits: Tensor) -> float:
    return float(logits.abs().max())


# ------------------------------------------------------------------------------------------------------------
# Nothing is left out


def test_every_method_is_in_the_matrix() -> None:
    assert {variant.method for variant in VARIANTS.values()} == TRAITS.keys() == METHODS.keys()
    assert {cell.init for cell in CELLS} == INITS.keys()
    assert len(CELLS) == len(VARIANTS) * len(KINDS) * len(BASES)


def test_the_registry_refuses_what_this_table_says() -> None:
    found = {
        (cell.variant if cell.method == "peft" or cell.init != "default" else cell.method, what)
        for cell in CELLS
        for what in cell.reasons
    }
    assert found == REFUSED


@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.reasons], ids=str)
def test_a_forbidden_cell_is_refused_with_its_reason(cell: Cell, shared: Shared, cli) -> None:
    recipe = write_recipe(cell, shared.folder)
    for verb in ("validate", "train"):
        code, out, err = cli(verb, recipe)
        assert code == 2
        assert next(iter(cell.reasons.values())) in out + err
        assert "Traceback" not in out + err


# ------------------------------------------------------------------------------------------------------------
# One process


@every_cell
def test_step_0_is_the_base(cell: Cell, shared: Shared) -> None:
    """Exactly; but DoRA divides every row by its length and multiplies with it again, PiSSA and OLoRA add
    what they take away, in bf16 rounded both times, and LoftQ starts nearer to what was quantized."""
    run = shared.trained(cell)
    if cell.init == "loftq":
        whole = Attached(replace(cell, variant="lora", base="fp32"), shared.bench).base_logits
        assert float((run.start_logits - whole).norm()) < float((run.base_logits - whole).norm())
    elif cell.method == "dora" or INITS[cell.init].pairs == 2:
        limit = 0.03 if cell.base == "bf16" and cell.method != "dora" else 1e-6
        assert apart(run.start_logits, run.base_logits) <= limit * scale(run.base_logits)
    else:
        assert torch.equal(run.start_logits, run.base_logits)


@every_cell
def test_only_the_declared_parameters_move(cell: Cell, shared: Shared) -> None:
    """Every one of them, in six steps; of the rest no bit, and of the base not one in any form it is held."""
    run = shared.trained(cell)
    state = run.model.state_dict(keep_vars=True)
    declared = {parameter.data_ptr() for parameter in run.declared.values()}
    assert run.declared.keys() <= run.moved
    others = {name for name in run.moved if state[name].data_ptr() not in declared}
    assert all(cell.method == "delta-lora" and ".before" in name for name in others), others  # B_K and A_K
    assert apart(run.final_logits, run.base_logits) > 0.02 * scale(run.base_logits)
    assert all(parameter.dtype == torch.float32 for parameter in run.declared.values())

    now = {re.sub(r"\.(token_adapter\.)?base_layer\.", ".", name): t for name, t in state.items()}
    assert run.plain.keys() <= now.keys()
    frozen = {
        n: t for n, t in run.plain.items() if cell.method != "full" or now[n].data_ptr() not in declared
    }
    assert digest(frozen) == digest({name: now[name] for name in frozen})


@every_cell
def test_disabled_is_the_base(cell: Cell, shared: Shared) -> None:
    """And nothing is different after it: PEFT makes every parameter of an adapter trainable again."""
    run = shared.trained(cell)
    if cell.method == "full":
        with pytest.raises(AssertionError, match="nothing to disable"):
            run.adapter.disabled()
        return
    with run.adapter.disabled():
        assert torch.equal(run.logits(), run.base_logits)
    assert torch.equal(run.logits(), run.final_logits)
    assert [item.name for item in run.adapter.trained()] == [*run.declared]


@every_cell
def test_the_count_is_the_closed_form(cell: Cell, shared: Shared) -> None:
    """By hand = tensors of the optimizer = params.json = count-params of the recipe; and the file's tensors,
    where it holds what was trained and nothing else."""
    run = shared.trained(cell)
    wanted = closed_form(cell, run)
    groups = run.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == wanted
    params = report.parameters(run.adapter, run.num_base)
    base = parameters_of_the_base(cell)
    assert run.num_base == base
    assert (params["trainable"], sum(m["trainable"] for m in params["modules"])) == (wanted, wanted)
    assert params["total"] == (base if cell.method == "full" else base + wanted)
    if cell.method in ("lora", "dora", "peft") and not is_exported(run.recipe.adapter):
        file = load_file(shared.saved(cell) / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in file.values()) == wanted
    counted = count(run.recipe.file).params
    if cell.method == "lora-drop":  # what is kept is not known before the probe
        assert counted["trainable"] >= wanted
    elif cell.init == "eva":  # where the ranks go is not either, but how many there are
        assert sum(m["rank"] for m in counted["modules"]) == sum(run.adapter.ranks().values())
    else:
        assert (counted["trainable"], counted["total"]) == (wanted, params["total"])
        assert [m["trainable"] for m in counted["modules"]] == [m["trainable"] for m in params["modules"]]


def parameters_of_the_base(cell: Cell) -> int:
    h, i, v = HIDDEN, INNER, VOCABULARY
    if cell.kind == "conv1d":  # two norms a layer with biases, one at the end; 64 places; the head is tied
        layer = (h * 3 * h + 3 * h) + (h * h + h) + (h * i + i) + (i * h + h) + 4 * h
        return v * h + 64 * h + 2 * layer + 2 * h
    return 2 * v * h + 2 * (4 * h * h + 3 * h * i + 2 * h) + h


def closed_form(cell: Cell, run: Attached) -> int:
    """What the cell trains, from the sizes of its model alone."""
    h, i, v = HIDDEN, INNER, VOCABULARY
    conv1d = [(h, 3 * h), (h, h), (h, i), (i, h)]
    linear = [(h, h)] * 4 + [(h, i)] * 2 + [(i, h)]
    layers = {"linear": [linear, linear], "conv1d": [conv1d, conv1d], "embedding": [[(v, h)]]}[cell.kind]
    if cell.variant == "full":
        return parameters_of_the_base(cell)
    if cell.variant == "full in part":
        return {
            "linear": 2 * 3 * h * i + h,
            "conv1d": 2 * (2 * h * i + i + h) + 2 * h,
            "embedding": v * h,
        }[cell.kind]
    if cell.variant == "lora tokens" and cell.kind == "embedding":
        return 2 * RANK * (h + h) + 2 * h
    if cell.method == "lora-drop":  # those that are kept, and one for each kind of which some are not
        kept = run.adapter.kept.reshape(len(layers), -1).T.tolist()  # type: ignore[attr-defined]
        assert {True, False} == {value for row in kept for value in row}
        sizes = [RANK * (a + b) for a, b in layers[0]]
        return sum(size * (sum(own) + (not all(own))) for size, own in zip(sizes, kept, strict=True))
    ranks = [RANK] * len(layers)
    if cell.variant == "lora patterns":
        ranks[-1] = 2
    if cell.variant == "peft OFT":  # R blocks of what is rotated: the input, of an embedding the output
        layers = [[(b, a) for a, b in layer] for layer in layers] if cell.kind == "embedding" else layers
    if cell.init == "eva":
        ranks, sides = run.adapter.ranks().values(), [pair for layer in layers for pair in layer]
        assert len(set(ranks)) > 1
        assert sum(ranks) == RANK * len(sides)
        return sum(rank * (a + b) for rank, (a, b) in zip(ranks, sides, strict=True))
    formula = FORMULAS[cell.variant.split(" ")[0] if cell.method != "peft" else cell.variant]
    rows = 2 * h if cell.variant == "lora tokens" else 0
    return rows + sum(formula(a, b, r) for layer, r in zip(layers, ranks, strict=True) for a, b in layer)


FORMULAS: dict[str, Callable[[int, int, int], int]] = {  # of in, out and rank
    "lora": lambda a, b, r: r * (a + b),
    "dora": lambda a, b, r: r * (a + b) + b,
    "lora-fa": lambda a, b, r: r * b,
    "adalora": lambda a, b, r: r * (a + b + 1),
    "vera": lambda a, b, r: r + b,
    "delta-lora": lambda a, b, r: r * (a + b),
    "peft OFT": lambda a, b, r: r * (a // r) * (a // r - 1) // 2,  # skew-symmetric blocks
    "peft IA3": lambda a, b, r: a if a == INNER else b,  # the input of the second layer of an MLP
}


@every_cell
def test_micro_batches_are_the_batch(cell: Cell, shared: Shared) -> None:
    """The layout of a step changes rounding alone: losses, gradient norms, and where the parameters end."""
    run = shared.trained(cell)
    other = Attached(cell, shared.bench).train(micro_batch_tokens=20)
    coarse = cell.base == "bf16"
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in other.lines] == pytest.approx(
            [line[key] for line in run.lines], rel=0.05 if coarse else 1e-4
        )
    # Where a gradient is zero but for rounding, such as that of a key's bias, Adam moves by its sign.
    assert distance(run, other.declared) <= (0.3 if coarse else 0.02)


def distance(run: Attached, others: dict[str, Tensor]) -> float:
    """Of the trained parameters from those of `run`, over how far `run` moved them."""
    assert run.declared.keys() == others.keys()
    off = sum(float((p - others[n]).detach().norm() ** 2) for n, p in run.declared.items())
    way = sum(float((p - run.start[n]).detach().norm() ** 2) for n, p in run.declared.items())
    return (off / way) ** 0.5


# Before, in and after what a schedule does: AdaLoRA decides after steps 2, 3 and 4, Delta-LoRA's weights
# follow from step 2 on, LoRA-drop's probe is over before step 1.
@pytest.mark.parametrize("step", [0, 1, 3, 5])
@every_cell
def test_interrupted_is_uninterrupted(cell: Cell, step: int, shared: Shared) -> None:
    """From a checkpoint on the disk, on a new base: every bit of adapter and optimizer, and every loss."""
    run = shared.trained(cell)
    other = Attached(cell, shared.bench)
    other.train(resume=shared.checkpoints(cell) / f"step-{step:06d}")
    assert same(run.adapter.state(), other.adapter.state())
    assert same(
        optim.state(run.optimizer, run.adapter.trained()),
        optim.state(other.optimizer, other.adapter.trained()),
    )
    assert [line["loss"] for line in run.lines][step:] == [line["loss"] for line in other.lines]
    assert torch.equal(run.final_logits, other.final_logits)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# ------------------------------------------------------------------------------------------------------------
# Saved


@pytest.fixture(scope="module")
def read(shared: Shared, request: pytest.FixtureRequest) -> dict[str, tuple[Tensor | str, Tensor | str]]:
    """Cell -> logits of what was saved, as a new process finds them: (by lorakit, by PEFT). Of the cells that
    are asked for, all at once."""
    asked = [item for item in request.session.items if "read" in getattr(item, "fixturenames", ())]
    for cell in {item.callspec.params["cell"] for item in asked}:
        shared.saved(cell)
    command = [sys.executable, "-m", "tests.adapters.matrix", "read", str(shared.folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found: dict[str, tuple[Tensor | str, Tensor | str]] = torch.load(shared.folder / "logits.pt")
    return found


@pytest.mark.parametrize("reader", ["lorakit", "others"])
@every_cell
def test_what_was_saved_is_what_was_trained(cell: Cell, reader: str, shared: Shared, read) -> None:
    """In another process, by lorakit and by PEFT (a whole model: by transformers)."""
    run = shared.trained(cell)
    found = read[str(cell)][reader == "others"]
    assert not isinstance(found, str), found
    # In bf16 an export is rounded once more than its factors were, and a whole model is rounded to its files;
    # what PiSSA takes away, before it is, is as large as the output.
    limit = (0.05 if INITS[cell.init].pairs == 2 else 0.03) if cell.base == "bf16" else 1e-5
    assert apart(found, run.final_logits) <= limit * scale(run.final_logits)


@every_cell
def test_merged_is_attached(cell: Cell, shared: Shared, tmp_path: Path) -> None:
    """In fp32: the merge itself, apart from what rounding to fewer bits costs afterwards."""
    place = shared.saved(cell)
    if cell.method == "full":
        with pytest.raises(LorakitError, match="there is nothing to merge"):
            merge(place, tmp_path / "merged")
        return
    merged = merge(place, tmp_path / "merged", dtype="fp32")
    opened = saved.open_saved(saved.find(place), None, CPU, exact=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        attached = opened.base.model(input_ids=IDS, use_cache=False).logits
        alone = model(input_ids=IDS, use_cache=False).logits
    assert apart(attached, alone) <= 1e-5 * scale(attached)
    assert merged.parity.largest_effect > 0.1
    if cell.base == "bf16":  # nothing of its own in what follows
        return
    base = load_file(opened.folder / "model.safetensors") | dict(opened.dequantized)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    entries = inspect(place).found["layers"]
    assert {entry["name"] for entry in entries} >= {target.layer.name for target in opened.adapter.targets}
    for entry in entries:
        change = written[f"{entry['name']}.weight"].double() - base[f"{entry['name']}.weight"].double()
        assert entry["norm"] == pytest.approx(float(change.norm()), rel=1e-4, abs=1e-5), entry["name"]


# ------------------------------------------------------------------------------------------------------------
# The command line


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_of_the_command_line(variant: str, write_recipe, cli, tiny: Path, tmp_path: Path) -> None:
    """All that a run adds to a cell, with the fast paths on: params.json is what count-params says, a run
    that stopped ends with the same bytes, and what it wrote is evaluated."""
    cell = once(variant)
    held = {"quantize": cell.base} if cell.base == "nf4" else {}
    recipe = write_recipe(
        model={"path": str(tiny / "model")} | held,
        adapter=cell.section,
        data={"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128},
        optimizer={"lr": VARIANTS[variant].lr},
        training={"max_steps": STEPS, "batch_size": 4, "precision": "fp32"},
        checkpoint={"every": 2, "keep": 9},
    )
    run = tmp_path / "run"
    code, _, err = cli("train", recipe)
    assert code == 0, err
    params = json.loads((run / "params.json").read_text())
    _, out, _ = cli("count-params", recipe, "--json")
    counted = json.loads(out)
    if cell.method != "lora-drop" and cell.init != "eva":
        assert (counted["trainable"], counted["total"]) == (params["trainable"], params["total"])
    assert sum(module["trainable"] for module in params["modules"]) == params["trainable"]

    stopped = Path(shutil.copytree(run, tmp_path / "stopped"))
    record = json.loads((stopped / "run.json").read_text())
    (stopped / "run.json").write_text(json.dumps(record | {"status": "interrupted"}))
    code, _, err = cli("train", recipe, "--resume", "step-000002", "--output", stopped)
    assert code == 0, err
    product = "model/model" if cell.method == "full" else "adapter/adapter_model"
    last = [f"checkpoints/step-{STEPS:06d}/{part}" for part in ("adapter_model", "optimizer")]
    for name in (product, *last):
        assert (stopped / f"{name}.safetensors").read_bytes() == (run / f"{name}.safetensors").read_bytes()

    code, out, err = cli("eval", run, "--json")
    assert code == 0, err
    found = json.loads(out)["model" if cell.method == "full" else "adapter"]["loss"]
    record = json.loads((run / "run.json").read_text())
    assert found == pytest.approx(record["best_loss"], rel=1e-5)
    assert found < 0.9 * record["base_eval_loss"]


# ------------------------------------------------------------------------------------------------------------
# Two processes


def in_two_processes(cells: list[Cell], shared: Shared) -> dict[str, Any]:
    (shared.folder / "cells.json").write_text(json.dumps([astuple(cell) for cell in cells]))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "tests.adapters.matrix", "ranks", str(shared.folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = torch.load(shared.folder / "ranks.pt")
    return found


def compare_ranks(cells: list[Cell], shared: Shared) -> None:
    for cell in cells:
        shared.trained(cell)
    found = in_two_processes(cells, shared)
    for cell in cells:
        run = shared.trained(cell)
        losses, norms, parameters = found[str(cell)]
        coarse = cell.base == "bf16"
        for key, values in (("loss", losses), ("grad_norm", norms)):
            wanted = [line[key] for line in run.lines]
            assert values == pytest.approx(wanted, rel=0.05 if coarse else 1e-4), f"{cell}: {key}"
        assert distance(run, parameters) <= (0.3 if coarse else 0.02), str(cell)


def test_two_processes_are_one(shared: Shared) -> None:
    """Every method once; all cells in the slow suite."""
    compare_ranks([once(variant) for variant in VARIANTS], shared)


@pytest.mark.slow
def test_two_processes_are_one_in_every_cell(shared: Shared) -> None:
    compare_ranks([cell for cell in ALLOWED if cell != once(cell.variant)], shared)
