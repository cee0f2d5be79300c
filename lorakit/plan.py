"""Recipe + facts -> Plan: steps, layout, precision, and the reason of every `auto`. Pure, and without torch.

Facts are what a recipe cannot know: how the weights are stored, what the device does, how long the samples
are.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import Problem, RecipeError
from lorakit.recipe import Recipe, peft_types
from lorakit.recipe.adapter import NO_DROPOUT
from lorakit.recipe.data import files_of, is_template, sources
from lorakit.recipe.methods import auto_alpha
from lorakit.recipe.optimizer import LORA_PLUS
from lorakit.recipe.schedule import phases, too_few_steps
from lorakit.recipe.task import TRAIN_ON
from lorakit.recipe.traits import TRAITS, init_of
from lorakit.shapes import Layer
from lorakit.targets import Target, assign, select, select_experts, twice


@dataclass(frozen=True)
class Decision:
    """What an `auto` became, and why. Kept in run.json and read back on resume."""

    value: Any
    why: str


Decisions = dict[str, Decision]  # dotted name of the recipe's field -> decision


@dataclass(frozen=True)
class Hardware:
    device: str  # "cpu" or "cuda"
    multiplies_bf16: bool
    memory_bytes: int  # all of the device's memory, not what happens to be free


@dataclass(frozen=True)
class Dimensions:
    """Of a decoder: what its activations cost."""

    hidden: int
    intermediate: int
    num_layers: int
    vocabulary: int

    def bytes_per_token(self, checkpointing: bool, width: int) -> int:
        """Activations held for the backward pass, per token, at `width` bytes per number: about (10 h + 4 f)
        per layer with a frozen base, plus the logits in two precisions. A rule of thumb, measured to a few
        percent."""
        layer = (10 * self.hidden + 4 * self.intermediate) * width
        logits = self.vocabulary * (width + 8)
        return logits + (
            layer + self.num_layers * self.hidden * width if checkpointing else self.num_layers * layer
        )


@dataclass(frozen=True)
class Plan:
    """All that is derived from a recipe before step 0."""

    total_steps: int
    warmup_steps: int
    decay_steps: int  # at the end
    num_samples: int
    decisions: Decisions

    def __getitem__(self, dotted: str) -> Any:
        return self.decisions[dotted].value


def check(recipe: Recipe) -> list[Problem]:
    """What is wrong with a recipe apart from its grammar, found without opening a model: files that are not
    there."""
    problems = []
    for dotted, value in (("data.train", recipe.data.train), ("data.eval", recipe.data.eval)):
        for source in () if value is None or isinstance(value, float) else sources(value, None):
            try:
                files_of(source.path) if source.is_local else None
            except ValueError as error:
                problems.append(recipe.problem(dotted, str(error)))
    template = recipe.data.chat_template
    if template is not None and not is_template(template) and not Path(template).is_file():
        message = f"no such file: {template}; a template itself holds {{{{ or {{%"
        problems.append(recipe.problem("data.chat_template", message))
    model = Path(recipe.model.path)
    if model.is_absolute() and not (model / "config.json").is_file():
        problems.append(recipe.problem("model.path", f"no model directory (with config.json): {model}"))
    start = getattr(recipe.adapter, "start_from", None)
    if start is not None and not (Path(start) / "adapter_config.json").is_file():
        problems.append(recipe.problem("adapter.start_from", f"no adapter directory: {start}"))
    return problems + check_kind_of_start(recipe)


def check_kind_of_start(recipe: Recipe) -> list[Problem]:
    """Where start_from is a DoRA and the method is not, or the other way round. An unreadable file is left to
    its reader."""
    method, start = recipe.adapter.method, getattr(recipe.adapter, "start_from", None)
    rows = False
    try:
        config = json.loads((Path(start or "") / "adapter_config.json").read_text())
        is_dora = bool(config.get("use_dora", False))
        rows = bool(config.get("trainable_token_indices"))
    except (OSError, ValueError, AttributeError):
        return []
    if rows and method != "lora":
        message = f"{start} trained tokens of the vocabulary, which {method} cannot"
        return [recipe.problem("adapter.start_from", message)]
    if is_dora == (method == "dora"):
        return []
    if is_dora:
        message = f"{start} is a DoRA, whose lengths of rows {method} does not have; write method: dora"
    else:
        message = f"{start} has no lengths of rows, as DoRA needs; write method: lora, or merge it first"
    return [recipe.problem("adapter.start_from", message)]


def choose_targets(recipe: Recipe, layers: Sequence[Layer], whole: Sequence[str] = ()) -> list[Target]:
    """The layers that the recipe adapts, each with rank and alpha. `whole`: the modules that it trains whole.

    Raises: RecipeError for targets and patterns that match nothing, for ranks that do not fit, and for a
    layer that would be adapted and trained whole.
    """
    section: Any = recipe.adapter
    chosen, problems = select(layers, section.targets)
    found = [recipe.problem("adapter.targets", message) for message in problems]
    experts, problems = select_experts(layers, getattr(section, "target_parameters", ()))
    found += [recipe.problem("adapter.target_parameters", message) for message in problems]
    if message := twice([*chosen, *experts], whole):
        found.append(recipe.problem("adapter.train_also", message))
    if not found:
        names = {layer.name for layer in (*chosen, *experts)}
        targets, faults = _assigned(section, [layer for layer in layers if layer.name in names])
        faults += _without_effect(recipe, targets)
        found = [recipe.problem(field, message) for field, message in faults]
    if found:
        raise RecipeError(found)
    return targets


def _assigned(section: Any, layers: Sequence[Layer]) -> tuple[list[Target], list[tuple[str, str]]]:
    """(`layers` with the section's ranks and alphas; what the method cannot adapt, as (field, message))."""
    if faults := _refused(section, layers):
        return [], faults
    alpha: Any = getattr(section, "alpha", "auto")
    if alpha == "auto" and getattr(section, "scaling", "") == "rank_stabilized":
        alpha, _ = auto_alpha(section)
    patterns = getattr(section, "rank_pattern", {}), getattr(section, "alpha_pattern", {})
    targets, faults = assign(layers, getattr(section, "rank", 0), alpha, *patterns)  # 0: PEFT's own tuners
    if TRAITS[section.method].any_rank:
        return targets, [fault for fault in faults if fault[0] != "adapter.rank"]
    return targets, faults if hasattr(section, "rank_pattern") else _narrow(section, layers)


def _refused(section: Any, layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """(field, message) of the first layer of a kind that the method, or its init, cannot adapt."""
    tuner = section.type if section.method == "peft" else ""
    refuses = peft_types.refuses(tuner) if tuner else TRAITS[section.method].refuses
    init = f"init: {getattr(section, 'init', '')}"
    of_init = ("init", init, init_of(section).refuses)
    for field, what, why in (("targets", tuner or section.method, refuses), of_init):
        if odd := next((layer for layer in layers if layer.kind in why), None):
            kind = "an embedding" if odd.kind == "embedding" else f"a {odd.kind} layer"
            message = f"{odd.name} is {kind}, which {what} cannot adapt: {why[odd.kind]}"
            return [(f"adapter.{field}", message)]
    return []


def _without_effect(recipe: Recipe, targets: Sequence[Target]) -> list[tuple[str, str]]:
    """(field, message) of what is written but plays no part where every adapted layer is an embedding."""
    if not targets or any(target.layer.kind != "embedding" for target in targets):
        return []
    why = {"dropout": "PEFT draws none for them", "init": "their A starts at zero, their B at N(0, 1)"}
    written = [field for field in why if recipe.written(f"adapter.{field}") is not None]
    return [
        (f"adapter.{field}", f"has no effect on embeddings ({why[field]}); delete it") for field in written
    ]


def _narrow(section: Any, layers: Sequence[Layer]) -> list[tuple[str, str]]:
    """(field, message) where a method of one rank for all layers has a layer narrower than that."""
    field, rank = ("init_rank", section.init_rank) if section.method == "adalora" else ("rank", section.rank)
    narrow = min(layers, key=lambda layer: min(layer.in_features, layer.out_features))
    side = min(narrow.in_features, narrow.out_features)
    if rank <= side:
        return []
    shape = f"{narrow.out_features} x {narrow.in_features}"
    message = f"{rank} is above the smaller side of {narrow.name} ({shape}); write at most {side}"
    return [(f"adapter.{field}", message)]


def check_start(
    recipe: Recipe,
    layers: Sequence[Layer],
    targets: Sequence[Target],
    scaling: str,
    whole: Sequence[str],
    whole_there: Sequence[str],
) -> list[Problem]:
    """Where the recipe contradicts the adapter that it starts from; what the recipe leaves out cannot."""
    section: Any = recipe.adapter
    found: list[tuple[str, str]] = []
    there = {target.layer.name: target for target in targets}
    found += _other_layers(recipe, layers, targets)
    adapted = [target.layer for target in targets]
    wanted, faults = _assigned(section, adapted)
    fields = (("rank", "rank_pattern", "rank"), ("alpha", "alpha_pattern", "alpha"))
    for field, pattern, attribute in fields if "rank" in TRAITS[section.method].taken_over else ():
        value = recipe.written(f"adapter.{field}")
        if value in (None, "auto") and not recipe.written(f"adapter.{pattern}"):
            continue
        for target in wanted:
            own, actual = (getattr(one, attribute) for one in (target, there[target.layer.name]))
            if actual != own:
                message = f"{own}, but start_from has {actual} at {target.layer.name}"
                message += f"; delete {field}: it comes from there"
                found.append((f"adapter.{field}", message))
                break
    if "rank" not in TRAITS[section.method].taken_over:
        found += faults
    if recipe.written("adapter.scaling") not in (None, scaling):
        found.append(("adapter.scaling", f"start_from is {scaling}"))
    if section.train_also and sorted(whole) != sorted(whole_there):
        found.append(
            ("adapter.train_also", f"start_from trained whole: {', '.join(whole_there) or 'nothing'}")
        )
    return [recipe.problem(field, message) for field, message in found]


def _other_layers(
    recipe: Recipe, layers: Sequence[Layer], targets: Sequence[Target]
) -> list[tuple[str, str]]:
    """(field, message) where the recipe names other layers than `targets`, those of start_from, or cannot
    have them."""
    section: Any = recipe.adapter
    found = []
    experts = {target.layer.name for target in targets if target.layer.kind == "experts"}
    theirs = {"targets": {t.layer.name for t in targets} - experts, "target_parameters": experts}
    for field, names in theirs.items():
        if recipe.written(f"adapter.{field}") is None:
            continue
        choose = select if field == "targets" else select_experts
        chosen = {layer.name for layer in choose(layers, getattr(section, field))[0]}
        if odd := sorted(names ^ chosen):
            message = f"not the layers of start_from: {odd[0]} is in one of the two only"
            found.append((f"adapter.{field}", message))
    if experts and section.method != "lora":
        found.append(("adapter.start_from", f"it adapts experts, which {section.method} cannot"))
    elif experts and section.dropout > 0:
        found.append(("adapter.dropout", f"start_from adapts experts: {NO_DROPOUT}"))
    return found


def choose_precision(recipe: Recipe, stored: str, hardware: Hardware) -> Decisions:
    """training.precision and model.dtype.

    Raises: RecipeError when the base is stored in fp16 and the recipe does not say how to hold it.
    """
    model, wanted = recipe.model, recipe.training.precision
    quantized = model.quantize != "none"
    held = stored if model.dtype == "auto" else model.dtype
    small = held != "fp32" or quantized
    if held == "fp16" and recipe.adapter.method != "full":
        message = "the base is stored in fp16, whose training needs loss scaling; write bf16 or fp32"
        raise RecipeError([recipe.problem("model.dtype", message)])
    if wanted != "auto":
        precision = Decision(wanted, "as the recipe says")
    elif small and hardware.multiplies_bf16:
        precision = Decision(
            "bf16", f"the base is {model.quantize if quantized else held}, the {hardware.device} has bf16"
        )
    elif model.dtype == "bf16":
        precision = Decision(
            "bf16", "the recipe holds the base in bf16, though this hardware only emulates it"
        )
    else:
        why = f"the base is stored in {held}" if not small else f"this {hardware.device} has no bf16 products"
        precision = Decision("fp32", why)
    if recipe.adapter.method == "full":
        dtype = Decision("fp32", "full fine-tuning updates fp32 weights")
    elif model.dtype != "auto":
        dtype = Decision(model.dtype, "as the recipe says")
    elif precision.value == "fp32" and held != "fp32":
        dtype = Decision("fp32", f"stored in {held}, but products are computed in fp32")
    else:
        dtype = Decision(held, "as stored")
    return {"training.precision": precision, "model.dtype": dtype}


def choose_layout(
    recipe: Recipe, precision: str, longest: int, dimensions: Dimensions, hardware: Hardware, isolated: str
) -> Decisions:
    """How a step is laid out: packing, micro_batch_tokens, gradient_checkpointing, deterministic.

    `isolated` is empty when packed documents were proved not to see each other, else the reason against it.
    A quarter of the device's memory may hold activations; the answer never depends on how much is free.
    """
    training = recipe.training
    if not recipe.data.packing or recipe.model.attention != "auto":
        packing = Decision(False, "as the recipe says")
    elif isolated:
        packing = Decision(False, f"rows are padded instead of packed: {isolated}")
    else:
        packing = Decision(True, "documents in one row were proved not to see each other")
    width = 2 if precision == "bf16" else 4
    budget = hardware.memory_bytes // 4
    room = budget // dimensions.bytes_per_token(False, width)
    if training.gradient_checkpointing == "auto":
        fits = longest <= room
        verb = "fit" if fits else "do not fit"
        why = f"{longest} tokens, the longest sample, {verb} into a quarter of the memory"
        checkpointing = Decision(not fits, why)
    else:
        checkpointing = Decision(training.gradient_checkpointing, "as the recipe says")
    if training.micro_batch_tokens == "auto":
        room = budget // dimensions.bytes_per_token(checkpointing.value, width)
        cap = 4096 if hardware.device == "cpu" else 16384
        tokens = max(longest, min(room, cap))
        why = (
            "the longest sample"
            if tokens == longest
            else "enough to keep the hardware busy"
            if tokens == cap
            else ""
        )
        micro = Decision(tokens, why or "what a quarter of the memory holds")
    else:
        micro = Decision(training.micro_batch_tokens, "as the recipe says")
    if training.deterministic == "auto":
        always = hardware.device == "cpu"
        deterministic = Decision(
            always, "a CPU repeats its bits" if always else "speed; write true to repeat bits"
        )
    else:
        deterministic = Decision(training.deterministic, "as the recipe says")
    return {
        "data.packing": packing,
        "training.micro_batch_tokens": micro,
        "training.gradient_checkpointing": checkpointing,
        "training.deterministic": deterministic,
    }


def choose_data(recipe: Recipe, format_name: str, why: str) -> Decisions:
    """data.format and task.train_on, once the first row has been seen."""
    train_on = recipe.task.train_on
    meaning = TRAIN_ON.get(format_name, "auto") if train_on == "auto" else train_on  # auto: sources differ
    rows = f"the rows are {format_name}" if format_name in TRAIN_ON else "each source has a format of its own"
    reason = rows if train_on == "auto" else "as the recipe says"
    return {"data.format": Decision(format_name, why), "task.train_on": Decision(meaning, reason)}


def count_steps(recipe: Recipe, num_samples: int) -> int:
    """Optimizer steps of the run."""
    steps_per_epoch = -(-num_samples // recipe.training.batch_size)
    return recipe.training.max_steps or steps_per_epoch * recipe.training.epochs


def make_plan(recipe: Recipe, num_samples: int, decisions: Decisions) -> Plan:
    """Steps of the run. Each epoch ends with what is left of its samples, so that every sample counts
    once."""
    total = count_steps(recipe, num_samples)
    if few := [recipe.problem(*found) for found in too_few_steps(recipe.schedule, total)]:
        raise RecipeError(few)
    adapter: Any = recipe.adapter
    if getattr(adapter, "alpha", None) == "auto" and not getattr(adapter, "rank_pattern", {}):
        taken_over = "alpha" in TRAITS[adapter.method].taken_over and adapter.start_from
        alpha = Decision(*auto_alpha(adapter))
        decisions = decisions if taken_over else decisions | {"adapter.alpha": alpha}
    if recipe.optimizer.lr_ratio == "lora+":
        why = "LoRA+ where B starts at zero; larger for harder tasks, with a smaller optimizer.lr"
        decisions = decisions | {"optimizer.lr_ratio": Decision(LORA_PLUS, why)}
    return Plan(total, *phases(recipe.schedule, total), num_samples, decisions)
