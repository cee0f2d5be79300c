"""Rules on the adapter: its method, where it sits, how large it is, how strongly it acts."""

from dataclasses import replace
from typing import Any

from lorakit.advice import (
    ADALORA,
    BIDERMAN,
    DATA,
    LORA,
    PEFT,
    PISSA,
    QLORA,
    STEPS,
    TML,
    VERA,
    Advice,
    Rule,
    change,
    keep,
)
from lorakit.advice.facts import Facts
from lorakit.recipe.adapter import METHOD_SECTIONS
from lorakit.recipe.inits import INITS
from lorakit.recipe.methods import auto_alpha, phases
from lorakit.targets import is_attention, select

PRODUCTS = ("lora", "dora", "lora-fa", "delta-lora", "lora-drop")  # rank, alpha, targets as LoRA has them
FEW = 5000  # samples of a small data set
SWEPT_ALPHA = 32  # of the learning-rate sweeps, at every rank
SMALLEST_ALPHA, LARGEST_ALPHA = 8, 512  # scale * rank: PEFT's default; twice the rank at 256
LARGEST_RANK = 256  # the largest that the comparisons tried
PRUNING_STEPS = 200  # below that AdaLoRA has few decisions, and little time after them


def _starts_fresh(facts: Facts) -> bool:
    """Whether rank, alpha and targets are the recipe's to say."""
    return not facts.value("adapter.start_from")


def _lora_instead(facts: Facts) -> dict[str, Any]:
    """The section `adapter` with method lora and all that was written and LoRA has too; for AdaLoRA, whose
    ranks have other names and defaults, with the rank that it aims at."""
    fields = METHOD_SECTIONS["lora"].model_fields
    written = facts.recipe.written("adapter") or {}
    kept = {name: value for name, value in written.items() if name in fields}
    aim = {"rank": facts.adapter.target_rank} if facts.method == "adalora" else {}
    return kept | aim | {"method": "lora"}


def _to_lora(facts: Facts, why: str, source: str, confidence: Any) -> Advice:
    settings = {"adapter": _lora_instead(facts)}
    return Advice("adapter.method", facts.method, "lora", why, source, confidence, settings)


# ------------------------------------------------------------------------------------------------------------
# Which method


def full_on_few_rows(facts: Facts) -> Advice | None:
    if facts.method != "full" or facts.value("adapter.train_only") or facts.samples is None:
        return None
    if facts.samples >= FEW:
        return None
    size = f": 16 bytes for each of {facts.base.shapes.num_parameters:,} parameters" if facts.base else ""
    why = (
        f"for tasks near what the base can do LoRA ends where full fine-tuning does (0.478, 0.472 on GSM8K),"
        f" and {facts.samples:,} samples are few{size}. Not so on lorakit's own tiny base: 1.343, full 1.064"
    )
    return _to_lora(facts, why, f"{TML}; {PEFT}; scripts/compare_methods.py", "low")


def dora_of_high_rank(facts: Facts) -> Advice | None:
    if facts.method != "dora" or facts.adapter.rank < 32 or not _starts_fresh(facts):
        return None
    why = "DoRA's gains are those of small ranks; at 32 it had 0.469 and LoRA 0.478, at 1.26 times the time"
    return _to_lora(facts, why, f"{PEFT}; DoRA 2402.09353", "medium")


def lora_fa_saves_little(facts: Facts) -> Advice | None:
    if facts.method != "lora-fa" or not _starts_fresh(facts):
        return None
    why = "at rank 32 LoRA-FA had 0.404 in 13.38 GiB, LoRA 0.478 in 13.41: it learns less and saves little"
    return _to_lora(facts, why, PEFT, "medium")


def vera_for_size_alone(facts: Facts) -> Advice | None:
    if facts.method != "vera":
        return None
    why = (
        "0.354 against LoRA's 0.478, with 0.13M parameters against 9.2M: for many small adapters, not scores"
    )
    return keep(facts, "adapter.method", why, f"{PEFT}; {VERA}", "medium")


def delta_lora_is_a_scale(facts: Facts) -> Advice | None:
    if facts.method != "delta-lora" or facts.adapter.start != 0:  # from a later step on, W_K is in it
        return None
    ratio = facts.adapter.delta_ratio
    why = f"under Adam it trains as LoRA with {1 + ratio:g} times the alpha, which costs nothing"
    return keep(facts, "adapter.method", why, "proof, and test in tests/oracles", "high")


def adalora_in_few_steps(facts: Facts) -> Advice | None:
    if facts.method != "adalora" or facts.steps is None or facts.steps >= PRUNING_STEPS:
        return None
    if not _starts_fresh(facts):
        return None
    why = f"{facts.steps:,} steps are few to find out which ranks matter: its papers' runs have thousands"
    return _to_lora(facts, why, f"{ADALORA}; {STEPS}", "low")


# ------------------------------------------------------------------------------------------------------------
# Where


def targets_without_mlp(facts: Facts) -> Advice | None:
    if facts.method not in (*PRODUCTS, "adalora") or not _starts_fresh(facts):
        return None
    if not _attention_alone(facts):
        return None
    why = "MLP layers carry most of what is learned: at equal size 0.494 for the MLP, 0.478 for q and v"
    if _query_and_key_alone(facts):
        why = "Wq and Wk are the worse pair (71.4 on WikiSQL; Wq and Wv 73.7), and the MLP is better yet"
    sources = f"{QLORA}, section 4; {TML}; {PEFT}; {LORA}, table 5"
    return change(facts, "adapter.targets", "all-linear", why, sources, "high")


def _attention_alone(facts: Facts) -> bool:
    """Whether attention is adapted and nothing else, though there is more."""
    targets = facts.adapter.targets
    if facts.value("adapter.target_parameters"):
        return False
    if facts.base is None:  # by the names that are common
        names = [targets] if isinstance(targets, str) else targets
        return all(name == "attention" or name in _ATTENTION for name in names)
    every, _ = select(facts.base.shapes.layers, "all-linear")
    more = any(not is_attention(layer.name) for layer in every)
    return more and all(is_attention(target.layer.name) for target in facts.targets)


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value")


def _query_and_key_alone(facts: Facts) -> bool:
    targets = facts.adapter.targets
    return not isinstance(targets, str) and set(targets) == {"q_proj", "k_proj"}


# ------------------------------------------------------------------------------------------------------------
# How large


def rank_for_the_data(facts: Facts) -> Advice | None:
    """The smallest power of two whose parameters hold the data, at 2 bits each and 1 bit per token."""
    if facts.method not in PRODUCTS or not _starts_fresh(facts):
        return None
    if not facts.trainable or not facts.trained_tokens or 2 * facts.trainable >= facts.trained_tokens:
        return None
    rank = facts.adapter.rank
    lacking = facts.trained_tokens / 2 - facts.trainable
    needed = rank + lacking / max(1, facts.per_rank)
    advised = min(_power_of_two(needed), LARGEST_RANK, facts.largest_rank)
    if advised <= rank:
        return None
    why = (
        f"{facts.trained_tokens:,} different trained tokens are about as many bits; rank {rank} holds"
        f" {2 * facts.trainable:,} at most (2 per parameter), {needed:,.0f} would do"
    )
    item = change(facts, "adapter.rank", advised, why, f"{DATA}; rule of {TML}", "medium")
    return replace(item, settings={**item.settings, **_same_steps(facts, advised)})


def _same_steps(facts: Facts, rank: int) -> dict[str, Any]:
    """What keeps Adam's steps of W as they are at another rank: scale * rank (Facts.step_alpha); of factors
    that start in W, the scale. What is auto and stays so by itself, is not written."""
    adapter = facts.adapter
    before, _ = auto_alpha(adapter)
    of_new, _ = auto_alpha(adapter.model_copy(update={"rank": rank}))
    power = 0.5 if adapter.scaling == "rank_stabilized" else 1.0
    times = rank / adapter.rank
    alpha = before if adapter.alpha == "auto" else adapter.alpha
    alpha = round(alpha * times ** (power if facts.starts_in_weight else power - 1), 4)
    if alpha == (of_new if adapter.alpha == "auto" else adapter.alpha):
        return {}
    patterns = facts.value("adapter.rank_pattern")
    if not patterns or adapter.alpha != "auto" or power != 1:
        return {"adapter.alpha": alpha}
    own = {name: 2.0 * number for name, number in patterns.items()}  # auto: twice the layer's own rank
    return {"adapter.alpha": alpha, "adapter.alpha_pattern": own | dict(adapter.alpha_pattern)}


def _power_of_two(number: float) -> int:
    found = 1
    while found < number:
        found *= 2
    return found


def more_data_than_rank(facts: Facts) -> Advice | None:
    """Where no rank is enough: full fine-tuning, which is more than a field to change."""
    if facts.method not in PRODUCTS or not _starts_fresh(facts) or facts.recipe.model.quantize != "none":
        return None
    if not facts.trainable or not facts.trained_tokens or 2 * facts.trainable >= facts.trained_tokens:
        return None
    if facts.adapter.rank < min(LARGEST_RANK, facts.largest_rank):
        return None
    why = f"{facts.trained_tokens:,} trained tokens are more than this rank holds, and LoRA learns less"
    source = f"{BIDERMAN}; {DATA}"
    return Advice("adapter.method", facts.method, "full", f"{why} there", source, "low")


def rank_beyond_the_data(facts: Facts) -> Advice | None:
    if facts.method not in PRODUCTS or not _starts_fresh(facts) or facts.adapter.rank < 64:
        return None
    if not facts.trainable or not facts.trained_tokens or facts.trainable < 100 * facts.trained_tokens:
        return None
    why = f"{facts.trained_tokens:,} trained tokens need far less: it costs memory; ranks 1 to 64 end alike"
    return keep(facts, "adapter.rank", why, f"{LORA}, table 6; {DATA}", "medium")


def adalora_with_nothing_to_take(facts: Facts) -> Advice | None:
    adapter = facts.adapter
    if facts.method != "adalora" or adapter.init_rank != adapter.target_rank:
        return None
    advised = min(-(-3 * adapter.target_rank // 2), facts.largest_rank or LARGEST_RANK)
    if advised <= adapter.init_rank:
        return None
    why = "no rank is ever taken away; its budget starts at half more than it ends with"
    item = change(facts, "adapter.init_rank", advised, why, f"{ADALORA}, its scripts", "high")
    before = auto_alpha(adapter)[0] if adapter.alpha == "auto" else adapter.alpha
    kept = max(before, advised)  # but no scale below 1
    alpha = {} if kept == adapter.alpha else {"adapter.alpha": float(kept)}
    return replace(item, settings={**item.settings, **alpha})


def adalora_decides_seldom(facts: Facts) -> Advice | None:
    adapter = facts.adapter
    if facts.method != "adalora" or facts.steps is None or adapter.init_rank == adapter.target_rank:
        return None
    start, settled = phases(facts.steps, adapter.warmup, adapter.final)
    advised = max(1, (settled - start) // 10)
    if settled <= start:  # refused when the run begins
        return None
    if settled - start >= 5 * adapter.interval or advised >= adapter.interval:
        return None
    number = (settled - start) // adapter.interval
    why = f"{number} decisions on the ranks in {facts.steps:,} steps: they fall in a few large blows"
    return change(facts, "adapter.interval", advised, why, STEPS, "medium")


# ------------------------------------------------------------------------------------------------------------
# How strongly


def alpha_out_of_range(facts: Facts) -> Advice | None:
    """Read as scale * rank: alpha at standard scaling."""
    if facts.method not in PRODUCTS or not _starts_fresh(facts) or facts.step_alpha is None:
        return None
    if SMALLEST_ALPHA <= facts.step_alpha <= LARGEST_ALPHA:
        return None
    auto, _ = auto_alpha(facts.adapter)
    now = auto if facts.adapter.alpha == "auto" else facts.adapter.alpha
    found = round(now * SWEPT_ALPHA / facts.step_alpha, 4)
    advised: Any = "auto" if found == auto else found
    why = (
        f"scale times rank is {facts.step_alpha:.4g}, and Adam's steps of W go with it; the sweeps of"
        f" learning rates had {SWEPT_ALPHA} at every rank, tools {SMALLEST_ALPHA} to {LARGEST_ALPHA}"
    )
    return change(facts, "adapter.alpha", advised, why, f"{LORA}, section 4.1; {TML}", "medium")


def adalora_scale(facts: Facts) -> Advice | None:
    if facts.method != "adalora" or facts.scale is None or facts.scale >= 1:
        return None
    why = (
        f"alpha / init_rank is {facts.scale:g}, and pruning leaves it there: at 0.125 AdaLoRA had 0.373 where"
        " LoRA had 0.478; its authors' runs have 5 to 16"
    )
    return change(facts, "adapter.alpha", "auto", why, f"{PEFT}; {ADALORA}, its scripts", "high")


def adalora_penalty(facts: Facts) -> Advice | None:
    if facts.method != "adalora" or 0 < facts.adapter.orthogonal_weight <= 0.5:
        return None
    why = "the paper has 0.1, 0.3 and 0.5; without it the triplets are no singular values"
    return change(facts, "adapter.orthogonal_weight", 0.1, why, f"{ADALORA}; its scripts", "medium")


def dropout_on_few_rows(facts: Facts) -> Advice | None:
    if facts.value("adapter.dropout") != 0 or facts.samples is None or facts.samples >= 1000:
        return None
    if (facts.passes or 0) <= 1 or facts.value("adapter.target_parameters") or _refuses_dropout(facts):
        return None
    seen = f"{facts.samples:,} samples seen {facts.passes:.3g} times"
    why = f"{seen}; QLoRA found 0.05 to 0.1 useful, most tools have 0"
    return change(facts, "adapter.dropout", 0.05, why, QLORA, "low")


def dropout_too_high(facts: Facts) -> Advice | None:
    dropout = facts.value("adapter.dropout")
    if dropout is None or dropout <= 0.1:
        return None
    why = "0.1 is the highest that was found useful (up to 13B; 0.05 above); it costs memory as well"
    return change(facts, "adapter.dropout", 0.1, why, QLORA, "medium")


# ------------------------------------------------------------------------------------------------------------
# From where


def _refuses_dropout(facts: Facts) -> bool:
    start = INITS.get(facts.value("adapter.init") or "")
    return start is not None and "dropout" in start.refuses


def gaussian_is_a_larger_start(facts: Facts) -> Advice | None:
    """Standard deviation 1 / rank against 1 / sqrt(3 in) of the default."""
    if facts.value("adapter.init") != "gaussian" or facts.base is None or not facts.base.hidden:
        return None
    times = (3 * facts.base.hidden) ** 0.5 / facts.adapter.rank
    why = (
        f"with {facts.base.hidden:,} inputs A starts {times:.2g} times as large as by default; to Adam as if"
        f" B's learning rate were {times:.2g} times as high, and A's as many times lower"
    )
    return keep(facts, "adapter.init", why, f"arithmetic; invariance of Adam, {TML}", "high")


def orthogonal_matters_little(facts: Facts) -> Advice | None:
    if facts.value("adapter.init") != "orthogonal":
        return None
    why = "rows of A drawn at random are nearly orthogonal while the rank is far below the inputs"
    return keep(facts, "adapter.init", why, "arithmetic; no comparison known", "medium")


def pissa_scale(facts: Facts) -> Advice | None:
    if facts.value("adapter.init") != "pissa" or not _starts_fresh(facts) or facts.scale == 1:
        return None
    rank = facts.adapter.rank
    advised = rank if facts.adapter.scaling == "standard" else rank**0.5
    further = facts.scale**0.5 if facts.scale else 0.0
    why = f"its authors take a scale of 1; with {facts.scale:g} a step moves W {further:.3g} times as far"
    return change(facts, "adapter.alpha", float(advised), why, PISSA, "low")


def loftq_gains_little(facts: Facts) -> Advice | None:
    if facts.value("adapter.init") != "loftq":
        return None
    why = "at 4 bits 40.71 on GSM8K where QLoRA had 39.8: step 0 is nearer to the base, the end hardly better"
    return keep(facts, "adapter.init", why, f"{PISSA}, README", "low")


RULES: tuple[Rule, ...] = (
    full_on_few_rows,
    dora_of_high_rank,
    lora_fa_saves_little,
    vera_for_size_alone,
    delta_lora_is_a_scale,
    adalora_in_few_steps,
    targets_without_mlp,
    rank_for_the_data,
    more_data_than_rank,
    rank_beyond_the_data,
    adalora_with_nothing_to_take,
    adalora_decides_seldom,
    alpha_out_of_range,
    adalora_scale,
    adalora_penalty,
    dropout_on_few_rows,
    dropout_too_high,
    gaussian_is_a_larger_start,
    orthogonal_matters_little,
    pissa_scale,
    loftq_gains_little,
)
