"""Gemma's embedding multiplies what it looks up by sqrt(hidden): adapters on it, merged.

The oracle is PEFT's model in memory.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import HiraConfig, LoraConfig, OFTConfig, TinyLoraConfig, get_peft_model

from lorakit.errors import RunError
from lorakit.merge import merge
from tests import architectures
from tests.adapters.test_peft_tuner import logits

ADAPTERS = {
    "rows": lambda: LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 3]),
    "lora": lambda: LoraConfig(r=2, target_modules=["embed_tokens"]),
    "dora": lambda: LoraConfig(r=2, target_modules=["embed_tokens"], use_dora=True),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["embed_tokens"]),
    "hira": lambda: HiraConfig(r=2, target_modules=["embed_tokens"]),
    "tinylora": lambda: TinyLoraConfig(target_modules=["embed_tokens"]),
}


def by_peft(kind: str, tied: bool, folder: Path) -> Any:
    """PEFT's model with an adapter moved away from its start; its base in folder/base, the adapter beside."""
    config = hf.Gemma3TextConfig(
        **architectures._LLAMA | {"pad_token_id": 0}, head_dim=8, tie_word_embeddings=tied
    )
    model = architectures.build(config)
    model.save_pretrained(folder / "base")
    assert float(model.get_input_embeddings().embed_scale) == pytest.approx(32**0.5)
    told = ADAPTERS[kind]()
    told.task_type = "CAUSAL_LM"
    torch.manual_seed(3)
    model = get_peft_model(model, told)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(folder / "adapter")
    return model


@pytest.mark.parametrize(
    ("kind", "tied"), [("rows", False), ("rows", True), ("lora", False), ("dora", False), ("oft", False)]
)
def test_a_scaled_embedding_is_merged(kind: str, tied: bool, tmp_path: Path) -> None:
    model = by_peft(kind, tied, tmp_path)
    wanted = logits(model)
    with model.disable_adapter():
        assert (wanted - logits(model)).abs().max() > 1e-2
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))
    alone = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert (logits(alone) - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["hira", "tinylora"])
def test_what_peft_does_not_scale_is_not_merged(kind: str, tmp_path: Path) -> None:
    """Of these two PEFT 0.20 adds the update to the embedding's output without the scale, and merges it into
    the weight, where it is scaled: the merged model would not be the one that was trained."""
    model = by_peft(kind, False, tmp_path)
    ids = torch.arange(12)[None]
    layer = model.base_model.model.model.embed_tokens
    update = layer(ids) - layer.base_layer(ids)
    assert torch.allclose(update[0], _update(layer)[ids[0]], atol=1e-5) and update.abs().max() > 1e-3
    with pytest.raises(RunError, match=r"not base and adapter: model\.embed_tokens\.weight is off"):
        merge(tmp_path / "adapter", tmp_path / "merged", base=str(tmp_path / "base"))


def _update(layer: Any) -> torch.Tensor:
    """(vocabulary, hidden): what PEFT's merge adds to the weight."""
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    update = layer.base_layer.weight.detach() - before
    layer.unmerge()
    return update
