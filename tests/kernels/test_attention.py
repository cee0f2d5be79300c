"""Packed documents against the model's own attention on each document alone (the plain twin)."""

import pytest
import torch

from lorakit.kernels import attention
from tests import architectures


def packed(model, documents):
    lengths = tuple(len(d) for d in documents)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(
        input_ids=torch.cat(documents)[None],
        position_ids=positions[None],
        document_lengths=lengths,
        use_cache=False,
    ).logits[0]


def documents():
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, architectures.VOCABULARY, (n,), generator=draw) for n in (7, 1, 12)]


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_packed_equals_separate_and_nothing_leaks(name: str) -> None:
    config = architectures.CONFIGS[name]()
    if name == "gemma2":
        config._attn_implementation = "eager"  # its soft-cap is not in SDPA: the plain twin must have it
    model = architectures.build(config)
    docs = documents()
    assert attention.prove_isolation(model, 2, architectures.VOCABULARY, routed=name == "mixtral") == ""
    assert model.config._attn_implementation != attention.NAME  # the proof leaves the model as it was
    with torch.no_grad():
        separate = torch.cat([model(d[None], use_cache=False).logits[0] for d in docs])
        attention.register()
        model.set_attn_implementation(attention.NAME)
        together = packed(model, docs)
        changed = packed(model, [docs[0].flip(0), *docs[1:]])
    assert (together - separate).abs().max() < 1e-6 * separate.abs().max().clamp(min=1) * 10
    if name == "mixtral":  # the rows that an expert multiplies at once depend on the other documents
        assert (together[7:] - changed[7:]).abs().max() < 1e-6
    else:
        assert torch.equal(together[7:], changed[7:])
    assert not torch.equal(together[:7], changed[:7])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mistral_window"])
def test_gradients_of_packed_equal_separate(name: str) -> None:
    config = architectures.CONFIGS[name]()
    if name == "gemma2":
        config._attn_implementation = "eager"
    model = architectures.build(config).double()
    docs = documents()
    torch.cat([model(d[None], use_cache=False).logits[0] for d in docs]).square().sum().backward()
    separate = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    attention.register()
    model.set_attn_implementation(attention.NAME)
    packed(model, docs).square().sum().backward()
    for parameter, expected in zip(model.parameters(), separate, strict=True):
        # eager attention computes its softmax in fp32 whatever the model's dtype
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("name", architectures.UNPACKED)
def test_the_proof_catches_models_that_do_not_isolate(name: str) -> None:
    model = architectures.build(architectures.UNPACKED[name]())
    assert attention.prove_isolation(model, 2, architectures.VOCABULARY) != ""


def test_a_window_that_only_the_mask_knows_is_caught() -> None:
    """Qwen2-MoE tells its sliding window to the mask, and packed rows have no mask."""
    model = architectures.build(architectures.window_in_the_mask())
    proof = attention.prove_isolation(model, 2, architectures.VOCABULARY, routed=True, window=4, longest=20)
    assert proof != ""
    config = architectures.CONFIGS["mistral_window"]()
    model = architectures.build(config)
    assert attention.prove_isolation(model, 2, architectures.VOCABULARY, window=4, longest=20) == ""
    model = architectures.build(architectures.CONFIGS["llama"]())
    assert attention.prove_isolation(model, 2, architectures.VOCABULARY, window=64, longest=60) == ""
    assert "window of 64" in attention.prove_isolation(
        model, 2, architectures.VOCABULARY, window=64, longest=90
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


def test_a_leaking_attention_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof can fail: attention over the whole row, as if there were one document."""

    def leaking(module, query, key, value, mask, **kwargs):
        attention.calls += 1
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(
            1, 2
        ), None

    model = architectures.build(architectures.CONFIGS["gpt2"]())
    with monkeypatch.context() as patched:
        patched.setattr(attention, "attention_by_document", leaking)
        reason = attention.prove_isolation(model, 2, architectures.VOCABULARY)
    attention.register()
    assert reason == "changing one document changed the next one"
