"""What a contestant is given, and how the base is held where that is left to its user."""

from dataclasses import dataclass
from typing import Any

from bench_rivals.workload import Setting

# "stamps": time.time() at the end of every step; "losses": mean loss of every step; "grad_norms"; where the
# contestant's own code made the batches, "tokens" and "trained" tokens of every step.
Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    setting: Setting
    model: str  # directories of bench_rivals.workload.make
    rows: str
    steps: int
    device: str
    output: str  # an empty directory


def held(setting: Setting, device: str) -> dict[str, Any]:
    """How from_pretrained is to hold the base, where that is left to its user."""
    import torch
    from transformers import BitsAndBytesConfig

    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    options: dict[str, Any] = {"dtype": dtype}
    if setting.quantize == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if setting.quantize == "nf4" or device == "cuda":
        options["device_map"] = {"": device}
    return options
