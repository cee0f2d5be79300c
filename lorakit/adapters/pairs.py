"""The pairs A, B of one of PEFT's LoRA layers, by the name of their adapter: several on a layer add up.

A is (rank, in), B is (out, rank); for an Embedding A is (rank, vocabulary).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit.kernels.lora import difference
from lorakit.layers import matrix_of

NAME = "default"  # the adapter that is trained


def factors(layer: Any, name: str = NAME) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of the adapter `name`."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def add_frozen(layer: Any, name: str, scale: float) -> None:
    """Another adapter, as large as that which is trained, that is zero and never trained. It counts once
    activate() names it."""
    frozen = [nn.Parameter(torch.zeros_like(p.data), requires_grad=False) for p in factors(layer)]
    layer.scaling[name], layer.lora_dropout[name] = scale, nn.Identity()
    layer.r[name], layer.lora_alpha[name] = len(frozen[0]), scale * len(frozen[0])
    if NAME in layer.lora_embedding_A:
        layer.lora_embedding_A[name], layer.lora_embedding_B[name] = frozen
        return
    for modules, weight in zip((layer.lora_A, layer.lora_B), frozen, strict=True):
        modules[name] = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        modules[name].weight = weight


@torch.no_grad()
def as_one(layer: Any, taken_away: str | None = None) -> tuple[Tensor, Tensor]:
    """(A', B') of one adapter of scale 1 that is what is trained, less the frozen adapter `taken_away`."""
    (a, b), scale = factors(layer), layer.scaling[NAME]
    if taken_away is None:
        return a, scale * b
    return difference((a, b), factors(layer, taken_away), scale, -layer.scaling[taken_away])


def activate(layer: Any, *frozen: str) -> None:
    """The adapter that is trained counts, and those called `frozen` beside it, which get no gradients."""
    layer.set_adapter([NAME, *frozen])
    for name in frozen:
        for factor in factors(layer, name):
            factor.requires_grad_(False)


def resize(layer: Any, rank: int) -> None:
    """A and B of the adapter that is trained become new parameters of another rank, zero; the scale stays.
    At rank 0 nothing is left to train."""
    a, b = (factor.data for factor in factors(layer))
    sized = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
    for module, weight in zip((layer.lora_A[NAME], layer.lora_B[NAME]), sized, strict=True):
        module.weight = nn.Parameter(weight, requires_grad=rank > 0)
        module.out_features, module.in_features = weight.shape
    layer.r[NAME], layer.lora_alpha[NAME] = rank, rank * layer.scaling[NAME]


def base_matrix(layer: Any) -> Tensor:
    """(out, in): the matrix that the base layer means, in fp32 or better."""
    base = layer.get_base_layer()
    weight: Tensor = base.weight.detach()
    if weight.dtype in (torch.uint8, torch.int8):
        return matrix_of(base).float()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return wide.T if isinstance(base, Conv1D) else wide
