"""Guidance from evidence: rules that hold a recipe against published results and against its data.

A rule looks at Facts and says one Advice or nothing; each is silent on the recipe that takes its advice. Here
is what they say, and the papers and measurements that it rests on: facts.py has what they look at, rules.py,
training.py, passes.py and rates.py the rules, primer.py what introductions say. All pure; lorakit/advise.py
reads and prints.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lorakit.advice.facts import Facts

Confidence = Literal["high", "medium", "low"]

# Numbers are arXiv's.
DATA = "counted from your data"
STEPS = "counted from your steps"
LORA = "LoRA 2106.09685"
QLORA = "QLoRA 2305.14314"
TML = '"LoRA Without Regret", 2025'
TINKER = "sweep and formula of tinker-cookbook"
BIDERMAN = "LoRA Learns Less and Forgets Less 2405.09673"
PEFT = "PEFT's method_comparison, 2026, one seed"
ADALORA = "AdaLoRA 2303.10512"
VERA = "VeRA 2310.11454"
PISSA = "PiSSA 2404.02948"
TOOLS = "what other tools default to; no comparison known"


@dataclass(frozen=True)
class Advice:
    """`settings`: fields of the recipe (dotted) with which it is taken; empty where nothing is to be changed,
    or where that is more than fields."""

    knob: str
    yours: Any
    advised: Any
    why: str
    source: str
    confidence: Confidence
    settings: Mapping[str, Any] = field(default_factory=dict)


Rule = Callable[[Facts], Advice | None]


def change(
    facts: Facts, knob: str, advised: Any, why: str, source: str, confidence: Confidence, **also: Any
) -> Advice:
    """An advice to write `advised` into `knob`; `also`: other fields that go with it, dots as two
    underscores."""
    more = {name.replace("__", "."): value for name, value in also.items()}
    settings = {knob: advised, **more}
    return Advice(knob, facts.value(knob), advised, why, source, confidence, settings)


def keep(facts: Facts, knob: str, why: str, source: str, confidence: Confidence) -> Advice:
    """A word on a knob that may stay as it is."""
    yours = facts.value(knob)
    return Advice(knob, yours, yours, why, source, confidence)
