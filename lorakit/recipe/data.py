"""Section `data`: which rows, how they become tokens, what happens to those that do not fit."""

from glob import escape, glob, has_magic
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from lorakit.errors import did_you_mean
from lorakit.recipe.section import Conflicts, Section, Written

# The fields that each format reads; `columns` maps them to the columns of the file.
FORMAT_FIELDS = {
    "alpaca": ("instruction", "input", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "text": ("text",),
    "labelled-text": ("text", "label"),
    "sentence-pair": ("sentence1", "sentence2", "score"),
    "text-to-text": ("source", "target"),
}
CHATS = ("messages", "sharegpt")

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt")
_ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json")  # which `datasets` writes beside them
COMPRESSED = (".gz", ".zst")  # a second suffix, after those of text

Text = Annotated[str, Field(min_length=1)]


class Source(Section):
    """Where rows come from, and how many of them count."""

    path: Text
    """A file, a directory or a glob of files (relative to this file), or a hub data set `owner/name`."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often a row of this source is seen in an epoch: 2 twice, 0.5 every other epoch (each epoch has at
    least one of them). With streaming: rows of this source for each row of a source of weight 1."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many rows, from the start."""

    config: Text | None = None
    """Configuration (subset) of a hub data set."""

    split: Text | None = None
    """Split of a hub data set; train if left out."""

    revision: Text | None = None
    """Commit, branch or tag of a hub data set."""

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_absolute()


Rows = Text | Source | Annotated[tuple[Text | Source, ...], Field(min_length=1)]


class Data(Section):
    train: Rows
    """Training rows: a .jsonl, .json, .csv, .tsv, .parquet, .arrow or .txt file (text also as .gz or .zst,
    relative to this file), a directory or a glob of such files, a hub data set `owner/name`,
    `owner/name:split`, or a list of these. An element may be a mapping: {path, weight, limit, config, split,
    revision}."""

    eval: Annotated[float, Field(gt=0, lt=1)] | Rows | None = None
    """Held-out rows, in the same forms; or the share of the training rows that is held out, drawn by
    training.seed. Without it nothing is evaluated and the last adapter is kept."""

    format: Literal[
        "auto",
        "alpaca",
        "prompt-completion",
        "messages",
        "sharegpt",
        "text",
        "labelled-text",
        "sentence-pair",
        "text-to-text",
    ] = "auto"
    """What a row looks like. auto: decided by the columns of the first row of each source, and printed."""

    columns: dict[str, str] = {}
    """Field of the format -> column of the file, for example {prompt: question, completion: answer}; dots
    lead into a column: {output: instances.0.output}."""

    header: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Names of the columns of .csv and .tsv files that have no header line."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Read at most this many rows of each source, from the start."""

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

    streaming: bool = False
    """Read rows while training, for more than fits a disk: training.max_steps says when it ends, and rows
    change places within windows of 8,192 only. false: all rows are tokenized before the first step."""


def sources(value: Rows, limit: int | None) -> tuple[Source, ...]:
    """What `train` or `eval` names, each with the limit that counts for it."""
    listed = (value,) if isinstance(value, str | Source) else value
    found = [_source(item) for item in listed]
    return tuple(s if s.limit or not limit else s.model_copy(update={"limit": limit}) for s in found)


def _source(item: str | Source) -> Source:
    source = item if isinstance(item, Source) else Source(path=item)
    name, _, split = source.path.partition(":")
    if source.is_local or not split or source.split:
        return source
    return source.model_copy(update={"path": name, "split": split})


def is_template(text: str) -> bool:
    """Whether a chat template was written out, and not the name of a file that holds it."""
    return "{{" in text or "{%" in text


def is_data_file(name: str) -> bool:
    """Whether a file of this name holds rows that lorakit reads."""
    stem = name.lower()
    for packed in COMPRESSED:
        if stem.endswith(packed):
            stem = stem.removesuffix(packed)
            return stem.endswith(SUFFIXES) and not stem.endswith((".parquet", ".arrow"))
    return stem.endswith(SUFFIXES)


def files_of(path: str) -> list[Path]:
    """The data files that a local path means: itself, those in a directory and below, those that a glob
    matches; by name, hidden ones left out.

    Raises: ValueError, with the reason, when there is none.
    """
    whole = Path(path)
    if whole.is_dir():
        found = _rows_in(glob(f"{escape(path)}/**/*", recursive=True))
        kinds = sorted({_kind(file.name) for file in found})
        if len(kinds) > 1:  # a licence beside the rows would be trained as text
            example = f"{path}/**/*{kinds[0]}"
            raise ValueError(f"{' and '.join(kinds)} files in this directory: name those you mean: {example}")
        if found:
            return found
        raise ValueError(f"no data file in this directory: {path} ({_known()})")
    if whole.exists():
        if is_data_file(whole.name):
            return [whole]
        raise ValueError(f"not a data file lorakit reads: {path} ({_known()})")
    if not has_magic(path):
        raise ValueError(f"no such file: {path}")
    matched = glob(path, recursive=True)
    if files := _rows_in(matched):
        return files
    odd = next((Path(file).name for file in matched), None)
    raise ValueError(f"no data file matches {path}" + (f" ({odd} is none: {_known()})" if odd else ""))


def _rows_in(found: list[str]) -> list[Path]:
    """The data files among `found`, each once whatever links lead to it, by name."""
    files = [Path(file) for file in found if is_data_file(file) and Path(file).is_file()]
    once: dict[Path, Path] = {}
    for file in sorted(files, key=lambda file: (len(file.parts), file)):
        if file.name not in _ABOUT_ROWS:
            once.setdefault(file.resolve(), file)
    return sorted(once.values())


def _kind(name: str) -> str:
    """The suffix that says what a file holds, without the one of its compression."""
    stem = name.lower()
    for packed in COMPRESSED:
        stem = stem.removesuffix(packed)
    return Path(stem).suffix


def _known() -> str:
    return f"{', '.join(SUFFIXES)}; text also with {' or '.join(COMPRESSED)}"


def conflicts(recipe: Any, written: Written) -> Conflicts:
    data = recipe.data
    yield from _of_columns(data)
    if written("data.packing") and data.packing and written("model.attention") in ("sdpa", "eager"):
        yield "data.packing", "packed rows need attention: auto; delete one of the two"
    if data.chat_template is not None and data.format in ("prompt-completion", "text"):
        yield "data.chat_template", f"has no effect on data.format: {data.format}; delete it"
    if data.eval is None:
        for field in ("eval.every", "eval.at_start", "eval.early_stopping", "checkpoint.best"):
            if written(field) is not None:
                yield field, "has no effect without data.eval, the rows to evaluate on"
    named = [("data.train", data.train)] + (
        [] if isinstance(data.eval, float) else [("data.eval", data.eval)]
    )
    for dotted, value in named:
        for source in sources(value, None) if value is not None else ():
            for field in ("config", "split", "revision") if source.is_local else ():
                if getattr(source, field) is not None:
                    yield dotted, f"{field} is for hub data sets and has no effect on {source.path}"
            if dotted == "data.eval" and source.weight != 1:
                yield dotted, "weight has no effect on held-out rows: each is scored once"
    read = [source.path for _, value in named if value is not None for source in sources(value, None)]
    if data.header is not None and not any(_may_be_csv(path) for path in read):
        yield "data.header", "has no effect: no .csv or .tsv file is read"
    if data.streaming:
        if recipe.training.max_steps is None:
            yield "data.streaming", "the end of a stream is not known: say training.max_steps"
        if isinstance(data.eval, float):
            yield "data.eval", "no share can be held out of a stream: name a file"


def _may_be_csv(path: str) -> bool:
    return not is_data_file(path) or any(suffix in path.lower() for suffix in (".csv", ".tsv"))


def _of_columns(data: Any) -> Conflicts:
    known = FORMAT_FIELDS.get(data.format) or sorted(
        {name for names in FORMAT_FIELDS.values() for name in names}
    )
    given, columns = list(data.columns), list(data.columns.values())
    if twice := [column for column in columns if columns.count(column) > 1]:
        yield "data.columns", f'"{twice[0]}" is named twice'
    elif not (set(given) <= set(known) or set(columns) <= set(known)):
        odd = sorted(set(given) - set(known))[0]
        message = (
            f"not a field of format {data.format}: one of {', '.join(known)}. {did_you_mean(odd, known)}"
        )
        yield f"data.columns.{odd}", message.removesuffix(". ")
    if data.header is not None and len(set(data.header)) < len(data.header):
        yield "data.header", "names a column twice"
