"""All that is wrong with a recipe as far as the files on this machine tell. No torch, no network.

Not here: the grammar (recipe), and what only the loaded model or the tokens can show (train).
"""

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lorakit import model_files, shipped
from lorakit.errors import LorakitError, Problem, RecipeError
from lorakit.plan import check, choose_targets
from lorakit.recipe import Recipe
from lorakit.shapes import Shapes
from lorakit.targets import select_modules, select_parameters, select_rows


def problems_of(recipe: Recipe) -> list[Problem]:
    """What is wrong with a recipe apart from its grammar: missing files, and targets that the model lacks."""
    return [*check(recipe), *_of_targets(recipe)]


def _of_targets(recipe: Recipe) -> tuple[Problem, ...]:
    """Targets, patterns and ranks that do not fit the model, where its config.json is here and its type in
    the table of shapes.py; likewise what full fine-tuning is to move.

    An adapter that the training starts from brings targets of its own; a model's own code, layers.
    """
    model = recipe.model
    section: Any = recipe.adapter
    folder = Path(model.path)
    if getattr(section, "start_from", None) or model.trust_remote_code:
        return ()
    if not (folder.is_absolute() and (folder / "config.json").is_file()):
        return ()
    try:
        shapes = model_files.shapes_from_table(folder)
        if shapes and section.method == "full":
            _, found = select_parameters(shapes.parameters, section.train_only, shapes.aliases)
            return tuple(recipe.problem("adapter.train_only", message) for message in found)
        if shapes:
            return _of_layers(recipe, shapes)
    except RecipeError as error:
        return error.problems
    except LorakitError as error:
        return (recipe.problem("model.path", error.message),)
    return ()


def _of_layers(recipe: Recipe, shapes: Shapes) -> tuple[Problem, ...]:
    """Of what is adapted and what is trained beside it."""
    section: Any = recipe.adapter
    whole, found = select_modules(shapes, section.train_also, recipe.model.quantize != "none")
    problems = [recipe.problem("adapter.train_also", message) for message in found]
    try:
        targets = choose_targets(recipe, shapes.layers, () if problems else whole)
    except RecipeError as error:
        return (*problems, *error.problems)
    moved = [*(target.layer.name for target in targets), *whole]
    _, found = select_rows(shapes.layers, getattr(section, "train_tokens", ()), shapes.tied, moved)
    return (*problems, *(recipe.problem("adapter.train_tokens", message) for message in found))


# ------------------------------------------------------------------------------------------------------------
# A call of train


def check_call(recipe: Recipe, trust_remote_code: bool) -> None:
    """Raises: LorakitError for what is wrong with a recipe and its call before anything is loaded."""
    shipped.check_not_installed(recipe.file)
    check_code(recipe, trust_remote_code)
    if problems := problems_of(recipe):
        raise RecipeError(problems)
    if recipe.log.trackers and find_spec("tensorboard") is None:
        raise LorakitError("log.trackers: tensorboard is not installed", "pip install 'lorakit[trackers]'")


def check_code(recipe: Recipe, trust_remote_code: bool) -> None:
    """Raises: LorakitError when only one of recipe and call agrees to run the model's own code."""
    if recipe.model.trust_remote_code != trust_remote_code:
        both = "model.trust_remote_code: true in the recipe and --trust-remote-code on the command line"
        raise LorakitError(f"running a model's own code needs both: {both}")


def check_place(recipe: Recipe, resume: str, output: Path) -> None:
    """Raises: LorakitError for the resolved.yaml of a run that was moved: its output is where the run was."""
    home = recipe.file.absolute().parent
    moved = recipe.file.name == "resolved.yaml" and (home / "run.json").exists() and home != output
    if resume == "auto" and moved:
        file, place = shlex.quote(str(recipe.file)), shlex.quote(str(home))
        hint = f"If the run was moved: lorakit train {file} --resume auto --output {place}"
        raise LorakitError(f"{recipe.file} lies in a run, but its output is {output}", hint)
