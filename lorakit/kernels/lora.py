"""Adapted layers that read the same input as one function: y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T.

All A of a group are stacked, so that x is read once for them (q, k and v; gate and up), and every update is
added into the base layer's output in place. Backwards the gradients of all outputs meet in one buffer: dx =
sum of dy_i W_i + (s_i dy_i B_i) A_i. Nothing is held but x and x A^T; where no A of the group moves (LoRA-FA)
x A^T alone, and of x only what the operation that made it holds. Activations are never copied to fp32, and a
quantized weight is dequantized when it is read and dropped. A and B stay PEFT's fp32 parameters; they are
rounded to the dtype of the products as autocast would, and their gradients come back in fp32. DoRA's rows are
rescaled afterwards (dora.py), which holds the outputs, too.

The layers stay PEFT's: only their `forward` is another one for as long as their group is switched on, and it
gives way to PEFT's own whenever it is asked for something else (a disabled or merged adapter, several
adapters). The plain twin is that forward of PEFT.

Shapes: N tokens of all rows, I in, O out, R rank.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lorakit.kernels import dora

Pair = tuple[Tensor, Tensor]  # A, B

NAME = "default"  # of the adapter, as PEFT calls one that has no other name

# By name: the 4-bit classes exist only once bitsandbytes is imported, which takes seconds.
_KINDS = {
    ("peft.tuners.lora.layer", "Linear"),
    ("peft.tuners.lora.bnb", "Linear4bit"),
    ("peft.tuners.adalora.layer", "SVDLinear"),
    ("peft.tuners.adalora.bnb", "SVDLinear4bit"),
}


# ------------------------------------------------------------------------------------------------------------
# The layers


def is_supported(layer: nn.Module) -> bool:
    """Whether the fast forward computes what this PEFT layer does: LoRA, AdaLoRA, DoRA without dropout, on a
    frozen Linear, Conv1D or 4-bit layer. Which adapters are active is looked at when it runs."""
    adapted: Any = layer
    if (type(layer).__module__, type(layer).__name__) not in _KINDS or NAME not in adapted.lora_A:
        return False
    base = adapted.base_layer
    biased = not hasattr(layer, "lora_E") and adapted.lora_B[NAME].bias is not None
    frozen = not any(parameter.requires_grad for parameter in base.parameters())
    read = type(base) in (nn.Linear, Conv1D) or _is_4bit(base)
    return _is_known(layer) and not biased and frozen and read


def _is_known(layer: Any) -> bool:
    """Whether the layer is no variant, or DoRA: whose dropout would change what the base layer reads, too."""
    kinds = [type(variant) for variant in getattr(layer, "lora_variant", {}).values()]
    dropped = any(isinstance(dropout, nn.Dropout) for dropout in layer.lora_dropout.values())
    return not kinds or ((kinds[0].__module__, kinds[0].__name__) == dora.VARIANT and not dropped)


def _magnitude(layer: Any) -> Tensor | None:
    """(O,) the lengths that DoRA trains; None where the layer is no DoRA."""
    vectors = getattr(layer, "lora_magnitude_vector", {})
    found: Tensor | None = vectors[NAME].weight if NAME in vectors else None
    return found


def _is_4bit(base: nn.Module) -> bool:
    return type(base).__name__ == "Linear4bit" and getattr(base, "compute_dtype", None) is not None


def dense(base: nn.Module, dtype: torch.dtype | None) -> Tensor:
    """(O, I) the weight of a base layer in `dtype`; None: in the dtype that it is held in."""
    weight: Any = base.weight
    if _is_4bit(base):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state)
    found: Tensor = (weight.T if isinstance(base, Conv1D) else weight).detach().to(dtype or weight.dtype)
    return found


def factors(layer: Any) -> tuple[Tensor, Tensor, float]:
    """(A (R, I), B (O, R), scale): the update is scale * B A. AdaLoRA's singular values go into A; several
    adapters stand one below the other, and one that is taken away from another is subtracted first."""
    if len(layer.active_adapters) > 1:
        names = layer.active_adapters
        if len(names) == 2 and layer.scaling[names[1]] < 0:
            now, before = ((layer.lora_A[name].weight, layer.lora_B[name].weight) for name in names)
            return *difference(now, before, layer.scaling[names[0]], -layer.scaling[names[1]]), 1.0
        wide = torch.cat([layer.lora_B[name].weight * layer.scaling[name] for name in names], dim=1)
        return torch.cat([layer.lora_A[name].weight for name in names]), wide, 1.0
    a, b = layer.lora_A[NAME], layer.lora_B[NAME]
    if hasattr(layer, "lora_E"):
        # As tensors: to read the divisor would make a GPU wait.
        return a * (layer.lora_E[NAME] * (layer.scaling[NAME] / (layer.ranknum[NAME] + 1e-5))), b, 1.0
    return a.weight, b.weight, layer.scaling[NAME]


def difference(now: Pair, before: Pair, scale: float, taken: float) -> Pair:
    """(A' (2R, I), B' (O, 2R)) with B' A' = scale * B A - taken * B_0 A_0, for pairs (A, B) and (A_0, B_0):

        A' = [A; A - A_0],    B' = [scale * B - taken * B_0, taken * B_0].

    What differs is subtracted before anything is rounded. As A' = [A; A_0] each of the two products would be
    rounded by itself: in bf16 by more than a small difference between them.
    """
    (a, b), (a_before, b_before) = now, before
    return (
        torch.cat([a, a - a_before]),
        torch.cat([scale * b - taken * b_before, taken * b_before], dim=1),
    )


# ------------------------------------------------------------------------------------------------------------
# Switching


@dataclass(eq=False)
class Group:
    """Adapted layers that read the same tensor. The first that is called computes for all; the others find
    their outputs waiting."""

    layers: tuple[Any, ...]
    source: tuple[Any, ...] | None = None  # what was read, its version, the dtype, whether with gradients
    waiting: dict[int, Tensor] = field(default_factory=dict)
    squares: tuple[Tensor | None, ...] = ()  # of the rows of DoRA's base weights, which are frozen

    def switch_on(self) -> None:
        self.squares = tuple(
            None if _magnitude(layer) is None else dora.row_squares(dense(layer.base_layer, None))
            for layer in self.layers
        )
        for number, layer in enumerate(self.layers):
            layer.forward = self._forward_of(number, layer)

    def switch_off(self) -> None:
        self.source, self.waiting, self.squares = None, {}, ()
        for layer in self.layers:
            vars(layer).pop("forward", None)

    def _forward_of(self, number: int, layer: Any) -> Callable[..., Tensor]:
        plain = type(layer).forward

        def forward(x: Tensor, *more: Any, **named: Any) -> Tensor:
            dtype = products_dtype(x)
            asked_more = more or named or x.is_inference()  # whose version cannot be told
            if asked_more or not all(_is_active(layer, dtype) for layer in self.layers):
                output: Tensor = plain(layer, x, *more, **named)
                return output
            now = (x._version, dtype, torch.is_grad_enabled())
            if self.source is None or self.source[0] is not x or self.source[1:] != now:
                self.waiting = {}
            if number not in self.waiting:
                self.waiting = dict(enumerate(outputs(self.layers, x, dtype, self.squares)))
            found = self.waiting.pop(number)
            self.source = (x, *now) if self.waiting else None
            return found

        return forward


def _is_active(layer: Any, dtype: torch.dtype) -> bool:
    if _is_4bit(layer.base_layer) and layer.base_layer.compute_dtype != dtype:
        return False  # the recipe says in what a quantized base is multiplied
    names = layer.active_adapters
    ours = names == [NAME] or (len(names) > 1 and _adds_up(layer, names))
    return ours and not layer.disable_adapters and not layer.merged


def _adds_up(layer: Any, names: Sequence[str]) -> bool:
    """Whether several adapters are LoRA without dropout and bias: then they are one of a larger rank."""
    plain = not (hasattr(layer, "lora_E") or getattr(layer, "lora_variant", {}))
    return plain and all(
        name in layer.lora_A
        and not isinstance(layer.lora_dropout[name], nn.Dropout)
        and layer.lora_B[name].bias is None
        for name in names
    )


def products_dtype(x: Tensor) -> torch.dtype:
    """What products with x are computed in: that of autocast where it is on."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def groups_of(model: nn.Module, run: Callable[[], object]) -> list[Group]:
    """The supported layers of a model in groups: those that are given the same tensor one after the other
    while `run` runs the model. A layer that is not called then, or twice, is a group of its own."""
    layers = [module for module in model.modules() if is_supported(module)]
    read: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        if given:  # else by keyword, which PEFT's own forward takes
            read.append((module, given[0]))

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    calls = [layer for layer, _ in read]
    found: list[list[nn.Module]] = []
    before: Tensor | None = None
    for layer, x in read:
        if calls.count(layer) > 1:
            continue
        if x is before:
            found[-1].append(layer)
        else:
            found.append([layer])
        before = x
    grouped = {id(layer) for group in found for layer in group}
    found += [[layer] for layer in layers if id(layer) not in grouped]
    return [Group(tuple(group)) for group in found]


# ------------------------------------------------------------------------------------------------------------
# The function


def outputs(
    layers: Sequence[Any], x: Tensor, dtype: torch.dtype, squares: Sequence[Tensor | None] | None = None
) -> tuple[Tensor, ...]:
    """What each of `layers` gives for x (..., I), with products in `dtype`: (..., O_i). `squares`: of the
    rows of their base weights where they are DoRA's."""
    given = [factors(layer) for layer in layers]
    dropouts = [layer.lora_dropout[NAME] for layer in layers]
    rates = [float(d.p) if isinstance(d, nn.Dropout) and d.training else 0.0 for d in dropouts]
    bases = tuple(layer.base_layer for layer in layers)
    magnitudes = [_magnitude(layer) for layer in layers]
    biases = tuple(b.bias if m is None else None for b, m in zip(bases, magnitudes, strict=True))
    scales = tuple(scale for _, _, scale in given)
    tensors = [tensor for a, b, _ in given for tensor in (a, b)]
    with torch.autocast(x.device.type, enabled=False):
        found: tuple[Tensor, ...] = _Outputs.apply(  # type: ignore[no-untyped-call]
            x.to(dtype), bases, biases, scales, tuple(rates), *tensors
        )
        if squares is None or not any(m is not None for m in magnitudes):
            return found
        rows = zip(found, bases, magnitudes, squares, given, strict=True)
        return tuple(v if m is None else _rescaled(v, base, m, sq, *abs) for v, base, m, sq, abs in rows)


def _rescaled(
    v: Tensor, base: Any, m: Tensor, squares: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """The output of a DoRA layer from what it is before its rows are rescaled."""
    assert squares is not None
    with torch.no_grad():
        lengths = dora.row_lengths(squares, dense(base, v.dtype), a, b, scale)
    return dora.rescaled(v, m, lengths, base.bias)


class _Outputs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bases: tuple[nn.Module, ...],
        biases: tuple[Tensor | None, ...],
        scales: tuple[float, ...],
        rates: tuple[float, ...],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        raised = [1.0 / (1.0 - rate) for rate in rates]  # what dropout keeps; in A, not in bf16 masks
        wide = [a if f == 1.0 else a * f for a, f in zip(tensors[::2], raised, strict=True)]
        stacked = torch.cat(wide).to(x.dtype)  # (sum of R, I)
        scaled = [(b * s).to(x.dtype) for b, s in zip(tensors[1::2], scales, strict=True)]
        ranks = [len(a) for a in tensors[::2]]
        # Drawn as PEFT draws: one mask per layer, in the order of the layers.
        ones = torch.ones_like(rows) if any(rates) else rows
        kept = [torch.dropout(ones, rate, True).bool() for rate in rates] if any(rates) else []
        if kept:
            down = torch.cat(
                [(rows * m) @ a.T for m, a in zip(kept, stacked.split(ranks), strict=True)], dim=1
            )
        else:
            down = rows @ stacked.T  # (N, sum of R)
        found = []
        for base, bias, b, z in zip(bases, biases, scaled, down.split(ranks, dim=1), strict=True):
            weight = dense(base, x.dtype)
            y = rows @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), rows, weight.T)
            # Not a view, which a model could not change in place.
            found.append(torch.ops.aten._unsafe_view(y.addmm_(z, b.T), [*x.shape[:-1], len(weight)]))
        moves_a = any(ctx.needs_input_grad[5::2])
        ctx.save_for_backward(x if moves_a else None, down, stacked, *scaled, *kept)
        ctx.bases, ctx.scales, ctx.ranks, ctx.raised, ctx.shape = bases, scales, ranks, raised, x.shape
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, down, stacked, *others = ctx.saved_tensors
        scaled, kept = others[: len(ctx.bases)], others[len(ctx.bases) :]
        rows = None if x is None else x.reshape(-1, x.shape[-1])
        exact = torch.float64 if down.dtype == torch.float64 else torch.float32
        grad_x: Tensor | None = None
        back = torch.zeros_like(down) if None in grads else torch.empty_like(down)  # (N, sum of R)
        of_a: list[Tensor | None] = []
        of_b: list[Tensor | None] = []
        parts = zip(
            ctx.bases,
            ctx.scales,
            scaled,
            grads,
            down.split(ctx.ranks, 1),
            back.split(ctx.ranks, 1),
            strict=True,
        )
        for base, scale, b, grad, z, z_back in parts:
            if grad is None:
                of_b.append(None)
                continue
            g = grad.reshape(len(down), grad.shape[-1])  # (N, O)
            torch.mm(g, b, out=z_back)
            of_b.append((g.T @ z).to(exact) * scale)
            if ctx.needs_input_grad[0]:
                weight = dense(base, down.dtype)
                grad_x = g @ weight if grad_x is None else grad_x.addmm_(g, weight)
        if kept:
            split = stacked.split(ctx.ranks), back.split(ctx.ranks, 1)
            for mask, factor, a, z_back in zip(kept, ctx.raised, *split, strict=True):
                of_a.append(None if rows is None else (z_back.T @ (rows * mask)).to(exact) * factor)
                if grad_x is not None:
                    grad_x += (z_back @ a).mul_(mask)
        else:
            of_a += [None] * len(grads) if rows is None else (back.T @ rows).to(exact).split(ctx.ranks)
            if grad_x is not None:
                grad_x.addmm_(back, stacked)
        of_a = [None if grad is None else a for a, grad in zip(of_a, grads, strict=True)]
        pairs = (grad for pair in zip(of_a, of_b, strict=True) for grad in pair)
        tensors = [None if grad is None else grad.to(t) for grad, t in zip(pairs, ctx.dtypes, strict=True)]
        return (None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, *tensors)
