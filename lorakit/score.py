"""How good is it: held-out loss and perplexity of the base, of what was trained, and of the merged model.

Loss is the mean of -log p over the trained tokens of all held-out rows, perplexity its exponential. The rows
are padded here, whatever the run did: that changes neither. Each model is loaded alone, so that one is in
memory at a time; base and adapter are one model.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit import base_model, data, model_files, runs, tasks
from lorakit.data.batches import Batches
from lorakit.data.formats import FIELDS, BadRow, rename
from lorakit.data.prompts import Question, questions
from lorakit.data.reading import rows_of, shown_sources
from lorakit.data.render import check_tokenizer
from lorakit.decoding import Settings, answer, context_of
from lorakit.devices import autocast_for, pick_device
from lorakit.errors import LorakitError
from lorakit.evaluate import evaluate
from lorakit.generate import open_to_ask
from lorakit.recipe import Recipe, is_hub_id, load_recipe
from lorakit.recipe.data import Data, Rows, files_of, sources
from lorakit.recipe.model import Model
from lorakit.recipe.task import CausalLm
from lorakit.saved import Opened, Saved, base_section, check_base, find, locate_base
from lorakit.signals import listen
from lorakit.terminal import say, track

_MICRO_BATCH_TOKENS = 2048  # padding included; over 150,000 tokens their logits are 1.2 GB in fp32
_CHANGEABLE = (
    *(f"data.{name}" for name in ("format", "columns", "limit", "max_length", "on_long", "on_bad_row")),
    "task.train_on",
)


@dataclass(frozen=True)
class Score:
    loss: float
    exact_match: float | None  # share of the prompts, 0 to 1; None: was not asked for

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self) -> dict[str, float | None]:
        values = {"loss": self.loss, "perplexity": self.perplexity}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return finite if self.exact_match is None else {**finite, "exact_match": self.exact_match}


@dataclass(frozen=True)
class Scores:
    data: str
    num_rows: int
    num_tokens: int  # scored
    num_prompts: int | None  # answered, for exact match
    trained_name: str  # adapter, or model after full fine-tuning
    base: Score
    trained: Score
    merged: Score | None

    def as_dict(self) -> dict[str, Any]:
        counts = {"data": self.data, "rows": self.num_rows, "tokens": self.num_tokens}
        asked = {} if self.num_prompts is None else {"prompts": self.num_prompts}
        merged = self.merged.as_dict() if self.merged else None
        scores = {"base": self.base.as_dict(), self.trained_name: self.trained.as_dict(), "merged": merged}
        return counts | asked | scores

    def as_text(self) -> str:
        asked = "" if self.num_prompts is None else f", {self.num_prompts:,} prompts"
        lines = [
            f"data      {self.data}: {self.num_rows:,} rows, {self.num_tokens:,} tokens scored{asked}",
            "",
        ]
        rows = [("base", self.base), (self.trained_name, self.trained)]
        rows += [("merged", self.merged)] if self.merged else []
        lines.append(f"{'':<9} {'loss':>9}  {'perplexity':>12}" + ("  exact match" if asked else ""))
        for name, score in rows:
            line = f"{name:<9} {score.loss:>9.4f}  {score.perplexity:>12,.2f}"
            share = "" if score.exact_match is None else f"  {100 * score.exact_match:>9.1f} %"
            lines.append(line + share)
        return "\n".join(lines)


@dataclass(frozen=True)
class HeldOut:
    """What every model is scored on, and how."""

    name: str  # of the data, as a user would type it
    rows: data.Loaded
    task: tasks.Task
    questions: list[Question] | None  # None: exact match was not asked for
    tokenizer: Any
    micro_batch_tokens: int


def score(
    place: Path,
    file: str | None = None,
    base: str | None = None,
    merged: Path | None = None,
    exact_match: bool = False,
    overrides: Sequence[str] = (),
) -> Scores:
    """Scores of what lies at `place` (a run, or an adapter) and of its base, on the run's held-out rows.

    `file`: other rows, a file or a hub data set. `base`: where the base model is, if not where it was.
    `merged`: the merged model, by default RUN/merged where that is. `overrides`: changes of the recipe's
    data and task, "data.limit=100". Raises: LorakitError for what is not there or does not fit.
    """
    saved = find(place)
    merged = _find_merged(saved, merged)
    chosen = choose_rows(saved, file, overrides)
    with listen():  # a Ctrl-C is never dropped
        held_out, precision, before, trained = _score_opened(saved, base, chosen, exact_match)
        if file is None and not overrides:
            _check_same_rows(saved, held_out)
        if before is None:
            before = _score_alone(*_base_of_full(saved, base), precision, held_out, "base")
        after = None
        if merged is not None:
            whole = Model(path=str(merged))
            dtype = "fp32" if precision == "fp32" else model_files.stored_dtype(merged)
            after = _score_alone(whole, merged, dtype, precision, held_out, "merged")
    name = "model" if saved.full else "adapter"
    if not trained.loss <= before.loss:  # also where it is no number
        say(f"warning: the {name} is worse than the base: loss {trained.loss:.4f} against {before.loss:.4f}")
    return Scores(
        data=held_out.name,
        num_rows=len(held_out.rows.tokens),
        num_tokens=int(held_out.rows.tokens.num_targets.sum()),
        num_prompts=None if held_out.questions is None else len(held_out.questions),
        trained_name=name,
        base=before,
        trained=trained,
        merged=after,
    )


# ------------------------------------------------------------------------------------------------------------
# The rows


@dataclass(frozen=True)
class Chosen:
    """Where the rows are, how to read them, which tokens count."""

    value: Rows
    section: Data
    task: CausalLm
    share: tuple[float, int] | None = None  # (share, seed): held out of the training rows by the run itself


def choose_rows(saved: Saved, file: str | None, overrides: Sequence[str]) -> Chosen:
    """The held-out rows as the run's recipe says, another file read as what it is; without a run, by the
    defaults.

    Raises: LorakitError when there are no held-out rows, or an override has no effect on a score.
    """
    source = file if file is None or _is_hub(file) else str(Path(file).expanduser().absolute())
    if saved.run is None:
        if source is None:
            raise LorakitError(
                f"{saved.folder} lies in no run, which would name held-out rows", "Add --data FILE"
            )
        if overrides:
            raise LorakitError(f"--set changes the recipe of a run, and {saved.folder} lies in none")
        return Chosen(source, Data(train=source, on_long="truncate"), CausalLm())
    for override in overrides:
        if not override.startswith(_CHANGEABLE):
            known = ", ".join(_CHANGEABLE)
            raise LorakitError(f"--set {override}: has no effect on a score", f"What has: {known}; --data.")
    recipe = load_recipe(saved.run / "resolved.yaml", overrides)
    section, task = recipe.data, recipe.task
    if source is None:
        return _of_the_run(saved, recipe, overrides)
    if not any(override.startswith("data.limit") for override in overrides):
        section = section.model_copy(update={"limit": None})
    told = any(override.startswith(("data.format", "data.columns")) for override in overrides)
    if not (told or _is_of(source, section)):
        section = section.model_copy(update={"format": "auto", "columns": {}, "header": None})
        task = task.model_copy(update={"train_on": "auto"})
    return Chosen(source, section.model_copy(update={"streaming": False}), task)


def _of_the_run(saved: Saved, recipe: Recipe, overrides: Sequence[str]) -> Chosen:
    section = recipe.data.model_copy(update={"streaming": False})
    if section.eval is None:
        raise LorakitError(f"{saved.run} was trained without held-out rows (data.eval)", "Add --data FILE")
    share = section.eval if isinstance(section.eval, float) else None
    if share is not None and (changed := [o for o in overrides if o.startswith("data.")]):
        raise LorakitError(
            f"--set {changed[0]}: the held-out rows are a share of the training rows, and would be others",
            "Rows that were trained on would be scored. Name a file of rows with --data.",
        )
    value = section.train if isinstance(section.eval, float) else section.eval
    try:
        _ = [files_of(source.path) for source in sources(value, None) if source.is_local]
    except ValueError as error:
        raise LorakitError(f"the held-out rows are not where they were: {error}", "Add --data FILE") from None
    return Chosen(value, section, recipe.task, None if share is None else (share, recipe.training.seed))


def _is_hub(source: str) -> bool:
    return is_hub_id(source) and not Path(source).exists()


def _is_of(source: str, section: Data) -> bool:
    """Whether the first row has the fields of the section's format."""
    if section.format == "auto":
        return False
    first, _ = next(rows_of(source, section), (None, ""))
    if first is None or first.value is None:
        return True
    try:
        fields = rename(first.value, section.columns)
    except BadRow:
        return False
    return all(field in fields for field in FIELDS[section.format])


def _load(saved: Saved, opened: Opened, chosen: Chosen, exact_match: bool) -> HeldOut:
    tokenizer, section, task = opened.tokenizer, chosen.section, chosen.task
    check_tokenizer(tokenizer, opened.base.model.get_input_embeddings().weight.shape[0])
    if saved.run is None:  # nobody said how long rows may be: as long as the model reads
        section = section.model_copy(update={"max_length": context_of(opened) or section.max_length})
    rows = data.load(chosen.value, section, tokenizer, task.train_on)
    if chosen.share is not None:
        rows = data.hold_out(rows, *chosen.share)[1]
    tokens = rows.tokens
    counted = f"{tokens.num_tokens:,} tokens, {tokens.num_trained:,} scored"
    say(f"held out  {rows.account}; {counted} ({rows.format})")
    asked = None
    if exact_match:
        found = questions(chosen.value, section, tokenizer, frozenset(rows.tokens.places))
        context = context_of(opened) or math.inf
        asked = [question for question in found if len(question.prompt) < context]
        if not asked:
            raise LorakitError("--exact-match: no row has a prompt that leaves room for an answer")
    decided = runs.read_record(saved.run).get("decisions", {}) if saved.run else {}
    budget = decided.get("training.micro_batch_tokens", {}).get("value", _MICRO_BATCH_TOKENS)
    name = shown_sources(chosen.value)
    return HeldOut(name, rows, tasks.build(task), asked, tokenizer, min(budget, _MICRO_BATCH_TOKENS))


def _check_same_rows(saved: Saved, held_out: HeldOut) -> None:
    assert saved.run is not None
    before = runs.read_record(saved.run).get("fingerprints", {}).get("eval")
    if before not in (None, held_out.rows.tokens.fingerprint()):
        say(f"warning: {held_out.name} has other rows than when {saved.run} was trained")


# ------------------------------------------------------------------------------------------------------------
# The models: one in memory at a time


def _score_opened(
    saved: Saved, base: str | None, chosen: Chosen, exact_match: bool
) -> tuple[HeldOut, str, Score | None, Score]:
    """(the rows, the precision, the base's score, the score of what was trained); full fine-tuning's model
    holds no base."""
    opened = open_to_ask(saved, None if saved.full else base)
    held_out = _load(saved, opened, chosen, exact_match)
    if opened.adapter is None:
        return held_out, opened.precision, None, _score(opened, held_out, "model")
    with opened.adapter.disabled():
        before = _score(opened, held_out, "base")
    return held_out, opened.precision, before, _score(opened, held_out, "adapter")


def _score_alone(
    section: Model, folder: Path, dtype: str, precision: str, held_out: HeldOut, what: str
) -> Score:
    """The score of a model without adapter, computed in the precision of training."""
    device = pick_device()
    loaded = base_model.load(folder, section, "AutoModelForCausalLM", dtype, device)
    if section.quantize == "none":
        loaded.model.to(device)
    check_tokenizer(held_out.tokenizer, loaded.model.get_input_embeddings().weight.shape[0])
    autocast = nullcontext if precision == "fp32" else autocast_for(precision, device)
    tokenizer = held_out.tokenizer
    opened = Opened(loaded, folder, None, None, tokenizer, precision, autocast, device)
    return _score(opened, held_out, what)


def _base_of_full(saved: Saved, base: str | None) -> tuple[Model, Path, str]:
    section = base_section(saved, base)
    folder = locate_base(section, given=base is not None)
    check_base(replace(saved, full=False), folder, given=base is not None)
    return section, folder, saved.provenance["base"]["dtype"]


def _find_merged(saved: Saved, given: Path | None) -> Path | None:
    """The merged model to score. Raises: LorakitError when the user names one that is none."""
    if given is None:
        beside = saved.run / "merged" if saved.run else None
        return beside if beside and (beside / "config.json").is_file() else None
    folder = given.expanduser().absolute()
    if saved.full:
        raise LorakitError(f"--merged: {saved.folder} is a whole model, to which nothing was merged")
    if not (folder / "config.json").is_file():
        raise LorakitError(f"--merged: {folder} is no model directory: it has no config.json")
    return folder


# ------------------------------------------------------------------------------------------------------------
# Scores


def _score(opened: Opened, held_out: HeldOut, what: str) -> Score:
    batches = Batches(
        held_out.rows.tokens,
        batch_size=1,
        seed=0,
        micro_batch_tokens=held_out.micro_batch_tokens,
        packing=False,
    )
    total = sum(1 for _ in batches.every_sample())
    loss = evaluate(
        tasks.Objective(opened.base.model, held_out.task),
        track(batches.every_sample(), f"loss of {what}", total=total),
        opened.device,
        opened.autocast,
        lambda tensor: tensor,
    )["eval_loss"]
    asked = held_out.questions
    return Score(loss, None if asked is None else _exact_match(opened, asked, what))


def _exact_match(opened: Opened, asked: Sequence[Question], what: str) -> float:
    """Share of the prompts that are answered, greedily, with the reference and nothing else but white space.

    An answer may have twice the reference's tokens: the same text can be more tokens than its tokenizer
    makes of it, and a longer answer is a wrong one.
    """
    assert opened.tokenizer is not None
    context = context_of(opened)
    limits = []
    for question in asked:
        enough = 8 + 2 * len(opened.tokenizer(question.reference, add_special_tokens=False)["input_ids"])
        limits.append(enough if context is None else min(enough, context - len(question.prompt)))
    answers = answer(opened, [question.prompt for question in asked], Settings(), limits, what)
    right = [a.strip() == q.reference.strip() for a, q in zip(answers, asked, strict=True)]
    return sum(right) / len(right)
