"""Is a merged model the base with its adapter? Two answers, by ways that the merge did not go.

Tensors: every tensor of the merged model, as transformers reads it back, against what PEFT makes of the one
in memory, element by element. Only rounding to the file's dtype is let pass: this is the proof. Logits: how
far the two models are apart on text, both computed in fp32: this is the price of rounding.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lorakit.saved import Opened
from lorakit.targets import modules_above
from lorakit.terminal import track

_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1969, 3.5 % of 12,000 people answered: yes, we would go there again!",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
)


@dataclass(frozen=True)
class Parity:
    """How far the merged model is from base and adapter, over all logits of the probes, in fp32."""

    largest_difference: float
    mean_difference: float
    largest_logit: float
    largest_effect: float  # of the adapter itself: how far it moves a logit
    num_tokens: int


# ------------------------------------------------------------------------------------------------------------
# Tensors


@torch.no_grad()
def different_tensor(opened: Opened, merged: Any, dtypes: dict[str, torch.dtype], others: torch.dtype) -> str:
    """The first tensor of `merged` that is not base and adapter, with what is wrong, or the empty string.

    `merged`: the model read back, in fp32. `dtypes`: what each changed parameter was rounded to; `others`:
    all others.
    """
    layers = {n: m for n, m in opened.base.model.named_modules() if isinstance(m, BaseTunerLayer)}
    owners = {f"{_plain(name)}.{part}": layer for name, layer in layers.items() for part in _parts_of(layer)}
    before, written = _plain_names(opened.base.model, layers), merged.state_dict()
    if odd := sorted(before.keys() ^ written.keys()):
        return f"{odd[0]} is in one of the two only"
    for name, base in track(before.items(), "comparing tensors", total=len(before)):
        layer = owners.get(name)
        part = name.rpartition(".")[2]
        value, order = (base.float(), 0.0) if layer is None else _by_peft(layer, part, base.float())
        if value.shape != written[name].shape:
            return f"{name} has another shape"
        kind = dtypes.get(name, others)
        limits = torch.finfo(kind)
        # Half a unit in the last place, and a little for fp32's own rounding before.
        rounding = 0.51 * limits.eps * value.abs() + limits.smallest_normal * limits.eps
        off = (written[name].float() - value).abs() - rounding - order
        if not bool((off <= 0).all()):  # also where it is no number
            return f"{name} is off by more than rounding to {str(kind).removeprefix('torch.')} explains"
    return ""


def _plain_names(model: Any, layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """Name in the plain model -> the base's tensor or what was trained in its place.

    `layers`: those that PEFT wrapped, by name. What they hold beside the base's own is left out."""
    found: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        above = [name for name in modules_above(key) if name in layers]
        added = any(not key.startswith(f"{name}.base_layer.") for name in above)
        if not added and ".original_module." not in key:
            found[_plain(key).replace(".modules_to_save.default.", ".")] = tensor
    return found


def _plain(name: str) -> str:
    """Without what PEFT puts in where it wraps a layer, one of experts several times, or an embedding."""
    return re.sub(r"(\.(base_layer|token_adapter))+(?=\.|$)", "", name)


def _parts_of(layer: Any) -> tuple[str, ...]:
    """The parameters that a wrapper adapts: of LoRA's and its kin's one; others may change the bias too."""
    if isinstance(layer, LoraLayer):
        return (getattr(layer, "parameter_name", "weight"),)
    return "weight", "bias"


def _by_peft(layer: Any, part: str, base: Tensor) -> tuple[Tensor, Tensor | float]:
    """(a parameter of a layer with its adapter as PEFT has it, in fp32; how far the order of additions may
    move that)."""
    if not isinstance(layer, LoraLayer):
        value = _by_forward(layer)[part]
        return value, 1e-5 * float(value.abs().max())
    if not layer.lora_variant:
        update = layer.get_delta_weight("default").float()
        return base + update, 1e-5 * float(update.abs().max())
    merged = copy.deepcopy(layer)
    merged.merge(safe_merge=True)
    value = merged.get_base_layer().weight.float()
    return value, 1e-5 * float((value - base).abs().max()) + 1e-6 * value.abs()


def _by_forward(layer: Any) -> dict[str, Tensor]:
    """Weight and bias of the matrix that a layer and its adapter are together: what they answer to the unit
    vectors and to zero. The merge of a tuner asks PEFT's merge(), this its forward()."""
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):  # Gemma's multiplies what it looks up
        return {"weight": layer(torch.arange(base.num_embeddings)) / getattr(base, "embed_scale", 1)}
    stored_by_row = isinstance(base, nn.Linear)  # a Conv1D stores (in, out)
    inside = base.weight.shape[1 if stored_by_row else 0]
    zero = layer(torch.zeros(1, inside))[0]
    rows = [layer(part) - zero for part in torch.eye(inside).split(1024)]  # (in, out)
    weight = torch.cat(rows)
    return {"weight": weight.T if stored_by_row else weight, "bias": zero}


# ------------------------------------------------------------------------------------------------------------
# Logits


def probes(opened: Opened) -> list[Tensor]:
    """Token ids, (1, T) each: text where there is a tokenizer, else random ids, the same every time."""
    vocabulary = opened.base.model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(vocabulary, (1, 48), generator=generator)]
    if opened.tokenizer is not None:
        found = [torch.tensor([opened.tokenizer(text)["input_ids"]]) for text in _TEXTS]
    context = getattr(opened.base.config.get_text_config(), "max_position_embeddings", None) or 64
    return [ids[:, : min(context, 64)] for ids in found if ids.shape[1] > 0]


@torch.no_grad()
def logits(model: Any, ids: Sequence[Tensor]) -> list[Tensor]:
    """(1, T, V) in fp32 for each of `ids`."""
    return [model(input_ids=part, use_cache=False).logits.float() for part in track(ids, "proving")]


def compare(base: Sequence[Tensor], wanted: Sequence[Tensor], got: Sequence[Tensor]) -> Parity:
    """`base`: logits without the adapter; `wanted`: with it; `got`: of the merged model."""
    before, a, b = (torch.cat([part.flatten() for part in found]) for found in (base, wanted, got))
    off = (a - b).abs()
    effect = float((a - before).abs().max())
    num_tokens = sum(part.shape[1] for part in wanted)
    return Parity(float(off.max()), float(off.mean()), float(a.abs().max()), effect, num_tokens)
