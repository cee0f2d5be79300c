"""The program, and what its verbs share: arguments, and the checks that come before anything heavy."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit import __version__
from lorakit.errors import RecipeError

app = typer.Typer(
    name="lorakit",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Fine-tune language models with low-rank adapters, driven by YAML recipes.",
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe: a YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a field, e.g. optimizer.lr=1e-4. Repeatable."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Agree to run the model's own Python code.")
]
BaseModel = Annotated[
    str | None,
    typer.Option("--base", metavar="PATH", help="The base model, where it is not the one that is recorded."),
]


Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run or an adapter directory.", show_default=False)
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorakit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Both are read before this runs: main() takes --debug wherever it stands."""


def must_exist(place: Path) -> None:
    """Said before torch is imported, which takes seconds."""
    from lorakit import runs

    runs.must_exist(place.expanduser())


def load(path: Path, overrides: list[str] | None, output: Path | None) -> Any:
    from lorakit.recipe import load_recipe
    from lorakit.validate import problems_of

    extra = [f"output={json.dumps(str(output), ensure_ascii=False)}"] if output is not None else []
    recipe = load_recipe(path, [*(overrides or []), *extra])
    if problems := problems_of(recipe):
        raise RecipeError(problems)
    return recipe
