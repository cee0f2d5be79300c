"""How many parameters a recipe, an adapter or a model trains, and how large its adapter is.

The numbers are those that a run of the same recipe measures and writes to params.json. No weights are
needed: what a method trains follows from the shapes of its model, for which config.json is enough, and what
an adapter holds from the header of its file.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from pathlib import Path
from typing import Any

from lorakit import model_files
from lorakit.adapter_file import AdapterFile, kind_of, read
from lorakit.errors import LorakitError, RecipeError
from lorakit.plan import check_kind_of_start, check_start, choose_targets
from lorakit.recipe import Recipe, default_recipe, is_hub_id, load_recipe
from lorakit.recipe.inits import highest_rank
from lorakit.recipe.model import Model
from lorakit.recipe.traits import TRAITS, init_of, is_exported, num_pairs
from lorakit.shapes import Shapes
from lorakit.targets import Target, modules_above, select_modules, select_parameters, select_rows

Entry = dict[str, Any]  # one of params.json's modules


@dataclass(frozen=True)
class Count:
    params: dict[str, Any]  # the content of params.json
    about: tuple[tuple[str, str], ...]  # what was counted: (word, text)

    def as_text(self) -> str:
        size = self.params["adapter_bytes"]
        share = f"{self.params['trainable']:,} of {self.params['total']:,}"
        facts = [
            *self.about,
            ("trainable", f"{share} parameters ({self.params['trainable_percent']:.4f} %)"),
            ("size", f"{_bytes(size['float32'])} in fp32, {_bytes(size['bfloat16'])} in bf16"),
        ]
        lines = [f"{word:<9} {text}" for word, text in facts]
        return "\n".join([*lines, "", *_table(self.params["modules"])])


def count_params(
    argument: str | Path, overrides: Sequence[str] = (), base: str | Path | None = None
) -> dict[str, Any]:
    """The content of params.json for a recipe, an adapter, a run or a model: see `count`."""
    return count(argument, overrides, base).params


def count(argument: str | Path, overrides: Sequence[str] = (), base: str | Path | None = None) -> Count:
    """What a recipe would train, what an adapter or a run holds, or what a model's default adapter would be.

    `overrides` change fields of a recipe, or of the adapter that is assumed for a model. `base`: the model of
    an adapter, when it is not where the adapter says. Raises: LorakitError.
    """
    path = Path(argument).expanduser()
    if base is not None and (path / "adapter" / "adapter_config.json").is_file():
        path = path / "adapter"
    trained = [name for name in ("adapter_config.json", "params.json") if (path / name).is_file()]
    if trained and overrides:
        raise LorakitError(f"--set {overrides[0]}: has no effect on {path}, which is trained already")
    if "adapter_config.json" in trained:
        return _of_adapter(path, base)
    if base is not None:
        raise LorakitError(f"--base has no effect: {path} is no adapter", "A recipe names its own model.")
    if trained:
        return _of_run(path)
    if path.is_file():
        return _of_recipe(load_recipe(path, [*overrides, 'output="."']))
    if (path / "config.json").is_file():
        return _of_model(path, overrides)
    if not path.exists():
        nothing = LorakitError(f"{path}: no such recipe, run, adapter or model, here or on the hub")
        if not is_hub_id(str(argument)):
            raise nothing
        try:
            return _of_model(path, overrides)
        except LorakitError as error:
            raise nothing if error.message.startswith("model.path") else error from None
    raise LorakitError(
        f"{path}: neither an adapter (adapter_config.json) nor a model (config.json) nor a finished run",
        "A model needs config.json alone; a run that never started is counted by its recipe.",
    )


# ------------------------------------------------------------------------------------------------------------
# A recipe, or a model with the recipe of all defaults


def _of_model(path: Path, overrides: Sequence[str]) -> Count:
    for override in overrides:
        if not override.strip().startswith("adapter."):
            raise LorakitError(f"--set {override}: a model has no recipe; only adapter.* can be set for it")
    recipe = default_recipe(str(path.absolute()) if path.exists() else str(path), overrides)
    return _of_recipe(recipe, " (assumed; --set adapter.rank=8 changes it)")


def _of_recipe(recipe: Recipe, remark: str = "") -> Count:
    folder = model_files.locate(recipe.model, weights=False, tokenizer=False)
    shapes = model_files.shapes(folder)
    section: Any = recipe.adapter
    full = section.method == "full"
    entries = _of_base_weights(recipe, shapes) if full else _of_method(recipe, shapes, folder)
    rank = f", {section.type}" if section.method == "peft" else "" if full else f", rank {section.rank}"
    if getattr(section, "start_from", None):
        rank = f", continued from {section.start_from}"
    told = f"{section.method}{rank}{remark}"
    about = [("model", f"{recipe.model.path}: {shapes.num_parameters:,} parameters"), ("adapter", told)]
    if decided := TRAITS[section.method].data_decide or init_of(section).data_decide:
        about.append(("counted", decided))
    if size := _shipped_bytes(section, entries):
        most = "at most " if section.method == "adalora" or init_of(section).data_decide else ""
        about.append(("ships", f"as plain LoRA, {most}{_bytes(size)} in fp32: A and B of every layer"))
    if not full and (left := set(shapes.experts) - {entry["name"] for entry in entries}):
        about.append(("experts", f"{len(left)} 3-D expert weights are not adapted"))
    moved = sum(entry["trainable"] for entry in entries) if full else 0
    return Count(_params(entries, shapes.num_parameters - moved), tuple(about))


def _shipped_bytes(section: Any, entries: Sequence[Entry]) -> int:
    """Bytes of adapter/ in fp32 where it holds more than is trained: the A and B of a LoRA, filled up to one
    rank where the method is exported; else 0."""
    if not is_exported(section) and section.method != "lora-fa":
        return 0
    largest = max(_highest(section, entry) for entry in entries) if is_exported(section) else 0
    factors: int = sum((largest or e["rank"]) * (e["in"] + e["out"]) for e in entries if e["rank"])
    whole: int = sum(entry["trainable"] for entry in entries if not entry["rank"])
    return 4 * (num_pairs(section) * factors + whole)


def _highest(section: Any, entry: Entry) -> int:
    """The rank of a layer, or the highest that the data may give it."""
    rank: int = entry["rank"]
    if "rank_spread" not in init_of(section).fields:
        return rank
    return highest_rank(rank, section.rank_spread, entry["in"], entry["out"])


def _of_base_weights(recipe: Recipe, shapes: Shapes) -> list[Entry]:
    """One entry per module that has parameters of its own that move.

    Raises: RecipeError for a pattern of train_only that matches nothing.
    """
    section: Any = recipe.adapter
    moving, problems = select_parameters(shapes.parameters, section.train_only, shapes.aliases)
    if problems:
        raise RecipeError(recipe.problem("adapter.train_only", message) for message in problems)
    modules: dict[str, list[tuple[int, ...]]] = {}
    for name in moving:
        modules.setdefault(name.rpartition(".")[0], []).append(shapes.parameters[name])
    return [_whole_entry(name, inside) for name, inside in modules.items()]


def _of_method(recipe: Recipe, shapes: Shapes, folder: Path) -> list[Entry]:
    """One entry per adapted layer and per module trained whole, in the model's order. `folder`: the model's.

    Raises: RecipeError for targets, patterns and ranks that do not fit the model.
    """
    section: Any = recipe.adapter
    saved: AdapterFile | None = None
    whole, problems = select_modules(shapes, section.train_also, recipe.model.quantize != "none")
    if problems:
        raise RecipeError(recipe.problem("adapter.train_also", message) for message in problems)
    if getattr(section, "start_from", None) is None:
        targets = choose_targets(recipe, shapes.layers, whole)
    else:
        if odd := check_kind_of_start(recipe):
            raise RecipeError(odd)
        saved = read(Path(section.start_from))
        targets = saved.targets(shapes.layers)
        if found := check_start(recipe, shapes.layers, targets, saved.scaling, whole, saved.train_also):
            raise RecipeError(found)
        whole = saved.train_also
    count_trained = TRAITS[section.method].num_trained
    if count_trained is None:
        return _in_order(_of_tuner(section, folder, targets, whole), shapes)
    texts = () if saved else getattr(section, "train_tokens", ())
    moved = [*(target.layer.name for target in targets), *whole]
    table, problems = select_rows(shapes.layers, texts, shapes.tied, moved)
    if problems:
        raise RecipeError(recipe.problem("adapter.train_tokens", message) for message in problems)
    tokens = saved.rows(shapes.layers) if saved else {table.name: texts} if table and texts else {}
    entries = _of_rows(tokens, shapes)
    for target in targets:
        layer, rank = target.layer, section.init_rank if section.method == "adalora" else target.rank
        trained = layer.num_experts * count_trained(layer.in_features, layer.out_features, rank)
        entry = _entry(layer.name, layer.in_features, layer.out_features, rank, trained)
        entries.append(entry | ({"init_rank": rank} if section.method == "adalora" else {}))
    for name in whole:
        inside = [shape for key, shape in shapes.parameters.items() if key.startswith(f"{name}.")]
        entries.append(_whole_entry(name, inside))
    return _in_order(entries, shapes)


def _of_tuner(section: Any, folder: Path, targets: Sequence[Target], whole: Sequence[str]) -> list[Entry]:
    """What PEFT adds to the model when that has shapes and no weights: PEFT alone knows.

    Raises: LorakitError for a tuner that starts from the weights.
    """
    from lorakit.adapters import attach
    from lorakit.layers import model_on_meta
    from lorakit.report import parameters

    adapter = attach(section, model_on_meta(folder), list(targets), seed=0, train_also=whole)
    entries: list[Entry] = parameters(adapter, 0)["modules"]
    return entries


def _of_rows(tokens: Mapping[str, Sequence[Any]], shapes: Shapes) -> list[Entry]:
    """One entry per embedding of which some rows are trained."""
    widths = {layer.name: layer.out_features for layer in shapes.layers}
    return [_whole_entry(name, [(len(rows), widths[name])]) for name, rows in tokens.items()]


# ------------------------------------------------------------------------------------------------------------
# What is trained already


def _of_adapter(folder: Path, base: str | Path | None) -> Count:
    if (kind := kind_of(folder)) != "LORA":
        return _of_tuner_file(folder, kind, base)
    saved = read(folder)
    home = _base_of(folder, saved.config, base)
    shapes = model_files.shapes(home)
    ranks = sorted({target.rank for target in saved.targets(shapes.layers)})
    words = f"{folder}: {saved.method}, rank {', '.join(map(str, ranks))}"
    about = (("model", f"{home}: {shapes.num_parameters:,} parameters"), ("adapter", words))
    return Count(_params(_in_order(_entries_of(saved, shapes), shapes), shapes.num_parameters), about)


def _of_tuner_file(folder: Path, kind: str, base: str | Path | None) -> Count:
    """What PEFT says was trained, with the sizes that the file's header has."""
    from lorakit.adapters.tuner_files import count_file
    from lorakit.layers import model_on_meta

    home = _base_of(folder, model_files.read_json(folder / "adapter_config.json"), base)
    shapes = model_files.shapes(home)
    layers, entries = {layer.name: layer for layer in shapes.layers}, []
    for name, trained in count_file(folder, model_on_meta(home), shapes.layers).items():
        if layer := layers.get(name):
            entries.append(_entry(name, layer.in_features, layer.out_features, 0, trained) | {"tuner": kind})
        else:  # trained whole, or a tensor that all layers share
            inside = [shape for key, shape in shapes.parameters.items() if key.startswith(f"{name}.")]
            entries.append(_whole_entry(name, inside or [(trained,)]))
    about = (("model", f"{home}: {shapes.num_parameters:,} parameters"), ("adapter", f"{folder}: {kind}"))
    return Count(_params(_in_order(entries, shapes), shapes.num_parameters), about)


def _entries_of(saved: AdapterFile, shapes: Shapes) -> list[Entry]:
    adapted = [
        _entry(layer.name, *saved.sides(at, layer.num_experts), sum(map(prod, saved.adapted[at].values())))
        for at, layer in saved.layers_at(shapes.layers).items()
        if at in saved.adapted
    ]
    place = {name: number for number, name in enumerate(shapes.parameters)}
    whole = [
        _whole_entry(name, [inside[key] for key in sorted(inside, key=lambda key: place.get(key, inf))])
        for name, inside in saved.whole.items()
    ]
    return adapted + whole + _of_rows(saved.rows(shapes.layers), shapes)


def _base_of(folder: Path, config: Mapping[str, Any], base: str | Path | None) -> Path:
    """The directory of the model that an adapter belongs to; never fetched from anywhere.

    Raises: LorakitError when it is neither given nor where the adapter says.
    """
    if base is not None:
        path = Path(base).expanduser()
        if not path.exists() and is_hub_id(str(base)):
            return model_files.locate(Model(path=str(base)), weights=False, tokenizer=False)
        if not (path / "config.json").is_file():
            raise LorakitError(f"--base: {path} is no model directory: it has no config.json")
        return path
    lorakit = folder / "lorakit.json"
    record = model_files.read_json(lorakit).get("base") if lorakit.is_file() else None
    own = record if isinstance(record, dict) else {}
    name = own.get("path") or config.get("base_model_name_or_path")
    if isinstance(name, str) and name:
        if (Path(name) / "config.json").is_file():
            return Path(name)
        revision = own.get("revision") or config.get("revision")
        if is_hub_id(name) and (cached := model_files.cached_config(name, revision)):
            return cached.parent
    raise LorakitError(
        f"{folder}: its base model is not on this machine: {name or 'it does not say which'}",
        f"Name it (config.json is enough): lorakit count-params {folder} --base PATH",
    )


def _of_run(folder: Path) -> Count:
    """What a run measured when it began, or when it ended."""
    params = model_files.read_json(folder / "params.json")
    if missing := {"total", "trainable", "trainable_percent", "adapter_bytes", "modules"} - params.keys():
        raise LorakitError(f"{folder / 'params.json'}: {sorted(missing)[0]} is missing")
    about = [("run", f"{folder}: counted by the run itself")]
    shipped = folder / "adapter" / "adapter_model.safetensors"
    if shipped.is_file():
        about.append(("ships", f"{_bytes(shipped.stat().st_size)} in adapter/"))
    return Count(params, tuple(about))


# ------------------------------------------------------------------------------------------------------------
# The result


def _entry(name: str, inside: int, outside: int, rank: int, trained: int) -> Entry:
    return {"name": name, "in": inside, "out": outside, "rank": rank, "trainable": trained}


def _whole_entry(name: str, inside: Sequence[tuple[int, ...]]) -> Entry:
    """Of a module trained whole: rank 0, and the sides of its first matrix."""
    trained = sum(map(prod, inside))
    outer, inner = next((shape for shape in inside if len(shape) == 2), (trained, 1))
    return _entry(name, inner, outer, 0, trained)


def _in_order(entries: list[Entry], shapes: Shapes) -> list[Entry]:
    """Sorted by the first parameter of their modules in the model; a head that shares its weights is last."""
    place: dict[str, int] = {}
    for number, parameter in enumerate(shapes.parameters):
        for name in (*modules_above(parameter), parameter):
            place.setdefault(name, number)
    return sorted(entries, key=lambda entry: place.get(entry["name"], inf))


def _params(entries: list[Entry], num_frozen: int) -> dict[str, Any]:
    trainable = sum(entry["trainable"] for entry in entries)
    total = num_frozen + trainable
    return {
        "total": total,
        "trainable": trainable,
        "trainable_percent": 100.0 * trainable / total,
        "adapter_bytes": {"float32": 4 * trainable, "bfloat16": 2 * trainable},
        "modules": entries,
    }


def _bytes(size: int) -> str:
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if size >= pair[0])
    return f"{size / unit:,.1f} {name} ({size:,} bytes)"


def _table(entries: Iterable[Entry]) -> list[str]:
    """A line for each kind of module: layers that differ only in their number are one."""
    kinds: dict[tuple[Any, ...], list[int]] = {}
    for entry in entries:
        name = re.sub(r"\.\d+(?=\.|$)", ".*", entry["name"])
        key = (
            name,
            entry["in"],
            entry["out"],
            entry["rank"],
            entry.get("init_rank"),
            entry.get("tuner", "whole"),
        )
        kinds.setdefault(key, []).append(entry["trainable"])
    rows = [("module", "number", "in", "out", "rank", "trainable")]
    for (name, inner, outer, rank, initial, without), counts in kinds.items():
        told = str(rank) if rank or initial else without
        rows.append((name, f"x {len(counts)}", f"{inner:,}", f"{outer:,}", told, f"{sum(counts):,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
