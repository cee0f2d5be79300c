"""How often rows may be seen: rules on epochs and on early stopping, and the primers' word on them."""

from typing import Any

from lorakit.advice import DATA, Advice, change
from lorakit.advice.facts import Facts
from lorakit.advice.rules import FEW

FEW_PASSES, MOST_PASSES = 3, 5  # what most runs have; the most over many rows, or where some are held out
PATIENCE = 3  # evaluations without a lower loss
SOURCE = f"Raschka 2023, 2 passes in Tulu 3; {DATA}"


def more_passes_than_helped(facts: Facts) -> Advice | None:
    """Fewer passes, where early stopping does not end them. Over few rows without held-out ones as many as
    most runs have."""
    training, samples, passes = facts.recipe.training, facts.samples, facts.passes
    if facts.recipe.eval.early_stopping or samples is None or passes is None:
        return None
    watched = facts.recipe.data.eval is not None or samples >= FEW
    most = MOST_PASSES if watched else FEW_PASSES
    if passes <= most:
        return None
    why = f"{samples:,} samples, seen {passes:.3g} times: most runs have 1 to 3 passes, and more often hurt"
    if training.max_steps is not None:
        steps = most * -(-samples // training.batch_size)
        return change(facts, "training.max_steps", steps, why, SOURCE, "medium")
    return change(facts, "training.epochs", most, why, SOURCE, "medium")


def seen_often_unwatched(facts: Facts) -> Advice | None:
    """Several passes over rows, and held-out ones: stop when their loss falls no longer."""
    if facts.recipe.eval.early_stopping or facts.samples is None or facts.passes is None:
        return None
    most = MOST_PASSES if facts.samples >= FEW else FEW_PASSES
    if facts.passes <= most or facts.recipe.data.eval is None or facts.rows is None or facts.rows.stream:
        return None
    why = f"{facts.samples:,} samples, seen {facts.passes:.3g} times: further passes over them often hurt"
    return change(facts, "eval.early_stopping", PATIENCE, why, SOURCE, "medium")


def beside_the_primers(facts: Facts) -> tuple[Any, str] | None:
    """(what is advised, why) on more epochs than the evidence has, where no rule speaks of them."""
    training = facts.recipe.training
    if training.max_steps is not None:
        seen = "" if facts.passes is None else f": {facts.passes:.3g} passes over the rows"
        return None, f"training.max_steps decides{seen}"
    if training.epochs <= FEW_PASSES:
        return None
    if facts.samples is None:
        return "1 to 3", f"{training.epochs} passes are more; how many rows there are could not be judged"
    if facts.samples >= FEW and not facts.recipe.eval.early_stopping:
        return training.epochs, f"{facts.samples:,} samples bear {training.epochs} passes better than few do"
    why = f"{training.epochs} passes over {facts.samples:,} samples: eval.early_stopping ends them in time"
    return "early stopping", why
