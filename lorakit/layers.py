"""A real model seen as layers: what can be adapted, what is trained whole, how many parameters, what shape.

shapes.py holds the same ideas without torch.
"""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.errors import LorakitError
from lorakit.plan import Dimensions
from lorakit.shapes import Layer, Shapes, experts_layer, is_expert
from lorakit.targets import QUANTIZED, TIED, is_attention, select_parameters, select_whole


def layers_of(model: Any) -> tuple[tuple[Layer, ...], tuple[str, ...]]:
    """(every matrix layer with its role, experts among them; the names of 3-D expert weights)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = getattr(model, "config", None)
    num_experts = [
        getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")
    ]
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            kind, shape = "linear", (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            kind, shape = "conv1d", tuple(module.weight.shape)
        elif isinstance(module, nn.Embedding):
            kind, shape = "embedding", (module.num_embeddings, module.embedding_dim)
        else:
            layers += _experts_of(name, module)
            continue
        role = "head" if module is head else "router" if _is_router(name, shape[1], num_experts) else ""
        layers.append(Layer(name, kind, *shape, role))  # type: ignore[arg-type]
    experts = tuple(name for name, p in model.named_parameters() if is_expert(name, p.dim()))
    return tuple(layers), experts


def _experts_of(name: str, module: nn.Module) -> list[Layer]:
    """The 3-D weights that a module holds, in the order of its parameters."""
    own = {f"{name}.{leaf}": p for leaf, p in module.named_parameters(recurse=False)}
    transposed = bool(getattr(module, "is_transposed", False))  # transformers says it, PEFT reads it
    return [
        experts_layer(path, tuple(p.shape), transposed)
        for path, p in own.items()
        if is_expert(path, p.dim()) and p.is_floating_point()
    ]


def shapes_on_meta(folder: Path) -> Shapes:
    """The shapes of any model that transformers knows, from config.json.

    Raises: LorakitError for a configuration that transformers refuses.
    """
    model = model_on_meta(folder)
    layers, _ = layers_of(model)
    parameters = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return Shapes(layers, parameters, _is_tied(model))


def model_on_meta(folder: Path) -> Any:
    """Any model that transformers knows, from config.json: built without memory for weights.

    As AutoModelForCausalLM builds it, which is what is trained; where that does not know the type, the class
    that the configuration names. Raises: LorakitError for a configuration that transformers refuses.
    """
    transformers.logging.set_verbosity_error()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        named = [getattr(transformers, name, None) for name in config.architectures or ()]
        with torch.device("meta"):
            if type(config) in transformers.AutoModelForCausalLM._model_mapping:
                return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            if named and named[0] is not None:
                return named[0](config)
            return transformers.AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # a configuration can be wrong in as many ways as there are models
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise LorakitError(f"{folder / 'config.json'}: no model can be made of it: {reason}") from None


def _is_tied(model: Any) -> bool:
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    return all(hasattr(end, "weight") for end in ends) and ends[0].weight is ends[1].weight


def whole_modules(model: Any, patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(modules that `patterns` name, to be trained whole; what is wrong with the patterns)."""
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())

    def refusal(name: str) -> str:
        module = model.get_submodule(name)
        if any(p.dtype in (torch.uint8, torch.int8) for p in module.parameters()):
            return QUANTIZED
        return TIED if tied and module in ends else ""

    names = [
        name for name, module in model.named_modules() if name and any(True for _ in module.parameters())
    ]
    return select_whole(names, patterns, refusal)


def moving_parameters(model: Any, patterns: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(parameters that `patterns` name, all where there is none; what is wrong with the patterns)."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    shared = model.named_parameters(remove_duplicate=False)
    tied = {name: own[id(parameter)] for name, parameter in shared if own[id(parameter)] != name}
    return select_parameters(own.values(), patterns, tied)


def _is_router(name: str, out_features: int, num_experts: list[int | None]) -> bool:
    """Whether a linear layer chooses experts: adapting it changes who works, not how."""
    if not any(num_experts):
        return False
    if {"gate", "router", "shared_expert_gate"} & set(name.split(".")[-2:]):
        return True
    # An unusual name is told by its width; but keys, values and shared experts can be as wide by chance.
    return out_features in num_experts and not is_attention(name) and "expert" not in name


def matrix_of(module: Any) -> Tensor:
    """The matrix that a layer of bitsandbytes means, (out, in).

    Read as one long row: as a matrix some widths are misread on a CPU (base_model.misread_widths).
    """
    from bitsandbytes import functional

    weight = module.weight
    if weight.dtype == torch.int8:
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        rows: Tensor = functional.int8_vectorwise_dequant(weight.data, scale)
        return rows
    as_row = copy.copy(weight.quant_state)
    as_row.shape = torch.Size([module.in_features * module.out_features])
    row: Tensor = functional.dequantize_4bit(weight.data, as_row)
    return row.reshape(module.out_features, module.in_features)


def num_parameters(model: nn.Module, layers: tuple[Layer, ...]) -> int:
    """Parameters of the base model; a packed 4-bit weight counts as the matrix that it stands for."""
    true_size = {
        layer.name: layer.in_features * layer.out_features for layer in layers if layer.kind != "embedding"
    }
    return sum(
        true_size[name.removesuffix(".weight")]
        if parameter.dtype in (torch.uint8, torch.int8)
        else parameter.numel()
        for name, parameter in model.named_parameters()
    )


def dimensions(config: Any) -> Dimensions:
    """What activations cost, from a configuration of any architecture."""
    text = config.get_text_config()
    names = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    intermediate = next(
        (getattr(text, name) for name in names if getattr(text, name, None)), 4 * text.hidden_size
    )
    return Dimensions(text.hidden_size, intermediate, text.num_hidden_layers, text.vocab_size)
