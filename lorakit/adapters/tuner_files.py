"""Adapters of PEFT's other tuners, read back: what `method: peft` wrote, and what PEFT itself wrote.

The tuner's own classes make the layers; from a file of others come shapes, numbers and plain settings, never
a path, a name on the hub or a pickle. What a layer becomes when it is merged is what PEFT's layer says of
its weight and its bias, in fp32.
"""

import copy
from collections.abc import Callable
from dataclasses import fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.adapter_file import kind_of, shapes_of, weights_of
from lorakit.adapters import Role
from lorakit.adapters.lora_files import PREFIX, Contents
from lorakit.adapters.peft_tuner import PeftTunerAdapter, tuner_layers
from lorakit.errors import LorakitError
from lorakit.model_files import read_json
from lorakit.recipe.methods import PeftTuner
from lorakit.recipe.peft_types import REFUSED, config_class, first_line
from lorakit.shapes import Layer
from lorakit.targets import Target, modules_above

_READ_ONLY = ("ADALORA", "LN_TUNING", "LORA", "VERA")  # trained here by other means, but read all the same
_NOT_FOLLOWED = ("auto_mapping", "base_model_name_or_path", "inference_mode", "revision", "peft_version")


def attach_file(folder: Path, model: Any, layers: tuple[Layer, ...]) -> PeftTunerAdapter:
    """The adapter that the configuration in `folder` describes, on `model`, with random weights.

    Raises: LorakitError for a kind that cannot be loaded, and where PEFT refuses model or configuration.
    """
    kind, file = kind_of(folder), folder / "adapter_config.json"
    if kind in REFUSED and kind not in _READ_ONLY:
        raise LorakitError(f"{folder}: lorakit does not run the kind {kind}: {REFUSED[kind]}")
    try:
        known = {item.name for item in fields(config_class(kind))}
        told = read_json(file)
        values = {name: told[name] for name in known & told.keys() if name not in _NOT_FOLLOWED}
        config = config_class(kind)(**values)
    except Exception as error:
        raise LorakitError(f"{file}: no configuration of {kind}: {first_line(error)}") from None
    section = PeftTuner(method="peft", type=kind)
    adapter = PeftTunerAdapter(section, model, [], seed=0, config=config)
    found = tuner_layers(model)
    adapter.targets = tuple(Target(layer, 0, 0.0) for layer in layers if layer.name in found)
    return adapter


def read_tuner(folder: Path, model: Any, layers: tuple[Layer, ...]) -> tuple[PeftTunerAdapter, Contents]:
    """The adapter in `folder` on `model`, with what was trained, and its contents as a merge wants them.

    Raises: LorakitError when it does not fit.
    """
    try:
        tensors = load_file(weights_of(folder))
    except (OSError, SafetensorError) as error:
        raise LorakitError(f"{folder / 'adapter_model.safetensors'}: cannot be read: {error}") from None
    plain = model.state_dict().keys()
    ends = tuple(read_json(folder / "adapter_config.json").get("modules_to_save") or ())
    copies, own = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        whole = bool(ends) and any(above.endswith(ends) for above in modules_above(name))
        if name in plain and not whole:
            copies[name] = tensor
        else:
            own[key] = tensor
    adapter = attach_file(folder, model, layers)
    try:
        set_peft_model_state_dict(adapter.peft, dict(own))
    except (RuntimeError, KeyError) as error:
        last = str(error).strip().splitlines()[-1].strip()  # torch's first line says only that there are some
        raise LorakitError(f"{folder} does not fit this model: {last}") from None
    ours = adapter.state()
    for name in sorted(ours.keys() | own.keys()):
        if name not in own or name not in ours:
            where = "the file lacks" if name not in own else "the model has no place for"
            raise LorakitError(f"{folder} does not fit this model: {where} {name}")
        if not torch.equal(ours[name].cpu(), own[name].to(ours[name].dtype)):
            raise LorakitError(f"{folder}: PEFT did not load {name}")
    whole_now = {
        item.name.replace(".modules_to_save.default", ""): item.parameter.detach()
        for item in adapter.trained()
        if item.role is Role.HEAD
    }
    changes = {
        f"{name}.{part}": _merged(adapter.tuner, name, layer, part)
        for name, layer in tuner_layers(model).items()
        for part in ("weight", "bias")
        if isinstance(getattr(layer.get_base_layer(), part, None), Tensor)
    }
    return adapter, Contents("peft", (), changes, whole_now, copies, own, ends, "standard")


def count_file(folder: Path, model: Any, layers: tuple[Layer, ...]) -> dict[str, int]:
    """Layer, or module trained whole -> numbers of its file that were trained; `model` needs no weights.

    Raises: LorakitError when the file does not fit the model.
    """
    adapter, shapes = attach_file(folder, model, layers), shapes_of(folder)
    adapted = {target.layer.name for target in adapter.targets}
    if lacking := sorted(adapter.state().keys() - shapes.keys()):
        raise LorakitError(f"{folder} does not fit this model: the file lacks {lacking[0]}")
    found: dict[str, int] = {}
    for item in adapter.trained():
        if ".ranknum." in item.name:  # AdaLoRA's, a constant: moved anywhere, PEFT's layer calls it trained
            continue
        name = item.name.replace(".modules_to_save.default", "")
        key = PREFIX + name.replace(".default", "")  # of what layers share, the file has a name of its own
        size = prod(shapes.get(key, tuple(item.parameter.shape)))
        owner = next((above for above in modules_above(name) if above in adapted), name.rpartition(".")[0])
        found[owner] = found.get(owner, 0) + size
    return found


def _merged(kind: str, name: str, layer: Any, part: str) -> Callable[[Tensor], Tensor]:
    """What PEFT's merge makes of the weight or the bias of `layer`, from the base's.

    Raises, when it is called: LorakitError where the tuner cannot be merged.
    """

    def change(old: Tensor) -> Tensor:
        if not isinstance(layer.get_base_layer(), nn.Linear | nn.Embedding | Conv1D):
            raise LorakitError(f"{name} is no matrix: {kind} on it cannot be merged here", _APART)
        try:
            merging = copy.deepcopy(layer)
            getattr(merging.get_base_layer(), part).data = old.clone()
            merging.merge(safe_merge=True)
            new: Tensor = getattr(merging.get_base_layer(), part).detach().float()
        except Exception as error:
            raise LorakitError(f"PEFT cannot merge {kind} into {name}: {first_line(error)}", _APART) from None
        return new

    return change


_APART = "Serve base and adapter apart; lorakit's eval, generate and chat, and PEFT, load it as it is."
