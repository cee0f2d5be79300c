"""A recipe: one YAML file that says all there is to say about a fine-tuning run.

Reading this folder is reading the manual: one strict, frozen section per file, every field with its meaning
and default. No tensors here, and nothing is imported that is slow.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from lorakit.errors import Problem, RecipeError
from lorakit.recipe import adapter as adapter_section
from lorakit.recipe import data as data_section
from lorakit.recipe import model as model_section
from lorakit.recipe import optimizer as optimizer_section
from lorakit.recipe import schedule as schedule_section
from lorakit.recipe import source
from lorakit.recipe import task as task_section
from lorakit.recipe import training as training_section
from lorakit.recipe.adapter import Adapter
from lorakit.recipe.data import Data
from lorakit.recipe.explain import TAGGED, as_meant, explain, key_of
from lorakit.recipe.methods import Lora
from lorakit.recipe.model import Model
from lorakit.recipe.optimizer import AdamW, Optimizer
from lorakit.recipe.schedule import Cosine, Schedule
from lorakit.recipe.section import Section
from lorakit.recipe.task import CausalLm, Task
from lorakit.recipe.training import Checkpoint, Eval, Log, Training
from lorakit.recipe.traits import TRAITS


class Recipe(Section):
    """All sections. Frozen: what is derived from it lives in a Plan."""

    model: Model
    """Which base model, and how it is held in memory."""

    adapter: Adapter = Lora()
    """How the weights move."""

    task: Task = CausalLm()
    """What is minimised."""

    data: Data
    """Which rows, and how they become tokens."""

    optimizer: Optimizer = AdamW()
    """How a gradient becomes an update."""

    schedule: Schedule = Cosine()
    """The learning rate over the steps."""

    training: Training = Training()
    """How long, and how it is laid out."""

    eval: Eval = Eval()
    """When the held-out rows are evaluated."""

    checkpoint: Checkpoint = Checkpoint()
    """What is kept."""

    log: Log = Log()
    """What is told."""

    output: Annotated[str, Field(min_length=1)]
    """The run directory (relative to the current directory). `--output DIR` sets it on the command line."""

    _source: source.Source = PrivateAttr(default_factory=lambda: source.Source(name=""))

    @property
    def file(self) -> Path:
        """The file it was read from."""
        return Path(self._source.name)

    def where(self, dotted: str) -> str:
        """file:line:column of a field, or of the nearest thing around it that was written."""
        return self._source.place(tuple(dotted.split(".")))

    def written(self, dotted: str) -> Any:
        """The value that the user wrote at a dotted name, or None when it is a default."""
        return self._source.get(dotted)

    def problem(self, dotted: str, message: str) -> Problem:
        return Problem(self.where(dotted), dotted, message)


CONFLICTS: tuple[Callable[..., Iterator[tuple[str, str]]], ...] = (
    model_section.conflicts,
    adapter_section.conflicts,
    task_section.conflicts,
    data_section.conflicts,
    optimizer_section.conflicts,
    schedule_section.conflicts,
    training_section.conflicts,
)


# ------------------------------------------------------------------------------------------------------------
# Loading


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at `path` with `--set` style overrides ("optimizer.lr=1e-4") applied.

    Raises: RecipeError with every problem: unknown keys, wrong types, conflicts, options without effect.
    """
    return _checked(source.read(Path(path), tuple(overrides)))


def default_recipe(model: str, overrides: Sequence[str] = ()) -> Recipe:
    """All defaults on a model (absolute path or hub id), with `--set` style overrides; it has no data.

    Raises: RecipeError as load_recipe.
    """
    values = {"model": {"path": model}, "data": {"train": "/"}, "output": "."}
    return _checked(source.override(source.Source(name="", values=values), tuple(overrides)))


def _checked(written: source.Source) -> Recipe:
    """Raises: RecipeError with every problem of what was written."""
    _resolve_paths(written)
    problems = list(written.problems)
    recipe, found = _as_far_as_right(written)
    if found and (meant := as_meant(written)):
        recipe, more = _as_far_as_right(meant)
        found += more
    for problem in found:
        if problem.field not in {other.field for other in problems}:
            problems.append(problem)
    if recipe is not None:
        problems += [recipe.problem(field, message) for field, message in conflicts(recipe, recipe.written)]
    if problems or recipe is None:
        raise RecipeError(sorted(problems, key=_by_place))
    return recipe


def conflicts(recipe: Recipe, written: Callable[[str], Any]) -> list[tuple[str, str]]:
    """(field, message) of everything that contradicts something else or has no effect."""
    return [found for rule in CONFLICTS for found in rule(recipe, written)]


def _as_far_as_right(written: source.Source) -> tuple[Recipe | None, list[Problem]]:
    """(the recipe without what is wrong with it, if that leaves one; what is wrong with it)."""
    try:
        return _validated(written), []
    except ValidationError as error:
        return _without_broken_fields(error, written), explain(error, written, Recipe)


def _validated(written: source.Source) -> Recipe:
    recipe = Recipe.model_validate(written.values)
    recipe._source = written
    return recipe


def _by_place(problem: Problem) -> tuple[str, list[int]]:
    file, *numbers = problem.where.rsplit(":", 2)
    return file, [int(n) for n in numbers if n.isdigit()]


def _without_broken_fields(error: ValidationError, written: source.Source) -> Recipe | None:
    """The recipe as far as it is right, so that conflicts between its sound fields are reported in the same
    go."""
    values = json.loads(json.dumps(written.values))  # a copy to cut from
    for item in error.errors():
        if item["type"] == "missing":
            continue
        path, node = key_of(item["loc"], values)[:2], values  # a bad item spoils its whole field
        path = (*path, TAGGED[str(path[0])].field) if item["type"] == "union_tag_invalid" else path
        for part in path[:-1]:
            node = node[part]
        if path:
            node.pop(path[-1], None)
    sound = source.Source(written.name, _tuples(values), written.places, written.folders)
    for section, field in (("model", "path"), ("data", "train")):
        sound.values.setdefault(section, {}).setdefault(field, "?")
    sound.values.setdefault("output", "?")
    try:
        return _validated(sound)
    except ValidationError:
        return None


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _resolve_paths(written: source.Source) -> None:
    """Relative inputs become absolute: they are relative to the file that names them, never to the current
    folder."""
    for section, field in (
        ("model", "path"),
        ("data", "train"),
        ("data", "eval"),
        ("data", "chat_template"),
        ("adapter", "start_from"),
    ):
        block = written.values.get(section)
        if isinstance(block, dict) and field in block:
            block[field] = _resolved(written, (section, field), block[field])


def _resolved(written: source.Source, key: tuple[str, str], value: Any) -> Any:
    """`value` with its path absolute; a list of sources, or a mapping with a `path`, likewise."""
    if key[0] == "data" and isinstance(value, tuple):
        return tuple(_resolved(written, key, item) for item in value)
    if key[0] == "data" and isinstance(value, dict) and "path" in value:
        return value | {"path": _resolved(written, key, value["path"])}
    if not isinstance(value, str) or not value:
        return value
    try:
        here = written.folder(key) / Path(value).expanduser()
        exists = here.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL, ~of-nobody
        written.problem(key, f"not a usable path: {error}")
        return value
    hub_like = key in (("model", "path"), ("data", "train"), ("data", "eval"))
    inline = key[1] == "chat_template" and data_section.is_template(value)
    misspelt = "/" in value and Path(value).suffix and here.parent.is_dir()  # a file that is not there
    on_the_hub = hub_like and is_hub_id(value) and not exists and not misspelt
    return value if inline or on_the_hub else str(here.absolute())


def is_hub_id(text: str) -> bool:
    """`owner/name` (data sets also `owner/name:split`) and `gpt2` are hub ids; paths and file names are
    not."""
    name = text.partition(":")[0]
    parts = name.split("/")
    if text.startswith(("/", ".", "~")) or not all(parts) or len(parts) > 2:
        return False
    if any(character in name for character in "*?["):  # a glob
        return False
    files = (*data_section.SUFFIXES, *data_section.COMPRESSED, ".yaml", ".yml")
    return not parts[-1].lower().endswith(files)


# ------------------------------------------------------------------------------------------------------------
# Writing


def dump(recipe: Recipe, resolved: dict[str, Any] | None = None) -> str:
    """YAML with every default and every path absolute; `resolved` replaces `auto` values (dotted name ->
    value).

    The text is a recipe again: a field that would have no effect (and so be refused) is left out.
    """
    values = recipe.model_dump(mode="json")
    for dotted, value in (resolved or {}).items():
        _assign(values, dotted, value)
    if values["adapter"].get("start_from"):  # what the recipe leaves open comes from there
        for field in TRAITS[recipe.adapter.method].taken_over:
            if recipe.written(f"adapter.{field}") is None:
                values["adapter"].pop(field, None)
    copy = source.Source(name="", values=values)
    while found := conflicts(_validated(source.Source(name="", values=_tuples(values))), copy.get):
        section, _, field = found[0][0].partition(".")
        del values[section][field]
    values["output"] = str(Path(recipe.output).expanduser().absolute())
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes text that source.py would read as something else, such as a revision of digits."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if source.plain(text) == text else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        values = values[section]
    values[field] = value


# What may differ between a run and its resumption, or is covered by the fingerprints of the model and of the
# data.
_NOT_IN_FINGERPRINT = (
    "output",
    "log",
    "checkpoint.every",
    "checkpoint.keep",
    "model.path",
    "data.train",
    "data.eval",
    "data.chat_template",
    "data.on_bad_row",
    "data.on_long",
    "adapter.start_from",
)


def comparable(recipe: Recipe) -> dict[str, Any]:
    """Dotted name -> value of every field that must be the same for a run to be continued."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if prefix.rstrip(".") in _NOT_IN_FINGERPRINT:
            return
        if isinstance(value, dict) and prefix.count(".") < 2:
            for key, item in value.items():
                walk(f"{prefix}{key}.", item)
        elif isinstance(value, dict):  # of patterns the last match counts: their order matters
            flat[prefix.rstrip(".")] = list(map(list, value.items()))
        else:
            flat[prefix.rstrip(".")] = value

    walk("", recipe.model_dump(mode="json"))
    return flat


def fingerprint(recipe: Recipe) -> str:
    """SHA-256 over everything in the recipe that changes what is trained."""
    return hashlib.sha256(json.dumps(comparable(recipe), sort_keys=True).encode()).hexdigest()


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, with the docstring of each field: what editors complete and check with."""
    schema = Recipe.model_json_schema()
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe (relative to this file) that this one is merged over.",
    }
    for part in (schema, *schema["$defs"].values()):
        part.pop("required", None)  # what is missing here may stand in the recipe that this one extends
    schema["title"] = "lorakit recipe"
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
