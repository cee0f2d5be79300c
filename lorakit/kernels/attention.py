"""Attention one document at a time, for rows in which several documents lie side by side without padding.

transformers lets a model call a registered function instead of its own attention, and forwards unknown
keyword arguments of the model's forward to it: `document_lengths` (a tuple of ints that sums to T) says where
documents end. Each document is attended to alone, so that no T x T mask exists and nothing can leak. The
plain twin is the model's own attention on each document by itself, in a batch of one.

Three ways lead to the same numbers: PyTorch's variable-length kernel takes all documents at once (CUDA, 16
bits), plain matrix products (products.py) what is bf16 on a CPU, and a loop over the documents with PyTorch's
fused attention everything else. Which one is a pure function of what is asked,
of the device and of what was registered, so that a run that continues computes as it began.

Shapes: H query heads, K key heads, T tokens of the row, D head size, N documents.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lorakit.kernels import Unsupported
from lorakit.kernels.products import attend

NAME = "lorakit_documents"
_WATCHED = f"{NAME}_watched"

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
    kernel: bool = True,
    products: bool = False,
    **unknown: object,
) -> tuple[Tensor, None]:
    """(1, T, H, D): causal attention within each document, by the loop alone where `kernel` is False,
    by plain products where `products` is True and they do what is asked.

    Raises: Unsupported for what could change the result unnoticed (attention sinks, biases, caches, other
    masks).
    """
    odd = sorted(name for name, given in unknown.items() if given is not None and name not in _HARMLESS)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if odd or document_lengths is None or attention_mask is not None or not causal or query.shape[0] != 1:
        raise Unsupported(", ".join(odd) or "a mask, a cache, a batch or bidirectional attention")
    dtype, sizes = _computed_in(query), (key.shape[-1], value.shape[-1])
    if kernel and softcap is None and fits_varlen(dtype, *sizes, dropout, _capability(query.device)):
        shape = (query.shape[1], key.shape[1], key.shape[-1])
        if _varlen_works(query.device, dtype, shape, scaling, sliding_window is not None):
            query, key, value = (x.to(dtype) for x in (query, key, value))
            return _all_at_once(query, key, value, document_lengths, scaling, sliding_window), None
    cut = sliding_window is not None and sliding_window < max(document_lengths)
    if products and softcap is None and dropout == 0 and not cut:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        query, key, value = (x.to(dtype)[0] for x in (query, key, value))
        return attend(query, key, value, document_lengths, scale)[None], None
    return _one_by_one(query, key, value, document_lengths, scaling, dropout, sliding_window, softcap), None


# ------------------------------------------------------------------------------------------------------------
# The loop


def _one_by_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    dropout: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:  # (1, T, H, D)
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(*(torch.split(x, list(lengths), dim=2) for x in (query, key, value)), strict=True):
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
    return torch.cat(outputs, dim=2).transpose(1, 2)


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


# ------------------------------------------------------------------------------------------------------------
# The variable-length kernel


def fits_varlen(
    dtype: torch.dtype, key_size: int, value_size: int, dropout: float, capability: tuple[int, int]
) -> bool:
    """Whether flash attention is written for this: 16 bits, no dropout, a CUDA `capability` from 8.0, and one
    head size for keys and values, which is a multiple of 8 up to 256.

    Source: the checks of mha_varlen_fwd in PyTorch's aten/src/ATen/native/transformers/cuda/flash_attn.
    """
    return (
        dtype in (torch.float16, torch.bfloat16)
        and key_size == value_size
        and key_size % 8 == 0
        and key_size <= 256
        and dropout == 0
        and capability >= (8, 0)
    )


def _capability(device: torch.device) -> tuple[int, int]:
    """That of a CUDA device which PyTorch has flash attention for, (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def _computed_in(query: Tensor) -> torch.dtype:
    """The dtype of the products: as autocast does with PyTorch's own attention, which the kernel escapes."""
    kind = query.device.type
    if query.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return query.dtype


def _all_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:  # (1, T, H, D)
    from torch.nn.attention.varlen import varlen_attn  # registers operators when it is imported

    longest = max(lengths)
    # flash attention counts the tokens before a query, a model counts the query too
    before = -1 if sliding_window is None or sliding_window >= longest else sliding_window - 1
    borders = _borders(lengths, query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, H, D), (T, K, D), (T, K, D)
    output = varlen_attn(
        q,
        k,
        v,
        borders,
        borders,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


@lru_cache(maxsize=8)  # a step asks once for every layer, forwards and again for checkpointed activations
def _borders(lengths: tuple[int, ...], device: torch.device) -> Tensor:  # (N + 1,)
    with torch.inference_mode(False):  # an evaluation must not leave behind what training cannot save
        borders = torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)
        # Only from pinned memory does a copy to a GPU not wait for what the GPU is doing.
        return borders.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else borders


@lru_cache(maxsize=64)
def _varlen_works(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],  # (H, K, D)
    scaling: float | None,
    windowed: bool,
) -> bool:
    """Whether the kernel runs here for this `shape`, forwards and backwards, and agrees with the loop.

    A build of PyTorch may lack it for a device or a head size, and tells by raising. Nothing random is drawn
    from the run's generators.
    """
    heads, key_heads, size = shape
    lengths, window = (9, 1, 30), 5 if windowed else None
    draw = torch.Generator().manual_seed(0)

    def drawn(num_heads: int) -> Tensor:
        numbers = torch.randn(1, num_heads, sum(lengths), size, generator=draw)
        return numbers.to(device, dtype).requires_grad_()

    # Whoever asks first may be inside checkpointing or an evaluation: this leaves no trace in either.
    # inference_mode(False) records gradients even inside no_grad.
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), hooks:
        query, key, value = inputs = (drawn(heads), drawn(key_heads), drawn(key_heads))
        weight = drawn(heads).detach().transpose(1, 2)
        expected = _one_by_one(query, key, value, lengths, scaling, 0.0, window, None)
        try:
            found = _all_at_once(query, key, value, lengths, scaling, window)
            backward = torch.autograd.grad(found, inputs, weight)
        except torch.OutOfMemoryError:
            raise  # says nothing about the kernel
        except (ImportError, TypeError, ValueError, RuntimeError):
            return False
        wanted = (expected, *torch.autograd.grad(expected, inputs, weight))
        pairs = zip((found, *backward), wanted, strict=True)
        return all(_distance(x.detach(), y.detach()) <= 1 for x, y in pairs)


# ------------------------------------------------------------------------------------------------------------
# The proof


def register(products: bool = False) -> None:
    """Make NAME known to transformers, by plain products or not. No mask function is registered with it, so
    that models build no mask."""
    AttentionInterface.register(NAME, partial(attention_by_document, products=products))


@dataclass
class _Seen:
    """What arrived at the registered function while a model ran: how often, and whether with a window."""

    kernel: bool = True
    calls: int = 0
    window: bool = False

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        self.calls += 1
        self.window = self.window or given.get("sliding_window") is not None
        return attention_by_document(module, q, k, v, mask, kernel=self.kernel, **given)


@torch.no_grad()
def prove_isolation(
    model: Any, num_layers: int, vocabulary: int, routed: bool = False, window: int = 0, longest: int = 0
) -> str:
    """Empty when packed documents do not see each other in this very model, else the reason why they might.

    Two short documents are packed: changing the first must not change one bit of the second, packed must
    equal each document alone under the model's own attention to rounding, and the registered function must
    have run once in each attention layer. With `routed` experts the first document decides how many rows an
    expert multiplies at once, and so how the second is rounded: there, rounding is allowed in both
    comparisons, and the second one takes the loop (the kernel's rounding may send a token to another expert;
    its trial has compared it with the loop). A `window` of the configuration that is shorter than the
    `longest` sample must have arrived as an argument: some models tell it to their mask alone, which packed
    rows do not have. The model is left as it was.
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

    seen = _Seen()
    model.eval()
    try:
        separate = torch.cat([model(d[None], use_cache=False).logits[0] for d in (first, second)])
        AttentionInterface.register(_WATCHED, seen)
        model.set_attn_implementation(_WATCHED)
        together = packed(first, second)
        if seen.calls != num_layers:
            return _not_called(model.config.model_type, seen.calls, num_layers)
        changed = packed(other, second)[9:]
        seen.kernel = False
        compared = packed(first, second) if routed else together
    except Unsupported as error:
        return f"its attention needs more than per-document causal attention: {error}"
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it does not take documents side by side: {str(error).splitlines()[0][:120]}"
    finally:
        model.set_attn_implementation(own)
        model.train(was_training)
    if not (torch.equal(together[9:], changed) or (routed and _distance(together[9:], changed) < 1)):
        return "changing one document changed the next one"
    if not _distance(compared, separate) <= 1:
        return "packed and separate documents differ by more than rounding"
    if 0 < window < longest and not seen.window:
        return f"its window of {window} tokens is known to its mask only, and samples are longer"
    return ""


def _not_called(kind: str, calls: int, num_layers: int) -> str:
    if calls == 0:
        return f"{kind} mixes tokens in code of its own, which cannot be told where a document ends"
    if calls < num_layers:
        return (
            f"{num_layers - calls} of the {num_layers} layers of {kind} mix tokens in code of their own, "
            "which cannot be told where a document ends"
        )
    return f"{kind} calls its attention {calls} times in {num_layers} layers instead of once in each"


def _distance(x: Tensor, y: Tensor) -> float:
    """Largest difference, in units of what rounding explains: 1e-4 of the largest value, 0.05 in 16 bits."""
    rounding = 1e-4 if x.dtype in (torch.float32, torch.float64) else 0.05
    return ((x - y).abs().max() / (rounding * y.abs().max() + 1e-9)).item()
