"""The verbs of recipes: train, validate, preview, advise, count-params, recipes, schema."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from lorakit.cli.app import Overrides, RecipeFile, TrustRemoteCode, app, load
from lorakit.errors import LorakitError
from lorakit.terminal import speaks


@app.command()
def train(
    recipe: RecipeFile,
    set_: Overrides = None,
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The run directory, instead of the recipe's.")
    ] = None,
    resume: Annotated[
        str, typer.Option(metavar="auto|never|CHECKPOINT", help="Continue the run that the directory holds.")
    ] = "never",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train what a recipe says."""
    loaded = load(recipe, set_, output)
    from lorakit.startup import trainer

    folder = trainer(loaded).train(loaded, resume, trust_remote_code)
    if speaks():
        from lorakit.report import summary

        typer.echo(summary(folder))


@app.command()
def validate(
    recipes: Annotated[
        list[Path], typer.Argument(metavar="RECIPE...", help="Recipes: YAML files.", show_default=False)
    ],
    set_: Overrides = None,
) -> None:
    """Check recipes: grammar, conflicts, files, targets.

    Also options without effect. Targets and ranks are held against the model where its config.json is here.
    """
    failed = 0
    for path in recipes:
        try:
            load(path, set_, None)
            typer.echo(f"{path}: valid")
        except LorakitError as error:
            typer.echo(str(error))
            failed += 1
    raise typer.Exit(2 if failed else 0)


@app.command()
def preview(
    recipe: RecipeFile,
    set_: Overrides = None,
    number: Annotated[
        int,
        typer.Option("-n", min=1, metavar="N", help="Samples. 1: the first; else longest, shortest, random."),
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with token ids.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page for a browser, instead of text.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show the exact tokens of samples, and which are trained.

    With an account of where every row went. Samples come in the order of their rows; no weights are loaded.
    """
    loaded = load(recipe, set_, Path("."))
    from lorakit import output_file, preview_html
    from lorakit.preview import preview as look
    from lorakit.tokenizer import without_torch

    without_torch(loaded.model)
    if html is not None:
        output_file.check_place("--html", html)
    found = look(loaded, number, trust_remote_code)
    if html is not None:
        output_file.write("--html", html, preview_html.page(found))
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    elif html is None:
        found.show()


@app.command()
def advise(
    recipe: RecipeFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    profile: Annotated[
        str | None, typer.Option(metavar="primer", help="Beside it, what introductions to LoRA say.")
    ] = None,
) -> None:
    """Say what the evidence advises, why, and how sure.

    From published results and from your data; nothing is changed, and no weights are loaded. Exit code 2:
    the rows would stop the run as it stands.
    """
    from lorakit.advise import advise as ask
    from lorakit.recipe import load_recipe
    from lorakit.tokenizer import without_torch

    without_torch(load_recipe(recipe, set_ or ()).model)
    found = ask(recipe, set_ or (), profile)
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_text())
    raise typer.Exit(2 if found.facts.stops else 0)


@app.command("count-params")
def count_params(
    argument: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|ADAPTER|MODEL",
            help="A recipe, a directory of an adapter or a run, or a directory with a model's config.json.",
            show_default=False,
        ),
    ],
    set_: Overrides = None,
    base: Annotated[
        str | None, typer.Option(metavar="PATH", help="The base model of an adapter (config.json is enough).")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Machine-readable: as params.json of a run.")
    ] = False,
) -> None:
    """Count what would be trained, or what an adapter holds.

    With its size in bytes. No weights are needed.
    """
    from lorakit.count import count

    found = count(argument, set_ or (), base)
    typer.echo(json.dumps(found.params) if as_json else found.as_text())


recipes_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The recipes that come along.")
app.add_typer(recipes_app, name="recipes")
RecipeName = Annotated[str, typer.Argument(metavar="NAME", help="As listed.", show_default=False)]


@recipes_app.command("list")
def list_recipes() -> None:
    """Name and purpose of every recipe."""
    from lorakit.shipped import listing

    typer.echo(listing())


@recipes_app.command("show")
def show_recipe(name: RecipeName) -> None:
    """Print a recipe."""
    from lorakit.shipped import find

    typer.echo(find(name).read_text("utf-8"), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    name: RecipeName,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Where the copy goes, e.g. `.`", show_default=False)
    ],
) -> None:
    """Copy a recipe, with its model and data, to make it yours."""
    from lorakit.shipped import copy

    path = copy(name, folder)
    typer.echo(f"{path}\nnext: lorakit train {shlex.quote(str(path))}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, for editors."""
    from lorakit.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
