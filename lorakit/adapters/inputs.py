"""What adapted layers are given for the rows of a probe."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Probe

See = Callable[[int, Tensor, Tensor], None]


def see_inputs(layers: Sequence[Any], probe: Probe, see: See) -> None:
    """Runs this rank's part of the probe's rows; `see` is told of every call of a layer: its index, the
    tensor it is given, and of that the rows (N, in) of real tokens. Padding is no token, but where a layer is
    given other rows than the tokens of the batch (an expert of a mixture)."""
    real: Tensor | None = None

    def hook(index: int, layer: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        x = (given or tuple(named.values()))[0]
        rows = x.reshape(-1, x.shape[-1])
        if real is not None and len(rows) == real.numel():
            rows = rows[real.flatten().bool()]
        with torch.autocast(x.device.type, enabled=False):
            see(index, x, rows)

    hooks = [
        layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        for micro in probe.micro_batches():
            real = micro.attention_mask
            with torch.no_grad():
                probe.forward(micro)
    finally:
        for each in hooks:
            each.remove()
