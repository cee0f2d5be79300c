"""Section `adapter`: how the weights move. One section type per method (methods.py), chosen by `method`."""

from typing import TYPE_CHECKING, Any

from lorakit.recipe.inits import INITS
from lorakit.recipe.methods import AdaLora, Lora, Method, first_step, phases
from lorakit.recipe.peft_types import problems_of
from lorakit.recipe.section import Conflicts, Tagged, Written
from lorakit.recipe.traits import TRAITS

NO_DROPOUT = "their update is added to the weight before any input is seen; write 0"


METHOD_SECTIONS: dict[str, type[Method]] = {name: traits.section for name, traits in TRAITS.items()}
TAGGED = Tagged("method", "lora", "method", METHOD_SECTIONS)
if TYPE_CHECKING:
    Adapter = Method  # a union that is built is no type to a checker
else:
    Adapter = TAGGED.union()


def conflicts(recipe: Any, written: Written) -> Conflicts:
    adapter = recipe.adapter
    traits = TRAITS[adapter.method]
    if traits.no_lr_ratio and written("optimizer.lr_ratio") is not None:
        yield "optimizer.lr_ratio", traits.no_lr_ratio.format(getattr(adapter, "type", ""))
    held = recipe.model.quantize
    for kind in ("quantized", held) if held != "none" else ():
        if kind in traits.refuses:
            yield "adapter.method", traits.refuses[kind].format(held)
    if getattr(adapter, "start_from", None) is not None and written("adapter.init") is not None:
        yield "adapter.init", "has no effect with start_from: the weights come from there; delete it"
    if adapter.method == "lora":
        yield from _lora_conflicts(adapter, written)
        yield from _init_conflicts(recipe, written)
    if adapter.method == "full" and written("model.dtype") == "bf16":
        yield "model.dtype", "full fine-tuning updates fp32 weights (bf16 loses small updates); delete it"
    elif adapter.method == "adalora":
        yield from _adalora_conflicts(adapter, written)
    elif adapter.method == "lora-drop" and recipe.data.streaming:
        yield "data.streaming", "lora-drop needs rows to draw a sample from before step 0; a stream has none"
    elif adapter.method == "peft":
        yield from problems_of(adapter, recipe.model.quantize)
    if recipe.training.max_steps is not None:
        yield from too_few_steps(adapter, recipe.training.max_steps)


def too_few_steps(adapter: Any, steps: int) -> Conflicts:
    """Where the schedule of a method does not fit into a run of `steps` steps."""
    if adapter.method == "delta-lora" and (first := first_step(steps, adapter.start)) >= steps:
        message = f"{first} steps before W follows do not fit into the {steps} steps of this run"
        yield "adapter.start", message
    if adapter.method == "adalora" and adapter.init_rank > adapter.target_rank:
        start, settled = phases(steps, adapter.warmup, adapter.final)
        if start >= settled and adapter.warmup + adapter.final < 1:
            message = f"{steps} steps are too few for AdaLoRA's three phases: warm-up, pruning, final"
            yield "training.max_steps", message


def too_few_rows(adapter: Any, rows: int) -> Conflicts:
    """Where a method, or a start, looks at more samples than the `rows` of an epoch."""
    probe = getattr(adapter, "probe", 0)
    if isinstance(probe, int) and probe > rows:
        cure = f"write at most {rows}, or a share of them such as 0.1"
        yield "adapter.probe", f"{probe} samples, but an epoch has {rows}: {cure}"


def _lora_conflicts(adapter: Lora, written: Written) -> Conflicts:
    if adapter.start_from is not None and written("adapter.train_tokens") is not None:
        yield "adapter.train_tokens", "has no effect with start_from: the tokens come from there; delete it"
    if not adapter.targets and not adapter.target_parameters:
        yield "adapter.targets", "must not be empty"
    if adapter.target_parameters and adapter.dropout > 0:
        yield "adapter.dropout", f"experts cannot have it (target_parameters): {NO_DROPOUT}"


def _init_conflicts(recipe: Any, written: Written) -> Conflicts:
    """Of how a LoRA starts."""
    adapter, held = recipe.adapter, recipe.model.quantize
    init, name = INITS[adapter.init], adapter.init
    for field in dict.fromkeys(field for traits in INITS.values() for field in traits.fields):
        if field not in init.fields and written(f"adapter.{field}") is not None:
            owners = " and ".join(other for other, traits in INITS.items() if field in traits.fields)
            yield f"adapter.{field}", f"has no effect with init: {name} (it is of {owners}); delete it"
    there = {
        "unquantized" if held == "none" else "quantized": True,
        "dropout": adapter.dropout > 0,
    }
    for kind in (kind for kind, is_there in there.items() if is_there and kind in init.refuses):
        field = "adapter.dropout" if kind == "dropout" else "adapter.init"
        yield field, f"init: {name} cannot be had here: {init.refuses[kind].format(held)}"
    if init.exported and adapter.train_tokens:
        yield "adapter.train_tokens", f"init: {name} writes a plain LoRA, which holds no rows"
    if "probe" in init.fields and recipe.data.streaming:
        yield "data.streaming", f"init: {name} needs rows to look at before step 0; a stream has none"


def _adalora_conflicts(adapter: AdaLora, written: Written) -> Conflicts:
    if adapter.target_rank > adapter.init_rank:
        field = "target_rank" if written("adapter.target_rank") is not None else "init_rank"
        message = f"target_rank {adapter.target_rank} is above init_rank {adapter.init_rank}: ranks only fall"
        yield f"adapter.{field}", message
    if adapter.warmup + adapter.final >= 1:
        field = "final" if written("adapter.final") is not None else "warmup"
        yield f"adapter.{field}", "warmup and final together leave no steps to decide on the ranks"
    if adapter.target_rank == adapter.init_rank:
        for field in ("warmup", "final", "interval", "beta1", "beta2"):
            if written(f"adapter.{field}") is not None:
                message = "has no effect where target_rank equals init_rank: nothing is taken away; delete it"
                yield f"adapter.{field}", message
