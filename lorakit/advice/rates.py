"""Rules on the learning rate."""

from typing import Any

from lorakit.advice import ADALORA, PEFT, TINKER, TML, VERA, Advice, Rule, change
from lorakit.advice.facts import Facts
from lorakit.advice.rules import PRODUCTS, SWEPT_ALPHA

ADAM = ("adamw", "adamw_8bit", "paged_adamw_8bit")
RATE_OVER_ADAM = dict.fromkeys(ADAM, 1.0) | {"adafactor": 1.0, "lion": 0.25, "sophia": 0.5}
POWERS = {"llama": 0.781, "qwen": 0.0775}  # of the hidden size, by family
SMALLEST_SWEPT = 2048  # hidden size of Llama 3.2 1B, the smallest model of the sweeps
BEYOND_CENTRE = 5  # PEFT's best had 4.5 times it: rank 64, alpha 64 rank-stabilized, 1e-4, Llama 3.2 3B


def centre(facts: Facts) -> float | None:
    """The learning rate that LoRA's sweeps found best for a model of this family and size; None: not known.

    5e-5 · 10 · (2000 / hidden)^p, half more in runs of less than 100 steps, for alpha 32. Source:
    tinker-cookbook; TML. Below SMALLEST_SWEPT an extrapolation of that formula.
    """
    if facts.base is None or facts.base.hidden is None:
        return None
    power = next((p for family, p in POWERS.items() if facts.base.kind.startswith(family)), None)
    if power is None:
        return None
    short = 1.5 if facts.steps is not None and facts.steps < 100 else 1.0
    return float(5e-4 * (2000 / facts.base.hidden) ** power * short)


# Method -> (its rate over LoRA's, lowest, highest, where its centre is not known, why, source)
_RATES: dict[str, tuple[float, float, float, float, str, str]] = {
    **dict.fromkeys(
        PRODUCTS,
        (
            1.0,
            3e-5,
            1e-3,
            2e-4,
            "LoRA's best is about ten times full fine-tuning's, at every rank of one alpha",
            TML,
        ),
    ),
    "adalora": (2.0, 5e-4, 2.2e-3, 1e-3, "its authors' runs have 5e-4 to 2.2e-3", f"{ADALORA}, its scripts"),
    "vera": (10.0, 3e-4, 1e-2, 2e-3, "VeRA takes about ten times LoRA's", f"{VERA}; {PEFT}"),
    "full": (
        0.1,
        1e-5,
        5e-5,
        2e-5,
        "a tenth of LoRA's",
        f"{TML}; {PEFT}",
    ),
}


def learning_rate(facts: Facts) -> Advice | None:
    """Out of the range that was tried, or more than four times off what the family's sweeps found best.

    Both are for alpha 32: with Adam alpha * lr counts (Facts.step_alpha). On models narrower than those that
    were swept the formula bounds nothing from above; there only what is as large as A itself is too much,
    1 / sqrt(3 hidden), which a first step would write over.
    """
    optimizer: Any = facts.recipe.optimizer
    over_adam = RATE_OVER_ADAM.get(optimizer.name)
    if over_adam is None or facts.method not in _RATES or getattr(optimizer, "eps2", 1.0) < 1:
        return None
    alpha = (facts.step_alpha if facts.method in PRODUCTS else None) or SWEPT_ALPHA
    share = over_adam * SWEPT_ALPHA / alpha
    times, *bounds, why, source = _RATES[facts.method]
    low, high, typical = (share * bound for bound in bounds)
    best, hidden = centre(facts), facts.base and facts.base.hidden
    middle = None if best is None else share * times * best
    narrow = bool(hidden and hidden < SMALLEST_SWEPT)
    if hidden and narrow:
        high = max(high, share / (3 * hidden) ** 0.5)
    elif middle is not None:
        high = max(high, BEYOND_CENTRE * middle)
    inside = low <= optimizer.lr <= high
    if inside and (middle is None or optimizer.lr >= middle / 4):
        return None
    if over_adam != 1:
        why = f"{why}, {optimizer.name}'s is {over_adam:g} times AdamW's"
    if alpha != SWEPT_ALPHA:
        why = f"{why}; it was swept at alpha {SWEPT_ALPHA}, and scale times rank is {alpha:.4g} here"
    if narrow:
        why = f"{why}. No model as narrow as {hidden:,} was swept (the smallest: {SMALLEST_SWEPT:,})"
        why += f": {middle:.2g} is the formula, extrapolated" if middle is not None else ""
    else:
        why = f"{why}; {low:.2g} to {high:.2g} is what to search"
        why += f", and sweeps of this family put the centre at {middle:.2g}" if middle is not None else ""
    if optimizer.lr > high and facts.method in PRODUCTS:
        why += "; at 3e-3 Llama 3.1 8B diverged at every rank"
    source = f"{source}; {TINKER}" if middle is not None else source
    by_alpha = low <= optimizer.lr * SWEPT_ALPHA / alpha <= high  # only alpha puts it where it is
    unsure = inside or by_alpha or narrow or facts.base is None or over_adam != 1
    unsure = unsure or facts.method == "adalora"  # of small encoders
    sure: Any = "high" if facts.method in PRODUCTS else "medium"
    advised = float(f"{typical if middle is None else max(low, middle):.1e}")
    return change(facts, "optimizer.lr", advised, why, source, "low" if unsure else sure)


def learning_rate_of_ia3(facts: Facts) -> Advice | None:
    adapter = facts.adapter
    if facts.method != "peft" or adapter.type != "IA3" or facts.recipe.optimizer.lr >= 1e-3:
        return None
    why = "IA3 moves few numbers and takes large steps: 0.455 at 5e-3, 0.398 at 1e-3"
    return change(facts, "optimizer.lr", 5e-3, why, PEFT, "medium")


def rate_of_b_over_a(facts: Facts) -> Advice | None:
    ratio = facts.value("optimizer.lr_ratio")
    if ratio in (None, "lora+") or 1 <= ratio <= 8:
        return None
    if ratio < 1:
        why = "B wants at least A's rate: the theory lets A's shrink with the width, not B's"
        return change(facts, "optimizer.lr_ratio", 1.0, why, "LoRA+ 2402.12354", "medium")
    why = "16 is for B at random and A at zero; where B starts at zero 2 to 8 is said to be best"
    return change(facts, "optimizer.lr_ratio", "lora+", why, "LoRA+ 2402.12354", "medium")


RULES: tuple[Rule, ...] = (learning_rate, learning_rate_of_ia3, rate_of_b_over_a)
