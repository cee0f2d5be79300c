"""What introductory articles on LoRA say, and what the evidence says of it. README.md has it at length."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lorakit.advice import LORA, PEFT, QLORA, TML, TOOLS, Confidence
from lorakit.advice.facts import Facts
from lorakit.advice.passes import beside_the_primers


@dataclass(frozen=True)
class Primer:
    knob: str
    says: str
    evidence: str
    source: str
    confidence: Confidence  # in the evidence
    apart: Callable[[Facts], tuple[Any, str] | None] = lambda _: None  # (advised, why) where no rule speaks


PRIMER = (
    Primer(
        "adapter.targets",
        "Wq and Wk",
        "the worse pair: WikiSQL 71.4, Wq and Wv 73.7, all four 73.7 at equal size; with the MLP better yet",
        f"{LORA}, table 5; {QLORA}; {PEFT}",
        "high",
    ),
    Primer(
        "adapter.rank",
        "4 to 8",
        "enough for small tasks (1 to 64 alike on WikiSQL and MNLI); what must be learned decides",
        f"{LORA}, table 6 and footnote 6; {TML}",
        "medium",
    ),
    Primer(
        "adapter.alpha",
        "= rank",
        "a convention; the first paper's own scripts have 2 and 8 times the rank. It acts as the rate does",
        f"{LORA}, section 4.1",
        "medium",
    ),
    Primer(
        "adapter.init",
        "all zeros",
        "B at zero, A at random: with both at zero every gradient is zero, and nothing ever moves",
        f"{LORA}, section 4.1; the product's gradient",
        "high",
    ),
    Primer(
        "adapter.dropout",
        "tune",
        "0.05 to 0.1 helped up to 13B; most tools have 0. A knob for small sets, after the learning rate",
        f"{QLORA}; {TOOLS}",
        "low",
    ),
    Primer(
        "optimizer.weight_decay",
        "tune",
        "no comparison shows that it matters for an adapter; 0 to 0.01 in most tools",
        f"{QLORA}; {TOOLS}",
        "low",
    ),
    Primer(
        "training.epochs",
        "tune",
        "1 to 3; further passes over few rows often hurt, and early stopping finds the number by itself",
        "Raschka 2023; Tulu 3",
        "medium",
        beside_the_primers,
    ),
    Primer(
        "optimizer.name",
        "AdamW, Sophia",
        "the optimizer matters little for LoRA; Sophia's factor 2 is of pre-training",
        "Raschka 2023; Sophia 2305.14342",
        "medium",
    ),
    Primer(
        "model.quantize",
        "4 or 8 bits",
        "for memory, not for quality: NF4 ends where 16 bits do (MMLU 53.1 and 53.0), in more time",
        f"{QLORA}, table 4",
        "high",
    ),
)
