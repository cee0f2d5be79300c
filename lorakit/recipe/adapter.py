"""Section `adapter`: how the weights move. One section type per method, chosen by `method`."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lorakit.recipe.section import Conflicts, Section, Written

Rank = Annotated[int, Field(ge=1, le=65536)]
Pattern = Annotated[str, Field(min_length=1)]
Alpha = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Targets = Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]


class Lora(Section):
    """LoRA: W x + scale * B A x with A (rank, in) and B (out, rank). Hu et al. 2021, arXiv 2106.09685."""

    method: Literal["lora"] = "lora"
    """How the weights move."""

    rank: Rank = 16
    """Rank of the update of every adapted layer."""

    alpha: Literal["auto"] | Alpha = "auto"
    """Numerator of the scale. auto: twice the rank of each layer, so that the scale is 2 everywhere
    (standard)."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training."""

    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """standard: alpha / rank. rank_stabilized: alpha / sqrt(rank), arXiv 2312.03732."""

    init: Literal["default", "gaussian"] = "default"
    """How A starts (B is zero). default: Kaiming-uniform; gaussian: N(0, 1/rank^2)."""

    targets: Targets = "all-linear"
    """all-linear (output head and routers excluded), attention, mlp, a list of module names, or regular
    expressions matched against the whole module path."""

    rank_pattern: dict[str, Rank] = {}
    """Other ranks for some layers: module name or regular expression -> rank. The last match counts."""

    alpha_pattern: dict[str, Alpha] = {}
    """Other alphas for some layers: module name or regular expression -> alpha. The last match counts."""

    train_also: tuple[str, ...] = ()
    """Modules trained whole beside the adapter (names or regular expressions), for example a norm or the
    head."""

    start_from: str | None = None
    """Directory of an adapter to continue from, with a fresh optimizer. Rank, alpha and targets come from it.
    """


class AdaLora(Section):
    """AdaLoRA: W x + alpha / init_rank * P diag(lambda) Q x. Every layer starts with init_rank triplets, and
    those that matter least are taken away until target_rank remain on average. Zhang et al. 2023, arXiv
    2303.10512."""

    method: Literal["adalora"]
    """How the weights move."""

    init_rank: Rank = 12
    """Rank of every adapted layer at the start."""

    target_rank: Rank = 8
    """Rank at the end, averaged over the adapted layers."""

    alpha: Literal["auto"] | Alpha = "auto"
    """Numerator of the scale alpha / init_rank, which pruning does not change. auto: twice init_rank."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training."""

    warmup: Share = 0.1
    """Share of the steps before anything is taken away."""

    final: Share = 0.3
    """Share of the steps, at the end, that train the ranks as they are then."""

    interval: Annotated[int, Field(ge=1)] = 10
    """Steps between two decisions on the ranks."""

    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of the sensitivity |w dL/dw|."""

    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Smoothing of its uncertainty."""

    orthogonal_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the penalty that keeps P and Q near orthogonal; added once per step, never to a held-out
    loss."""

    targets: Targets = "all-linear"
    """As for lora; embeddings cannot be adapted."""

    train_also: tuple[str, ...] = ()
    """Modules trained whole beside the adapter (names or regular expressions)."""

    start_from: str | None = None
    """Directory of a LoRA to continue from (adapter/ of an AdaLoRA run is one), with a fresh optimizer: its
    update is decomposed into P, lambda and Q exactly. Its targets are taken over."""

    @property
    def rank(self) -> int:
        """What a new layer starts with."""
        return self.init_rank

    @property
    def rank_pattern(self) -> dict[str, int]:
        return {}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        return {}


class Full(Section):
    """Every weight of the base model moves: the baseline of every comparison. The run writes model/."""

    method: Literal["full"]
    """How the weights move."""


def _method(section: Any) -> Any:
    return section.get("method", "lora") if isinstance(section, dict) else getattr(section, "method", "lora")


# Method -> trained parameters of one layer: of its in and out features and its rank, which is the initial one
# where ranks move.
NUM_TRAINED: dict[str, Callable[[int, int, int], int]] = {
    "lora": lambda inside, outside, rank: rank * (inside + outside),
    "adalora": lambda inside, outside, rank: rank * (inside + outside) + rank,  # Q, P and lambda
}

METHOD_SECTIONS: dict[str, type[Section]] = {"lora": Lora, "adalora": AdaLora, "full": Full}
Adapter = Annotated[
    Annotated[Lora, Tag("lora")] | Annotated[AdaLora, Tag("adalora")] | Annotated[Full, Tag("full")],
    Discriminator(_method),
]

# What start_from decides where the recipe does not say it.
TAKEN_OVER = {
    "lora": ("rank", "alpha", "scaling", "targets", "rank_pattern", "alpha_pattern", "train_also"),
    "adalora": ("targets", "train_also"),
}


def conflicts(recipe: Any, written: Written) -> Conflicts:
    adapter = recipe.adapter
    if adapter.method == "full":
        if recipe.model.quantize != "none":
            yield "adapter.method", f"full fine-tuning cannot move {recipe.model.quantize} weights; use lora"
        if written("optimizer.lr_ratio") is not None:
            yield "optimizer.lr_ratio", "has no effect without an adapter (method: full); delete it"
        if written("model.dtype") == "bf16":
            yield "model.dtype", "full fine-tuning updates fp32 weights (bf16 loses small updates); delete it"
    elif adapter.method == "adalora":
        yield from _adalora_conflicts(adapter, written)
    elif adapter.start_from is not None and written("adapter.init") is not None:
        yield "adapter.init", "has no effect with start_from: the weights come from there; delete it"


def _adalora_conflicts(adapter: AdaLora, written: Written) -> Conflicts:
    if written("optimizer.lr_ratio") is not None:
        yield "optimizer.lr_ratio", "is LoRA+'s, which says nothing on AdaLoRA's factors; delete it"
    if adapter.target_rank > adapter.init_rank:
        field = "target_rank" if written("adapter.target_rank") is not None else "init_rank"
        message = f"target_rank {adapter.target_rank} is above init_rank {adapter.init_rank}: ranks only fall"
        yield f"adapter.{field}", message
    if adapter.warmup + adapter.final >= 1:
        field = "final" if written("adapter.final") is not None else "warmup"
        yield f"adapter.{field}", "warmup and final together leave no steps to decide on the ranks"
    if adapter.target_rank == adapter.init_rank:
        for field in ("warmup", "final", "interval", "beta1", "beta2"):
            if written(f"adapter.{field}") is not None:
                message = "has no effect where target_rank equals init_rank: nothing is taken away; delete it"
                yield f"adapter.{field}", message
