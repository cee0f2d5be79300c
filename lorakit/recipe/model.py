"""Section `model`: which base model, and how it is held in memory."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Written

DType = Literal["fp32", "bf16", "fp16"]


class Model(Section):
    path: Annotated[str, Field(min_length=1)]
    """A directory with config.json, *.safetensors and a tokenizer (relative to this file), or a hub id."""

    revision: str | None = None
    """Branch, tag or commit of a hub model. Default: the hub's main branch."""

    dtype: Literal["auto"] | DType = "auto"
    """How the weights are held. auto: as stored in the checkpoint; fp32 when training computes in fp32."""

    quantize: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Hold the linear layers in 4 or 8 bits (bitsandbytes). nf4 is QLoRA. The output head is never quantized.
    """

    double_quant: bool = True
    """Quantize the quantization constants too (nf4, fp4): saves 0.37 bit per parameter."""

    compute_dtype: DType = "bf16"
    """What 4-bit weights are multiplied in (nf4, fp4)."""

    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """auto: one document at a time when rows are packed, else PyTorch's SDPA. sdpa, eager: rows are padded.
    """

    dropout: Annotated[float, Field(ge=0.0, le=0.0)] | Literal["keep"] = 0.0
    """0.0 switches the base model's own dropout off; keep leaves it as its configuration says."""

    trust_remote_code: bool = False
    """Run Python code of a hub model. Needs a 40-digit `revision` and `--trust-remote-code` on the command
    line."""


def conflicts(recipe: Any, written: Written) -> Conflicts:
    model = recipe.model
    four_bit = model.quantize in ("nf4", "fp4")
    for field in ("double_quant", "compute_dtype"):
        if written(f"model.{field}") is not None and not four_bit:
            yield (
                f"model.{field}",
                f"has no effect with quantize: {model.quantize}; write quantize: nf4, or delete it",
            )
    local = model.path.startswith(("/", ".", "~"))
    if written("model.revision") and local:
        yield "model.revision", "has no effect on a local directory; delete it"
    if model.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", model.revision or ""):
        yield "model.trust_remote_code", "needs model.revision: the 40-digit commit whose code you have read"
    if written("model.dtype") == "fp16" or (four_bit and written("model.compute_dtype") == "fp16"):
        field = "model.dtype" if written("model.dtype") == "fp16" else "model.compute_dtype"
        yield field, "fp16 training needs loss scaling, which lorakit does not do; write bf16 or fp32"
    if written("training.precision") == "fp32" and written("model.dtype") == "bf16":
        yield (
            "model.dtype",
            "bf16 weights are not multiplied in fp32 (training.precision); delete one of the two",
        )
