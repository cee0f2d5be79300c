"""The verbs of what was trained: merge, inspect, eval, generate, chat."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lorakit import output_file
from lorakit.cli.app import BaseModel, Overrides, Run, app, must_exist
from lorakit.errors import LorakitError

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
    must_exist(place)
    from lorakit.merge import merge as run

    typer.echo(str(run(place, output, base, dtype)))


@app.command("inspect")
def inspection(
    run: Run,
    base: BaseModel = None,
    against: Annotated[
        Path | None, typer.Option(metavar="OTHER", help="Another adapter: how alike the two are.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with every number.")] = False,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it too, layer by module.")] = None,
) -> None:
    """What an adapter changed: norms, spectra, which layers.

    Against the weights of its base, where they are on this machine.
    """
    for folder in filter(None, (run, against)):
        must_exist(folder)
    if svg is not None:
        output_file.check_place("--svg", svg)
    from lorakit.inspection import inspect

    found = inspect(run, base, against)
    if svg is not None:
        output_file.write("--svg", svg, found.as_svg())
    typer.echo(json.dumps(found.as_dict(), allow_nan=False) if as_json else found.as_text())


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
    must_exist(run)
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
    must_exist(run)
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
    must_exist(run)
    from lorakit.chat import chat as talk
    from lorakit.generate import settings_of

    talk(run, settings_of(max_new_tokens, temperature, top_p, seed), base_path, system)
