"""What can be told of a method from its name: TRAITS, the registry that the command line, the counts, the
README and the matrix of tests read. In: I, out: O, rank: R.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorakit.recipe.inits import INITS, Init
from lorakit.recipe.methods import (
    AdaLora,
    DeltaLora,
    Dora,
    Full,
    Lora,
    LoraDrop,
    LoraFa,
    Method,
    PeftTuner,
    Vera,
)

_PAIR = "LoRA+ lets B learn faster than A; "


@dataclass(frozen=True)
class Traits:
    """What can be told of a method from its name."""

    section: type[Method]
    update: str  # what a layer computes, for the README
    says: str  # one honest line, for the README
    source: str
    num_trained: Callable[[int, int, int], int] | None  # of I, O and R of one layer; None: PEFT alone knows
    refuses: Mapping[str, str] = field(default_factory=dict)  # layer kind, "quantized", "int8", ... -> why
    no_lr_ratio: str = ""  # why B cannot have a learning rate of its own
    exported: bool = False  # the run writes plain LoRA instead: other tools do not know the method
    any_rank: bool = False  # the rank may be above a layer's smaller side
    scheduled: bool = False  # it must know how many steps there will be
    data_decide: str = ""  # what of its count only the data can tell
    taken_over: tuple[str, ...] = ()  # fields that start_from decides where the recipe does not say them


_LIKE_LORA = ("rank", "alpha", "scaling", "targets", "rank_pattern", "alpha_pattern", "train_also")
_OF_LORA = ("target_parameters", "train_tokens")


def _of_lora(inside: int, outside: int, rank: int) -> int:
    return rank * (inside + outside)


TRAITS: dict[str, Traits] = {
    "lora": Traits(
        Lora,
        "W + alpha/rank · B A",
        "the default: nothing below beats it by much once its learning rate is right",
        "arXiv 2106.09685",
        _of_lora,
        taken_over=(*_LIKE_LORA, *_OF_LORA),
    ),
    "dora": Traits(
        Dora,
        "m (W + s · B A) / norm of its rows",
        "2 to 4 points over LoRA in its paper, none in PEFT's benchmark; for small ranks",
        "arXiv 2402.09353",
        lambda inside, outside, rank: rank * (inside + outside) + outside,
        refuses={"int8": "PEFT loses the scales of 8-bit rows where DoRA measures their lengths; use nf4"},
        taken_over=_LIKE_LORA,
    ),
    "lora-fa": Traits(
        LoraFa,
        "W + alpha/rank · B A, A as drawn",
        "keeps A x instead of x: little of the whole (PEFT measured 13.38 of 13.41 GiB); learns less",
        "arXiv 2308.03303",
        lambda inside, outside, rank: rank * outside,
        refuses={"embedding": "its A starts at zero, and a frozen A of zero never moves anything"},
        no_lr_ratio=_PAIR + "here A does not move: write optimizer.lr",
    ),
    "adalora": Traits(
        AdaLora,
        "W + alpha/init_rank · P Λ Q",
        "ranks go where they matter, for few parameters in long runs; up to 1 point over LoRA in its paper",
        "arXiv 2303.10512",
        lambda inside, outside, rank: rank * (inside + outside) + rank,  # Q, P and lambda
        refuses={"embedding": "PEFT has no AdaLoRA layer for it"},
        no_lr_ratio="is LoRA+'s, which says nothing on AdaLoRA's factors; delete it",
        scheduled=True,
        taken_over=("targets", "train_also"),
        exported=True,
    ),
    "vera": Traits(
        Vera,
        "W + b B d A, A and B shared and frozen",
        "the fewest parameters, for many adapters on tasks near the base; learns less, at ten times the rate",
        "arXiv 2310.11454",
        lambda inside, outside, rank: rank + outside,
        refuses={"embedding": "PEFT has no VeRA layer for it"},
        no_lr_ratio=_PAIR + "here neither moves: write optimizer.lr",
        any_rank=True,
        exported=True,
    ),
    "delta-lora": Traits(
        DeltaLora,
        "W + s · ((1 + λ) B A - λ B_K A_K)",
        "here to be compared: with K = 0 it trains like LoRA of (1 + λ) times the alpha, as a test shows",
        "arXiv 2309.02411",
        _of_lora,
        scheduled=True,
        exported=True,
    ),
    "lora-drop": Traits(
        LoraDrop,
        "LoRA; layers that matter little share one",
        "about half of LoRA's parameters at its scores, says its paper; a short probe, and a file as large",
        "arXiv 2402.07721",
        _of_lora,
        refuses={"embedding": "what it adds to its output cannot be compared with what a matrix adds"},
        data_decide="at most: layers that matter little will share, and how many do, the data decide",
        exported=True,
    ),
    "full": Traits(
        Full,
        "every weight, or `train_only`",
        "the baseline; fp32 weights, gradients and two moments: 16 bytes per parameter",
        "",
        lambda inside, outside, rank: inside * outside,
        refuses={"quantized": "full fine-tuning cannot move {} weights; use lora"},
        no_lr_ratio="has no effect without an adapter (method: full); delete it",
    ),
    "peft": Traits(
        PeftTuner,
        "as PEFT's `type` says",
        "OFT, IA3, LoHa, ...: PEFT's layers in lorakit's loop, saved as PEFT saves; a type may refuse more",
        "PEFT",
        None,
        no_lr_ratio=_PAIR + "lorakit does not know which parameters of {} are B: delete it",
        any_rank=True,
    ),
}


def init_of(section: Any) -> Init:
    """What can be told of how a section's factors start."""
    return INITS[getattr(section, "init", "default")]


def is_exported(section: Any) -> bool:
    """Whether the run writes plain LoRA instead of what it trains."""
    return TRAITS[section.method].exported or init_of(section).exported


def num_pairs(section: Any) -> int:
    """Pairs of A and B that a layer has in the files: one more where an earlier one is taken away."""
    return 2 if section.method == "delta-lora" and section.start else init_of(section).pairs
