"""Section `data`: which rows, how they become tokens, what happens to those that do not fit."""

from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.recipe.section import Conflicts, Section, Written

# The fields that each format reads; `columns` maps them to the columns of the file.
FORMAT_FIELDS = {
    "alpaca": ("instruction", "input", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations", "system"),
    "text": ("text",),
}


class Data(Section):
    train: Annotated[str, Field(min_length=1)]
    """Training rows: a .jsonl, .json, .csv, .tsv, .parquet or .txt file (relative to this file), or a hub
    data set `owner/name`, `owner/name:split`."""

    eval: Annotated[str, Field(min_length=1)] | None = None
    """Held-out rows, in the same forms. Without it nothing is evaluated and the last adapter is kept."""

    format: Literal["auto", "alpaca", "prompt-completion", "messages", "sharegpt", "text"] = "auto"
    """What a row looks like. auto: decided by the columns of the first row, and printed."""

    columns: dict[str, str] = {}
    """Field of the format -> column of the file, for example {prompt: question, completion: answer}."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many rows of each file, from the start."""

    chat_template: str | None = None
    """Jinja chat template, as text or a file, in place of the tokenizer's own."""

    max_length: Annotated[int, Field(ge=2)] = 1024
    """Longest sample, in tokens."""

    on_long: Literal["error", "truncate", "drop"] = "error"
    """What happens to a longer sample. truncate cuts its end; a cut sample gets no end token."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read or has nothing to train on. Skipped rows are counted."""

    packing: bool = True
    """Lay documents side by side in one row without padding; they do not see each other. false: padded rows.
    """


def conflicts(recipe: Any, written: Written) -> Conflicts:
    data = recipe.data
    known = FORMAT_FIELDS.get(data.format) or sorted(
        {name for names in FORMAT_FIELDS.values() for name in names}
    )
    given, columns = list(data.columns), list(data.columns.values())
    if twice := [column for column in columns if columns.count(column) > 1]:
        yield "data.columns", f'"{twice[0]}" is named twice'
    elif not (set(given) <= set(known) or set(columns) <= set(known)):
        odd = sorted(set(given) - set(known))[0]
        yield f"data.columns.{odd}", f"not a field of format {data.format}: one of {', '.join(known)}"
    if written("data.packing") and data.packing and written("model.attention") in ("sdpa", "eager"):
        yield "data.packing", "packed rows need attention: auto; delete one of the two"
    if data.chat_template is not None and data.format in ("alpaca", "prompt-completion", "text"):
        yield "data.chat_template", f"has no effect on data.format: {data.format}; delete it"
    if data.eval is None:
        for field in ("eval.every", "eval.at_start", "eval.early_stopping", "checkpoint.best"):
            if written(field) is not None:
                yield field, "has no effect without data.eval, the rows to evaluate on"
