"""An adapted layer answers in the dtype of its base layer: else step 0 and the disabled adapter are not the
base model. Bit for bit, on bases held in each way, with and without autocast to bf16."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import base_model
from lorakit.adapters import attach
from lorakit.recipe.methods import AdaLora, PeftTuner, Vera
from lorakit.recipe.model import Model
from lorakit.targets import Target, select
from tests import architectures
from tests.adapters.test_peft_tuner import IDS

SECTIONS = {
    "adalora": AdaLora(method="adalora", init_rank=4, target_rank=2),
    "vera": Vera(method="vera", rank=4),
    "OFT": PeftTuner(method="peft", type="OFT", config={"oft_block_size": 8}),
    "IA3": PeftTuner(method="peft", type="IA3", config={"feedforward_modules": ("down_proj",)}),
}
BASES = [(quantize, dtype) for quantize in ("none", "nf4", "int8") for dtype in ("fp32", "bf16")]
# On an int8 base whose other tensors are fp32, under autocast, the tuner rounds a layer's input to bf16 for
# the rotation; the base layer alone would read it in fp32.
ROUNDED = ("OFT", "int8", "fp32")
PUT_RIGHT = {  # under autocast PEFT's layers alone are not the base
    *(("vera", "none", "fp32"), ("OFT", "none", "fp32"), ("adalora", "int8", "bf16")),
    *(("IA3", quantize, "bf16") for quantize in ("nf4", "int8")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    config = architectures.CONFIGS["llama"]()
    config.hidden_size = config.intermediate_size = 64  # widths that bitsandbytes reads right on every CPU
    config.head_dim = 16
    architectures.build(config).save_pretrained(made)
    return made


def attached(kind: str, folder: Path, quantize: str, dtype: str) -> tuple[Any, Any]:
    section = Model(path=str(folder), quantize=quantize)
    base = base_model.load(folder, section, "AutoModelForCausalLM", dtype, torch.device("cpu"))
    rank = 0 if kind.isupper() else 4
    targets = [Target(layer, rank, 2.0 * rank) for layer in select(base.layers, "all-linear")[0]]
    more = {"total_steps": 100} if kind == "adalora" else {}
    before = [logits(base.model, autocast) for autocast in (False, True)]
    adapter = attach(SECTIONS[kind], base.model, targets, seed=1, **more)
    return (base.model, before), adapter


def logits(model: Any, autocast: bool) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(("quantize", "dtype"), BASES)
@pytest.mark.parametrize("kind", SECTIONS)
def test_step_0_and_the_disabled_adapter_are_the_base(
    kind: str, quantize: str, dtype: str, folder: Path
) -> None:
    (model, before), adapter = attached(kind, folder, quantize, dtype)
    for autocast in (False, True):
        start = logits(model, autocast)
        if autocast and (kind, quantize, dtype) == ROUNDED:
            assert 0 < (start - before[autocast]).abs().max() < 0.05
        else:
            assert torch.equal(start, before[autocast])
        with adapter.disabled():
            assert torch.equal(logits(model, autocast), before[autocast])


@pytest.mark.parametrize(("kind", "quantize", "dtype"), sorted(PUT_RIGHT))
def test_what_peft_does_that_is_put_right_here(kind: str, quantize: str, dtype: str, folder: Path) -> None:
    """When this fails, PEFT no longer does it, and in_dtype_of_base() has less to do."""
    (model, before), _ = attached(kind, folder, quantize, dtype)
    for module in model.modules():
        module._forward_hooks.clear()
    assert not torch.equal(logits(model, True), before[True])
