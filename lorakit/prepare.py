"""All that stands before step 0: tokens, model, adapter, plan. Bad input is found here, cheapest first."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from lorakit import base_model, data, fast, model_files, tasks
from lorakit.adapters import Adapter, attach
from lorakit.base_model import Base
from lorakit.data.batches import Batches, StreamBatches, first_tokens, heaviest
from lorakit.data.render import check_tokenizer
from lorakit.data.tokens import TokenData
from lorakit.devices import agree, autocast_for, describe, hardware_of, peak_bytes, unanimous
from lorakit.errors import RecipeError
from lorakit.fast import Autocast, FastPaths
from lorakit.kernels import attention
from lorakit.layers import dimensions, moving_parameters, num_parameters, whole_modules
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
from lorakit.recipe import Recipe
from lorakit.recipe.adapter import too_few_rows, too_few_steps
from lorakit.recipe.optimizer import elsewhere
from lorakit.recipe.traits import TRAITS
from lorakit.targets import Target, select_rows
from lorakit.tasks import Objective
from lorakit.terminal import say
from lorakit.tokenizer import load_tokenizer, token_ids


@dataclass(frozen=True)
class Prepared:
    """All that stands before step 0."""

    tokenizer: Any
    rows: data.Loaded
    held_out: data.Loaded | None
    base: Base
    adapter: Adapter
    objective: Objective
    autocast: Callable[[], AbstractContextManager[Any]]
    plan: Plan
    num_base: int  # parameters of the base


def prepare(recipe: Recipe, record: dict[str, Any], ranks: Accelerator) -> Prepared:
    """Tokens, model, adapter and plan. `record` is run.json of the run to continue: what it decided holds."""
    hardware = hardware_of(ranks.device)
    if found := [recipe.problem(*one) for one in elsewhere(recipe.optimizer, hardware.device)]:
        raise RecipeError(found)
    # Data first: a bad row costs seconds to find, a model minutes to load.
    folder = model_files.locate(recipe.model)
    tokenizer = load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    tokens = tokens_of(recipe, tokenizer)
    rows, held_out = load_rows(recipe, tokenizer)
    total_steps = count_steps(recipe, rows.tokens.num_draws)
    few = [*too_few_steps(recipe.adapter, total_steps)]
    few += too_few_rows(recipe.adapter, rows.tokens.num_draws)
    if few:
        raise RecipeError(recipe.problem(*found) for found in few)

    decisions = {name: Decision(**d) for name, d in record.get("decisions", {}).items()}
    if not decisions:
        decisions = agree(ranks, choose_precision(recipe, model_files.stored_dtype(folder), hardware))
    precision = decisions["training.precision"].value
    base = load_base(recipe, folder, tokenizer, decisions["model.dtype"].value, ranks.device)
    data.check_context(base.config.to_dict(), base.layers, rows, held_out)
    num_base = num_parameters(base.model, base.layers)
    adapter = attach_adapter(recipe, base, total_steps, tokens)
    autocast = autocast_for(precision, ranks.device)
    adapter.try_out(base.model, autocast)

    if "data.packing" not in decisions:
        longest = max(longest_of(recipe, rows), longest_of(recipe, held_out))
        isolated = isolation(recipe, base, longest, autocast)
        shape = dimensions(base.config)
        layout = choose_layout(recipe, precision, longest, shape, hardware, isolated)
        decisions = agree(ranks, decisions | choose_data(recipe, rows.format, rows.why) | layout)
    settle(base.model, decisions, ranks.device)
    objective = Objective(base.model, tasks.build(recipe.task))
    autocast, decisions = fast_paths(recipe, objective, adapter, rows.tokens, autocast, decisions, ranks)
    plan = make_plan(recipe, 0 if rows.stream else rows.tokens.num_draws, decisions)
    ready = Prepared(tokenizer, rows, held_out, base, adapter, objective, autocast, plan, num_base)
    try_heaviest(ready, recipe, ranks.device)
    return ready


# ------------------------------------------------------------------------------------------------------------
# Data


def load_rows(recipe: Recipe, tokenizer: Any) -> tuple[data.Loaded, data.Loaded | None]:
    """Training rows and held-out rows as tokens, with their account."""
    check_tokenizer(tokenizer)
    rows, held_out = data.load_parts(recipe, tokenizer)
    data.check_ends(rows, recipe.data)
    say("\n".join(data.account_lines(rows, held_out)) + "\n")
    return rows, held_out


def batches_of(
    ready: Prepared, recipe: Recipe, ranks: Accelerator
) -> tuple[Batches | StreamBatches, Batches | None]:
    """(the plan over the training rows, the one over the held-out rows) of this rank."""
    shared: Any = {
        "batch_size": recipe.training.batch_size,
        "micro_batch_tokens": ready.plan["training.micro_batch_tokens"],
        "packing": ready.plan["data.packing"],
        "rank": ranks.process_index,
        "num_ranks": ranks.num_processes,
    }
    rows, held_out, seed = ready.rows, ready.held_out, recipe.training.seed
    return (
        StreamBatches(rows.stream, **shared) if rows.stream else Batches(rows.tokens, seed=seed, **shared),
        Batches(held_out.tokens, seed=seed, **shared) if held_out else None,
    )


def longest_of(recipe: Recipe, rows: data.Loaded | None) -> int:
    """Tokens of the longest sample; of a stream, of the longest that may come."""
    if rows is None:
        return 0
    return recipe.data.max_length if rows.stream else int(rows.tokens.lengths.max())


def try_heaviest(ready: Prepared, recipe: Recipe, device: torch.device) -> None:
    """Forward and backward of what needs the most memory, before step 0: it runs out now or never.

    Nothing stays of it: gradients are dropped, and the loop seeds every draw.
    """
    tokens, plan, batch_size = ready.rows.tokens, ready.plan, recipe.training.batch_size
    lengths, num_targets = tokens.lengths, tokens.num_targets
    if ready.rows.stream:  # what may come
        lengths = np.full(batch_size, recipe.data.max_length)
        num_targets = lengths - 1
    ids, budget = tokens.sample(0)[0], plan["training.micro_batch_tokens"]
    micros = heaviest(lengths, num_targets, ids, budget, batch_size, plan["data.packing"])
    ready.objective.train()
    draws = [False, True] if recipe.optimizer.name == "sophia" else [False]
    for micro, drawn in product(micros, draws):
        places = [torch.zeros(len(micro.targets), dtype=torch.float64, device=device)] if drawn else []
        with ready.autocast():
            loss = ready.objective(micro.to(device), *places)
        loss.backward()
        for item in ready.adapter.trained():
            item.parameter.grad = None
    most = max(micro.input_ids.numel() for micro in micros)
    say(f"trial     {most:,} tokens at once, the most of this run, fit: {peak_bytes() / 1e9:.2f} GB so far")


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


def tokens_of(recipe: Recipe, tokenizer: Any) -> list[int]:
    """The tokens whose rows of the embedding are trained. Raises: RecipeError for a text that is not one."""
    ids, problems = token_ids(tokenizer, getattr(recipe.adapter, "train_tokens", ()))
    if problems:
        raise RecipeError(recipe.problem("adapter.train_tokens", message) for message in problems)
    return ids


def attach_adapter(recipe: Recipe, base: Base, total_steps: int, tokens: Sequence[int] = ()) -> Adapter:
    """The adapter of the recipe on the model, new or continued from `start_from`. `tokens`: rows of the input
    embedding that the recipe trains."""
    section: Any = recipe.adapter
    seed = recipe.training.seed
    if section.method == "full":
        moving, problems = moving_parameters(base.model, section.train_only)
        if problems:
            raise RecipeError(recipe.problem("adapter.train_only", message) for message in problems)
        return attach(section, base.model, [], seed, moving=moving, stored_config=base.config)
    planned = {"total_steps": total_steps} if TRAITS[section.method].scheduled else {}
    whole, problems = whole_modules(base.model, section.train_also)
    if problems:
        raise RecipeError(recipe.problem("adapter.train_also", message) for message in problems)
    if getattr(section, "start_from", None) is None:
        targets = choose_targets(recipe, base.layers, whole)
        moved = [*(target.layer.name for target in targets), *whole]
        tied = bool(base.config.get_text_config().tie_word_embeddings)
        _, problems = select_rows(base.layers, tokens, tied, moved)
        if problems:
            raise RecipeError(recipe.problem("adapter.train_tokens", message) for message in problems)
        rows = {"tokens": tokens} if tokens else {}
        return attach(section, base.model, targets, seed, train_also=whole, **planned, **rows)
    from lorakit.adapters.lora_files import read_adapter, revived

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
    rows = {"tokens": there.tokens} if there.tokens else {}
    adapter = attach(section, base.model, there.targets, seed, train_also=there.train_also, **rows)
    tensors, num_dead = revived(there.tensors, adapter.state())
    if num_dead:
        say(f"note      {num_dead:,} directions of start_from are zero and start anew")
    adapter.load_state(tensors)
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


def fast_paths(
    recipe: Recipe,
    objective: Objective,
    adapter: Adapter,
    tokens: TokenData,
    autocast: Autocast,
    decisions: Decisions,
    ranks: Accelerator,
) -> tuple[Autocast, Decisions]:
    """Switch the fast paths as decided: (what the model must run in; the decisions with all verdicts)."""
    if recipe.training.fast == "off":
        return autocast, decisions | dict.fromkeys(fast.PATHS, Decision(False, "as the recipe says"))
    micro = first_tokens(tokens, fast.NUM_TOKENS, decisions["data.packing"].value).to(ranks.device)
    paths = FastPaths(objective, adapter, micro, autocast)
    if not any(name in decisions for name in fast.PATHS):
        precision = decisions["training.precision"].value
        decisions = decisions | unanimous(ranks, fast.choose(paths, adapter, micro, precision))
    # Only what is there: the run may go on on another device.
    paths.switch([name for name in paths.available() if name in decisions and decisions[name].value])
    return paths.autocast, decisions


def facts_of(ready: Prepared, ranks: Accelerator) -> dict[str, Any]:
    """What run.json says of rows, model and machine; some must be the same for a run to continue."""
    rows, held_out = ready.rows, ready.held_out
    return {
        "fingerprints": {
            "model": ready.base.fingerprint,
            "train": rows.stream.fingerprint() if rows.stream else rows.tokens.fingerprint(),
            "eval": held_out.tokens.fingerprint() if held_out else None,
        },
        "num_ranks": ranks.num_processes,
        "device": describe(ranks.device),
        "rows": rows.account.rows(),
        "eval_rows": held_out.account.rows() if held_out else None,
        "account": {
            "train": rows.account.as_dict(),
            "eval": held_out.account.as_dict() if held_out else None,
        },
    }
