"""Section `adapter` with `method: peft`: its type and configuration, checked against PEFT's own classes.

PEFT is imported when such a recipe is read, and by nothing else here: all other recipes stay light.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

from lorakit.errors import did_you_mean
from lorakit.recipe.words import expected, show

_PROMPT = "it trains positions before the text, of which packed rows and their labels know nothing"

# Why a type of PEFT's cannot be trained here.
REFUSED = {
    "LORA": "lorakit has it: write method: lora",
    "ADALORA": "lorakit has it: write method: adalora",
    "VERA": "lorakit has it: write method: vera",
    "LN_TUNING": "lorakit trains norms itself: write method: full with train_only: [norm]",
    "TRAINABLE_TOKENS": "it adapts no layer: write method: lora with train_tokens",
    "ADAMSS": "it clusters weights by scikit-learn and moves ranks by a callback of transformers' Trainer",
    "ADAPTION_PROMPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "CPT": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "POLY": "it wants the task of every row, which rows here do not have",
    "PREFIX_TUNING": _PROMPT,
    "PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "SHADOW": "it adapts whole blocks by a second model and adds a loss of its own",
    "XLORA": "it mixes adapters that were trained before",
}

_TARGETS = "which layers are adapted is adapter.targets"
_WRITTEN = "lorakit writes it"

# Fields of PEFT's configurations that lorakit decides.
DECIDED = {
    "target_modules": _TARGETS,
    "exclude_modules": _TARGETS,
    "layers_to_transform": _TARGETS,
    "layers_pattern": _TARGETS,
    "modules_to_save": "what is trained whole is adapter.train_also",
    "fan_in_fan_out": "lorakit sees how a layer stores its weight",
    "bias": "biases are the base's, which stays as it is",
    "peft_type": "it is adapter.type",
    "task_type": "it is task.type",
    "generator_seed": "every draw follows training.seed",
    "save_only_topk_weights": "what is left out cannot be trained on; lorakit saves all",
    "runtime_offload_base_weight": "the base stays where it is",
    "inference_mode": _WRITTEN,
    "base_model_name_or_path": _WRITTEN,
    "revision": _WRITTEN,
    "auto_mapping": _WRITTEN,
    "peft_version": _WRITTEN,
}

# Two fields of which one is 0, and the other decides.
EITHER = {"OFT": ("r", "oft_block_size"), "BOFT": ("boft_block_num", "boft_block_size")}

# Beside Linear in 16 or 32 bits, which every type adapts; a test finds out what PEFT really has.
ON_QUANTIZED = ("IA3", "OFT")
ON_EMBEDDING = ("HIRA", "OFT", "TINYLORA")
ON_CONV1D = (
    *("DEFT", "FOURIERFT", "FROD", "GRALORA", "HIRA", "IA3", "PVERA", "RANDLORA", "TINYLORA", "UNILORA"),
    *("VBLORA", "WAVEFT"),
)

_IA3 = (
    "IA3 must know which layers have their input scaled instead of their output: write, for example,"
    " config: {feedforward_modules: [down_proj]}, or [] for none"
)


def config_class(kind: str) -> Any:
    """PEFT's configuration of the tuner `kind`."""
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]


def refuses(kind: str) -> dict[str, str]:
    """Kind of layer -> why the tuner `kind` cannot adapt it."""
    able = {"conv1d": ON_CONV1D, "embedding": ON_EMBEDDING}
    return {layer: f"PEFT has no {kind} for it" for layer, kinds in able.items() if kind not in kinds}


def problems_of(section: Any, quantize: str) -> Iterator[tuple[str, str]]:
    """(field, message) of what is wrong with `type` and `config`; `quantize`: how the base is held."""
    if message := _wrong_type(section.type):
        yield "adapter.type", message
        return
    if quantize != "none" and section.type not in ON_QUANTIZED:
        able = " and ".join(ON_QUANTIZED)
        yield "adapter.type", f"{section.type} is not known to be right on {quantize} weights; {able} are"
    found = [
        (f"adapter.config.{name}", message)
        for name, value in section.config.items()
        if (message := _wrong_field(section.type, name, value))
    ]
    if section.type == "IA3" and section.config.get("feedforward_modules") is None:
        found.append(("adapter.config", _IA3))
    if found:
        yield from found
        return
    try:
        config_class(section.type)(**keywords(section.type, section.config))
    except Exception as error:  # whatever PEFT checks beyond its annotations
        yield "adapter.config", f"PEFT: {first_line(error)}"


def keywords(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` as PEFT's classes take it: lists, not tuples; without what lorakit resolves on the model.

    Of two fields that say one thing, PEFT wants the default of the one that was not written to be 0.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(config)))
    plain.pop("feedforward_modules", None)
    pair = EITHER.get(kind, ())
    if sum(name in plain for name in pair) == 1:
        plain |= {name: 0 for name in pair if name not in plain}
    return plain


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _wrong_type(kind: str) -> str:
    if kind in REFUSED:
        return f"{kind} is not for method peft: {REFUSED[kind]}"
    if find_spec("peft") is None:
        return "PEFT is not installed: pip install peft"
    from peft import PeftType

    known = [item.value for item in PeftType if item.value not in REFUSED]
    if kind in known:
        return ""
    hint = did_you_mean(kind, [*known, *REFUSED]) or f"Types: {', '.join(known)}."
    return f"{show(kind)} is no tuner of PEFT's. {hint}"


def _wrong_field(kind: str, name: str, value: Any) -> str:
    """Why `config` cannot have `name: value`, or the empty string."""
    config = config_class(kind)
    known = {item.name for item in fields(config)}
    if name in known and name in DECIDED:
        return f"not for the recipe: {DECIDED[name]}"
    if name not in known:
        open_to_users = sorted(known - DECIDED.keys())
        hint = did_you_mean(name, open_to_users) or f"Fields: {', '.join(open_to_users) or 'none'}."
        return f"not a field of {kind}. {DECIDED.get(name, '')} {hint}".replace("  ", " ")
    try:
        kind_of_value = TypeAdapter(get_type_hints(config)[name])
    except PydanticSchemaGenerationError:
        return ""  # a class of PEFT's own: its constructor judges
    try:
        kind_of_value.validate_json(json.dumps(value), strict=True)
    except ValidationError:
        schema = kind_of_value.json_schema()
        return f"expected {expected(schema, schema.get('$defs', {}))}, got {show(value)}"
    return ""
