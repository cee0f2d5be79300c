"""How A and B start: INITS, what can be told of a start from its name. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.recipe.section import share_of

_TAKEN_AWAY = "what is taken away from W at the start would have to be seen by dropout too; write 0"
_REST = "it gains by quantizing the rest of W, which no base on a disk is; write init: loftq"
_EXPERTS = "of an expert's weights only default and gaussian starts are there"
_EMBEDDING = "an embedding starts with A at zero and B at random"


@dataclass(frozen=True)
class Init:
    """What can be told of a start from its name."""

    start: str  # what A and B are before step 0, for the README
    says: str  # one honest line, for the README
    source: str
    refuses: Mapping[str, str] = field(default_factory=dict)  # layer kind, "quantized", "dropout", ... -> why
    fields: tuple[str, ...] = ()  # of the recipe, that only this start reads
    prepared: bool = False  # computed from the weights or the data before step 0; becomes checkpoint 0
    data_decide: str = ""  # what of the count only the data can tell
    exported: bool = False  # the run writes plain LoRA: other tools do not know what is taken away from W
    starts_elsewhere: bool = False  # step 0 is not the base model
    pairs: int = 1  # of A and B in the files; 2 where the start is taken away again


INITS: dict[str, Init] = {
    "default": Init(
        "A uniform in ±1/√I, B = 0",
        "the usual start: step 0 is the base exactly",
        "arXiv 2106.09685",
    ),
    "gaussian": Init(
        "A ~ N(0, 1/R²), B = 0",
        "larger than the default where R is below √(3 I); then the learning rate is another too",
        "arXiv 2106.09685",
    ),
    "orthogonal": Init(
        "A with orthogonal rows of the default's length, B = 0",
        "little to gain where R is far below I: rows drawn at random are nearly orthogonal there",
        "arXiv 1312.6120",
        refuses={"embedding": _EMBEDDING, "experts": _EXPERTS},
    ),
    "pissa": Init(
        "s · B A = the R largest singular directions of W, taken away from W",
        "falls faster in the first steps at LoRA's learning rate; how much is left at the end, measure",
        "arXiv 2404.02948",
        refuses={
            "quantized": _REST,
            "embedding": _EMBEDDING,
            "experts": _EXPERTS,
            "dropout": _TAKEN_AWAY,
        },
        fields=("init_svd",),
        prepared=True,
        exported=True,
        pairs=2,
    ),
    "olora": Init(
        "W = Q T: B = the first R columns of Q, s · A = the first R rows of T, taken away from W",
        "as PiSSA, by a QR decomposition, which is cheaper than one by singular values",
        "arXiv 2406.01775",
        refuses={
            "quantized": _REST,
            "embedding": _EMBEDDING,
            "experts": _EXPERTS,
            "dropout": _TAKEN_AWAY,
        },
        prepared=True,
        exported=True,
        pairs=2,
    ),
    "eva": Init(
        "A = the R strongest directions of the layer's inputs, B = 0; ranks go where they explain most",
        "looks at some rows of the data first; ranks differ from layer to layer, their sum does not",
        "arXiv 2410.07170",
        refuses={"embedding": "its inputs are tokens, which have no directions", "experts": _EXPERTS},
        fields=("probe", "rank_spread"),
        prepared=True,
        data_decide="with one rank for all; EVA moves ranks from layer to layer, as the data decide",
        exported=True,
    ),
    "loftq": Init(
        "s · B A = the R largest singular directions of W - quantized W",
        "gives back a part of what quantization took, a small one at small ranks; step 0 is not the base",
        "arXiv 2310.08659",
        refuses={
            "unquantized": "there is nothing to give back: model.quantize is none; write nf4 there",
            "embedding": _EMBEDDING,
            "experts": _EXPERTS,
        },
        fields=("init_svd",),
        prepared=True,
        starts_elsewhere=True,
    ),
}


def highest_rank(rank: int, spread: float, inside: int, outside: int) -> int:
    """That EVA may give to a layer of `rank`, where no rank gets above `spread` times what it was."""
    return min(int(share_of(spread, rank)), inside, outside)
