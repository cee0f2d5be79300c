"""Next-token prediction: cross-entropy summed over the trained tokens, in fp32 or better.

Only the positions whose next token is trained reach the output head: a packed row asks the model for those
alone.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.micro_batch import MicroBatch


class CausalLmTask:
    model_class = "AutoModelForCausalLM"

    def loss_sum(self, model: Any, micro: MicroBatch) -> Tensor:
        """Sum over M targets of -log p(target | the tokens before it in its own document)."""
        inputs: dict[str, Any] = {
            "input_ids": micro.input_ids,
            "position_ids": micro.position_ids,
            "use_cache": False,
        }
        if micro.document_lengths is not None:
            logits = model(
                **inputs, document_lengths=micro.document_lengths, logits_to_keep=micro.predictors
            ).logits[0]  # (M, V)
        else:
            full = model(**inputs, attention_mask=micro.attention_mask).logits  # (B, T, V)
            logits = full.reshape(-1, full.shape[-1])[micro.predictors]  # (M, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, micro.targets, reduction="sum")
