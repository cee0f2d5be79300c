"""Wiring: recipe -> tokens -> model -> adapter -> plan -> loop -> what the run leaves. Read it from top to
bottom.

All ranks of a torchrun walk through here alike; rank 0 alone writes. Whatever a user got wrong is found
before step 0.
"""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from lorakit import loop, optim, report, runs
from lorakit.data import account_lines
from lorakit.data.batches import StreamEnded
from lorakit.data.stream import Stream
from lorakit.devices import on_rank_0, start_ranks
from lorakit.errors import Interrupted, RunError, out_of_memory
from lorakit.evaluate import evaluate
from lorakit.prepare import batches_of, facts_of, prepare
from lorakit.probe import RunProbe
from lorakit.recipe import Recipe, load_recipe
from lorakit.signals import Stop, listen
from lorakit.terminal import say
from lorakit.tokenizer import quiet
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
        quiet()
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

    # Continue where a run stopped, or begin; then write what will be done.
    facts = facts_of(ready, ranks)
    if record:
        runs.check_facts(record, facts)
    continued = continue_from(resume, output, record)
    preparing = adapter.prepares and continued is None
    if preparing:
        adapter.prepare(RunProbe(ready, recipe, ranks))
    optimizer, state = restore(continued, adapter, recipe.optimizer)
    params = report.parameters(adapter, ready.num_base)
    runs.check_space(output, disk_needed(recipe, adapter, params["total"]), product(recipe))
    ranks.wait_for_everyone()  # all have read the checkpoint before rank 0 deletes what is later
    account = account_lines(ready.rows, ready.held_out)
    told = (recipe, plan, params, facts, account)
    on_rank_0(ranks, lambda: begin(run, *told, continued) if run else None)
    adapted = {target.layer.name for target in adapter.targets}
    experts = [name for name in ready.base.experts if name not in adapted]
    announce(recipe, plan, params, experts, output)

    # What the loop calls: pure functions of a step, and sums over ranks.
    batches, held_out = batches_of(ready, recipe, ranks)
    stream = ready.rows.stream
    if stream:
        stream.open_journal(output / "stream.jsonl")
        ranks.wait_for_everyone()  # all have read the journal before rank 0 replaces it
        if run:
            stream.keep_journal(output / "stream.jsonl")

    def lr_at(step: int) -> float:
        phases = (plan.warmup_steps, plan.total_steps, plan.decay_steps)
        floor = getattr(recipe.schedule, "floor", 0.0)
        return optim.lr_at(step, recipe.schedule.name, recipe.optimizer.lr, *phases, floor)

    def all_ranks_sum(tensor: Tensor) -> Tensor:
        summed: Tensor = ranks.reduce(tensor, "sum")
        return summed

    def held_out_loss() -> dict[str, float]:
        assert held_out is not None
        micros = held_out.every_sample()
        return evaluate(ready.objective, micros, ranks.device, ready.autocast, all_ranks_sum)

    writer = Writer(
        run=run,
        ranks=ranks,
        recipe=recipe,
        plan=plan,
        params=params,
        base_fingerprint=ready.base.fingerprint,
        adapter=adapter,
        optimizer=optimizer,
        tokenizer=ready.tokenizer,
    )
    if recipe.log.trackers:
        ranks.init_trackers(output.name)
    if preparing:
        writer.checkpoint(state)
    stop.arm()
    with writer.shown(state):
        try:
            outcome = loop.run(
                objective=ranks.prepare(ready.objective),
                adapter=adapter,
                optimizer=optimizer,
                batch_at=batches.at,
                lr_at=lr_at,
                evaluate=held_out_loss if held_out else None,
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
                deferred=ranks.device.type == "cuda" and optim.looks_at_found_inf(optimizer),
                autocast=ready.autocast,
                rank=ranks.process_index,
                num_ranks=ranks.num_processes,
                all_ranks_sum=all_ranks_sum,
                stop_requested=lambda: stop.requested,
            )
        except loop.NotFinite as error:
            raise with_rows(error, batches.data, output) from None
        except StreamEnded as error:  # what was trained until here is not lost
            writer.checkpoint(state)
            assert stream is not None
            tell_stream(stream, run)
            raise StreamEnded(error.message, cured(error.hint, stream, output)) from None
    if stream:
        tell_stream(stream, run)
    writer.close(outcome, state)
    return outcome


# ------------------------------------------------------------------------------------------------------------
# Streams


def tell_stream(stream: Stream, run: runs.Run | None) -> None:
    """Say what became of all rows of the stream, and record it; the account of the first rows, with their
    lengths and repetitions, stays beside it."""
    account = stream.account()
    for line in (str(account), *(f"first {kind}: {told}" for kind, told in account.first.items())):
        say(f"stream    {line}")
    for line in stream.lines():
        say(f"stream    {line}")
    if run is not None:
        before = run.record()["account"]
        whole = {"train": account.as_dict(), "first_rows": before["train"], "eval": before["eval"]}
        run.update(rows=account.rows(), account=whole)


def cured(hint: str, stream: Stream, output: Path) -> str:
    """The hint for rows further on that cannot be trained, with the command that gets past them."""
    kinds = stream.reading.fatal_kinds
    if "dropped" in kinds:
        return f"{hint}\n  That is for a new run, with --output: the rows of this one would be others."
    skipped = " --set data.on_bad_row=skip" if kinds else ""
    return f"{hint}\n  {runs.continue_hint(output)}{skipped}"


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
