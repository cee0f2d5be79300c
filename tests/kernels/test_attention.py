"""Packed documents against the model's own attention on each document alone (the plain twin).

The models are random, the documents too: every property is checked for several lengths and contents. Logits
and gradients are compared in fp32 to 1e-6 of the largest value; what must not change is compared bit by bit.
"""

import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lorakit.kernels import attention
from lorakit.tasks.causal_lm import CausalLmTask
from tests import architectures
from tests.architectures import VOCABULARY

SEEDS = range(4)


def model_of(name: str, packed: bool = True) -> Any:
    """A model that packs; its own attention is the plain twin, to which `own` goes back."""
    config = architectures.CONFIGS[name]()
    if name == "gemma2":
        config._attn_implementation = "eager"  # its soft-cap is not in SDPA: the plain twin must have it
    model = architectures.build(config)
    if packed:
        attention.register()
        model.set_attn_implementation(attention.NAME)
    return model


def own(model: Any, name: str) -> Any:
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")
    return model


def positions_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def packed(model: Any, documents: list[Tensor], **options: Any) -> Tensor:
    """(T, V) from one row; documents are ids, (n,), or embeddings, (n, I)."""
    lengths = tuple(len(d) for d in documents)
    kind = "inputs_embeds" if documents[0].is_floating_point() else "input_ids"
    inputs = {kind: torch.cat(documents)[None], "position_ids": positions_of(lengths)}
    return model(**inputs, document_lengths=lengths, use_cache=False, **options).logits[0]


def separate(model: Any, documents: list[Tensor]) -> Tensor:
    """(T, V) from one forward for each document."""
    kind = "inputs_embeds" if documents[0].is_floating_point() else "input_ids"
    return torch.cat([model(**{kind: d[None]}, use_cache=False).logits[0] for d in documents])


def draw_documents(seed: int) -> list[Tensor]:
    """Two to six documents of 1 to 40 tokens."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(1, 41, size=draw.integers(2, 7))
    return [torch.from_numpy(draw.integers(3, VOCABULARY, size=n)) for n in lengths]


def draw_weights(num_tokens: int) -> Tensor:
    """(T, V): the loss of the tests is the sum of logits with these weights."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal((num_tokens, VOCABULARY), np.float32))


def embedded(model: Any, documents: list[Tensor]) -> list[Tensor]:
    """The documents as embeddings that take a gradient."""
    return [model.get_input_embeddings()(d).detach().clone().requires_grad_() for d in documents]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    """Of all parameters; zero where a parameter takes no part."""
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
    pairs = zip(found, model.parameters(), strict=True)
    return [torch.zeros_like(p) if g is None else g for g, p in pairs]


def close(found: Tensor, expected: Tensor, of: float | None = None) -> bool:
    """Within 1e-6 of the largest value expected, or of `of`."""
    largest = expected.abs().max().item() if of is None else of
    return (found - expected).abs().max().item() <= 1e-6 * largest


def largest_of(tensors: list[Tensor]) -> float:
    return max(x.abs().max().item() for x in tensors)


# ------------------------------------------------------------------------------------------------------------
# Packed is separate, and nothing leaks


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_packed_equals_separate_in_logits_and_gradients(name: str) -> None:
    model = model_of(name)
    for seed in SEEDS:
        documents = draw_documents(seed)
        weights = draw_weights(sum(map(len, documents)))
        inputs = embedded(model, documents)
        expected = separate(own(model, name), inputs)
        wanted = gradients(model, (expected * weights).sum())
        wanted_inputs = torch.cat(torch.autograd.grad((expected * weights).sum(), inputs))
        model.set_attn_implementation(attention.NAME)
        found = packed(model, inputs)
        assert close(found, expected)
        for gradient, other in zip(gradients(model, (found * weights).sum()), wanted, strict=True):
            assert close(
                gradient, other, of=largest_of(wanted)
            )  # some, as of key biases, are zero but for noise
        assert close(torch.cat(torch.autograd.grad((found * weights).sum(), inputs)), wanted_inputs)


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_changing_a_document_changes_nothing_of_the_others(name: str) -> None:
    """Neither their logits nor the gradients of their loss, of which nothing reaches the changed document."""
    model = model_of(name)

    def later(documents: list[Tensor]) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """Of all documents but the first: logits; gradients of parameters, of their inputs, of the first."""
        inputs = embedded(model, documents)
        logits = packed(model, inputs)[len(documents[0]) :]
        loss = (logits * draw_weights(len(logits))).sum()
        first, *rest = torch.autograd.grad(loss, inputs, retain_graph=True)
        return logits, gradients(model, loss), torch.cat(rest), first

    for seed in SEEDS:
        first, *others = draw_documents(seed)
        logits, of_parameters, of_inputs, of_first = later([first, *others])
        assert not of_first.any()
        same_length = VOCABULARY + 2 - first
        found, of_parameters_now, of_inputs_now, of_first = later([same_length, *others])
        assert not of_first.any()
        assert torch.equal(of_inputs_now, of_inputs) or (
            name == "mixtral" and close(of_inputs_now, of_inputs)
        )
        assert torch.equal(found, logits) or (name == "mixtral" and close(found, logits))
        for now, before in zip(of_parameters_now, of_parameters, strict=True):
            # the rows that an expert multiplies at once, and so its rounding, depend on the other documents
            exact = torch.equal(now, before)
            assert exact or (name == "mixtral" and close(now, before, of=largest_of(of_parameters)))

        longer = torch.cat([same_length, first, first[:1]])
        found, of_parameters_now, of_inputs_now, of_first = later([longer, *others])
        assert not of_first.any() and close(found, logits) and close(of_inputs_now, of_inputs)
        for now, before in zip(of_parameters_now, of_parameters, strict=True):
            assert close(now, before, of=largest_of(of_parameters))


@pytest.mark.parametrize("name", architectures.CONFIGS)
@torch.no_grad()
def test_positions_start_again_in_every_document(name: str) -> None:
    """A document gives the same logits wherever it stands, also past the last learned position (127)."""
    model, document = model_of(name), draw_documents(9)[0]
    others = draw_documents(5) + draw_documents(6)
    assert sum(map(len, others)) > 128
    row = packed(model, [document, *others, document])
    assert close(row[-len(document) :], row[: len(document)])
    assert close(row[: len(document)], separate(own(model, name), [document]))


@pytest.mark.parametrize("name", architectures.CONFIGS)
@torch.no_grad()
def test_a_document_sees_its_own_past(name: str) -> None:
    """So that the tests above do not pass because nothing sees anything."""
    model, documents = model_of(name), [torch.arange(3, 12), torch.arange(20, 31)]
    before = packed(model, documents)
    documents[1] = torch.cat([documents[1][:4], documents[1][4:5] + 1, documents[1][5:]])
    changed = (packed(model, documents) != before).any(dim=1)
    assert not changed[:13].any()
    assert changed[13:16].all()  # at least as far as the shortest window


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(made) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_no_mask_over_the_whole_row_is_ever_built(name: str) -> None:
    """Forwards and backwards of 1,280 tokens in 128 documents: nothing is larger than the logits by much."""
    documents = [torch.arange(3, 13) + n % 40 for n in range(128)]
    num_tokens, positions = 1280, positions_of((10,) * 128)
    model = model_of(name)
    with Largest() as largest:
        packed(model, documents).sum().backward()
    widest = max(VOCABULARY, 4 * 48)  # of a token's logits and hidden values, over the experts of Mixtral
    assert largest.elements <= 2 * widest * num_tokens < num_tokens**2 / 3

    ids = torch.cat(documents)[None]
    ones = torch.ones_like(ids).index_fill(1, torch.tensor([num_tokens - 1]), 0)
    with Largest() as largest, torch.no_grad():  # the recorder sees the mask that transformers makes
        own(model, name)(input_ids=ids, position_ids=positions, attention_mask=ones, use_cache=False)
    assert largest.elements >= num_tokens**2


# ------------------------------------------------------------------------------------------------------------
# A mask of ones, which switches transformers' own detection of packed rows off


@pytest.mark.parametrize("name", architectures.CONFIGS)
@torch.no_grad()
def test_a_mask_of_ones_does_not_merge_documents(name: str) -> None:
    """huggingface/transformers#46634: it makes SDPA and eager attention see across packed documents."""
    model, documents = model_of(name), draw_documents(3)
    ones = torch.ones(1, sum(map(len, documents)), dtype=torch.long)
    assert torch.equal(packed(model, documents, attention_mask=ones), packed(model, documents))


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_mask_without_lengths_is_refused(name: str) -> None:
    """Positions and a mask alone do not say where documents end: nothing is guessed from them."""
    ids = torch.arange(3, 13)[None]
    for mask in (None, torch.ones_like(ids), torch.tensor([[1] * 7 + [0] * 3])):
        with pytest.raises(attention.Unsupported):
            model_of(name)(
                input_ids=ids, position_ids=positions_of((4, 6)), attention_mask=mask, use_cache=False
            )


def test_the_task_gives_a_packed_row_no_mask() -> None:
    asked: dict[str, Any] = {}

    def model(**inputs: Any) -> Any:
        asked.update(inputs)
        return SimpleNamespace(logits=torch.zeros(1, len(inputs["logits_to_keep"]), VOCABULARY))

    loss = CausalLmTask().loss_sum(model, micro_batch([torch.arange(3, 8), torch.arange(9, 12)], pack=True))
    assert loss.item() == pytest.approx(6 * np.log(VOCABULARY))
    assert asked["document_lengths"] == (5, 3) and asked["position_ids"].tolist() == [
        [0, 1, 2, 3, 4, 0, 1, 2]
    ]
    assert "attention_mask" not in asked


def micro_batch(documents: list[Tensor], pack: bool) -> Any:
    """All tokens but the first of each document are trained."""
    lengths = tuple(len(d) for d in documents)
    width = sum(lengths) if pack else max(lengths)
    starts = np.cumsum((0, *lengths)) if pack else np.arange(len(lengths)) * width
    real = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids = torch.cat(documents)[None] if pack else torch.zeros(len(lengths), width, dtype=torch.long)
    if not pack:
        ids[real] = torch.cat(documents)
    return SimpleNamespace(
        input_ids=ids,
        position_ids=positions_of(lengths) if pack else torch.arange(width)[None] * real,
        document_lengths=lengths if pack else None,
        attention_mask=torch.ones_like(ids) if pack else real.long(),
        predictors=torch.cat([torch.arange(n - 1) + int(s) for n, s in zip(lengths, starts, strict=False)]),
        targets=torch.cat([d[1:] for d in documents]),
    )


# ------------------------------------------------------------------------------------------------------------
# The proof at start, and what it catches


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_the_proof_holds_and_leaves_the_model_as_it_was(name: str) -> None:
    model = model_of(name, packed=False).train()
    before = model.config._attn_implementation
    assert attention.prove_isolation(model, 2, VOCABULARY, routed=name == "mixtral") == ""
    assert model.config._attn_implementation == before in ("sdpa", "eager")
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", architectures.UNPACKED)
def test_what_cannot_be_packed_is_caught_and_padded_to_the_same_losses(name: str) -> None:
    """The padded rows give the summed loss, and its gradient, of the documents one by one."""
    model = architectures.build(architectures.UNPACKED[name]())
    kind = model.config.model_type
    assert attention.prove_isolation(model, 2, VOCABULARY) == (
        f"{kind} mixes tokens in code of its own, which cannot be told where a document ends"
    )
    documents = [d for d in draw_documents(1) + draw_documents(2) if len(d) > 1]
    expected = torch.zeros(())
    for document in documents:
        logits = model(input_ids=document[None], use_cache=False).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, document[1:], reduction="sum")
    found = CausalLmTask().loss_sum(model, micro_batch(documents, pack=False))
    assert close(found, expected)
    wanted = gradients(model, expected)
    for gradient, other in zip(gradients(model, found), wanted, strict=True):
        assert close(gradient, other, of=largest_of(wanted))


def test_a_layer_that_is_no_attention_is_caught() -> None:
    model = architectures.build(architectures.half_convolution())
    assert attention.prove_isolation(model, 2, VOCABULARY) == (
        "1 of the 2 layers of lfm2 mix tokens in code of their own, "
        "which cannot be told where a document ends"
    )
    model = model_of("llama", packed=False)
    assert attention.prove_isolation(model, 1, VOCABULARY) == (
        "llama calls its attention 2 times in 1 layers instead of once in each"
    )


def test_attention_that_asks_for_more_is_caught() -> None:
    model = architectures.build(architectures.with_attention_sinks())
    reason = attention.prove_isolation(model, 2, VOCABULARY, routed=True)
    assert reason == "its attention needs more than per-document causal attention: s_aux"


def test_a_model_that_raises_is_caught() -> None:
    model = model_of("llama", packed=False)
    model.register_forward_pre_hook(only_without_lengths, with_kwargs=True)
    reason = attention.prove_isolation(model, 2, VOCABULARY)
    assert reason == "it does not take documents side by side: unexpected document_lengths"
    assert model.config._attn_implementation == "sdpa"


def only_without_lengths(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    if "document_lengths" in kwargs:
        raise TypeError("unexpected document_lengths\nin a second line")


def test_a_window_that_only_the_mask_knows_is_caught() -> None:
    """Qwen2-MoE tells its sliding window to the mask, and packed rows have no mask."""
    model = architectures.build(architectures.window_in_the_mask())
    proof = attention.prove_isolation(model, 2, VOCABULARY, routed=True, window=4, longest=20)
    assert proof != ""
    model = model_of("mistral_window", packed=False)
    assert attention.prove_isolation(model, 2, VOCABULARY, window=4, longest=20) == ""
    model = model_of("llama", packed=False)
    assert attention.prove_isolation(model, 2, VOCABULARY, window=64, longest=60) == ""
    assert attention.prove_isolation(model, 2, VOCABULARY, window=64, longest=90) == (
        "its window of 64 tokens is known to its mask only, and samples are longer"
    )


def test_what_is_not_understood_is_refused() -> None:
    q = torch.randn(1, 2, 4, 8)
    plain = attention.attention_by_document(torch.nn.Module(), q, q, q, None, document_lengths=(4,))[0]
    assert plain.shape == (1, 4, 2, 8)
    for odd in ({"s_aux": torch.ones(2)}, {"position_bias": q}, {"is_causal": False}):
        with pytest.raises(attention.Unsupported):
            attention.attention_by_document(torch.nn.Module(), q, q, q, None, document_lengths=(4,), **odd)
    with pytest.raises(attention.Unsupported):
        attention.attention_by_document(torch.nn.Module(), q, q, q, torch.ones(4, 4), document_lengths=(4,))
    with pytest.raises(attention.Unsupported):
        attention.attention_by_document(torch.nn.Module(), q, q, q, None)


def across_documents(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Attention over the whole row, as if there were one document."""
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return found.transpose(1, 2), None


def one_token_too_few(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> Any:
    """Isolated, but the last document does not see its first token."""
    begin = sum(given["document_lengths"][:-1])
    value = torch.cat(
        [value[:, :, :begin], 0 * value[:, :, begin : begin + 1], value[:, :, begin + 1 :]], dim=2
    )
    return WORKING(module, query, key, value, None, **given)


def rounded_by_others(module: Any, query: Tensor, *rest: Any, **given: Any) -> Any:
    """Isolated but for the last bits, which depend on the first document."""
    found, nothing = WORKING(module, query, *rest, **given)
    return found * (1 + 1e-5 * query[:, :, : given["document_lengths"][0]].sum().sin()), nothing


WORKING = attention.attention_by_document


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (across_documents, "changing one document changed the next one"),
        (one_token_too_few, "packed and separate documents differ by more than rounding"),
    ],
)
def test_the_proof_can_fail(broken: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_by_document", broken)
    assert attention.prove_isolation(model_of("gpt2", packed=False), 2, VOCABULARY) == reason
    # experts round by what else is in the row, but neither of these is rounding
    assert attention.prove_isolation(model_of("gpt2", packed=False), 2, VOCABULARY, routed=True) == reason


def test_only_experts_may_round_by_what_else_is_in_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention_by_document", rounded_by_others)
    model = model_of("gpt2", packed=False)
    assert attention.prove_isolation(model, 2, VOCABULARY, routed=True) == ""
    assert attention.prove_isolation(model, 2, VOCABULARY) == "changing one document changed the next one"


# ------------------------------------------------------------------------------------------------------------
# The variable-length kernel of CUDA, here with a plain twin in its place


class Kernel:
    """varlen_attn as its documentation describes it, in fp32, document by document; and what it was given."""

    def __init__(self) -> None:
        self.dtypes: set[torch.dtype] = set()
        self.windows: set[tuple[int, int]] = set()
        self.borders: list[Tensor] = []

    def __call__(
        self,
        query: Tensor,  # (T, H, D)
        key: Tensor,  # (T, K, D)
        value: Tensor,  # (T, K, D)
        cu_seq_q: Tensor,  # (N + 1,)
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:  # (T, H, D)
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
        assert max_q == max_k == cu_seq_q.diff().max() and cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        assert enable_gqa or query.shape[1] == key.shape[1]
        self.dtypes |= {query.dtype, key.dtype, value.dtype}
        self.windows.add(window_size)
        self.borders.append(cu_seq_q)
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        outputs = []
        for begin, end in zip(cu_seq_q.tolist(), cu_seq_q.tolist()[1:], strict=False):
            q, k, v = (x[begin:end].float().transpose(0, 1) for x in (query, key, value))
            scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            ahead = torch.arange(end - begin)[None, :] - torch.arange(end - begin)[:, None]
            before, after = window_size
            seen = (ahead <= after if after >= 0 else True) & (
                (-ahead <= before) if before >= 0 else ahead == ahead
            )
            outputs.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return KeepsBorders.apply(torch.cat(outputs).to(query.dtype), cu_seq_q)


class KeepsBorders(torch.autograd.Function):
    """The kernel saves them for its backward, which tensors made in inference mode do not allow."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, borders: Tensor) -> Tensor:
        ctx.save_for_backward(borders)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """This machine as if it were a CUDA device of capability 8.0."""
    twin = Kernel()
    monkeypatch.setattr(attention, "_capability", lambda device: (8, 0))
    monkeypatch.setattr(varlen, "varlen_attn", twin)
    forget()
    yield twin
    forget()


def forget() -> None:
    attention._varlen_works.cache_clear()
    attention._borders.cache_clear()


def test_the_twin_takes_what_the_kernel_takes() -> None:
    real, twin = (inspect.signature(f).parameters for f in (varlen.varlen_attn, Kernel().__call__))
    for name, parameter in twin.items():
        assert real[name].kind == parameter.kind and real[name].default == parameter.default


def by_hand(query: Tensor, key: Tensor, value: Tensor, lengths: Any, scale: float, window: int | None) -> Any:
    """(T, H, D) in numpy and fp64: every token looks at the last `window` tokens of its document."""
    q, k, v = (x[0].double().detach().numpy() for x in (query, key, value))
    output = np.zeros_like(q).swapaxes(0, 1)
    begins = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)
    for head in range(q.shape[0]):
        group = head * k.shape[0] // q.shape[0]
        for token, begin in enumerate(begins):
            first = begin if window is None else max(begin, token + 1 - window)
            weights = np.exp(scale * k[group, first : token + 1] @ q[head, token])
            output[token, head] = weights / weights.sum() @ v[group, first : token + 1]
    return output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("window", [None, 1, 4, 12, 99])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_both_ways_are_attention_by_hand(
    heads: tuple[int, int], window: int | None, scale: float | None, dtype: torch.dtype, kernel: Kernel
) -> None:
    lengths = (7, 1, 12, 3)
    draw = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, n, 23, 8, generator=draw, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    found, _ = attention.attention_by_document(
        torch.nn.Module(), q, k, v, None, scale, sliding_window=window, document_lengths=lengths
    )
    expected = by_hand(q, k, v, lengths, 8**-0.5 if scale is None else scale, window)
    assert np.abs(found[0].double().numpy() - expected).max() < (1e-5 if dtype == torch.float32 else 0.02)
    if dtype == torch.float32:
        assert not kernel.borders
    else:
        assert kernel.borders[-1].tolist() == [0, 7, 8, 20, 23]
        assert (-1 if window in (None, 12, 99) else window - 1, 0) in kernel.windows


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt_neox", "opt", "mistral_window"])
def test_a_model_in_16_bits_takes_the_kernel(name: str, kernel: Kernel) -> None:
    """Every layer of it, with the borders of the documents made once; logits and gradients are the loop's."""
    model, documents = model_of(name).bfloat16(), draw_documents(2)
    weights = draw_weights(sum(map(len, documents)))
    found = packed(model, documents)
    used, kernel.borders = kernel.borders[-2:], []
    assert used[0] is used[1] and len(used[0]) == len(documents) + 1
    of_found = gradients(model, (found * weights).sum())
    assert attention.prove_isolation(own(model, name), 2, VOCABULARY) == ""
    assert len(kernel.borders) == 4  # two packed rows in two layers: the trial of the kernel is not repeated

    model.set_attn_implementation(attention.NAME)
    kernel.borders = []
    attention._capability = lambda device: (0, 0)  # put back by the fixture
    expected = packed(model, documents)
    assert not kernel.borders
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()
    of_expected = gradients(model, (expected * weights).sum())
    largest = largest_of(of_expected)
    for gradient, other in zip(of_found, of_expected, strict=True):
        assert (gradient - other).abs().max() <= 0.05 * largest


def test_experts_in_16_bits_take_the_kernel(kernel: Kernel) -> None:
    """The kernel's rounding sends a token of this model to another expert: no leak, no reason to pad."""
    model = model_of("mixtral", packed=False).bfloat16()
    assert attention.prove_isolation(model, 2, VOCABULARY, routed=True) == ""
    assert len(kernel.borders) == 1 + 2 * 2  # the trial, and two packed rows in two layers
    assert attention.prove_isolation(model, 2, VOCABULARY) != ""


def test_autocast_is_obeyed(kernel: Kernel) -> None:
    """Qwen3's norms leave queries and keys in fp32, values in 16 bits: PyTorch's own attention casts."""
    model, documents = model_of("qwen3"), draw_documents(2)
    with torch.autocast("cpu", torch.bfloat16):
        packed(model, documents).sum().backward()
        assert kernel.dtypes == {torch.bfloat16}
        kernel.borders = []
        assert packed(model.double(), documents).dtype == torch.float64
    assert not kernel.borders


def test_soft_caps_and_dropout_take_the_loop(kernel: Kernel) -> None:
    packed(model_of("gemma2").bfloat16(), draw_documents(0))
    q = torch.ones(1, 2, 4, 8, dtype=torch.bfloat16)
    attention.attention_by_document(torch.nn.Module(), q, q, q, None, dropout=0.5, document_lengths=(1, 3))
    assert not kernel.borders
    attention.attention_by_document(torch.nn.Module(), q, q, q, None, document_lengths=(1, 3))
    assert kernel.borders


@pytest.mark.parametrize(
    ("fits", "given"),
    [
        (True, (torch.bfloat16, 64, 64, 0.0, (8, 0))),
        (True, (torch.float16, 256, 256, 0.0, (12, 0))),
        (False, (torch.float32, 64, 64, 0.0, (9, 0))),
        (False, (torch.float64, 64, 64, 0.0, (9, 0))),
        (False, (torch.bfloat16, 60, 60, 0.0, (9, 0))),
        (False, (torch.bfloat16, 264, 264, 0.0, (9, 0))),
        (False, (torch.bfloat16, 192, 128, 0.0, (9, 0))),
        (False, (torch.bfloat16, 64, 64, 0.1, (9, 0))),
        (False, (torch.bfloat16, 64, 64, 0.0, (7, 5))),
        (False, (torch.bfloat16, 64, 64, 0.0, (0, 0))),
    ],
)
def test_the_kernel_is_asked_for_what_it_can_do(fits: bool, given: Any) -> None:
    assert attention.fits_varlen(*given) is fits


def test_other_devices_and_builds_have_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert attention._capability(cuda) == (9, 0)
    assert attention._capability(cpu) == (0, 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    assert attention._capability(cuda) == (0, 0)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert attention._capability(cuda) == (0, 0)


class RaisesBackwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise RuntimeError("no backward for this head size")


def raising(error: Exception) -> Callable[..., Tensor]:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        raise error

    return kernel


def wider(query: Tensor, *args: Any, window_size: tuple[int, int], **given: Any) -> Tensor:
    before, after = window_size
    return Kernel()(query, *args, window_size=(before + 1 if before >= 0 else -1, after), **given)


def leaking(query: Tensor, key: Tensor, value: Tensor, borders: Tensor, *args: Any, **given: Any) -> Tensor:
    borders, total = borders[[0, -1]], len(query)
    return Kernel()(query, key, value, borders, borders, total, total, **given)


BROKEN: dict[str, Callable[..., Tensor]] = {
    "no kernel image": raising(RuntimeError("no kernel image is available for execution on the device")),
    "an older signature": raising(
        TypeError("varlen_attn() got an unexpected keyword argument 'window_size'")
    ),
    "no grouped heads": raising(ValueError("Expect query and key/value to have the same number of heads")),
    "no backward": lambda *args, **given: RaisesBackwards.apply(Kernel()(*args, **given)),
    "a window one too wide": wider,
    "one document": leaking,
    "not a number": lambda *args, **given: Kernel()(*args, **given) * torch.nan,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_kernel_that_fails_its_trial_is_not_used(
    broken: str, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing goes on with the loop: the proof holds, and the numbers are the loop's, bit by bit."""
    model, documents = model_of("mistral_window").bfloat16(), draw_documents(2)
    monkeypatch.setattr(varlen, "varlen_attn", BROKEN[broken])
    found = packed(model, documents)
    assert attention.prove_isolation(own(model, "mistral_window"), 2, VOCABULARY) == ""
    model.set_attn_implementation(attention.NAME)
    monkeypatch.setattr(attention, "_capability", lambda device: (0, 0))
    assert torch.equal(packed(model, documents), found)


def test_memory_that_runs_out_is_not_taken_for_a_missing_kernel(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", raising(torch.OutOfMemoryError("out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        packed(model_of("llama").bfloat16(), draw_documents(0))


@pytest.mark.parametrize("before", [torch.no_grad, torch.inference_mode])
def test_the_trial_of_the_kernel_leaves_no_trace(before: Any, kernel: Kernel) -> None:
    """Not in the random numbers, not in checkpointed activations, and an evaluation may come first."""
    model, documents = model_of("llama").bfloat16(), draw_documents(2)
    generator = torch.get_rng_state()
    row = embedded(model, documents)
    checkpoint(lambda *x: packed(model, list(x)), *row, use_reentrant=False).sum().backward()
    expected = [x.grad for x in row]
    forget()
    kernel.borders = []
    with before():
        packed(model, documents)
    assert len(kernel.borders) == 3  # the trial and two layers
    row = embedded(model, documents)
    packed(model, row).sum().backward()
    assert len(kernel.borders) == 5
    assert all(torch.equal(x.grad, wanted) for x, wanted in zip(row, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 1, 7, 64])
@pytest.mark.parametrize("shape", [(8, 8, 64), (8, 2, 128), (4, 1, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_cuda_the_kernel_is_attention_by_hand(
    dtype: torch.dtype, shape: tuple[int, int, int], window: int | None
) -> None:
    heads, key_heads, size = shape
    lengths, device = (70, 1, 129, 8), torch.device("cuda")
    if torch.cuda.get_device_capability() >= (8, 0) and size < 256:
        assert attention._varlen_works(device, dtype, shape, None, window is not None)
    draw = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(1, n, 208, size, generator=draw).to(device, dtype) for n in (heads, key_heads, key_heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found, _ = attention.attention_by_document(
        torch.nn.Module(), *inputs, None, sliding_window=window, document_lengths=lengths
    )
    expected = by_hand(q.cpu(), k.cpu(), v.cpu(), lengths, size**-0.5, window)
    assert np.abs(found[0].double().detach().cpu().numpy() - expected).max() < 0.03
    loop = attention._one_by_one(*(x.float() for x in inputs), lengths, None, 0.0, window, None)
    weights = torch.randn(found.shape, generator=draw).to(device, dtype)
    expected = torch.autograd.grad(loop, inputs, weights.float())
    for gradient, other in zip(torch.autograd.grad(found, inputs, weights), expected, strict=True):
        # a window of one token gives queries and keys no gradient
        assert (gradient - other).abs().max() <= 0.03 * largest_of(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", architectures.CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_the_proof_holds(dtype: torch.dtype, name: str) -> None:
    model = model_of(name, packed=False).to("cuda", dtype)
    assert attention.prove_isolation(model, 2, VOCABULARY, routed=name == "mixtral") == ""
