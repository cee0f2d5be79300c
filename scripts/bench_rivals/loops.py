"""Contestants whose loop is written by hand: the plain PEFT loop, alone and on models patched by others."""

import json
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from bench_rivals.job import Job, Result, held
from bench_rivals.workload import ALPHA, LEARNING_RATE, RANK, SEED

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain(job: Job, attention: str = "sdpa") -> Result:
    """The PEFT loop as people write it: padded batches, `model(**batch).loss`, autocast, fp32 adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = held(job.setting, job.device)
    model = AutoModelForCausalLM.from_pretrained(job.model, attn_implementation=attention, **options)
    for module in model.modules():  # a packed 4-bit weight of bitsandbytes on a CPU has no backward
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = False
    if job.setting.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(SEED)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return _loop(job, model, AutoTokenizer.from_pretrained(job.model))


def plain_flash(job: Job) -> Result:
    """The plain loop with FlashAttention 2."""
    import flash_attn  # noqa: F401 (skipped where it is not installed)

    return plain(job, "flash_attention_2")


def liger(job: Job) -> Result:
    """The plain loop on a model patched by Liger."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama()
    return plain(job)


def unsloth(job: Job) -> Result:
    """The plain loop on Unsloth's model."""
    from unsloth import FastLanguageModel

    setting = job.setting
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.model,
        max_seq_length=setting.longest,
        load_in_4bit=setting.quantize == "nf4",
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=TARGETS,
        use_gradient_checkpointing="unsloth" if setting.checkpointing else False,
        random_state=SEED,
    )
    return _loop(job, model, tokenizer)


def _loop(job: Job, model: Any, tokenizer: Any) -> Result:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    found: Result = {"stamps": [], "losses": [], "grad_norms": []}
    model.train()
    for batch in _padded_batches(job, tokenizer):
        with _autocast(job):
            loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["grad_norms"].append(norm.item())
        found["stamps"].append(time.time())
    return found


def _autocast(job: Job) -> AbstractContextManager[Any]:
    import torch

    return torch.autocast(job.device, torch.bfloat16) if job.setting.dtype == "bf16" else nullcontext()


def _padded_batches(job: Job, tokenizer: Any) -> Iterator[dict[str, Any]]:
    import torch

    rows = [json.loads(line) for line in (Path(job.rows) / "ordered.jsonl").open()]
    size = job.setting.batch_size
    for start in range(0, job.steps * size, size):
        ids, labels = [], []
        for row in rows[start : start + size]:
            prompt = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
            rest = tokenizer(row.get("completion") or row["text"])["input_ids"] + [tokenizer.eos_token_id]
            ids.append(torch.tensor(prompt + rest))
            labels.append(torch.tensor([-100] * len(prompt) + rest))
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        batch = {"input_ids": pad(ids, batch_first=True), "attention_mask": mask}
        batch["labels"] = pad(labels, batch_first=True, padding_value=-100)
        yield {key: value.to(job.device) for key, value in batch.items()}
