"""Optimizers and the learning rate: parameter groups by Role, and lr_at(step), a pure function."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.adapters import Role, Trained
from lorakit.recipe.optimizer import LORA_PLUS, AdamW

Groups = list[dict[str, Any]]


def groups(trained: Sequence[Trained], weight_decay: float, lr_ratio: float | Literal["lora+"]) -> Groups:
    """One group for each learning rate and decay that occurs: B learns `lr_ratio` times as fast as the rest
    (LoRA+, arXiv 2402.12354), and only matrices decay: no bias, no scale."""
    of_b = LORA_PLUS if lr_ratio == "lora+" else lr_ratio
    found: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for item in trained:
        ratio = of_b if item.role is Role.B else 1.0
        decays = item.parameter.dim() > 1 and item.role is not Role.SCALE
        decay = weight_decay if decays else 0.0
        found.setdefault((ratio, decay), []).append(item.parameter)
    return [{"params": ps, "lr_ratio": ratio, "weight_decay": decay} for (ratio, decay), ps in found.items()]


def adamw(section: AdamW, trained: Sequence[Trained]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups(trained, section.weight_decay, section.lr_ratio),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        fused=True,
    )


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": adamw}


def build(section: Any, trained: Sequence[Trained]) -> torch.optim.Optimizer:
    return OPTIMIZERS[section.name](section, trained)


def lr_at(step: int, name: str, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear rise that reaches `peak` at the end of the
    warm-up, then constant, or a linear or half-cosine fall that would reach zero at `total_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[name]
    return peak * shape


def looks_at_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() leaves parameters and state alone where the tensor `found_inf` holds a one: PyTorch's
    mark of optimizers that work with its loss scaler on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def state(optimizer: torch.optim.Optimizer, trained: Sequence[Trained]) -> dict[str, Tensor]:
    """The optimizer's tensors by name: "exp_avg|model.layers.0...". They share memory with the optimizer."""
    return {
        f"{key}|{item.name}": tensor
        for item in trained
        for key, tensor in optimizer.state.get(item.parameter, {}).items()
    }


def load_state(
    optimizer: torch.optim.Optimizer, trained: Sequence[Trained], tensors: dict[str, Tensor]
) -> None:
    """Take over what state() gave. Raises: KeyError when a tensor belongs to no trained parameter."""
    parameters = {item.name: item.parameter for item in trained}
    for label, tensor in tensors.items():
        key, _, name = label.partition("|")
        # fused AdamW wants all of its state on the parameter's device, its step count too
        optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
