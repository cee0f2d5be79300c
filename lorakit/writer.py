"""What a run leaves behind, and how it is taken up again. Rank 0 writes; the others keep quiet.

Before the loop: choose a checkpoint to continue from, and write the files that say what will be done. In the
loop: metrics.jsonl line by line, checkpoints, and adapter/ (or model/) whenever it becomes the one to keep.
"""

import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from lorakit import __version__, checkpoint, optim, picture, report, runs
from lorakit.adapters import Adapter, Role
from lorakit.data.tokens import TokenData
from lorakit.devices import peak_bytes
from lorakit.errors import LorakitError, RunError
from lorakit.loop import NotFinite, TrainState
from lorakit.plan import Plan
from lorakit.recipe import Recipe, comparable, dump, fingerprint
from lorakit.recipe.optimizer import OPTIMIZERS
from lorakit.recipe.traits import is_exported, num_pairs
from lorakit.terminal import progress, say

# ------------------------------------------------------------------------------------------------------------
# Before the loop


def continue_from(resume: str, output: Path, record: dict[str, Any]) -> Path | None:
    """The checkpoint that `resume` means: "never", "auto" or a checkpoint of this run. None: from the start.

    Raises: LorakitError when it names no checkpoint of `output`.
    """
    root = output / "checkpoints"
    if resume == "never":
        return None
    if resume == "auto":
        found = checkpoint.newest(root, say)
        if found is None:
            say(f"resume    {output} has no checkpoint yet: starting over")
        return found
    if not record:
        raise LorakitError(f"--resume {resume}: {output} holds no run")
    named = Path(resume) if Path(resume).is_dir() else root / resume
    if not named.is_dir():
        raise LorakitError(f"--resume {resume}: expected auto, never or a checkpoint below {root}")
    if named.resolve().parent != root.resolve():
        raise LorakitError(
            f"--resume {resume}: not a checkpoint of {output}",
            "To start from another run's adapter, write adapter.start_from.",
        )
    return named


def restore(folder: Path | None, adapter: Adapter, section: Any) -> tuple[torch.optim.Optimizer, TrainState]:
    """The optimizer of the recipe's `section` and the state of a checkpoint, with the adapter as it was then;
    None: a new state. What is trained may be among what the checkpoint says."""
    if folder is None:
        return optim.build(section, adapter.trained()), TrainState()
    saved = checkpoint.load(folder)
    adapter.load_state(saved.adapter)
    optimizer = optim.build(section, adapter.trained())
    optim.load_state(optimizer, adapter.trained(), saved.optimizer)
    say(f"resume    from {folder}")
    return optimizer, TrainState(**saved.state)


def begin(
    run: runs.Run,
    recipe: Recipe,
    plan: Plan,
    params: dict[str, Any],
    facts: dict[str, Any],
    account: Sequence[str],
    continued: Path | None,
) -> None:
    """Forget what lies past the point to continue from, and say what will be done: run.json first, then
    recipe.yaml, resolved.yaml, data.md (the account of the rows), params.json, params.md, ranks.svg."""
    at = checkpoint.step_of(continued) if continued else -1
    for later in checkpoint.folders(run.checkpoints):
        if checkpoint.step_of(later) > at:
            shutil.rmtree(later)
    run.cut_metrics(at or -1)  # what belongs to step 0 is measured again
    packages = (
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "bitsandbytes",
        "datasets",
        "tokenizers",
        "safetensors",
    )
    run.start(
        status="running",
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={
            "lorakit": __version__,
            "python": platform.python_version(),
            **{p: version(p) for p in packages},
        },
        seed=recipe.training.seed,
        step=max(0, at),
        steps=plan.total_steps,
        recipe=comparable(recipe),
        recipe_fingerprint=fingerprint(recipe),
        decisions={name: asdict(decision) for name, decision in plan.decisions.items()},
        **facts,
    )
    if recipe.file.is_file() and not (run.path / "recipe.yaml").exists():
        run.write("recipe.yaml", recipe.file.read_text())
    fields = {name: d.value for name, d in plan.decisions.items() if not name.startswith("fast.")}
    run.write("resolved.yaml", dump(recipe, fields))
    run.write("data.md", report.account_markdown(account))
    _write_parameters(run, params)


def _write_parameters(run: runs.Run, params: dict[str, Any]) -> None:
    """params.json, params.md and, where the method decides the ranks, the picture that it shows."""
    run.write("params.json", report.as_json(params))
    if picture.rank_cells(params):
        run.write(picture.RANKS, picture.rank_heat_map(params))
    run.write("params.md", report.parameters_markdown(params))


def announce(
    recipe: Recipe, plan: Plan, params: dict[str, Any], experts: Sequence[str], output: Path
) -> None:
    """What will happen, and what every `auto` became."""
    if experts:
        say(f"note      {len(experts)} 3-D expert weights are not adapted: {experts[0]}, ...")
    percent = f"{params['trainable_percent']:.3f} % of {params['total']:,}"
    method = f"{recipe.adapter.method} {getattr(recipe.adapter, 'type', '')}".strip()
    say(f"adapter   {method}: {params['trainable']:,} trainable parameters ({percent})")
    names = sorted({module["name"].rsplit(".", 1)[-1] for module in params["modules"]})
    say(f"targets   {len(params['modules'])} modules: {', '.join(names)}")
    taken = []
    for name, decision in plan.decisions.items():
        if not name.startswith("fast."):
            say(f"auto      {name}: {decision.value} ({decision.why})")
        elif decision.value:
            taken.append(name.removeprefix("fast."))
    if taken:
        say(f"fast      {', '.join(taken)}: as their plain twins on this model (run.json has numbers)")
    elif recipe.training.fast == "off":
        say("fast      off, as the recipe says")
    batch_size = recipe.training.batch_size
    uneven = "up to " if plan.num_samples % batch_size else ""
    if 0 < plan.num_samples < batch_size:
        say(f"note      batch_size {batch_size} is above the number of samples: each step holds all")
    say(f"plan      {plan.total_steps} steps of {uneven}{batch_size} samples -> {output}")


def disk_needed(recipe: Recipe, adapter: Adapter, num_total: int) -> int:
    """Bytes of the checkpoints that are kept, one more while it is staged, and twice what was trained.

    A checkpoint holds the adapter's state and the optimizer's. What was trained is that state or, where
    other tools cannot read it, plain LoRA in fp32: an A and a B of the largest rank for every layer (of twice
    that where Delta-LoRA remembers the first). Of full fine-tuning it is the model, of `num_total`
    parameters.
    """
    section: Any = recipe.adapter
    trained = adapter.trained()
    state = sum(tensor.numel() * tensor.element_size() for tensor in adapter.state().values())
    per_shape = OPTIMIZERS[recipe.optimizer.name].state_bytes
    moments = sum(per_shape(recipe.optimizer, tuple(item.parameter.shape)) for item in trained)
    if section.method == "full":
        written = 4 * num_total
    elif not is_exported(section):
        written = state
    else:
        sides = sum(target.layer.in_features + target.layer.out_features for target in adapter.targets)
        whole = sum(item.parameter.numel() for item in trained if item.role is Role.HEAD)
        written = 4 * (num_pairs(section) * max(adapter.ranks().values()) * sides + whole)
    return (recipe.checkpoint.keep + 1) * (state + moments) + 2 * written + (1 << 20)


# ------------------------------------------------------------------------------------------------------------
# In the loop


@dataclass
class Writer:
    """The loop's Observer."""

    run: runs.Run | None  # None on every rank but 0
    ranks: Accelerator
    recipe: Recipe
    plan: Plan
    params: dict[str, Any]
    base_fingerprint: str
    adapter: Adapter
    optimizer: torch.optim.Optimizer
    tokenizer: Any

    def stepped(self, state: TrainState) -> None:
        self._display.update(self._bar, completed=state.step)

    def metrics(self, line: dict[str, Any]) -> None:
        if self.run is None:
            return
        self.run.append_metrics(line)
        if self.recipe.log.trackers:
            self.ranks.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        self._tell(line)

    def best(self, state: TrainState) -> None:
        if self.recipe.checkpoint.best:
            self._write_product(state)

    def checkpoint(self, state: TrainState) -> None:
        if self.run is None:
            return
        tensors = optim.state(self.optimizer, self.adapter.trained())
        content = checkpoint.Checkpoint(self.adapter.state(), tensors, asdict(state))
        config = self.adapter.config(self.recipe.model.path)
        checkpoint.save(self.run.checkpoints, state.step, content, config, self.recipe.checkpoint.keep)
        self.run.update(step=state.step)

    @contextmanager
    def shown(self, state: TrainState) -> Iterator[None]:
        """A progress bar over the steps, where there is a terminal."""
        with progress() as self._display:
            self._bar = self._display.add_task("training", total=self.plan.total_steps, completed=state.step)
            yield

    def close(self, outcome: str, state: TrainState) -> None:
        """The final adapter, unless the best one is there already, and the end of run.json."""
        if outcome != "interrupted" and (state.best_step is None or not self.recipe.checkpoint.best):
            self._write_product(state)
        if self.run is not None:
            if outcome != "interrupted" and self.adapter.moves_ranks:
                self._tell_ranks(state)
            status = "interrupted" if outcome == "interrupted" else "finished"
            ended = datetime.now(UTC).isoformat(timespec="seconds")
            self.run.update(
                status=status, outcome=outcome, ended=ended, peak_bytes=peak_bytes(), **asdict(state)
            )
        self.ranks.end_training()

    def _write_product(self, state: TrainState) -> None:
        """adapter/ or model/ as the weights stand, replaced as a whole."""
        if self.run is None:
            return
        name = product(self.recipe)
        new = self.run.path / f".{name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        self.adapter.write(new, self.recipe.model.path)
        if name == "model":
            self.tokenizer.save_pretrained(new)
        provenance = {**self._provenance(), **_scores(state)}
        (new / "lorakit.json").write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n")
        (new / "README.md").write_text(report.model_card(self.recipe, self.plan, self.params, _scores(state)))
        for path in [*new.iterdir(), new]:
            checkpoint.sync(path)
        self.run.replace_folder(name, new)

    def _tell_ranks(self, state: TrainState) -> None:
        """What the ranks became, where a method decides them: settled ranks are those of adapter/ too."""
        assert self.run is not None
        self.params = report.parameters(self.adapter, self.params["total"] - self.params["trainable"])
        _write_parameters(self.run, self.params)
        self.run.append_metrics({"step": state.step, "ranks": self.adapter.ranks()})

    def _provenance(self) -> dict[str, Any]:
        """lorakit.json: what later verbs must know of base and run; no time, so that equal runs are equal."""
        model = self.recipe.model
        four_bit = model.quantize in ("nf4", "fp4")
        return {
            "lorakit": __version__,
            "method": self.recipe.adapter.method,
            "base": {
                "path": model.path,
                "revision": model.revision,
                "fingerprint": self.base_fingerprint,
                "dtype": self.plan["model.dtype"],
                "quantize": model.quantize,
                "double_quant": model.double_quant if four_bit else None,
                "compute_dtype": model.compute_dtype if four_bit else None,
            },
            "precision": self.plan["training.precision"],
            "format": self.plan["data.format"],
            "chat_template": self.tokenizer.chat_template if self.recipe.data.chat_template else None,
            "recipe_fingerprint": fingerprint(self.recipe),
        }

    def _tell(self, line: dict[str, Any]) -> None:
        step = f"step {line['step']:>{len(str(self.plan.total_steps))}}/{self.plan.total_steps}"
        if "eval_loss" in line:
            text = f"{step}  held-out loss {line['eval_loss']:.4f}"
        else:
            text = (
                f"{step}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  grad {line['grad_norm']:.3f}"
                f"  {line['tokens_per_s']:,.0f} tokens/s"
            )
        if sys.stderr.isatty():
            self._display.console.print(text, highlight=False)
        else:
            say(text)


def product(recipe: Recipe) -> str:
    """The folder of a run that holds what was trained."""
    return "model" if recipe.adapter.method == "full" else "adapter"


def _scores(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "eval_loss": state.eval_loss, "base_eval_loss": state.base_eval_loss}


def with_rows(error: NotFinite, tokens: TokenData | None, output: Path) -> RunError:
    """The same error with the places of the rows, and what to do."""
    rows = [tokens.places[sample] for sample in error.samples] if tokens else []
    named = f"; rows of the micro-batches to blame: {', '.join(rows[:16])}" if rows else ""
    return RunError(
        f"{error.message}{named}",
        f"Look at these rows, lower optimizer.lr, or check the base. {output} keeps its last checkpoint.",
    )
