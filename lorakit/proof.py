"""Is a merged model the base with its adapter? Two answers, by ways that the merge did not go.

Tensors: every tensor of the merged model, as transformers reads it back, against the one in memory plus what
PEFT says the adapter adds, element by element. Only rounding to the file's dtype is let pass: this is the
proof. Logits: how far the two models are apart on text, both computed in fp32: this is the price of rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lorakit.saved import Opened
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
    """The first tensor of `merged` that is not base plus adapter, with what is wrong, or the empty string.

    `merged`: the model read back, in fp32. `dtypes`: what each changed parameter was rounded to; `others`:
    all others.
    """
    wanted, written = _expected(opened), merged.state_dict()
    if odd := sorted(wanted.keys() ^ written.keys()):
        return f"{odd[0]} is in one of the two only"
    for name, (base, update) in track(wanted.items(), "comparing tensors", total=len(wanted)):
        value = base.float() if update is None else base.float() + update.float()
        if value.shape != written[name].shape:
            return f"{name} has another shape"
        kind = dtypes.get(name, others)
        limits = torch.finfo(kind)
        # Half a unit in the last place, and a little for fp32's own rounding before.
        rounding = 0.51 * limits.eps * value.abs() + limits.smallest_normal * limits.eps
        # The update itself is a sum of products, which PEFT and the merge may add up in another order.
        order = 0.0 if update is None else 1e-5 * float(update.abs().max())
        off = (written[name].float() - value).abs() - rounding - order
        if not bool((off <= 0).all()):  # also where it is no number
            return f"{name} is off by more than rounding to {str(kind).removeprefix('torch.')} explains"
    return ""


def _expected(opened: Opened) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Name in the plain model -> (the base's tensor or what was trained in its place, PEFT's update)."""
    updates = {
        f"{name}.weight": module.get_delta_weight("default")
        for name, module in opened.base.model.named_modules()
        if isinstance(module, LoraLayer)
    }
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for key, tensor in opened.base.model.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        name = key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        found[name] = tensor, updates.get(name)
    return found


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
