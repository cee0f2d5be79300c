"""The cells of the method matrix: every method, by the kind of layer that it adapts, by how its base is held.

A cell goes the way of a real run: its recipe through the grammar, its base from files, lorakit's loop. Its
models are as small as 4-bit blocks let them be (64 wide). As a program this module is the other process:

    python -m tests.adapters.matrix read FOLDER      logits of what the cells saved, by lorakit and by PEFT
    torchrun ... -m tests.adapters.matrix ranks FOLDER      the runs of the cells in several processes
"""

import copy
import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor

from lorakit import base_model, checkpoint, loop, optim, prepare, saved, tasks, writer
from lorakit.adapters import Adapter
from lorakit.base_model import Base
from lorakit.data.batches import Batches
from lorakit.devices import autocast_for, start_ranks
from lorakit.layers import num_parameters
from lorakit.probe import RunProbe
from lorakit.recipe import Recipe, load_recipe, peft_types
from lorakit.recipe.inits import INITS
from lorakit.recipe.traits import TRAITS
from tests.samples import made

VOCABULARY, HIDDEN, INNER, RANK, STEPS = 64, 64, 128, 4, 6
KINDS = ("linear", "conv1d", "embedding")
BASES = ("fp32", "bf16", "nf4")
LENGTHS = (3, 10, 4, 7, 5, 9, 6, 8)  # of the samples; two steps see all of them
CPU = torch.device("cpu")


# ------------------------------------------------------------------------------------------------------------
# What there is


@dataclass(frozen=True)
class Variant:
    """A method as one of its recipes has it. `by_kind`: fields that name layers."""

    section: dict[str, Any]
    by_kind: dict[str, dict[str, Any]] = field(default_factory=dict)
    lr: float = 1e-2

    @property
    def method(self) -> str:
        return str(self.section["method"])


TARGETS: dict[str, Any] = {"linear": "all-linear", "conv1d": "all-linear", "embedding": ["embed_tokens"]}
SECOND = {"linear": r".*layers\.1\..*", "conv1d": r".*h\.1\..*", "embedding": "embed_tokens"}
PATTERNS = {kind: {"rank_pattern": {SECOND[kind]: 2}, "alpha_pattern": {SECOND[kind]: 3.0}} for kind in KINDS}
MOVING = {"linear": ["mlp", "norm"], "conv1d": ["mlp", "ln_f"], "embedding": ["embed_tokens"]}

IA3 = {
    kind: {"config": {"feedforward_modules": names}}
    for kind, names in (("linear", ["down_proj"]), ("conv1d", ["mlp.c_proj"]), ("embedding", []))
}

# Of the embedding itself two rows alone, with a layer adapted elsewhere; GPT-2's head shares them.
TOKENS: dict[str, dict[str, Any]] = {kind: {"train_tokens": [5, 7]} for kind in KINDS}
TOKENS["embedding"]["targets"] = ["v_proj"]

VARIANTS = {
    "lora": Variant({"method": "lora", "rank": RANK}),
    "lora rank-stabilized": Variant({"method": "lora", "rank": RANK, "scaling": "rank_stabilized"}),
    "lora patterns": Variant({"method": "lora", "rank": RANK}, PATTERNS),
    "lora tokens": Variant({"method": "lora", "rank": RANK}, TOKENS),
    "lora gaussian": Variant({"method": "lora", "rank": RANK, "init": "gaussian"}),
    "lora orthogonal": Variant({"method": "lora", "rank": RANK, "init": "orthogonal"}),
    "lora pissa": Variant({"method": "lora", "rank": RANK, "init": "pissa"}),
    "lora pissa fast": Variant({"method": "lora", "rank": RANK, "init": "pissa", "init_svd": "fast"}),
    "lora olora": Variant({"method": "lora", "rank": RANK, "init": "olora"}),
    "lora eva": Variant({"method": "lora", "rank": RANK, "init": "eva", "probe": 8}),
    "lora loftq": Variant({"method": "lora", "rank": RANK, "init": "loftq"}),
    "dora": Variant({"method": "dora", "rank": RANK}),
    "lora-fa": Variant({"method": "lora-fa", "rank": RANK}),
    "lora-fa projected": Variant({"method": "lora-fa", "rank": RANK, "projected": True}),
    # of 6 steps one is warm-up, three decide, two train what is left
    "adalora": Variant({"method": "adalora", "init_rank": RANK, "target_rank": 2, "interval": 1}, lr=0.1),
    "vera": Variant({"method": "vera", "rank": RANK}, lr=0.1),
    "delta-lora": Variant({"method": "delta-lora", "rank": RANK, "start": 2}),
    "lora-drop": Variant({"method": "lora-drop", "rank": RANK, "probe": 4, "threshold": 0.6}),
    "full": Variant({"method": "full"}),
    "full in part": Variant({"method": "full"}, {kind: {"train_only": MOVING[kind]} for kind in KINDS}),
    "peft OFT": Variant({"method": "peft", "type": "OFT", "config": {"r": RANK, "oft_block_size": 0}}),
    "peft IA3": Variant({"method": "peft", "type": "IA3"}, IA3, lr=0.1),
}

# What is held in 8 bits has 4096 numbers: layers of 64 by 64, for cells that ask for an optimizer.
WIDE: dict[str, dict[str, Any]] = {
    "lora": {"rank": 64},
    "adalora": {"init_rank": 64, "target_rank": 32},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "": {},
    "adamw": {},
    "adamw_8bit": {},
    "paged_adamw_8bit": {},
    "sgd": {"lr": 1.0},
    "adafactor": {},
    "lion": {"lr": 3e-3},
    "sophia": {"lr": 3e-3, "every": 2},
}


@dataclass(frozen=True)
class Cell:
    variant: str
    kind: str
    base: str
    optimizer: str = ""  # where it is what is asked for

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.variant, self.kind, self.base, self.optimizer)))

    @property
    def method(self) -> str:
        return VARIANTS[self.variant].method

    @property
    def section(self) -> dict[str, Any]:
        variant = VARIANTS[self.variant]
        targets = {} if self.method == "full" else {"targets": TARGETS[self.kind]}
        wide = WIDE.get(self.variant, {}) if self.optimizer else {}
        return variant.section | targets | variant.by_kind.get(self.kind, {}) | wide

    @property
    def init(self) -> str:
        return str(self.section.get("init", "default"))

    @property
    def reasons(self) -> dict[str, str]:
        """What is refused of this cell, by the registries (and a start that has no effect) -> why; what the
        grammar can tell comes first."""
        tuner = peft_types.refuses(self.section["type"]) if self.method == "peft" else {}
        started = {"embedding": "has no effect on embeddings"} if self.init == "gaussian" else {}
        refuses = {**TRAITS[self.method].refuses, **tuner, **INITS[self.init].refuses, **started}
        held = "quantized" if self.base == "nf4" else "unquantized"
        return {what: refuses[what].format(self.base) for what in (held, self.kind) if what in refuses}


CELLS = [Cell(variant, kind, base) for variant in VARIANTS for kind in KINDS for base in BASES]


# ------------------------------------------------------------------------------------------------------------
# Bases and recipes


def make_bases(folder: Path) -> None:
    """Random models on the disk, in both dtypes, with weights large enough that every layer matters; and a
    file of rows, which recipes must name."""
    llama = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    sizes = {"n_embd": HIDDEN, "n_inner": INNER, "n_layer": 2, "n_head": 4, "n_positions": 64}
    gpt2 = hf.GPT2Config(**sizes, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    for name, config in (("llama", llama), ("gpt2", gpt2)):
        torch.manual_seed(1)
        model = hf.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)
        model.save_pretrained(folder / f"{name}-fp32")
        model.to(torch.bfloat16).save_pretrained(folder / f"{name}-bf16")
    (folder / "rows.jsonl").write_text('{"text": "a b c"}\n')


def place_of(cell: Cell, folder: Path) -> Path:
    stored = "bf16" if cell.base == "bf16" else "fp32"
    return folder / f"{'gpt2' if cell.kind == 'conv1d' else 'llama'}-{stored}"


def write_recipe(cell: Cell, folder: Path) -> Path:
    model: dict[str, Any] = {"path": str(place_of(cell, folder))}
    if cell.base == "nf4":  # products in fp32: what is exact must come out exact on this base too
        model |= {"quantize": "nf4", "compute_dtype": "fp32"}
    optimizer = {"name": cell.optimizer} if cell.optimizer else {}
    values = {
        "model": model,
        "adapter": cell.section,
        "data": {"train": str(folder / "rows.jsonl")},
        "optimizer": optimizer | {"lr": VARIANTS[cell.variant].lr} | OPTIMIZERS[cell.optimizer],
        "training": {
            "max_steps": STEPS,
            "batch_size": 4,
            "precision": "bf16" if cell.base == "bf16" else "fp32",
            "seed": 3,
        },
        "output": str(folder / "run"),
    }
    path = folder / f"{cell}.yaml"
    if not path.exists():  # else several processes would write what others read
        path.write_text(json.dumps(values))
    return path


def recipe_of(cell: Cell, folder: Path) -> Recipe:
    """Raises: RecipeError where the grammar refuses the cell."""
    return load_recipe(write_recipe(cell, folder))


def samples() -> Any:
    """Eight samples; of each the first token and one more are not trained."""
    draw = np.random.default_rng(4)
    ids = draw.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    weights = np.ones(len(ids), np.uint8)
    offsets = np.cumsum([0, *LENGTHS])
    for start, _ in pairwise(offsets):
        weights[start : start + 2] = 0
    return made(ids, weights, offsets)


IDS = torch.from_numpy(np.random.default_rng(5).integers(0, VOCABULARY, (2, 12)))


class Bench:
    """Every base once, of which `fresh` gives copies; and the processes that there are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loaded: dict[tuple[Path, bool], Base] = {}
        self.ranks = start_ranks(folder / "trackers", True, ())

    def fresh(self, cell: Cell) -> Base:
        recipe = recipe_of(cell, self.folder)
        place, quantized = place_of(cell, self.folder), cell.base == "nf4"
        dtype = "bf16" if cell.base == "bf16" and cell.method != "full" else "fp32"
        key = (place / dtype, quantized)
        if key not in self.loaded:
            self.loaded[key] = base_model.load(place, recipe.model, "AutoModelForCausalLM", dtype, CPU)
        return copy.deepcopy(self.loaded[key])


# ------------------------------------------------------------------------------------------------------------
# A run of a cell


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


class Attached:
    """A cell with its adapter on a base of its own, ready to be trained."""

    def __init__(self, cell: Cell, bench: "Bench") -> None:
        self.cell, self.bench, self.recipe = cell, bench, recipe_of(cell, bench.folder)
        self.base = bench.fresh(cell)
        self.model = self.base.model
        self.autocast: Callable[[], AbstractContextManager[Any]] = (
            autocast_for("bf16", CPU) if cell.base == "bf16" else nullcontext
        )
        self.plain = copied(self.model.state_dict())
        self.num_base = num_parameters(self.model, self.base.layers)
        self.base_logits = self.logits()
        self.adapter: Adapter = prepare.attach_adapter(
            self.recipe, self.base, STEPS, tokens=cell.section.get("train_tokens", ())
        )
        self.objective: Any = tasks.Objective(self.model, tasks.build(self.recipe.task))
        self.lines: list[dict[str, Any]] = []
        self.moved: set[str] = set()

    def logits(self) -> Tensor:
        """(2, 12, V) of fixed tokens, in fp32, in eval mode."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            found: Tensor = self.model(input_ids=IDS, use_cache=False).logits.float()
        return found

    def train(
        self, resume: Path | None = None, micro_batch_tokens: int = 100, checkpoints: Path | None = None
    ) -> "Attached":
        """All steps, or those after the checkpoint `resume`; `checkpoints`: where one is written per step."""
        ranks, self.checkpoints = self.bench.ranks, checkpoints
        if self.adapter.prepares and resume is None:
            plan = {"training.micro_batch_tokens": micro_batch_tokens, "data.packing": False}
            rows = SimpleNamespace(tokens=samples())
            parts = {"adapter": self.adapter, "objective": self.objective, "autocast": self.autocast}
            ready: Any = SimpleNamespace(rows=rows, plan=plan, base=self.base, **parts)
            self.adapter.prepare(RunProbe(ready, self.recipe, ranks))
        self.optimizer, state = writer.restore(resume, self.adapter, self.recipe.optimizer)
        self.declared = {item.name: item.parameter for item in self.adapter.trained()}
        self.start, self.start_logits = copied(self.model.state_dict()), self.logits()
        self.checkpoint(state)
        rank, num_ranks = ranks.process_index, ranks.num_processes
        outcome = loop.run(
            objective=ranks.prepare(self.objective),
            adapter=self.adapter,
            optimizer=self.optimizer,
            batch_at=Batches(samples(), 4, 3, micro_batch_tokens, False, rank, num_ranks).at,
            lr_at=lambda step: optim.lr_at(step, "cosine", self.recipe.optimizer.lr, 1, STEPS),
            evaluate=None,
            observer=self,
            state=state,
            cadence=loop.Cadence(
                log=1, evaluate=100, checkpoint=1, evaluate_at_start=False, early_stopping=None
            ),
            total_steps=STEPS,
            seed=3,
            max_grad_norm=self.recipe.optimizer.max_grad_norm,
            device=CPU,
            autocast=self.autocast,
            rank=rank,
            num_ranks=num_ranks,
            all_ranks_sum=lambda tensor: ranks.reduce(tensor, "sum"),
        )
        assert outcome == "finished"
        self.model.eval()
        self.final_logits = self.logits()
        return self

    def stepped(self, state: loop.TrainState) -> None:
        now = self.model.state_dict()
        self.moved |= {name for name, tensor in self.start.items() if not torch.equal(tensor, now[name])}

    def metrics(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def best(self, state: loop.TrainState) -> None:
        raise AssertionError("there is no evaluation in these runs")

    def checkpoint(self, state: loop.TrainState) -> None:
        if self.checkpoints is not None:
            tensors = optim.state(self.optimizer, self.adapter.trained())
            content = checkpoint.Checkpoint(self.adapter.state(), tensors, asdict(state))
            checkpoint.save(self.checkpoints, state.step, content, {}, keep=STEPS + 1)

    def save(self, folder: Path) -> None:
        """What a run writes of an adapter: its files, and lorakit.json on base and precision."""
        folder.mkdir(parents=True)
        self.adapter.write(folder, self.recipe.model.path)
        model = self.recipe.model
        four_bit = model.quantize == "nf4"
        base = {
            "path": model.path,
            "revision": None,
            "fingerprint": self.base.fingerprint,
            "dtype": "bf16" if self.cell.base == "bf16" else "fp32",
            "quantize": model.quantize,
            "double_quant": model.double_quant if four_bit else None,
            "compute_dtype": model.compute_dtype if four_bit else None,
        }
        precision = "bf16" if self.cell.base == "bf16" else "fp32"
        record = {"method": self.cell.method, "base": base, "precision": precision}
        (folder / "lorakit.json").write_text(json.dumps(record | {"format": "text", "chat_template": None}))


def digest(tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of every tensor's bytes."""
    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors.items()
    }


# ------------------------------------------------------------------------------------------------------------
# The other process


def read(folder: Path) -> None:
    """Logits of every adapter below `folder`/saved into logits.pt: (by lorakit, by PEFT or transformers)."""
    found = {}
    for place in sorted((folder / "saved").iterdir()):
        record = json.loads((place / "lorakit.json").read_text())
        autocast = autocast_for(record["precision"], CPU)

        def logits(load: Callable[[], Any], autocast: Any = autocast) -> Tensor | str:
            try:
                with torch.no_grad(), autocast():
                    found: Tensor = load()(input_ids=IDS, use_cache=False).logits.float()
            except Exception as error:  # told by the test of this cell alone
                return repr(error)
            return found

        found[place.name] = (
            logits(lambda place=place: saved.open_saved(saved.find(place), None, CPU).base.model),
            logits(lambda place=place, record=record: by_others(place, record)),
        )
    torch.save(found, folder / "logits.pt")


def by_others(place: Path, record: dict[str, Any]) -> Any:
    """The model as somebody without lorakit loads it."""
    from peft import PeftModel

    dtype = torch.bfloat16 if record["base"]["dtype"] == "bf16" else torch.float32
    if record["method"] == "full":
        return hf.AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
    quantization = {}
    if record["base"]["quantize"] == "nf4":
        quantization["quantization_config"] = hf.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = hf.AutoModelForCausalLM.from_pretrained(record["base"]["path"], dtype=dtype, **quantization)
    for module in base.modules():
        # Else bitsandbytes multiplies in bf16 on some CPUs in evaluation, whatever dtype was asked for.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(base, place).eval()


def run_ranks(folder: Path) -> None:
    """The cells that `folder`/cells.json names, in all processes of a torchrun; rank 0 writes ranks.pt."""
    bench = Bench(folder)
    found = {}
    for values in json.loads((folder / "cells.json").read_text()):
        cell = Cell(*values)
        run = Attached(cell, bench).train(micro_batch_tokens=20)
        losses = [line["loss"] for line in run.lines]
        norms = [line["grad_norm"] for line in run.lines]
        found[str(cell)] = (losses, norms, {n: p.detach().clone() for n, p in run.declared.items()})
    if bench.ranks.is_main_process:
        torch.save(found, folder / "ranks.pt")
    bench.ranks.end_training()


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    torch.set_num_threads(1)
    {"read": read, "ranks": run_ranks}[sys.argv[1]](Path(sys.argv[2]))
