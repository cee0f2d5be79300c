"""Rules on the rest: how the base is held, what the rows need, the optimizer, how long."""

import math

import numpy as np

from lorakit.advice import (
    DATA,
    PEFT,
    QLORA,
    STEPS,
    TML,
    TOOLS,
    Advice,
    Rule,
    change,
    keep,
)
from lorakit.advice.facts import Facts
from lorakit.advice.passes import more_passes_than_helped, seen_often_unwatched
from lorakit.advice.rates import ADAM
from lorakit.recipe.optimizer import OPTIMIZERS

SMALL_BASE = 300_000_000  # parameters: what 4 bits save of them is less than half a gigabyte
SMALL_STATE = 500_000_000  # bytes that are not worth rounding for
LARGE_BATCH, ADVISED_BATCH = 64, 32
FEWEST_STEPS = 50


# ------------------------------------------------------------------------------------------------------------
# The base


def fp4_instead_of_nf4(facts: Facts) -> Advice | None:
    if facts.recipe.model.quantize != "fp4":
        return None
    why = "at the same size NF4 loses less: perplexity 27.41 against 31.07, MMLU 53.1 against 52.2"
    return change(facts, "model.quantize", "nf4", why, f"{QLORA}, tables 2 and 4", "high")


def constants_not_quantized(facts: Facts) -> Advice | None:
    model = facts.recipe.model
    if model.quantize not in ("nf4", "fp4") or model.double_quant:
        return None
    saved = f" ({facts.base.shapes.num_parameters * 0.373 / 8e9:.2g} GB here)" if facts.base else ""
    why = f"saves 0.37 bit per parameter{saved} and costs no score"
    return change(facts, "model.double_quant", True, why, f"{QLORA}, tables 2 and 4", "high")


def small_base_quantized(facts: Facts) -> Advice | None:
    model = facts.recipe.model
    if model.quantize == "none" or facts.base is None:
        return None
    number = facts.base.shapes.num_parameters
    written = [
        name
        for name in ("double_quant", "compute_dtype")
        if facts.recipe.written(f"model.{name}") is not None
    ]
    if number >= SMALL_BASE or written or facts.value("adapter.init") == "loftq":
        return None
    why = f"of {number:,} parameters it saves {1.5 * number / 1e9:.2g} GB, and a step takes longer"
    return change(
        facts, "model.quantize", "none", why, "counted; Raschka 2023: 33 % of memory, 39 % of time", "low"
    )


def base_held_in_fp32(facts: Facts) -> Advice | None:
    if facts.recipe.written("model.dtype") != "fp32" or facts.method == "full" or facts.base is None:
        return None
    if facts.base.stored != "bfloat16" or facts.recipe.training.precision != "auto":
        return None
    why = "stored in bf16: fp32 holds the same numbers in twice the memory. Adapters are fp32 anyway"
    return change(facts, "model.dtype", "auto", why, "arithmetic", "medium")


# ------------------------------------------------------------------------------------------------------------
# The rows


def rows_longer_than_allowed(facts: Facts) -> Advice | None:
    """What on_long does to which share of the rows; 1 of 100 may be cut or dropped without a word."""
    if facts.rows is None:
        return None
    section, lengths = facts.recipe.data, facts.rows.lengths
    share = float((lengths > section.max_length).mean())
    stops = section.on_long == "error"
    if not share or (share <= 0.01 and not stops):
        return None
    wanted = int(lengths.max()) if stops else int(np.quantile(lengths, 0.995, method="higher"))
    room = (facts.base and facts.base.context) or UNLIMITED
    advised = max(section.max_length, min(64 * math.ceil(wanted / 64), room))
    number = int((lengths > section.max_length).sum())
    does = {"error": "which stops the run", "truncate": "and lose their end", "drop": "and are left out"}
    why = f"{number:,} of {len(lengths):,} samples ({100 * share:.3g} %) are longer, {does[section.on_long]}"
    why += f"; the longest has {lengths.max():,} tokens"
    beyond = float((lengths > advised).mean())
    if stops and beyond:  # the model's context ends before they do
        action = "drop" if beyond <= 0.5 else "truncate"
        if advised == section.max_length:
            return change(facts, "data.on_long", action, f"{why}, the model takes {room:,}", DATA, "high")
        return change(facts, "data.max_length", advised, why, DATA, "high", data__on_long=action)
    if advised == section.max_length:
        return None
    return change(facts, "data.max_length", advised, why, DATA, "high")


UNLIMITED = 1 << 62


def rows_padded(facts: Facts) -> Advice | None:
    if facts.recipe.data.packing or facts.rows is None or facts.recipe.model.attention != "auto":
        return None
    mean, longest = float(facts.rows.lengths.mean()), int(facts.rows.lengths.max())
    if mean > 0.8 * longest:
        return None
    lengths = f"samples have {mean:,.0f} tokens on average, the longest {longest:,}"
    why = f"{lengths}: padding is work, and the updates are the same"
    return change(facts, "data.packing", True, why, f"{DATA}; lorakit's tests", "high")


def nothing_held_out(facts: Facts) -> Advice | None:
    if facts.recipe.data.eval is not None or facts.rows is None or facts.rows.stream:
        return None
    number = facts.rows.distinct
    if number < 100:
        return None
    share = 0.1 if number < 1000 else 0.05
    why = f"nothing says when to stop, and adapter/ is the last step; {share:g} of {number:,} samples will do"
    return change(facts, "data.eval", share, why, DATA, "high")


def stopping_that_cannot_happen(facts: Facts) -> Advice | None:
    patience, every = facts.recipe.eval.early_stopping, facts.recipe.eval.every
    if not patience or facts.steps is None or (facts.steps - 1) // every > patience:
        return None
    advised = max(1, facts.steps // (4 * patience))
    if advised >= every or (facts.steps - 1) // advised <= patience:
        return None
    number = -(-facts.steps // every)  # the last step ends in one, too
    why = f"of {facts.steps:,} steps {number} end in an evaluation: too few for {patience} in a row to fail"
    return change(facts, "eval.every", advised, why, STEPS, "high")


# ------------------------------------------------------------------------------------------------------------
# The optimizer


def large_batch(facts: Facts) -> Advice | None:
    if facts.method == "full" or facts.recipe.training.batch_size <= LARGE_BATCH:
        return None
    why = "LoRA falls behind full fine-tuning as the batch grows, and no rank makes up for it"
    return change(facts, "training.batch_size", ADVISED_BATCH, why, f"{TML}; TRL's guide", "medium")


def few_steps(facts: Facts) -> Advice | None:
    """Where the rows make few steps; a number of steps that was written is meant."""
    batch = facts.recipe.training.batch_size
    if facts.recipe.training.max_steps is not None or facts.steps is None or facts.samples is None:
        return None
    if facts.steps >= FEWEST_STEPS or batch <= 4:
        return None
    epochs, advised = facts.recipe.training.epochs, batch
    while advised > 4 and -(-facts.samples // advised) * epochs < FEWEST_STEPS:
        advised = max(4, advised // 2)
    number = -(-facts.samples // advised) * epochs
    why = f"{facts.steps:,} steps, warm-up and decay among them, are few; {number:,} small ones suit LoRA"
    return change(
        facts, "training.batch_size", advised, why, f"{STEPS}; small batches suit LoRA: {TML}", "low"
    )


def optimizer_matters_little(facts: Facts) -> Advice | None:
    said = {
        "sgd": "SGD and AdamW ended alike on LoRA; its learning rate is to be searched anew for every model",
        "adafactor": "it saves state, of which an adapter has little; no gain on LoRA is known",
        "lion": "its gains were shown for large batches, which LoRA does not like",
        "sophia": "twice as fast was shown for pre-training from scratch; on LoRA optimizers matter little",
    }
    name = facts.recipe.optimizer.name
    if name not in said or facts.method == "full":
        return None
    source = "; ".join(filter(None, ("Raschka 2023", OPTIMIZERS[name].source)))
    return keep(facts, "optimizer.name", said[name], source, "medium")


def state_that_is_small_already(facts: Facts) -> Advice | None:
    name = facts.recipe.optimizer.name
    if name not in ("adamw_8bit", "paged_adamw_8bit") or facts.trainable is None:
        return None
    plain, rounded = (
        sum(OPTIMIZERS[other].state_bytes(facts.recipe.optimizer, shape) for shape in facts.trained_shapes)
        for other in ("adamw", name)
    )
    saved = plain - rounded
    if saved >= SMALL_STATE:
        return None
    why = f"8 bits save {saved / 1e6:,.3g} MB of the means of {facts.trainable:,} parameters, and round them"
    if not saved:
        why = "it saves nothing here: every matrix has less than 4,096 numbers, and those keep 32 bits"
    return change(facts, "optimizer.name", "adamw", why, "counted from your model", "medium")


def strong_decay(facts: Facts) -> Advice | None:
    decay = facts.value("optimizer.weight_decay")
    if decay is None or decay <= 0.1 or facts.recipe.optimizer.name not in ADAM:
        return None
    why = "0 in QLoRA, at most 0.01 in most tools, 0.1 in PEFT's benchmark; it pulls towards the base"
    return change(facts, "optimizer.weight_decay", 0.0, why, f"{QLORA}; {TOOLS}", "low")


def clipping(facts: Facts) -> Advice | None:
    norm = facts.value("optimizer.max_grad_norm")
    if norm is not None and 0.1 <= norm <= 10:
        return None
    why = "0.3 in QLoRA, 1 in most tools; a single bad batch otherwise moves Adam's means for long"
    return change(facts, "optimizer.max_grad_norm", 1.0, why, f"{QLORA}; {TOOLS}", "low")


def long_warmup(facts: Facts) -> Advice | None:
    if facts.recipe.schedule.name == "inverse-sqrt":  # whose fall the warm-up decides
        return None
    warmup = facts.recipe.schedule.warmup
    share = warmup / (facts.steps or math.inf) if isinstance(warmup, int) else warmup
    if share <= 0.2:
        return None
    why = f"{100 * share:.3g} % of the run is below its learning rate; 3 to 6 % is what the papers have"
    return change(facts, "schedule.warmup", 0.03, why, f"{QLORA}; LoRA's scripts", "low")


def schedule_matters_little(facts: Facts) -> Advice | None:
    name = facts.recipe.written("schedule.name")
    if name in (None, "cosine"):
        return None
    why = "schedules of every shape are in use, with little between them; the learning rate counts"
    return keep(facts, "schedule.name", why, f"{QLORA} and {TML} constant, {PEFT} cosine", "medium")


RULES: tuple[Rule, ...] = (
    small_base_quantized,
    fp4_instead_of_nf4,
    constants_not_quantized,
    base_held_in_fp32,
    rows_longer_than_allowed,
    rows_padded,
    nothing_held_out,
    large_batch,
    more_passes_than_helped,
    seen_often_unwatched,
    few_steps,
    stopping_that_cannot_happen,
    optimizer_matters_little,
    state_that_is_small_already,
    strong_decay,
    clipping,
    long_warmup,
    schedule_matters_little,
)
