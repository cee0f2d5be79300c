"""Held-out loss of the base with its linear layers rounded to 4 bits, output head left alone, no training."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # weights that share a constant


def int4(weight: Tensor) -> Tensor:
    """`weight` rounded to the 15 levels -7 ... 7 times absmax / 7 of each BLOCK numbers, row by row."""
    blocks = weight.reshape(-1, BLOCK)
    step = blocks.abs().amax(dim=1, keepdim=True) / 7
    levels = torch.where(step > 0, blocks / step, 0.0).round()
    return (levels * step).reshape(weight.shape)


def rounded(weight: Tensor, form: str) -> Tensor:
    """`weight` as a format gives it back: int4 as above; nf4 and fp4 by bitsandbytes, constants in fp32."""
    if form == "none":
        return weight
    if form == "int4":
        return int4(weight)
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight.reshape(1, -1), blocksize=BLOCK, quant_type=form)
    found: Tensor = dequantize_4bit(packed, state)
    return found.reshape(weight.shape)


@torch.no_grad()
def losses(base: Path, form: str, work: Path) -> dict[str, Any]:
    """{"rows": {name: [[summed loss, trained tokens] of every row]}} on held-out text and on the task."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.copy_(rounded(module.weight, form))
    found: dict[str, list[list[float]]] = {}
    for part in ("text", "task"):
        lines = (work / f"{part}-held-out.jsonl").read_text().splitlines()
        found[part] = [row_loss(model, tokenizer, json.loads(line)) for line in lines]
    return {"rows": found}


def row_loss(model: Any, tokenizer: Any, row: dict[str, str]) -> list[float]:
    """[summed loss of a row's text or completion with its end token, its tokens]."""
    start = tokenizer(row.get("prompt", ""))["input_ids"]
    rest = tokenizer(row.get("completion", row.get("text")), add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*start, *rest, tokenizer.eos_token_id])
    logits = model(input_ids=ids[None]).logits[0, len(start) - 1 : -1]
    total = torch.nn.functional.cross_entropy(logits, ids[len(start) :], reduction="sum")
    return [round(float(total), 4), len(ids) - len(start)]
