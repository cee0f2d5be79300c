"""Tiny random models of many architectures: configurations only, nothing is downloaded."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 64
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 128}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_LLAMA),
    "qwen3": lambda: hf.Qwen3Config(**_LLAMA, head_dim=8),
    "gemma": lambda: hf.GemmaConfig(**_LLAMA, head_dim=8),
    "gemma2": lambda: hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=4),
    "gpt2": lambda: hf.GPT2Config(**_GPT, **_ENDS),
    "phi": lambda: hf.PhiConfig(**(_LLAMA | {"num_key_value_heads": 4})),
    "gpt_neox": lambda: hf.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        **_ENDS,
    ),
    "opt": lambda: hf.OPTConfig(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
    ),
    "mixtral": lambda: hf.MixtralConfig(**_LLAMA, num_local_experts=4),
    "mistral_window": lambda: hf.MistralConfig(**_LLAMA, sliding_window=4),
}
# These never call a registered attention function: they are padded.
UNPACKED: dict[str, Callable[[], Any]] = {
    "bloom": lambda: hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "codegen": lambda: hf.CodeGenConfig(**_GPT, **_ENDS, rotary_dim=4),
    "mamba": lambda: hf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCABULARY, **_ENDS),
    "falcon": lambda: hf.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY, **_ENDS
    ),
    "gptj": lambda: hf.GPTJConfig(**_GPT, **_ENDS, rotary_dim=4),
    "mpt": lambda: hf.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCABULARY, max_seq_len=128),
}


def window_in_the_mask() -> Any:
    """Qwen2-MoE with a sliding window, which it tells to its mask and not to its attention function."""
    return hf.Qwen2MoeConfig(
        **_LLAMA,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
    )


def with_attention_sinks() -> Any:
    """GPT-OSS, whose softmax has one more term in each head."""
    return hf.GptOssConfig(**_LLAMA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4)


def half_convolution() -> Any:
    """LFM2 with a short convolution in one layer and attention in the other."""
    return hf.Lfm2Config(**_LLAMA, layer_types=["conv", "full_attention"])


def build(config: Any) -> Any:
    """A model with weights large enough that attention matters, in eval mode, without dropout."""
    from lorakit.base_model import _switch_off_dropout

    _switch_off_dropout(config)
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()
