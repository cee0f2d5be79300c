"""The tensors of one forward pass.

Shapes: T tokens of a packed row, or B rows of T tokens when padded; M trained tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class MicroBatch:
    input_ids: Tensor  # (1, T) packed, (B, T) padded
    position_ids: Tensor  # as input_ids; starts again at 0 in every document
    document_lengths: tuple[int, ...] | None  # packed: sums to T
    attention_mask: Tensor | None  # (B, T) padded: 1 at real tokens
    predictors: Tensor  # (M,) indices into the B * T positions whose next token is trained
    targets: Tensor  # (M,) those next tokens
    samples: tuple[int, ...]  # indices of the samples, for messages

    def num_targets(self) -> list[int]:
        """Trained tokens of each of the samples."""
        if self.document_lengths is not None:
            ends = torch.tensor(self.document_lengths).cumsum(0)
        else:
            ends = self.input_ids.shape[1] * torch.arange(1, len(self.samples) + 1)
        owners = torch.bucketize(self.predictors, ends, right=True)
        counts: list[int] = torch.bincount(owners, minlength=len(self.samples)).tolist()
        return counts

    def widened(self, width: int) -> "MicroBatch":
        """The same with rows of `width` tokens: a further document that nothing is trained on, or padding."""
        before = self.input_ids.shape[1]
        more = width - before
        if more == 0:
            return self

        def wider(tensor: Tensor) -> Tensor:
            return nn.functional.pad(tensor, (0, more))

        lengths, positions = self.document_lengths, wider(self.position_ids)
        if lengths is not None:
            lengths = (*lengths, more)
            positions[0, before:] = torch.arange(more, device=positions.device)
        return replace(
            self,
            input_ids=wider(self.input_ids),
            position_ids=positions,
            document_lengths=lengths,
            attention_mask=None if self.attention_mask is None else wider(self.attention_mask),
            predictors=self.predictors + more * (self.predictors // before),
        )

    def to(self, device: torch.device) -> "MicroBatch":
        def moved(tensor: Tensor) -> Tensor:
            # Only from pinned memory does a copy to a GPU not wait for what the GPU is doing.
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return replace(
            self,
            input_ids=moved(self.input_ids),
            position_ids=moved(self.position_ids),
            attention_mask=None if self.attention_mask is None else moved(self.attention_mask),
            predictors=moved(self.predictors),
            targets=moved(self.targets),
        )
