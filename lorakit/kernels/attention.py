"""Attention one document at a time, for rows in which several documents lie side by side without padding.

transformers lets a model call a registered function instead of its own attention, and forwards unknown
keyword arguments of the model's forward to it: `document_lengths` (a tuple of ints that sums to T) says where
documents end. Each document is attended to alone, so that no T x T mask exists and nothing can leak. The
plain twin is the model's own attention on each document by itself, in a batch of one.

Shapes: H query heads, K key heads, T tokens of the row, D head size.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "lorakit_documents"

# What transformers passes along that does not change attention within one document.
_HARMLESS = {
    "position_ids",
    "position_embeddings",
    "use_cache",
    "cache_position",
    "output_attentions",
    "logits_to_keep",
}
_HARMLESS |= {"output_hidden_states", "return_dict", "token_type_ids", "head_mask", "output_router_logits"}

# What the registered function saw, for the proof that a model uses it: how often it ran, and whether a window
# came.
calls = 0
window_given = False


class Unsupported(Exception):
    """The model asks its attention for something that this function does not do."""


def attention_by_document(
    module: nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, K, T, D)
    value: Tensor,  # (1, K, T, D)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **unknown: object,
) -> tuple[Tensor, None]:
    """(1, T, H, D): causal attention within each document.

    Raises: Unsupported for what could change the result unnoticed (attention sinks, biases, caches, other
    masks).
    """
    global calls, window_given
    calls += 1
    window_given = window_given or sliding_window is not None
    odd = sorted(name for name, given in unknown.items() if given is not None and name not in _HARMLESS)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if odd or document_lengths is None or attention_mask is not None or not causal or query.shape[0] != 1:
        raise Unsupported(", ".join(odd) or "a mask, a cache, a batch or bidirectional attention")
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(
        *(torch.split(x, list(document_lengths), dim=2) for x in (query, key, value)), strict=True
    ):
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        length = q.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < length else None
        if softcap is not None:
            output = _with_softcap(q, k, v, scaling, dropout, window, softcap)
        elif window is not None:
            mask = _visible(length, window, q.device)
            output = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scaling)
        else:
            output = nn.functional.scaled_dot_product_attention(
                q, k, v, None, dropout, is_causal=True, scale=scaling
            )
        outputs.append(output)
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _visible(
    length: int, window: int | None, device: torch.device
) -> Tensor:  # (length, length), True: attended to
    ones = torch.ones(length, length, dtype=torch.bool, device=device)
    return ones.tril() if window is None else ones.tril() & ones.triu(1 - window)


def _with_softcap(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, dropout: float, window: int | None, softcap: float
) -> Tensor:
    """softmax(softcap * tanh(q k^T * scaling / softcap)) v. Source: Gemma 2 report, arXiv 2408.00118, section
    2."""
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_visible(q.shape[2], window, q.device), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v


def register() -> None:
    """Make NAME known to transformers. No mask function is registered with it, so that models build no
    mask."""
    AttentionInterface.register(NAME, attention_by_document)


@torch.no_grad()
def prove_isolation(
    model: Any, num_layers: int, vocabulary: int, routed: bool = False, window: int = 0, longest: int = 0
) -> str:
    """Empty when packed documents do not see each other in this very model, else the reason why they might.

    Two short documents are packed: changing the first must not change one bit of the second, packed must
    equal each document alone under the model's own attention to rounding, and the registered function must
    have run once in each attention layer. With `routed` experts the first document decides how many rows an
    expert multiplies at once, and so how the second is rounded: there, rounding is allowed in both
    comparisons. A `window` of the configuration that is shorter than the `longest` sample must have arrived
    as an argument: some models tell it to their mask alone, which packed rows do not have. The model is left
    as it was.
    """
    own, was_training = model.config._attn_implementation, model.training
    device = next(model.parameters()).device
    num_ids = max(2, min(vocabulary, 1000))
    ids = torch.arange(20, device=device) * 7 % num_ids
    first, second, other = ids[:9], ids[9:], (ids[:9] + 1) % num_ids

    def packed(*documents: Tensor) -> Tensor:  # (T, V)
        positions = torch.cat([torch.arange(len(d), device=device) for d in documents])
        output = model(
            input_ids=torch.cat(documents)[None],
            position_ids=positions[None],
            document_lengths=tuple(len(d) for d in documents),
            use_cache=False,
        )
        found: Tensor = output.logits[0]
        return found

    global calls, window_given
    calls, window_given = 0, False
    model.eval()
    try:
        separate = torch.cat([model(d[None], use_cache=False).logits[0] for d in (first, second)])
        register()
        model.set_attn_implementation(NAME)
        together = packed(first, second)
        if calls != num_layers:
            return f"the registered attention ran {calls} times in {num_layers} layers"
        changed = packed(other, second)[9:]
    except Unsupported as error:
        return f"its attention needs more than per-document causal attention: {error}"
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it does not take documents side by side: {str(error).splitlines()[0][:120]}"
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
    if not (torch.equal(together[9:], changed) or (routed and _distance(together[9:], changed) < 1)):
        return "changing one document changed the next one"
    if _distance(together, separate) > 1:
        return "packed and separate documents differ by more than rounding"
    if 0 < window < longest and not window_given:
        return f"its window of {window} tokens is known to its mask only, and samples are longer"
    return ""


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference, in units of what rounding explains: 1e-4 of the largest value, 0.05 in 16 bits."""
    rounding = 1e-4 if x.dtype in (torch.float32, torch.float64) else 0.05
    return ((x - y).abs().max() / (rounding * y.abs().max() + 1e-9)).item()
