"""Next-token prediction: cross-entropy summed over the trained tokens, in fp32 or better.

Only the positions whose next token is trained reach the output head: a packed row asks the model for those
alone, and the fused loss never makes their logits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.kernels import Unsupported, cross_entropy
from lorakit.micro_batch import MicroBatch


class CausalLmTask:
    model_class = "AutoModelForCausalLM"

    def loss_sum(self, model: Any, micro: MicroBatch) -> Tensor:
        """Sum over M targets of -log p(target | the tokens before it in its own document)."""
        return nn.functional.cross_entropy(_logits(model, micro), micro.targets, reduction="sum")

    def drawn_loss_sum(self, model: Any, micro: MicroBatch, places: Tensor) -> Tensor:
        """The same with labels from the model's own distribution, which stand for the targets."""
        logits = _logits(model, micro)
        return nn.functional.cross_entropy(logits, labels_at(logits, places), reduction="sum")

    def fused_loss_sum(self, model: Any, micro: MicroBatch) -> Tensor:
        """The same sum from the hidden states at the M predictors, without logits."""
        head = model.get_output_embeddings()
        head = getattr(head, "modules_to_save", {"default": head})["default"]  # PEFT's copy of a trained head
        head, weight = _with_rows(head)
        if type(head) is not nn.Linear:
            kind = "adapted" if hasattr(head, "base_layer") else f"a {type(head).__name__}"
            raise Unsupported(f"the output head is {kind}")
        hidden = model.get_decoder()(**inputs_of(micro)).last_hidden_state  # (B, T, H)
        chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, micro.predictors)  # (M, H)
        scale, softcap = logit_transform(model.config)
        return cross_entropy.summed(chosen, weight, micro.targets, head.bias, scale, softcap)


def _logits(model: Any, micro: MicroBatch) -> Tensor:
    """(M, V) at the predictors, in fp32 or better, by the model's own forward pass."""
    inputs = inputs_of(micro)
    if micro.document_lengths is not None:
        logits = model(**inputs, logits_to_keep=micro.predictors).logits[0]
    else:
        full = model(**inputs).logits  # (B, T, V)
        logits = full.reshape(-1, full.shape[-1])[micro.predictors]
    return logits if logits.dtype == torch.float64 else logits.float()  # type: ignore[no-any-return]


@torch.no_grad()
def labels_at(logits: Tensor, places: Tensor, rows: int = 64) -> Tensor:
    """(M,): the label in whose stretch of [0, 1) `places` (M,) lies, each label's as long as its probability
    under `logits` (M, V). Probabilities are counted in units of 2^-48: their sums are exact then, whatever
    the device does in which order. `rows` at a time are held in 64 bits."""
    labels = []
    for some, where in zip(logits.split(rows), places.split(rows), strict=True):
        ends = (some.double().softmax(-1) * 2**48).long().cumsum(-1)
        total = ends[:, -1:]
        start = (where[:, None] * total).long().clamp(max=total - 1)
        labels.append(torch.searchsorted(ends, start, right=True)[:, 0])
    return torch.cat(labels)


def _with_rows(head: Any) -> tuple[Any, Any]:
    """(the output head, its weight): with the trained rows in place where PEFT ties the head to an embedding
    of which some rows are trained."""
    if not hasattr(head, "token_adapter"):
        return head, getattr(head, "weight", None)
    rows = head.token_adapter
    base = rows.get_base_layer()
    return base, base.weight if rows.disable_adapters else rows.get_merged_weights(rows.active_adapters)


def inputs_of(micro: MicroBatch) -> dict[str, Any]:
    """What a decoder is called with."""
    inputs = {"input_ids": micro.input_ids, "position_ids": micro.position_ids, "use_cache": False}
    if micro.document_lengths is not None:
        return inputs | {"document_lengths": micro.document_lengths}
    return inputs | {"attention_mask": micro.attention_mask}


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(factor, softcap) that a model applies to the output of its head, by the names under which
    configurations of transformers hold them: Cohere and Falcon-H1 multiply, Granite divides, Gemma 2 bends. A
    model that does something else is found out by comparing with its own forward pass."""
    text = config.get_text_config()
    factor = getattr(text, "logit_scale", None) or getattr(text, "lm_head_multiplier", None) or 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0
    return float(factor) / float(divisor), getattr(text, "final_logit_softcapping", None)
