"""What a run says about itself: trainable parameters as JSON and Markdown, the account of its rows, the model
card of its adapter."""

import json
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.adapters import Adapter, Role, Trained
from lorakit.picture import RANKS, column_names, rank_cells
from lorakit.plan import Plan
from lorakit.recipe import Recipe
from lorakit.recipe.inits import INITS
from lorakit.recipe.traits import is_exported
from lorakit.targets import modules_above
from lorakit.terminal import harmless


def parameters(adapter: Adapter, num_base: int) -> dict[str, Any]:
    """The content of params.json, counted from the trained tensors themselves. `num_base`: parameters of the
    base."""
    trained = adapter.trained()
    full = any(item.role is Role.FULL for item in trained)
    trainable = sum(item.parameter.numel() for item in trained)
    total = num_base if full else num_base + trainable
    return {
        "total": total,
        "trainable": trainable,
        "trainable_percent": 100.0 * trainable / total,
        "adapter_bytes": {"float32": 4 * trainable, "bfloat16": 2 * trainable},
        "modules": _modules(adapter, trained),
    }


def _modules(adapter: Adapter, trained: Sequence[Trained]) -> list[dict[str, Any]]:
    """One entry per adapted layer; then one per module trained whole, with rank 0.

    `rank` is the layer's rank as it is now; where a method changes it, `init_rank` says what was trained;
    0 where `tuner` has none.
    """
    adapted, ranks = {target.layer.name: target for target in adapter.targets}, adapter.ranks()
    counts: dict[str, int] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for item in trained:
        name = item.layer or next((above for above in modules_above(item.name) if above in adapted), None)
        name = name or re.split(r"\.(?:modules_to_save|token_adapter)\.", item.name.rpartition(".")[0])[0]
        counts[name] = counts.get(name, 0) + item.parameter.numel()
        if item.parameter.dim() == 2:
            shapes.setdefault(name, (item.parameter.shape[1], item.parameter.shape[0]))
    entries, notes = [], adapter.notes()
    for name, count in _with_sharers(counts, list(adapted)).items():
        target = adapted.get(name)
        if target:
            rank, (inner, outer) = ranks[name], (target.layer.in_features, target.layer.out_features)
        else:
            rank, (inner, outer) = 0, shapes.get(name, (1, count))
        entry = {"name": name, "in": inner, "out": outer, "rank": rank, "trainable": count}
        entry |= {"init_rank": target.rank} if target and adapter.moves_ranks else {}
        entries.append(entry | notes.get(name, {}))
    return entries


def _with_sharers(counts: dict[str, int], adapted: Sequence[str]) -> dict[str, int]:
    """`counts` with a zero, in the model's order, for layers without parameters or counted with another."""
    order = list(counts)
    for before, name in pairwise(["", *adapted]):
        if name not in counts:
            order.insert(order.index(before) + 1 if before else 0, name)
    return {name: counts.get(name, 0) for name in order}


def as_json(params: dict[str, Any]) -> str:
    return json.dumps(params, indent=2) + "\n"


def account_markdown(lines: Sequence[str]) -> str:
    """data.md: where every row went, as it was printed. Names of files and rows are not read as markup."""
    fence = "`" * (1 + max((len(run) for line in lines for run in re.findall("`+", line)), default=2))
    return "\n".join(["# Data", "", fence, *map(harmless, lines), fence, ""])


def parameters_markdown(params: dict[str, Any]) -> str:
    changes = any("init_rank" in m for m in params["modules"])
    judged = any("importance" in m for m in params["modules"])
    lent = {m.get("shared_with") for m in params["modules"]}
    columns = ["module", "in", "out", "rank", *(["initial rank"] if changes else []), "trainable"]
    columns += ["importance", "adapter"] if judged else []
    lines = [
        f"Trainable: {_share(params)} parameters",
        "",
        f"| {' | '.join(columns)} |",
        f"|---{'|---:' * (len(columns) - 1)}|",
    ]
    for m in params["modules"]:
        rank = m["rank"] if m["rank"] or "init_rank" in m else m.get("tuner", "whole")
        initial = f" {m.get('init_rank', '')} |" if changes else ""
        line = f"| {m['name']} | {m['in']:,} | {m['out']:,} | {rank} |{initial} {m['trainable']:,} |"
        own = "shared" if m["name"] in lent else "own"
        whose = f"that of {m['shared_with']}" if "shared_with" in m else own
        share = f" {m['importance']:.4f} | {whose} |" if "importance" in m else "  |  |"
        lines.append(line + (share if judged else ""))
    if rank_cells(params):
        lines += ["", f"![Ranks, layer by module]({RANKS})"]
    if changes:
        lines += ["", "Ranks, layer by module:", "", *rank_table(params)]
    return "\n".join(lines) + "\n"


def rank_table(params: dict[str, Any]) -> list[str]:
    """Markdown lines: a row for every layer number, a column for every module name, the rank in the cell."""
    cells = rank_cells(params)
    names = column_names(cells)
    rows = [
        [layer, *(str(row[name]["rank"]) if name in row else "" for name in names)]
        for layer, row in cells.items()
    ]
    sums = [str(sum(row[name]["rank"] for row in cells.values() if name in row)) for name in names]
    head = ["layer", *names]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *rows, ["sum", *sums])]


def _share(params: dict[str, Any]) -> str:
    return f"{params['trainable']:,} of {params['total']:,} ({params['trainable_percent']:.4f} %)"


def model_card(recipe: Recipe, plan: Plan, params: dict[str, Any], scores: dict[str, Any]) -> str:
    """README.md of an adapter or a model. Front matter as the hub reads it; names are quoted as JSON, which
    YAML is."""
    path = recipe.model.path
    name = path.rsplit("/", 1)[-1] if path.startswith("/") else path
    full = recipe.adapter.method == "full"
    exported, init = is_exported(recipe.adapter), getattr(recipe.adapter, "init", "default")
    tag = getattr(recipe.adapter, "type", "lora").lower()
    library, tags = ("transformers", "[lorakit]") if full else ("peft", f"[{tag}, lorakit]")
    front = ["---", f"base_model: {json.dumps(name)}", f"library_name: {library}", f"tags: {tags}", "---", ""]
    revision = f", revision `{_code(recipe.model.revision)}`" if recipe.model.revision else ""
    trained = f"{plan.num_samples:,} samples"
    if recipe.data.streaming:
        trained = f"{scores['step']:,} steps of {recipe.training.batch_size:,} samples of a stream"
    facts = {
        "base model": f"`{_code(name)}`{revision}",
        "quantization of the base": recipe.model.quantize,
        "method": recipe.adapter.method + (f", init: {init}" if init != "default" else ""),
        "in the files": "plain LoRA, which is what was trained exactly" if exported else None,
        "trainable parameters": _share(params),
        "step": f"{scores['step']} of {plan.total_steps}, {recipe.training.batch_size} samples each",
        "held-out loss (nats per trained token)": _number(scores["eval_loss"]),
        f"the same {_before(init)}": _number(scores["base_eval_loss"]),
        "trained on": f"{trained}, {plan['data.format']}, {plan['task.train_on']}",
        "seed": recipe.training.seed,
        "written by": f"lorakit {__version__}",
    }
    table = [
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in facts.items() if value is not None),
    ]
    place = "path/to/this/folder" if full else "path/to/the/base/model" if path.startswith("/") else name
    title = f"# {'A model trained from' if full else 'An adapter for'} {_code(name)}"
    use = ["## Use", "", "```python", *_loading(recipe, place), "```"]
    return "\n".join([*front, title, "", *table, "", *use]) + "\n"


def _loading(recipe: Recipe, place: str) -> list[str]:
    """The lines of Python that load what was trained, on a base that is held as it was then."""
    model = recipe.model
    if recipe.adapter.method == "full":
        return [
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(place)})",
        ]
    imports, held = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM"], []
    options = json.dumps(place)
    if model.quantize != "none":
        imports[1] += ", BitsAndBytesConfig"
        options += ", quantization_config=held"
        held = ["held = BitsAndBytesConfig(load_in_8bit=True)"]
    if model.quantize in ("nf4", "fp4"):
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[model.compute_dtype]
        held = [
            "held = BitsAndBytesConfig(",
            "    load_in_4bit=True,",
            f'    bnb_4bit_quant_type="{model.quantize}",',
            f"    bnb_4bit_use_double_quant={model.double_quant},",
            f'    bnb_4bit_compute_dtype="{dtype}",',
            ")",
        ]
    return [
        *imports,
        "",
        *held,
        f"model = AutoModelForCausalLM.from_pretrained({options})",
        'model = PeftModel.from_pretrained(model, "path/to/this/folder")',
    ]


def _code(text: str) -> str:
    return text.replace("`", "").replace("|", "").replace("\n", " ").replace("<", "")


def _before(init: str) -> str:
    """When the first held-out loss was: the base's, but where the adapter starts elsewhere."""
    return "before training" + (f", as {init} starts" if INITS[init].starts_elsewhere else "")


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _shortest(path: Path) -> Path:
    """`path` as a user in the current directory would write it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def summary(folder: Path) -> str:
    """The end of a training run, in a few lines: losses, place, what to type next."""
    record = json.loads((folder / "run.json").read_text())
    product = folder / ("model" if (folder / "model").is_dir() else "adapter")
    lines = [f"{record['status']} at step {record['step']} of {record['steps']} in {record['seconds']:.1f} s"]
    if record.get("base_eval_loss") is not None:
        before = _before(record["recipe"].get("adapter.init", "default"))
        lines.append(f"held-out loss   {record['base_eval_loss']:.4f} {before}")
    if record.get("best_loss") is not None:
        since = " since the ranks were settled" if record["recipe"].get("adapter.method") == "adalora" else ""
        lines.append(
            f"held-out loss   {record['best_loss']:.4f} at step {record['best_step']}, the lowest{since}"
        )
        if record.get("base_eval_loss") is not None and record["best_loss"] > record["base_eval_loss"]:
            lines.append("warning         worse than before training; try a smaller optimizer.lr")
    lines.append(f"{product.name:<15} {product}")
    place = _shortest(folder)
    commands = [f"lorakit generate {shlex.quote(str(place))} -p 'a prompt'"]
    if product.name == "adapter":
        merged = shlex.quote(str(place / "merged"))
        commands.append(f"lorakit merge {shlex.quote(str(place))} --output {merged}")
    lines += [f"{word:<15} {command}" for word, command in zip(("next", ""), commands, strict=False)]
    return "\n".join(lines)
