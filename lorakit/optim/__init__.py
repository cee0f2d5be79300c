"""Optimizers and the learning rate: parameter groups by Role, and lr_at(step), a pure function."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lorakit.adapters import Role, Trained
from lorakit.optim.lion import Lion
from lorakit.optim.sophia import Sophia
from lorakit.recipe.optimizer import LORA_PLUS

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


def adamw(section: Any, moved: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(moved, lr=section.lr, betas=section.betas, eps=section.eps, fused=True)


def adamw_8bit(section: Any, moved: Groups) -> torch.optim.Optimizer:
    """bitsandbytes': means of parameters of at least 4096 numbers in 8 bits, updates and all else in 32. On a
    CPU it is the same update in PyTorch's own operations, for trying out: it saves no time."""
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    kind = PagedAdamW8bit if section.name == "paged_adamw_8bit" else AdamW8bit
    built: torch.optim.Optimizer = kind(moved, lr=section.lr, betas=section.betas, eps=section.eps)
    return built


def sgd(section: Any, moved: Groups) -> torch.optim.Optimizer:
    # not fused: that fails where the first gradient of a parameter comes after another's
    return torch.optim.SGD(moved, lr=section.lr, momentum=section.momentum, nesterov=section.nesterov)


def adafactor(section: Any, moved: Groups) -> torch.optim.Optimizer:
    eps = (None, section.eps2)  # the first: that of the dtype
    return torch.optim.Adafactor(moved, lr=section.lr, beta2_decay=section.beta2_decay, eps=eps)


def lion(section: Any, moved: Groups) -> torch.optim.Optimizer:
    return Lion(moved, lr=section.lr, betas=section.betas)


def sophia(section: Any, moved: Groups) -> torch.optim.Optimizer:
    rest = {"rho": section.rho, "eps": section.eps}
    return Sophia(moved, lr=section.lr, betas=section.betas, every=section.every, **rest)


OPTIMIZERS: dict[str, Callable[[Any, Groups], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "adamw_8bit": adamw_8bit,
    "paged_adamw_8bit": adamw_8bit,
    "sgd": sgd,
    "adafactor": adafactor,
    "lion": lion,
    "sophia": sophia,
}


def build(section: Any, trained: Sequence[Trained]) -> torch.optim.Optimizer:
    """The optimizer of the recipe's `section` over what is trained."""
    return OPTIMIZERS[section.name](section, groups(trained, section.weight_decay, section.lr_ratio))


def lr_at(
    step: int,
    name: str,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    decay_steps: int = 0,
    floor: float = 0.0,
) -> float:
    """Learning rate of optimizer step `step` (from 0): a linear rise that reaches `peak` at the end of the
    warm-up, then the shape `name`. What falls to `floor` (a share of the peak) would reach it at
    `total_steps`; of wsd only the last `decay_steps` fall."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if name == "inverse-sqrt":
        begun = max(1, warmup_steps)
        return peak * math.sqrt(begun / (begun + step - warmup_steps))
    fall = decay_steps + 1 if name == "wsd" else total_steps - warmup_steps  # + 1: from the last at the peak
    done = max(0.0, (step - (total_steps - fall)) / max(1, fall))
    bent = {"constant": 1.0, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
    return peak * (floor + (1.0 - floor) * bent.get(name, 1.0 - done))


def looks_at_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() leaves parameters and state alone where the tensor `found_inf` holds a one: PyTorch's
    mark of optimizers that work with its loss scaler on the device."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_ratio"]


def estimates_at(optimizer: torch.optim.Optimizer, step: int) -> bool:
    """Whether step `step` (from 0) begins with gradients for estimate()."""
    return isinstance(optimizer, Sophia) and optimizer.estimates_at(step)


def estimate(optimizer: torch.optim.Optimizer, num_targets: int) -> None:
    """Takes the gradients of the mean loss over `num_targets` drawn labels, and leaves none."""
    assert isinstance(optimizer, Sophia)
    optimizer.estimate(num_targets)
    optimizer.zero_grad(set_to_none=True)


def measures(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """What a line of metrics.jsonl says of the optimizer."""
    return optimizer.measures() if isinstance(optimizer, Sophia) else {}


def state(optimizer: torch.optim.Optimizer, trained: Sequence[Trained]) -> dict[str, Tensor]:
    """The optimizer's state by name: "exp_avg|model.layers.0...". Its tensors share memory with the
    optimizer; an int becomes an int64 without dimensions."""
    return {
        f"{key}|{item.name}": _as_tensor(key, value)
        for item in trained
        for key, value in optimizer.state.get(item.parameter, {}).items()
    }


def _as_tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, int):
        return torch.tensor(value)
    found: Tensor = value.clone() if key.startswith("qmap") else value  # one table of bitsandbytes for all
    return found


def load_state(
    optimizer: torch.optim.Optimizer, trained: Sequence[Trained], tensors: dict[str, Tensor]
) -> None:
    """Take over what state() gave. Raises: KeyError when a tensor belongs to no trained parameter."""
    parameters = {item.name: item.parameter for item in trained}
    for label, tensor in tensors.items():
        key, _, name = label.partition("|")
        parameter = parameters[name]
        if tensor.dtype == torch.int64:
            optimizer.state[parameter][key] = int(tensor)
        elif getattr(optimizer, "is_paged", False) and key in ("state1", "state2"):
            # memory that the GPU may page out is taken by bitsandbytes alone
            paged = optimizer.get_state_buffer(parameter, dtype=tensor.dtype)  # type: ignore[attr-defined]
            optimizer.state[parameter][key] = paged.copy_(tensor)
        else:
            # fused AdamW wants all of its state on the parameter's device, its step count too
            optimizer.state[parameter][key] = tensor.to(parameter.device)
