"""The command line: each verb parses, calls one function and prints. Nothing heavy is imported before a verb
runs."""

import json
import logging
import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit import __version__
from lorakit.errors import LorakitError, RecipeError, RunError, as_told
from lorakit.terminal import harmless, say, speaks, without_bars

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
    loaded = _load(recipe, set_, output)
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
            _load(path, set_, None)
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
    loaded = _load(recipe, set_, Path("."))
    from lorakit import preview_html
    from lorakit.preview import preview as look
    from lorakit.tokenizer import without_torch

    without_torch(loaded.model)
    if html is not None:
        preview_html.check_place(html)
    found = look(loaded, number, trust_remote_code)
    if html is not None:
        preview_html.write(html, preview_html.page(found))
    if as_json:
        typer.echo(json.dumps(found.as_dict()))
    elif html is None:
        found.show()


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


@app.command()
def merge(
    place: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="A run or an adapter directory.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the model goes; must not exist.")],
    base: BaseModel = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|bf16|fp16", help="Of all weights, instead of the base's own.")
    ] = None,
) -> None:
    """Fold an adapter into its base, and prove the result.

    The proof: the merged model answers as base and adapter do together.
    """
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise LorakitError(f"--dtype {dtype}: expected fp32, bf16 or fp16")
    _must_exist(place)
    from lorakit.merge import merge as run

    typer.echo(str(run(place, output, base, dtype)))


Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run or an adapter directory.", show_default=False)
]
BasePath = Annotated[
    str | None,
    typer.Option("--base-path", metavar="PATH", help="The base model, where it is not the recorded one."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="A system turn before the prompt.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Longest answer, in tokens.")]
Temperature = Annotated[
    float, typer.Option(min=0.0, metavar="T", help="0: the likeliest token, always. Above: draw.")
]
TopP = Annotated[
    float | None, typer.Option(metavar="P", help="Draw from the likeliest tokens with probability P.")
]
Seed = Annotated[
    int | None, typer.Option(metavar="N", help="Of the draws; the same text again. [default: 0]")
]


@app.command("eval")
def score(
    run: Run,
    data: Annotated[str | None, typer.Option(metavar="FILE", help="Rows, instead of the run's own.")] = None,
    base: BaseModel = None,
    merged: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The merged model. Default: RUN/merged, if there.")
    ] = None,
    exact_match: Annotated[
        bool, typer.Option("--exact-match", help="Also answer every prompt and compare.")
    ] = False,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Held-out loss and perplexity: base, adapter, merged."""
    _must_exist(run)
    from lorakit.score import score as compute

    found = compute(run, data, base, merged, exact_match, set_ or ())
    typer.echo(json.dumps(found.as_dict()) if as_json else found.as_text())


@app.command()
def generate(
    run: Run,
    prompt: Annotated[
        list[str] | None, typer.Option("-p", metavar="TEXT", help="A prompt. Repeatable.")
    ] = None,
    file: Annotated[
        str | None, typer.Option("-f", metavar="FILE", help="One prompt per line; - is standard input.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="The base answers, not the adapter.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Both answer, side by side.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without template.")] = False,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Prompts answered at once.")] = 16,
    base_path: BasePath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, answers to the letter.")] = False,
) -> None:
    """Answer prompts with what was trained, its base, or both."""
    if base and compare:
        raise LorakitError("--base and --compare: keep the one you mean; --compare shows the base's too")
    _must_exist(run)
    from lorakit.generate import Which, read_prompts, settings_of
    from lorakit.generate import generate as answer

    settings = settings_of(max_new_tokens, temperature, top_p, seed, batch_size)
    prompts = read_prompts(prompt or (), file)
    which: Which = "both" if compare else "base" if base else "trained"
    found = answer(run, prompts, settings, which, base_path, raw, system)
    typer.echo(json.dumps(found.as_list(), ensure_ascii=False) if as_json else found.as_text())


@app.command()
def chat(
    run: Run,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    seed: Seed = None,
    base_path: BasePath = None,
) -> None:
    """Talk to what was trained, or to its base. /help lists the commands."""
    _must_exist(run)
    from lorakit.chat import chat as talk
    from lorakit.generate import settings_of

    talk(run, settings_of(max_new_tokens, temperature, top_p, seed), base_path, system)


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


def _must_exist(place: Path) -> None:
    """Said before torch is imported, which takes seconds."""
    if not place.expanduser().is_dir():
        raise LorakitError(f"{place}: no such directory", "Give a run directory or an adapter directory.")


def _load(path: Path, overrides: list[str] | None, output: Path | None) -> Any:
    from lorakit.recipe import load_recipe
    from lorakit.validate import problems_of

    extra = [f"output={json.dumps(str(output), ensure_ascii=False)}"] if output is not None else []
    recipe = load_recipe(path, [*(overrides or []), *extra])
    if problems := problems_of(recipe):
        raise RecipeError(problems)
    return recipe


def main() -> None:
    """The `lorakit` command: a user's mistake ends in one message and its exit code, never in a traceback."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    try:
        with without_bars():
            app(words, prog_name="lorakit")
    except Exception as error:
        told = as_told(error, next(iter(words), ""))
        if told is None:
            raise
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        if speaks() or isinstance(told, RunError):  # what fails while running may fail on one rank only
            print(harmless(f"lorakit: {told}"), file=sys.stderr)
        _leave(told.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:  # Typer makes the second of the first
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        say("lorakit: interrupted")
        _leave(130)


def _leave(code: int) -> None:
    """End with `code`. After a signal at once: where it arrived within an import, the interpreter would
    forget the code and end as if killed."""
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
