"""What other programs (PEFT, transformers, TRL, axolotl) call what a recipe says: their name -> what to
write here. A name that is here under the same name needs no entry."""

from typing import Any

from lorakit.recipe.inits import INITS

Known = tuple[dict[str, Any], str]  # what its section is then, to check the rest by; what to write


def _optimizer(name: str, told: str = "") -> Known:
    return {"name": name}, told or f"Write name: {name}."


def _schedule(name: str, told: str) -> Known:
    return {"name": name}, told


def _lora(told: str, **fields: str) -> Known:
    return {"method": "lora", **fields}, f"Write method: lora with {told}."


def _peft(kind: str) -> Known:
    return {"method": "peft", "type": kind}, f"Write method: peft with type: {kind}."


_PAGED = "What pages is called paged_adamw_8bit."
_LION = "Write name: lion; its state is one number of 32 bits."
_FLOOR = "Write name: cosine with a floor above 0."

# A method, an optimizer, a schedule, or a setting of one.
NAMES: dict[str, Known] = {
    "rslora": _lora("scaling: rank_stabilized", scaling="rank_stabilized"),
    "lora+": _lora("optimizer.lr_ratio: lora+"),
    "qlora": _lora("model.quantize: nf4"),
    **{name: _lora(f"init: {name}", init=name) for name in INITS},
    "bitfit": ({"method": "full", "train_only": ("bias",)}, "Write method: full with train_only: [bias]."),
    "freeze": ({"method": "full"}, "Write method: full with train_only."),
    **{kind.lower(): _peft(kind) for kind in ("OFT", "IA3", "LOHA", "LOKR")},
    **dict.fromkeys(
        ("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adamw"), _optimizer("adamw")
    ),
    **dict.fromkeys(("adam8bit", "adamw8bit", "adamw_bnb_8bit", "adam_8bit"), _optimizer("adamw_8bit")),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw_32bit", "pagedadamw8bit"), _optimizer("paged_adamw_8bit", _PAGED)
    ),
    **dict.fromkeys(
        ("lion_32bit", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit"), _optimizer("lion", _LION)
    ),
    **dict.fromkeys(("sophiag", "sophia-g", "sophia_g"), _optimizer("sophia")),
    **dict.fromkeys(
        ("sophiah", "sophia-h", "sophia_h"), _optimizer("sophia", "Sophia-G is here: name: sophia.")
    ),
    **dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), _schedule("cosine", _FLOOR)),
    "constant_with_warmup": _schedule("constant", "Write name: constant; every schedule has a warmup."),
    "polynomial": _schedule("linear", "Write name: linear with a floor."),
    **dict.fromkeys(("inverse_sqrt", "rsqrt"), _schedule("inverse-sqrt", "Write name: inverse-sqrt.")),
    **dict.fromkeys(
        ("warmup_stable_decay", "trapezoid", "trapezoidal"), _schedule("wsd", "Write name: wsd.")
    ),
}

# A value of adapter.init.
STARTS = {
    **dict.fromkeys(("true", "kaiming", "kaiming_uniform"), "Write init: default."),
    **dict.fromkeys(
        ("lora_ga", "lora-ga", "loraga", "corda"),
        "It is not in lorakit; what starts from the data is eva, from the weight pissa.",
    ),
}

# A field: where it stands here, and what there is to say of its value.
FIELDS: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("model_name_or_path", "base_model"), ("model.path", "")),
    "load_in_4bit": ("model.quantize", "nf4"),
    "load_in_8bit": ("model.quantize", "int8"),
    **dict.fromkeys(("r", "lora_r"), ("adapter.rank", "")),
    "lora_alpha": ("adapter.alpha", ""),
    "lora_dropout": ("adapter.dropout", ""),
    **dict.fromkeys(("target_modules", "lora_target_modules"), ("adapter.targets", "")),
    "modules_to_save": ("adapter.train_also", ""),
    "trainable_token_indices": ("adapter.train_tokens", ""),
    "init_lora_weights": ("adapter.init", ""),
    "use_rslora": ("adapter.scaling", "rank_stabilized"),
    "use_dora": ("adapter.method", "dora"),
    "learning_rate": ("optimizer.lr", ""),
    "optim": ("optimizer.name", ""),
    "loraplus_lr_ratio": ("optimizer.lr_ratio", ""),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), ("optimizer.betas", "[beta1, beta2]")),
    "adam_epsilon": ("optimizer.eps", ""),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), ("schedule.name", "")),
    "min_lr": ("schedule.floor", "min_lr / lr, a share of the peak"),
    **dict.fromkeys(("min_lr_rate", "min_lr_ratio"), ("schedule.floor", "")),
    **dict.fromkeys(("warmup_ratio", "warmup_steps", "num_warmup_steps"), ("schedule.warmup", "")),
    "num_decay_steps": ("schedule.decay", ""),
    **dict.fromkeys(("num_train_epochs", "num_epochs"), ("training.epochs", "")),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps"),
        ("training.batch_size", "the samples of a step, of all devices and micro-batches together"),
    ),
    "bf16": ("training.precision", "bf16"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len"), ("data.max_length", "")),
    "eval_steps": ("eval.every", ""),
    "save_steps": ("checkpoint.every", ""),
    "logging_steps": ("log.every", ""),
    "report_to": ("log.trackers", ""),
    "output_dir": ("output", ""),
}


def cure_of_field(name: str, section: str) -> str:
    """What to write for a field of another program's that stands in `section`; empty where it is unknown."""
    if name not in FIELDS:
        return ""
    place, value = FIELDS[name]
    told = place.removeprefix(f"{section}.")
    return f"Write {told}: {value}." if value else f"Write {told}."
