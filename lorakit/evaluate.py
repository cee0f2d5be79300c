"""Held-out loss: summed over tokens and ranks, divided once, so that neither batches nor ranks weigh in."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.micro_batch import MicroBatch


@torch.no_grad()
def evaluate(
    objective: nn.Module,
    micros: Iterable[MicroBatch],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[Any]],
    all_ranks_sum: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """{"eval_loss": mean over the trained tokens of all ranks}. `objective` is left in the mode it was in."""
    was_training = objective.training
    objective.eval()
    loss_total = torch.zeros((), dtype=torch.float64, device=device)
    num_targets = 0
    for micro in micros:
        with autocast():
            loss_total += objective(micro.to(device)).double()
        num_targets += len(micro.targets)
    objective.train(was_training)
    total, count = all_ranks_sum(torch.stack([loss_total, loss_total.new_tensor(num_targets)])).tolist()
    return {"eval_loss": total / count}
