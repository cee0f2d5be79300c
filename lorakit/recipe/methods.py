"""The adapter methods: the section of each. What can be told of one without a model stands in traits.py."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from lorakit.recipe.section import Section, share_of

Rank = Annotated[int, Field(ge=1, le=65536)]
Pattern = Annotated[str, Field(min_length=1)]
Alpha = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Inits = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"]  # see inits.py
Targets = Pattern | Annotated[tuple[Pattern, ...], Field(min_length=1)]


# ------------------------------------------------------------------------------------------------------------
# What several methods share


class Method(Section):
    """What every method has."""

    lacks: ClassVar[Mapping[str, str]] = {}  # field of other methods -> why this one cannot have it

    method: str
    """How the weights move."""


class _Layers(Method):
    """A method that adapts layers."""

    targets: Targets = "all-linear"
    """all-linear (output head and routers excluded), attention, mlp, a list of module names, or regular
    expressions matched against the whole module path."""

    train_also: tuple[Pattern, ...] = ()
    """Modules trained whole beside the adapter (names or regular expressions), for example a norm or the
    head."""


class _Product(_Layers):
    """A method whose update is a product of A (rank, in) and B (out, rank)."""

    rank: Rank = 16
    """Rank of the update of every adapted layer."""

    alpha: Literal["auto"] | Alpha = "auto"
    """Numerator of the scale. auto: twice the rank of each layer, so that the scale is 2 everywhere; with
    rank_stabilized 16, whatever the rank. Adam's steps of W go with scale times rank: with auto a larger rank
    takes larger steps. Write a number to keep them, and the best learning rate, when the rank changes."""

    scaling: Literal["standard", "rank_stabilized"] = "standard"
    """standard: alpha / rank. rank_stabilized: alpha / sqrt(rank), arXiv 2312.03732."""

    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """How A starts (B is zero). default: Kaiming-uniform; gaussian: N(0, 1/rank^2); orthogonal: rows that are
    orthogonal, of the default's length. An embedding starts with A at zero and B at N(0, 1)."""


class _Factors(_Product):
    """One whose layers may differ in rank and alpha."""

    rank_pattern: dict[str, Rank] = {}
    """Other ranks for some layers: module name or regular expression -> rank. The last match counts."""

    alpha_pattern: dict[str, Alpha] = {}
    """Other alphas for some layers: module name or regular expression -> alpha. The last match counts."""


# ------------------------------------------------------------------------------------------------------------
# The methods


class Lora(_Factors):
    """LoRA: W x + scale * B A x with A (rank, in) and B (out, rank). Hu et al. 2021, arXiv 2106.09685."""

    method: Literal["lora"] = "lora"
    """How the weights move."""

    targets: Pattern | tuple[Pattern, ...] = "all-linear"
    """all-linear (output head and routers excluded), attention, mlp, a list of module names, or regular
    expressions matched against the whole module path. Empty where target_parameters are all."""

    target_parameters: tuple[Pattern, ...] = ()
    """Expert weights of a mixture that are one 3-D parameter (Mixtral, Qwen3-MoE: gate_up_proj, down_proj):
    ends of their names, or regular expressions for all of it. Every expert has an A and a B of its own."""

    train_tokens: tuple[Pattern | Annotated[int, Field(ge=0)], ...] = ()
    """Tokens, by text or number, whose rows of the input embedding (and of a head that shares them) are
    trained too: "<|im_start|>" of a base model that never saw its chat marks."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training; embeddings have none."""

    init: Inits = "default"  # type: ignore[assignment]  # more than the other methods have
    """How A and B start. default: A Kaiming-uniform, B zero; gaussian: A N(0, 1/rank^2); orthogonal: rows of
    A that are orthogonal; pissa, olora: the strongest part of the weight, by singular values or a QR
    decomposition; eva: A from the layer's inputs, and ranks where they explain most; loftq: what quantization
    took from the weight."""

    init_svd: Literal["exact", "fast"] = "exact"
    """Of pissa and loftq. exact: all singular values, whose time grows with the cube of a weight's side (7B
    parameters on a CPU: hours); fast: the strongest by a randomised method (minutes), which misses some."""

    probe: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)] = 0.1
    """Samples that eva looks at: below 1 a share of all, from 1 a number of samples."""

    rank_spread: Annotated[float, Field(ge=1)] = 2.0
    """Of eva: no layer's rank gets above so many times `rank` (rho of its paper); 1: all stay equal."""

    start_from: str | None = None
    """Directory of an adapter to continue from, with a fresh optimizer; rank, alpha, targets come from it."""


class Dora(_Factors):
    """DoRA: m (W + scale * B A) / |W + scale * B A| x, row by row: size and direction of every row of the
    weight move apart. Liu et al. 2024, arXiv 2402.09353."""

    method: Literal["dora"]
    """How the weights move."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training; embeddings have none."""

    start_from: str | None = None
    """Directory of a DoRA adapter to continue from, with a fresh optimizer. Rank, alpha and targets come from
    it."""


class LoraFa(_Factors):
    """LoRA-FA: LoRA whose A stays as it was drawn; B alone is trained, so that of a layer's input only A x
    is kept for the backward pass. Zhang et al. 2023, arXiv 2308.03303."""

    lacks = {"dropout": "LoRA-FA keeps A x alone for the backward pass; dropout would need x and its mask"}

    method: Literal["lora-fa"]
    """How the weights move."""

    projected: bool = False
    """Whether B's gradient is multiplied by (A A^T)^-1 / scale^2, in fp32, so that the step moves W by the
    full gradient projected on the rows of A (version 2 of the paper). The norm that is logged and clipped is
    then that of the multiplied gradient."""


class AdaLora(_Layers):
    """AdaLoRA: W x + alpha / init_rank * P diag(lambda) Q x. Every layer starts with init_rank triplets, and
    those that matter least are taken away until target_rank remain on average. Zhang et al. 2023, arXiv
    2303.10512."""

    lacks = {"rank": "it starts at init_rank everywhere and ends at target_rank on average"}

    method: Literal["adalora"]
    """How the weights move."""

    init_rank: Rank = 12
    """Rank of every adapted layer at the start."""

    target_rank: Rank = 8
    """Rank at the end, averaged over the adapted layers."""

    alpha: Literal["auto"] | Alpha = "auto"
    """Numerator of the scale alpha / init_rank, which pruning does not change. auto: twice init_rank."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training; embeddings have none."""

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

    start_from: str | None = None
    """Directory of a LoRA to continue from (adapter/ of an AdaLoRA run is one), with a fresh optimizer: its
    update is decomposed into P, lambda and Q exactly. Its targets are taken over."""

    @property
    def rank(self) -> int:
        """What a new layer starts with."""
        return self.init_rank


def auto_alpha(section: Any) -> tuple[float, str]:
    """(what alpha: auto is for a section, the reason)."""
    if getattr(section, "scaling", "") == "rank_stabilized":  # scale 4 at rank 16, 2 at rank 64
        return 16.0, "the same for every rank: the scale is alpha / sqrt(rank)"
    return 2.0 * section.rank, "twice init_rank" if section.method == "adalora" else "twice the rank"


def phases(total_steps: int, warmup: float, final: float) -> tuple[int, int]:
    """(steps of AdaLoRA's warm-up, first step count at which the ranks are settled)."""
    return round(share_of(warmup, total_steps)), total_steps - round(share_of(final, total_steps))


class Vera(_Layers):
    """VeRA: W x + b * B (d * A x). A and B are drawn once, shared by all layers and never trained; d (rank)
    and b (out) of every layer are. Kopiczko et al. 2023, arXiv 2310.11454."""

    lacks = {"alpha": "VeRA has no scale: d and b are the scale"}

    method: Literal["vera"]
    """How the weights move."""

    rank: Rank = 256
    """Rows of A and columns of B; may be above a layer's smaller side."""

    d_initial: Annotated[float, Field(gt=0)] = 0.1
    """What every entry of d starts at; b starts at zero."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training; embeddings have none."""


class DeltaLora(_Factors):
    """Delta-LoRA: W follows B A. After every step from `start` on, W moves by delta_ratio * scale times what
    the step changed B A by. Zi et al. 2023, arXiv 2309.02411."""

    lacks = {"dropout": "Delta-LoRA takes the gradient of B A for that of W, which dropout makes untrue"}

    method: Literal["delta-lora"]
    """How the weights move."""

    delta_ratio: Annotated[float, Field(gt=0)] = 2.0
    """How much of each change of scale * B A is given to W (lambda of the paper)."""

    start: Share | Annotated[int, Field(ge=0)] = 0
    """Steps before W begins to follow (K of the paper): below 1 a share of all, from 1 a number of steps."""


def first_step(total_steps: int, start: float) -> int:
    """K of Delta-LoRA: steps before W begins to follow. `start`: below 1 a share of `total_steps`, from 1 a
    number of steps."""
    return start if isinstance(start, int) else round(share_of(start, total_steps))


class LoraDrop(_Product):
    """LoRA-drop: LoRA is first trained on a sample of the data; layers are ranked by the square of what their
    adapter adds to their output; those that make up `threshold` of the sum keep an adapter of their own, the
    others share one per kind of module. Then all is trained anew. Zhou et al. 2024, arXiv 2402.07721."""

    lacks = dict.fromkeys(("rank_pattern", "alpha_pattern"), "layers that share an adapter have one rank")

    method: Literal["lora-drop"]
    """How the weights move."""

    dropout: Share = 0.0
    """Share of the adapter's input features set to zero in training; embeddings have none."""

    threshold: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of the importance that the layers with an adapter of their own make up."""

    probe: Annotated[float, Field(gt=0, lt=1)] | Annotated[int, Field(ge=1)] = 0.1
    """Samples of the probe, seen once: below 1 a share of all, from 1 a number of samples."""


class Full(Method):
    """Every weight of the base model moves: the baseline of every comparison. The run writes model/."""

    method: Literal["full"]
    """How the weights move."""

    train_only: tuple[Pattern, ...] = ()
    """Modules that move (names or regular expressions); all others stay as they are. Empty: all move."""


class PeftTuner(_Layers):
    """Any other tuner of PEFT's, by its type: OFT, IA3, LoHa, ... with PEFT's own configuration."""

    method: Literal["peft"]
    """How the weights move."""

    type: Pattern
    """The tuner, as PEFT calls it: OFT, BOFT, IA3, LOHA, LOKR, FOURIERFT, ..."""

    config: dict[str, Any] = {}
    """Fields of the tuner's configuration in PEFT; `targets` and `train_also` are said here, not there."""
