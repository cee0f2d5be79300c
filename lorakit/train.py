"""Wiring: recipe -> tokens -> model -> adapter -> plan -> loop -> what the run leaves. Read it from top to
bottom.

All ranks of a torchrun walk through here alike; rank 0 alone writes. Whatever a user got wrong is found
before step 0.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from lorakit import base_model, data, loop, model_files, optim, report, runs, tasks
from lorakit.adapters import Adapter, attach
from lorakit.base_model import Base
from lorakit.data.batches import Batches
from lorakit.data.render import check_tokenizer
from lorakit.devices import agree, autocast_for, describe, hardware_of, on_rank_0, start_ranks
from lorakit.errors import Interrupted, RecipeError, RunError, out_of_memory
from lorakit.evaluate import evaluate
from lorakit.kernels import attention
from lorakit.layers import dimensions, num_parameters, whole_modules
from lorakit.plan import (
    Decision,
    Decisions,
    Plan,
    check_start,
    choose_data,
    choose_layout,
    choose_precision,
    choose_targets,
    count_steps,
    make_plan,
)
from lorakit.recipe import Recipe, load_recipe
from lorakit.signals import Stop, listen
from lorakit.targets import Target
from lorakit.terminal import say
from lorakit.validate import check_call, check_place
from lorakit.writer import Writer, announce, begin, continue_from, disk_needed, product, restore, with_rows


def train(recipe: Recipe | str | Path, resume: str = "never", trust_remote_code: bool = False) -> Path:
    """Train what the recipe (or the file that holds it) says and return the run directory.

    `resume`: "never"; "auto" (the newest whole checkpoint, or from the start); or a checkpoint of this run.
    Raises: LorakitError with the exit code that fits: wrong input 2, failed while running 1, interrupted 130.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    check_call(recipe, trust_remote_code)
    output = Path(recipe.output).expanduser().absolute()
    check_place(recipe, resume, output)
    with listen() as stop:
        base_model.quiet()
        ranks = start_ranks(output / "trackers", recipe.training.deterministic is True, recipe.log.trackers)
        run = on_rank_0(ranks, lambda: runs.open_run(output, resume))
        record = runs.read_record(output)
        ranks.wait_for_everyone()  # rank 0 must not write run.json before all have read it
        try:
            runs.check_recipe(record, recipe)
            if record.get("status") == "finished" and resume == "auto":
                say(f"{output} is finished ({record['step']} steps): nothing to do")
                return output
            outcome = _train(recipe, resume, output, run, record, ranks, stop)
        except BaseException as error:
            if run is not None:
                run.fail(error)
            told = as_told(error, output, ranks)
            if told is error:
                raise
            raise told from error
        finally:
            if run is not None:
                run.close()
    if outcome == "interrupted":
        raise Interrupted("stopped by a signal; a checkpoint was written", runs.continue_hint(output))
    return output


@dataclass(frozen=True)
class Prepared:
    """All that stands before step 0."""

    tokenizer: Any
    rows: data.Loaded
    held_out: data.Loaded | None
    base: Base
    adapter: Adapter
    autocast: Callable[[], AbstractContextManager[Any]]
    plan: Plan
    params: dict[str, Any]  # the content of params.json


def prepare(recipe: Recipe, record: dict[str, Any], ranks: Accelerator) -> Prepared:
    """Tokens, model, adapter and plan. `record` is run.json of the run to continue: what it decided holds."""
    # Data first: a bad row costs seconds to find, a model minutes to load.
    folder = model_files.locate(recipe.model)
    tokenizer = base_model.load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    rows, held_out = load_rows(recipe, tokenizer)

    hardware = hardware_of(ranks.device)
    decisions = {name: Decision(**d) for name, d in record.get("decisions", {}).items()}
    if not decisions:
        decisions = agree(ranks, choose_precision(recipe, model_files.stored_dtype(folder), hardware))
    precision = decisions["training.precision"].value
    base = load_base(recipe, folder, tokenizer, decisions["model.dtype"].value, ranks.device)
    data.check_context(base.config.to_dict(), base.layers, rows, held_out)
    num_base = num_parameters(base.model, base.layers)
    adapter = attach_adapter(recipe, base, count_steps(recipe, len(rows.tokens)))
    autocast = autocast_for(precision, ranks.device)

    if "data.packing" not in decisions:
        longest = max(int(part.tokens.lengths.max()) for part in (rows, held_out) if part)
        isolated = isolation(recipe, base, longest, autocast)
        shape = dimensions(base.config)
        layout = choose_layout(recipe, precision, longest, shape, hardware, isolated)
        decisions = agree(ranks, decisions | choose_data(recipe, rows.format, rows.why) | layout)
    settle(base.model, decisions, ranks.device)
    plan = make_plan(recipe, len(rows.tokens), decisions)
    params = report.parameters(adapter, num_base)
    return Prepared(tokenizer, rows, held_out, base, adapter, autocast, plan, params)


def _train(
    recipe: Recipe,
    resume: str,
    output: Path,
    run: runs.Run | None,
    record: dict[str, Any],
    ranks: Accelerator,
    stop: Stop,
) -> loop.Outcome:
    ready = prepare(recipe, record, ranks)
    adapter, plan = ready.adapter, ready.plan
    optimizer = optim.build(recipe.optimizer, adapter.trained())

    # Continue where a run stopped, or begin; then write what will be done.
    facts = facts_of(ready, ranks)
    if record:
        runs.check_facts(record, facts)
    continued = continue_from(resume, output, record)
    state = restore(continued, adapter, optimizer)
    runs.check_space(output, disk_needed(recipe, ready.params["trainable"]), product(recipe))
    ranks.wait_for_everyone()  # all have read the checkpoint before rank 0 deletes what is later
    on_rank_0(ranks, lambda: begin(run, recipe, plan, ready.params, facts, continued) if run else None)
    announce(recipe, plan, ready.params, ready.base.experts, output)

    # What the loop calls: pure functions of a step, and sums over ranks.
    task = tasks.build(recipe.task)

    def batches_over(rows: data.Loaded) -> Batches:
        return Batches(
            rows.tokens,
            batch_size=recipe.training.batch_size,
            seed=recipe.training.seed,
            micro_batch_tokens=plan["training.micro_batch_tokens"],
            packing=plan["data.packing"],
            rank=ranks.process_index,
            num_ranks=ranks.num_processes,
        )

    def lr_at(step: int) -> float:
        name, peak = recipe.schedule.name, recipe.optimizer.lr
        return optim.lr_at(step, name, peak, plan.warmup_steps, plan.total_steps)

    def all_ranks_sum(tensor: Tensor) -> Tensor:
        summed: Tensor = ranks.reduce(tensor, "sum")
        return summed

    def held_out_loss() -> dict[str, float]:
        assert ready.held_out is not None
        micros = batches_over(ready.held_out).every_sample()
        return evaluate(ready.base.model, task.loss_sum, micros, ranks.device, ready.autocast, all_ranks_sum)

    writer = Writer(
        run=run,
        ranks=ranks,
        recipe=recipe,
        plan=plan,
        params=ready.params,
        base_fingerprint=ready.base.fingerprint,
        adapter=adapter,
        optimizer=optimizer,
        tokenizer=ready.tokenizer,
    )
    if recipe.log.trackers:
        ranks.init_trackers(output.name)
    stop.arm()
    with writer.shown(state):
        try:
            outcome = loop.run(
                model=ranks.prepare(ready.base.model),
                adapter=adapter,
                optimizer=optimizer,
                loss_sum=task.loss_sum,
                batch_at=batches_over(ready.rows).at,
                lr_at=lr_at,
                evaluate=held_out_loss if ready.held_out else None,
                observer=writer,
                state=state,
                cadence=loop.Cadence(
                    log=recipe.log.every,
                    evaluate=recipe.eval.every,
                    checkpoint=recipe.checkpoint.every,
                    evaluate_at_start=recipe.eval.at_start,
                    early_stopping=recipe.eval.early_stopping,
                ),
                total_steps=plan.total_steps,
                seed=recipe.training.seed,
                max_grad_norm=recipe.optimizer.max_grad_norm,
                device=ranks.device,
                autocast=ready.autocast,
                rank=ranks.process_index,
                num_ranks=ranks.num_processes,
                all_ranks_sum=all_ranks_sum,
                stop_requested=lambda: stop.requested,
            )
        except loop.NotFinite as error:
            raise with_rows(error, ready.rows.tokens, output) from None
    writer.close(outcome, state)
    return outcome


# ------------------------------------------------------------------------------------------------------------
# The call


def as_told(error: BaseException, output: Path, ranks: Accelerator) -> BaseException:
    """The error as a user should hear it; a bug of ours stays as it is."""
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(f"{error or 'interrupted'} before a step was done: nothing new was trained")
    hint = runs.continue_hint(output) if (output / "resolved.yaml").exists() else ""
    if out_of_memory(error):
        cure = "A smaller training.micro_batch_tokens or data.max_length, or model.quantize, needs less."
        return RunError(f"out of memory: {str(error).splitlines()[0]}", f"{cure}\n  {hint}".rstrip())
    if isinstance(error, OSError | SafetensorError):
        return RunError(f"stopped: {error}", hint)
    if not ranks.is_main_process and isinstance(error, RuntimeError) and "closed by peer" in str(error):
        return RunError("another process of this run failed; its message says why")
    return error


# ------------------------------------------------------------------------------------------------------------
# Before the model


def load_rows(recipe: Recipe, tokenizer: Any) -> tuple[data.Loaded, data.Loaded | None]:
    """Training rows and held-out rows as tokens, with a line on each."""
    check_tokenizer(tokenizer)
    train_on = recipe.task.train_on
    rows = data.load(recipe.data.train, recipe.data, tokenizer, train_on)
    say(f"data      {rows.account}; {len(rows.tokens.ids):,} tokens, {rows.tokens.weights.sum():,} trained")
    if recipe.data.eval is None:
        return rows, None
    same_format = recipe.data.model_copy(update={"format": rows.format})
    held_out = data.load(recipe.data.eval, same_format, tokenizer, train_on)
    scored = held_out.tokens.weights.sum()
    say(f"held out  {held_out.account}; {len(held_out.tokens.ids):,} tokens, {scored:,} scored")
    return rows, held_out


# ------------------------------------------------------------------------------------------------------------
# Model and adapter


def load_base(recipe: Recipe, folder: Path, tokenizer: Any, dtype: str, device: torch.device) -> Base:
    began = time.perf_counter()
    base = base_model.load(folder, recipe.model, tasks.build(recipe.task).model_class, dtype, device)
    if recipe.model.quantize == "none":
        base.model.to(device)
    check_tokenizer(tokenizer, base.model.get_input_embeddings().num_embeddings)
    held = dtype if recipe.model.quantize == "none" else f"{recipe.model.quantize}, the rest {dtype}"
    say(f"model     {recipe.model.path} in {held}, loaded in {time.perf_counter() - began:.1f} s")
    return base


def attach_adapter(recipe: Recipe, base: Base, total_steps: int) -> Adapter:
    """The adapter of the recipe on the model, new or continued from `start_from`."""
    section: Any = recipe.adapter
    seed = recipe.training.seed
    if section.method == "full":
        return attach(section, base.model, [], seed, stored_config=base.config)
    planned = {"total_steps": total_steps} if section.method == "adalora" else {}
    whole, problems = whole_modules(base.model, section.train_also)
    if problems:
        raise RecipeError(recipe.problem("adapter.train_also", message) for message in problems)
    if section.start_from is None:
        targets = choose_targets(recipe, base.layers)
        return attach(section, base.model, targets, seed, train_also=whole, **planned)
    from lorakit.adapters.lora import read_adapter

    there = read_adapter(Path(section.start_from), base.layers)
    if not there.factors:
        raise RecipeError([recipe.problem("adapter.start_from", "it adapts no layer")])
    if found := check_start(recipe, base.layers, there.targets, there.scaling, whole, there.train_also):
        raise RecipeError(found)
    if section.method == "adalora":
        alpha = 2.0 * section.init_rank if section.alpha == "auto" else section.alpha
        targets = [Target(target.layer, section.init_rank, alpha) for target in there.targets]
        adapter = attach(section, base.model, targets, seed, train_also=there.train_also, **planned)
        adapter.continue_from(there.factors, there.whole)  # type: ignore[attr-defined]
        return adapter
    section = section.model_copy(update={"scaling": there.scaling})
    adapter = attach(section, base.model, there.targets, seed, train_also=there.train_also)
    adapter.load_state(there.tensors)
    return adapter


def isolation(
    recipe: Recipe, base: Base, longest: int, autocast: Callable[[], AbstractContextManager[Any]]
) -> str:
    """Empty when packed documents were proved not to see each other in this model, else why rows are padded.

    `longest`: tokens of the longest sample, which a window that only the model's mask knows must not cut.
    """
    if not recipe.data.packing or recipe.model.attention != "auto":
        return ""
    text = base.config.get_text_config()
    shape = dimensions(base.config)
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    with autocast():
        return attention.prove_isolation(
            base.model, shape.num_layers, shape.vocabulary, bool(base.experts), window or 0, longest
        )


def settle(model: Any, decisions: Decisions, device: torch.device) -> None:
    """Put the model into the state that was decided."""
    if decisions["data.packing"].value:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    if decisions["training.gradient_checkpointing"].value:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if decisions["training.deterministic"].value and device.type == "cuda":
        torch.use_deterministic_algorithms(True)


def facts_of(ready: Prepared, ranks: Accelerator) -> dict[str, Any]:
    """What run.json says of rows, model and machine; some must be the same for a run to continue."""
    rows, held_out = ready.rows, ready.held_out
    return {
        "fingerprints": {
            "model": ready.base.fingerprint,
            "train": rows.tokens.fingerprint(),
            "eval": held_out.tokens.fingerprint() if held_out else None,
        },
        "num_ranks": ranks.num_processes,
        "device": describe(ranks.device),
        "rows": rows.account.rows(),
        "eval_rows": held_out.account.rows() if held_out else None,
    }
