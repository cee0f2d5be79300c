"""Names and shapes of a model, told from its configuration alone: no torch, no weights.

A layer is adaptable when it is a matrix: Linear, Conv1D (GPT-2's transposed Linear) or Embedding; or as many
matrices as a mixture has experts, in one parameter. Names are paths from the root of the model
("model.layers.0.self_attn.q_proj"), of a module or, for experts, of that parameter. TABLE describes the
common decoders as transformers' AutoModelForCausalLM builds them, default by default; a test proves each
equal to the model on the meta device. Not here: types outside the table, which layers.py builds on that
device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from lorakit.errors import LorakitError

Kind = Literal["linear", "conv1d", "embedding", "experts"]


@dataclass(frozen=True)
class Layer:
    name: str
    kind: Kind
    in_features: int
    out_features: int
    role: Literal["", "head", "router"] = ""
    num_experts: int = 1  # matrices of this size
    transposed: bool = False  # of experts: stored as (E, in, out) instead of (E, out, in)

    @property
    def weight(self) -> str:
        """Name of its parameter in the model."""
        return self.name if self.kind == "experts" else f"{self.name}.weight"


def experts_layer(name: str, shape: Sequence[int], transposed: bool = False) -> Layer:
    """The experts that the 3-D parameter `name` holds."""
    number, outside, inside = (shape[0], shape[2], shape[1]) if transposed else shape
    return Layer(name, "experts", inside, outside, "", number, transposed)


@dataclass(frozen=True)
class Shapes:
    """All that counting needs of a model: what is a layer, and the shape of every parameter."""

    layers: tuple[Layer, ...]  # in the order of the model's modules
    parameters: Mapping[str, tuple[int, ...]]  # in the model's order; what is shared stands here once
    tied: bool  # the output head shares its weights with the input embedding

    @property
    def num_parameters(self) -> int:
        return sum(map(prod, self.parameters.values()))

    @property
    def aliases(self) -> dict[str, str]:
        """Parameter that is another one -> that other: the weight of a head that is the embedding's."""
        head = next((layer for layer in self.layers if layer.role == "head"), None)
        table = embedding_of(self.layers)
        return {head.weight: table.weight} if self.tied and head and table else {}

    @property
    def experts(self) -> tuple[str, ...]:
        """3-D expert weights, which `targets` never means."""
        return tuple(layer.name for layer in self.layers if layer.kind == "experts")

    @property
    def others(self) -> dict[str, int]:
        """Parameter -> number of elements, of all that is no layer's matrix: norms, biases, experts."""
        matrices = {f"{layer.name}.weight" for layer in self.layers}
        return {name: prod(shape) for name, shape in self.parameters.items() if name not in matrices}


def embedding_of(layers: Sequence[Layer]) -> Layer | None:
    """The input embedding: the first as long as the output head is wide, else the first of all."""
    tables = [layer for layer in layers if layer.kind == "embedding"]
    width = next((layer.out_features for layer in layers if layer.role == "head"), None)
    return next((table for table in tables if table.in_features == width), next(iter(tables), None))


def is_expert(name: str, num_dimensions: int) -> bool:
    """Whether a parameter holds the weights of all experts of a mixture in one tensor."""
    return num_dimensions == 3 and "expert" in name


def shapes_of(config: Mapping[str, Any], file: str = "config.json") -> Shapes | None:
    """The shapes of the model that a configuration (the content of `file`) describes, or None when its type
    is not in TABLE.

    Raises: LorakitError naming file and key for a value of a wrong type, and for a size that is missing.
    """
    describe = TABLE.get(str(config.get("model_type")))
    return describe(_Config(config, file)) if describe else None


@dataclass(frozen=True)
class _Config:
    values: Mapping[str, Any]
    file: str

    def size(self, key: str, default: int | None = None, null: int | None = None) -> int:
        """A whole number above 0: `default` where the key is missing, `null` where it is missing or null."""
        value = self.values.get(key, default)
        value = null if value is None else value
        if value is None:
            raise LorakitError(f"{self.file}: {key} is missing", "It says how large the model is.")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise LorakitError(f"{self.file}: {key}: expected a whole number above 0, got {value!r}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise LorakitError(f"{self.file}: {key}: expected true or false, got {value!r}")
        return value

    def numbers(self, key: str) -> list[int]:
        value = self.values.get(key) or []
        if not isinstance(value, list) or not all(type(item) is int for item in value):
            raise LorakitError(f"{self.file}: {key}: expected a list of whole numbers, got {value!r}")
        return value

    def per_head(self) -> int:
        """Width of an attention head where it is not written."""
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        if hidden % heads:
            raise LorakitError(f"{self.file}: hidden_size {hidden} is no multiple of {heads} attention heads")
        return hidden // heads


@dataclass
class _Model:
    """Layers and parameters, added in the order in which the model registers them."""

    layers: list[Layer] = field(default_factory=list)
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def layer(self, name: str, inside: int, outside: int, bias: bool = False, kind: Kind = "linear") -> None:
        self.layers.append(Layer(name, kind, inside, outside))
        self.parameters[f"{name}.weight"] = (outside, inside) if kind == "linear" else (inside, outside)
        if bias:
            self.parameters[f"{name}.bias"] = (outside,)

    def norm(self, name: str, size: int, bias: bool = False) -> None:
        self.parameters[f"{name}.weight"] = (size,)
        if bias:
            self.parameters[f"{name}.bias"] = (size,)

    def shapes(self, config: _Config, inside: int, tied: bool) -> Shapes:
        """The finished model: its output head comes last."""
        vocabulary, tied = config.size("vocab_size"), config.flag("tie_word_embeddings", tied)
        if not tied:
            self.parameters["lm_head.weight"] = (vocabulary, inside)
        head = Layer("lm_head", "linear", inside, vocabulary, "head")
        return Shapes((*self.layers, head), self.parameters, tied)


# ------------------------------------------------------------------------------------------------------------
# Llama and its kin


@dataclass(frozen=True)
class _Kin:
    """In what a decoder differs from Llama's first one."""

    heads: int | None = None  # key and value heads where the key is missing; None: as many as query heads
    head_dim: int | None = None  # where the key is missing; None: hidden size / heads
    tied: bool = False
    bias: tuple[bool, bool] = (
        False,
        False,
    )  # of the projections to queries, keys and values; of the output's
    mlp_bias: bool = False
    fused_attention: bool = False  # queries, keys and values in one matrix, which is registered last
    fused_mlp: bool = False  # gate and up in one matrix
    head_norms: bool = False  # norms of queries and keys, one head wide
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    experts: Callable[[_Config, int], tuple[int, int, bool] | None] = lambda config, number: None
    """(how many, intermediate size, router first) of block `number`; None for a block without experts."""


def _llama(config: _Config, kin: _Kin) -> Shapes:
    hidden, vocabulary = config.size("hidden_size"), config.size("vocab_size")
    model = _Model()
    model.layer("model.embed_tokens", vocabulary, hidden, kind="embedding")
    for number in range(config.size("num_hidden_layers")):
        block = f"model.layers.{number}"
        _attention(model, f"{block}.self_attn", config, kin)
        if experts := kin.experts(config, number):
            _experts(model, f"{block}.mlp", hidden, *experts)
        else:
            _mlp(model, f"{block}.mlp", hidden, config.size("intermediate_size"), kin)
        for norm in kin.norms:
            model.norm(f"{block}.{norm}", hidden)
    model.norm("model.norm", hidden)
    return model.shapes(config, hidden, kin.tied)


def _attention(model: _Model, at: str, config: _Config, kin: _Kin) -> None:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    written = config.values.get("head_dim") is not None or kin.head_dim
    width = config.size("head_dim", kin.head_dim) if written else config.per_head()
    query, key = width * heads, width * config.size("num_key_value_heads", kin.heads, null=heads)
    into, out = kin.bias
    if kin.fused_attention:
        model.layer(f"{at}.o_proj", query, hidden, out)
        model.layer(f"{at}.qkv_proj", hidden, query + 2 * key, into)
        return
    for name, outside in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        model.layer(f"{at}.{name}", hidden, outside, into)
    model.layer(f"{at}.o_proj", query, hidden, out)
    if kin.head_norms:
        model.norm(f"{at}.q_norm", width)
        model.norm(f"{at}.k_norm", width)


def _mlp(model: _Model, at: str, hidden: int, inner: int, kin: _Kin) -> None:
    if kin.fused_mlp:
        model.layer(f"{at}.gate_up_proj", hidden, 2 * inner)
    else:
        model.layer(f"{at}.gate_proj", hidden, inner, kin.mlp_bias)
        model.layer(f"{at}.up_proj", hidden, inner, kin.mlp_bias)
    model.layer(f"{at}.down_proj", inner, hidden, kin.mlp_bias)


def _experts(model: _Model, at: str, hidden: int, number: int, inner: int, router_first: bool) -> None:
    """A router and experts whose weights are parameters, not layers."""
    parts = {
        f"{at}.gate.weight": (number, hidden),
        f"{at}.experts.gate_up_proj": (number, 2 * inner, hidden),
        f"{at}.experts.down_proj": (number, hidden, inner),
    }
    order = parts if router_first else [*list(parts)[1:], f"{at}.gate.weight"]
    model.parameters.update({name: parts[name] for name in order})
    model.layers += [experts_layer(name, shape) for name, shape in parts.items() if len(shape) == 3]


def _mixtral_experts(config: _Config, number: int) -> tuple[int, int, bool]:
    return config.size("num_local_experts", 8), config.size("intermediate_size"), True


def _qwen_experts(config: _Config, number: int) -> tuple[int, int, bool] | None:
    """Every `decoder_sparse_step`-th block has experts, but for those that are listed as plain."""
    if (number + 1) % config.size("decoder_sparse_step", 1) or number in config.numbers("mlp_only_layers"):
        return None
    key = "num_local_experts" if "num_local_experts" in config.values else "num_experts"
    return config.size(key, 128), config.size("moe_intermediate_size", 768), False


def _both(config: _Config, default: bool = False) -> tuple[bool, bool]:
    bias = config.flag("attention_bias", default)
    return bias, bias


_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_GLM4 = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


# ------------------------------------------------------------------------------------------------------------
# Older decoders


def _gpt2(config: _Config) -> Shapes | None:
    if config.flag("add_cross_attention", False):
        return None

    def size(key: str, alias: str) -> int:
        return config.size(key if key in config.values else alias)

    hidden = size("n_embd", "hidden_size")
    inner = config.size("n_inner", null=4 * hidden)
    model = _Model()
    model.layer("transformer.wte", config.size("vocab_size"), hidden, kind="embedding")
    positions = size("n_positions", "max_position_embeddings")
    model.layer("transformer.wpe", positions, hidden, kind="embedding")
    for number in range(size("n_layer", "num_hidden_layers")):
        block = f"transformer.h.{number}"
        model.norm(f"{block}.ln_1", hidden, bias=True)
        model.layer(f"{block}.attn.c_attn", hidden, 3 * hidden, True, "conv1d")
        model.layer(f"{block}.attn.c_proj", hidden, hidden, True, "conv1d")
        model.norm(f"{block}.ln_2", hidden, bias=True)
        model.layer(f"{block}.mlp.c_fc", hidden, inner, True, "conv1d")
        model.layer(f"{block}.mlp.c_proj", inner, hidden, True, "conv1d")
    model.norm("transformer.ln_f", hidden, bias=True)
    return model.shapes(config, hidden, tied=True)


def _gpt_neox(config: _Config) -> Shapes:
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    config.per_head()  # the heads must divide the hidden size
    bias = config.flag("attention_bias", True)
    model = _Model()
    model.layer("gpt_neox.embed_in", config.size("vocab_size"), hidden, kind="embedding")
    for number in range(config.size("num_hidden_layers")):
        block = f"gpt_neox.layers.{number}"
        model.norm(f"{block}.input_layernorm", hidden, bias=True)
        model.norm(f"{block}.post_attention_layernorm", hidden, bias=True)
        model.layer(f"{block}.attention.query_key_value", hidden, 3 * hidden, bias)
        model.layer(f"{block}.attention.dense", hidden, hidden, bias)
        model.layer(f"{block}.mlp.dense_h_to_4h", hidden, inner, True)
        model.layer(f"{block}.mlp.dense_4h_to_h", inner, hidden, True)
    model.norm("gpt_neox.final_layer_norm", hidden, bias=True)
    return model.shapes(config, hidden, tied=False)


def _opt(config: _Config) -> Shapes:
    """The learned positions have two rows more than positions; opt-350m embeds in fewer dimensions."""
    hidden, inner, bias = config.size("hidden_size"), config.size("ffn_dim"), config.flag("enable_bias", True)
    embedded = config.size("word_embed_proj_dim", null=hidden)
    affine = config.flag("layer_norm_elementwise_affine", True)
    last_norm = config.flag("do_layer_norm_before", True) and not config.flag(
        "_remove_final_layer_norm", False
    )
    model = _Model()
    model.layer("model.decoder.embed_tokens", config.size("vocab_size"), embedded, kind="embedding")
    positions = config.size("max_position_embeddings") + 2
    model.layer("model.decoder.embed_positions", positions, hidden, kind="embedding")
    if embedded != hidden:
        model.layer("model.decoder.project_out", hidden, embedded)
        model.layer("model.decoder.project_in", embedded, hidden)
    if affine and last_norm:
        model.norm("model.decoder.final_layer_norm", hidden, bias=True)
    for number in range(config.size("num_hidden_layers")):
        block = f"model.decoder.layers.{number}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            model.layer(f"{block}.self_attn.{name}", hidden, hidden, bias)
        if affine:
            model.norm(f"{block}.self_attn_layer_norm", hidden, bias=True)
        model.layer(f"{block}.fc1", hidden, inner, bias)
        model.layer(f"{block}.fc2", inner, hidden, bias)
        if affine:
            model.norm(f"{block}.final_layer_norm", hidden, bias=True)
    return model.shapes(config, embedded, tied=True)


def _gemma(config: _Config, heads: int, **more: Any) -> Shapes:
    return _llama(config, _Kin(heads, 256, tied=True, bias=_both(config), **more))


def _glm(config: _Config, **more: Any) -> Shapes:
    bias = (config.flag("attention_bias", True), False)
    return _llama(config, _Kin(2, 128, bias=bias, fused_mlp=True, **more))


TABLE: dict[str, Callable[[_Config], Shapes | None]] = {  # model_type -> what it looks like
    "gemma": lambda c: _gemma(c, 16),
    "gemma2": lambda c: _gemma(c, 4, norms=_SANDWICH),
    "gemma3_text": lambda c: _gemma(c, 4, norms=_SANDWICH, head_norms=True),
    "glm": lambda c: _glm(c),
    "glm4": lambda c: _glm(c, norms=_GLM4),
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": lambda c: _llama(c, _Kin(bias=_both(c), mlp_bias=c.flag("mlp_bias", False))),
    "mistral": lambda c: _llama(c, _Kin(8)),
    "mixtral": lambda c: _llama(c, _Kin(8, experts=_mixtral_experts)),
    "opt": _opt,
    "phi3": lambda c: _llama(c, _Kin(fused_attention=True, fused_mlp=True)),
    "qwen2": lambda c: _llama(c, _Kin(32, bias=(True, False))),
    "qwen3": lambda c: _llama(c, _Kin(32, 128, bias=_both(c), head_norms=True)),
    "qwen3_moe": lambda c: _llama(c, _Kin(4, bias=_both(c), head_norms=True, experts=_qwen_experts)),
    "smollm3": lambda c: _llama(c, _Kin(4, tied=True, bias=_both(c), mlp_bias=c.flag("mlp_bias", False))),
}
