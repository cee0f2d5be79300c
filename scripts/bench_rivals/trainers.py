"""Contestants that bring their trainer: TRL and LLaMA-Factory, given the same rows in the same order."""

import importlib.machinery
import json
import sys
import time
import types
from pathlib import Path
from typing import Any

from bench_rivals.job import Job, Result, held
from bench_rivals.workload import ALPHA, LEARNING_RATE, RANK, SEED


def trl(job: Job) -> Result:
    """TRL's SFTTrainer; its default of recomputing activations is set as the setting says."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    setting = job.setting
    rows = [json.loads(line) for line in (Path(job.rows) / "ordered.jsonl").open()]
    arguments = SFTConfig(
        **_trainer_arguments(job),
        completion_only_loss=not setting.all_trained,
        max_length=setting.longest,
        gradient_checkpointing=setting.checkpointing,
        train_sampling_strategy="sequential",
    )
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(job.model, **held(setting, job.device)),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[watcher := _watcher()],
    )
    trainer.train()
    return watcher.found


def llama_factory(job: Job) -> Result:
    """LLaMA-Factory's SFT stage. Its template `empty` adds nothing: the rows bring the end token."""
    import transformers  # noqa: F401 (looks for torchaudio before the next lines put something there)

    # LLaMA-Factory imports torchaudio to read sound, of which there is none here.
    silent = types.ModuleType("torchaudio")
    silent.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
    sys.modules.setdefault("torchaudio", silent)
    from llamafactory.train.tuner import run_exp

    setting = job.setting
    quantized = {"quantization_bit": 4, "quantization_type": "nf4", "double_quantization": True}
    arguments = {
        **_trainer_arguments(job),
        "model_name_or_path": job.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": RANK,
        "lora_alpha": ALPHA,
        "lora_target": "all",
        "dataset_dir": job.rows,
        "dataset": "rows",
        "template": "empty",
        "cutoff_len": setting.longest,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": not setting.checkpointing,
        "overwrite_cache": True,
        **(quantized if setting.quantize == "nf4" else {}),
    }
    watcher = _watcher()
    run_exp(arguments, [watcher])
    return watcher.found


def _trainer_arguments(job: Job) -> dict[str, Any]:
    """What both trainers take, by the names of transformers' TrainingArguments."""
    return {
        "output_dir": job.output,
        "max_steps": job.steps,
        "per_device_train_batch_size": job.setting.batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": job.setting.dtype == "bf16",
        "use_cpu": job.device == "cpu",
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _watcher() -> Any:
    """A callback for transformers' Trainer that writes down times, losses and what the batches hold."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def __init__(self) -> None:
            names = ("stamps", "losses", "grad_norms", "tokens", "trained")
            self.found: Result = {name: [] for name in names}

        def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
            model.register_forward_pre_hook(self.count, with_kwargs=True)

        def count(self, _: Any, __: Any, batch: dict[str, Any]) -> None:
            self.found["tokens"].append(int(batch["attention_mask"].sum()))
            if batch.get("labels") is not None:
                self.found["trained"].append(int((batch["labels"][:, 1:] != -100).sum()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.found["stamps"].append(time.time())

        def on_log(self, *_: Any, logs: dict[str, Any], **__: Any) -> None:
            if "loss" in logs:
                self.found["losses"].append(float(logs["loss"]))
                self.found["grad_norms"].append(float(logs["grad_norm"]))

    return Watcher()
