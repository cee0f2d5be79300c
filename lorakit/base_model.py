"""The base model: from a directory, in full precision or quantized, as layers.

Weights are safetensors only. Not here: where the directory comes from (model_files.py), what is attached to
the model (adapters/).
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorakit.errors import LorakitError, out_of_memory
from lorakit.layers import layers_of
from lorakit.model_files import by_leaf, fingerprint, header, nearest, weight_files
from lorakit.recipe.model import Model
from lorakit.shapes import Layer
from lorakit.terminal import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Base:
    model: Any  # a transformers model
    config: Any  # its configuration as stored, before dropout was switched off
    layers: tuple[Layer, ...]
    experts: tuple[str, ...]  # 3-D expert weights, which `targets` never means
    fingerprint: str
    folder: Path  # of its files


# ------------------------------------------------------------------------------------------------------------
# Loading


def load_config(folder: Path, section: Model) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=section.trust_remote_code)
    except Exception as error:
        raise LorakitError(
            f"model.path: {folder / 'config.json'}: {str(error).splitlines()[0][:300]}"
        ) from None


def load(folder: Path, section: Model, model_class: str, dtype: str, device: torch.device) -> Base:
    """The model in eval mode, every parameter frozen, on `device`, with its layers listed.

    `dtype` is how unquantized weights are held. Raises: LorakitError for files that do not make the model.
    """
    config = load_config(folder, section)
    stored = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        raise LorakitError(
            f"model.path: {folder} is stored quantized",
            "Give the unquantized model and write model.quantize: nf4.",
        )
    if section.dropout != "keep":
        _switch_off_dropout(config)
    options: dict[str, Any] = (
        {"device_map": {"": device}} if section.quantize != "none" or device.type == "cuda" else {}
    )
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    if section.quantize != "none":
        options["quantization_config"] = _quantization(section)
    try:
        model, info = getattr(transformers, model_class).from_pretrained(
            folder,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            trust_remote_code=section.trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if out_of_memory(error):
            raise
        raise LorakitError(
            f"model.path: {folder} cannot be loaded: {str(error).strip().splitlines()[0][:300]}"
        ) from None
    for kind, what in (
        ("missing_keys", "not in the files"),
        ("mismatched_keys", "of another shape in the files"),
    ):
        if bad := sorted(map(str, info.get(kind) or ())):
            raise LorakitError(
                f"model.path: {folder}: {len(bad)} tensors of the model are {what}: {', '.join(bad[:3])}"
            )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in evaluation into a form that has no
        # backward.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if section.quantize in ("nf4", "fp4") and device.type == "cpu":
        for width in misread_widths(model):
            say(
                f"warning: bitsandbytes misreads 4-bit layers {width} columns wide on this CPU, so that the"
                " base is not what a GPU would hold; widths that are multiples of 64 are read right"
            )
    model.requires_grad_(False)
    model.eval()
    layers, experts = layers_of(model)
    return Base(model, stored, layers, experts, fingerprint(folder), folder)


def stored(folder: Path, parameter: str) -> Tensor:
    """A parameter of the model as its files hold it, by its name in the model, whose beginning may be another
    in the files.

    Raises: LorakitError where there is no such tensor, or more than one, in the files.
    """
    files = {key: path for path in weight_files(folder) for key in header(path)}
    near = nearest(parameter, by_leaf(files))
    if len(near) != 1:
        what = f"could be {near[0]} or {near[1]}" if near else "is not"
        raise LorakitError(
            f"{parameter} {what} in the files of {folder}",
            "Leave this layer out of adapter.targets, or write another adapter.init.",
        )
    with safe_open(files[near[0]], "pt") as file:
        found: Tensor = file.get_tensor(near[0])
    return found


def misread_widths(model: nn.Module) -> list[int]:
    """Widths at which bitsandbytes dequantizes a 4-bit matrix otherwise than the same numbers as one long
    row.

    bitsandbytes 0.50.2 on CPUs with AVX512: rows that are no multiple of a block get another block's
    constant.
    """
    import bitsandbytes

    wrong = set()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight, state = module.weight.data, module.weight.quant_state
            as_row = copy.copy(state)
            as_row.shape = torch.Size([module.in_features * module.out_features])
            right = bitsandbytes.functional.dequantize_4bit(weight, as_row).flatten()
            found = bitsandbytes.functional.dequantize_4bit(weight, state).flatten()
            if not torch.equal(right, found):
                wrong.add(module.in_features)
    return sorted(wrong)


def _quantization(section: Model) -> transformers.BitsAndBytesConfig:
    if section.quantize == "int8":
        warnings.filterwarnings("ignore", message="MatMul8bitLt")
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=section.quantize,
        bnb_4bit_use_double_quant=section.double_quant,
        bnb_4bit_compute_dtype=DTYPES[section.compute_dtype],
    )


def _switch_off_dropout(config: Any) -> None:
    """Set every dropout probability of a configuration, and of those inside it, to zero."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            _switch_off_dropout(value)
        elif isinstance(value, float) and ("dropout" in name or name.endswith(("pdrop", "layerdrop"))):
            setattr(config, name, 0.0)
