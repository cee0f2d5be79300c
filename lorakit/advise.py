"""`lorakit advise`: what published results and your data say about the knobs of a recipe.

Nothing is changed here: `set` is the part of a command line that would. No torch, and nothing of the
hardware.

`lorakit advise --json`: {"recipe": path, "facts": {"model": {type, parameters, hidden_size, context} or null,
"data": {samples, trained_tokens, mean_length, longest, too_long, held_out} or null, "adapter": {method,
trainable, capacity_bits, scale}, "steps": int or null, "missing": [text], "stops": text}, "advice": [{"knob",
"yours", "advised", "why", "source", "confidence": high, medium or low, "primer": {"says", "evidence"} where
the profile has a word on that knob}], "set": ["KEY=VALUE"], "try": [["KEY=VALUE"]]}. `missing` is what could
not be judged, `stops` why `lorakit train` refuses the rows (exit code 2), or empty. `set` takes all advice of
high and medium confidence, an entry of `try` one of low. Where `advised` equals `yours`, the evidence says
that the knob matters little, or what it does.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorakit import data, model_files
from lorakit.advice import Advice, Rule
from lorakit.advice.facts import Base, Facts, Rows, setting
from lorakit.advice.primer import PRIMER, Primer
from lorakit.advice.rates import RULES as OF_THE_RATE
from lorakit.advice.rates import learning_rate
from lorakit.advice.rules import RULES as OF_THE_ADAPTER
from lorakit.advice.training import RULES as OF_THE_TRAINING
from lorakit.data.render import check_tokenizer
from lorakit.errors import LorakitError, RecipeError
from lorakit.recipe import Recipe, load_recipe
from lorakit.recipe.data import sources
from lorakit.terminal import harmless
from lorakit.tokenizer import load_tokenizer, quiet
from lorakit.validate import problems_of

RULES: tuple[Rule, ...] = (*OF_THE_ADAPTER, *OF_THE_TRAINING, *OF_THE_RATE)
UNCUT = 1 << 30  # tokens: a data.max_length that no row reaches
ROUNDS = 4  # taking one advice may call for another: a larger rank, for its scaling


@dataclass(frozen=True)
class Advised:
    """The advice on a recipe, in the order of RULES."""

    facts: Facts
    advice: tuple[Advice, ...]
    profile: tuple[Primer, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """The arguments of --set that take what is of more than low confidence."""
        return _settings(item for item in self.advice if item.confidence != "low")

    @property
    def trials(self) -> tuple[tuple[str, ...], ...]:
        """Those that take the rest, one by one: nobody knows whether it is better here."""
        low = [item for item in self.advice if item.confidence == "low" and item.settings]
        return tuple(_settings([item]) for item in low)

    def as_dict(self) -> dict[str, Any]:
        entries = []
        for item, primer in self._rows():
            entry = {name: getattr(item, name) for name in _COLUMNS}
            said = {"primer": {"says": primer.says, "evidence": primer.evidence}} if primer else {}
            entries.append(entry | said)
        found = {"recipe": str(self.facts.path), "facts": self.facts.as_dict(), "advice": entries}
        return found | {"set": list(self.settings), "try": list(map(list, self.trials))}

    def as_text(self) -> str:
        rows = self._rows()
        table = _table(rows, bool(self.profile)) if rows else [_nothing(self.facts)]
        end = [f"to take it: {_as_options(self.settings)}"] if self.settings else []
        end += [f"to try, of low confidence: {_as_options(one)}" for one in self.trials]
        return harmless("\n".join([self.facts.as_text(), "", *table, *([""] if end else []), *end]))

    def _rows(self) -> list[tuple[Advice, Primer | None]]:
        """Every advice, and every knob of the profile, on which the recipe may stay as it is."""
        said = {primer.knob: primer for primer in self.profile}
        found = [(item, said.pop(item.knob, None)) for item in self.advice]
        more = [(_as_it_is(self.facts, primer), primer) for primer in said.values()]
        return [*found, *more]


def _settings(advice: Iterable[Advice]) -> tuple[str, ...]:
    taken: dict[str, Any] = {}
    for item in advice:
        taken |= item.settings
    return tuple(map(setting, taken, taken.values()))


def _as_options(settings: Sequence[str]) -> str:
    return " ".join(f"--set {shlex.quote(one)}" for one in settings)


_COLUMNS = ("knob", "yours", "advised", "why", "source", "confidence")


def advise(path: Path, overrides: Sequence[str] = (), profile: str | None = None) -> Advised:
    """What the evidence advises for the recipe at `path`. Pure but for reading; loads no weights.

    Raises: LorakitError for a recipe that is none, and for an unknown profile.
    """
    if profile not in (None, "primer"):
        raise LorakitError(f"--profile {profile}: expected primer")
    facts = gather(path, overrides)
    return Advised(facts, settled(facts), PRIMER if profile else ())


def settled(facts: Facts) -> tuple[Advice, ...]:
    """The advice of all rules: that of more than low confidence each asked about the recipe that has taken
    the others' already, one for each knob; what is only to be tried, and words, about the recipe that has
    taken all of that. Nothing is advised that is written."""
    now = facts
    changes: dict[str, tuple[Rule, Advice]] = {}
    values: dict[str, Any] = {}
    for _ in range(ROUNDS):
        before = now
        for rule in RULES:
            item = _told(rule, facts, now)
            if item and item.settings and item.confidence != "low" and (after := taken_by(now, item)):
                changes[item.knob] = rule, item
                values |= item.settings
                now = after
        if now is before:
            break
    found = []
    for rule in RULES:
        for by, item in changes.values():
            advised = values.get(item.knob, item.advised)  # another rule's advice may have moved it further
            if by is rule and advised != item.yours:
                kept = {name: values[name] for name in item.settings if values[name] != facts.value(name)}
                found.append(replace(item, advised=advised, settings=kept))
        last = _told(rule, facts, now)
        untouched = last and last.knob not in changes and now.value(last.knob) == last.yours
        if last and (last.settings or untouched):
            after = taken_by(now, last) if last.confidence == "low" else None
            found.append(_with_its_rate(after, last) if after else replace(last, settings={}))
    return tuple(found)


def _with_its_rate(after: Facts, item: Advice) -> Advice:
    """A method to try with the learning rate that it asks for: the recipe's was another method's."""
    rate = learning_rate(after) if item.knob == "adapter.method" and item.settings else None
    if rate is None:
        return item
    why = f"{item.why}; optimizer.lr {_shown(rate.advised)} goes with it"
    return replace(item, why=why, settings={**item.settings, **rate.settings})


def _nothing(facts: Facts) -> str:
    if facts.stops:
        return "nothing to advise: mend the rows first"
    known = " of what was judged" if facts.missing else ""
    return f"nothing to advise{known}: the recipe has what the evidence has"


def _told(rule: Rule, facts: Facts, now: Facts) -> Advice | None:
    """What a rule says of the recipe `now`, beside what was written; and that it is of another recipe than
    `facts`, where it says something else of that."""
    item, of_yours = rule(now), rule(facts)
    if item is None:
        return None
    other = of_yours is None or of_yours.why != item.why
    why = f"once the rest is taken, {item.why}" if other else item.why
    return replace(item, yours=facts.value(item.knob), why=why)


def taken_by(facts: Facts, item: Advice) -> Facts | None:
    """The facts of the recipe that takes `item`; None where other fields of the recipe stand against it."""
    try:
        return facts.taken(item.settings)
    except LorakitError:
        return None


def _as_it_is(facts: Facts, primer: Primer) -> Advice:
    yours = facts.value(primer.knob)
    advised, why = primer.apart(facts) or (yours, "as it is")
    return Advice(primer.knob, yours, advised, why, primer.source, primer.confidence)


def _table(rows: Sequence[tuple[Advice, Primer | None]], with_primer: bool) -> list[str]:
    """Two lines for each knob, or three: values; why and source; what the evidence says of the primers."""
    heads = ["knob", "yours", "advised", *(["primers"] if with_primer else []), "confidence"]
    cells = [heads]
    for item, primer in rows:
        advised = _shown(item.advised) if item.advised != item.yours else "as it is"
        says = [primer.says if primer else "-"] if with_primer else []
        cells.append([item.knob, _shown(item.yours), advised, *says, item.confidence])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
    found = lines[:1]
    for line, (item, primer) in zip(lines[1:], rows, strict=True):
        found.append(line)
        if item.why != "as it is":
            found.append(f"    {item.why} [{item.source}]")
        if primer:
            found.append(f"    on the primers: {primer.evidence} [{primer.source}]")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


# ------------------------------------------------------------------------------------------------------------
# Reading


def gather(path: Path, overrides: Sequence[str]) -> Facts:
    """Facts of the recipe at `path`. What is not on this machine, nor on a hub in reach, is named in
    `missing`; rows that stop the run, but could be read without the recipe's limits, in `stops`.

    Raises: LorakitError for a recipe that is none; RecipeError for what `lorakit validate` refuses.
    """
    recipe = load_recipe(path, overrides)
    if problems := problems_of(recipe):
        raise RecipeError(problems)
    empty = Facts(path, tuple(overrides), recipe, None, None, ())
    if recipe.model.trust_remote_code:
        return replace(empty, missing=("model and rows: advise does not run a model's own code",))
    try:
        folder = model_files.locate(recipe.model, weights=False)
    except LorakitError as error:
        return replace(empty, missing=(f"model and rows: {error.message}",))
    base = _base(folder)
    missing = []
    if base is None:
        missing.append(f"shapes: lorakit's tables have no model of this type: {folder / 'config.json'}")
    quiet()
    tokenizer = load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    check_tokenizer(tokenizer)
    rows, absent, stops = _rows(recipe, tokenizer)
    missing += [absent] if absent else []
    facts = replace(empty, base=base, rows=rows, missing=tuple(missing), stops=stops)
    _ = facts.targets
    return facts


def _base(folder: Path) -> Base | None:
    shapes = model_files.shapes_from_table(folder)
    config = model_files.read_json(folder / "config.json")
    text = config.get("text_config") or config
    stored = str(config.get("dtype") or config.get("torch_dtype") or "")
    if shapes is None:
        return None
    return Base(
        config["model_type"],
        _first_size(text, "hidden_size", "n_embd"),
        _first_size(text, "max_position_embeddings", "n_positions", "max_seq_len"),
        stored,
        shapes,
    )


def _first_size(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _rows(recipe: Recipe, tokenizer: Any) -> tuple[Rows | None, str, str]:
    """(the rows, what of them is not on this machine, why `lorakit train` would not take them). They are read
    as `lorakit preview` reads them; where the recipe refuses or cuts some, again without its limits.

    Raises: LorakitError for files here that cannot be read even so.
    """
    section = recipe.data
    training = section.model_copy(update={"eval": None})
    stops = ""
    try:
        named = training if isinstance(section.eval, float) else section
        loaded, other = data.load_parts(recipe.model_copy(update={"data": named}), tokenizer)
        if not (loaded.account.truncated or loaded.account.dropped):
            return _measured(loaded, len(other.tokens) if other else None), "", ""
    except LorakitError as error:
        stops = error.message.splitlines()[0]
        if not _are_here(section.eval):
            rows, absent, others = _rows(recipe.model_copy(update={"data": training}), tokenizer)
            return rows, absent or ("" if others else f"held-out rows: {stops}"), others
    freely = {"max_length": UNCUT, "on_long": "truncate", "on_bad_row": "skip"}
    freed = recipe.model_copy(update={"data": training.model_copy(update=freely)})
    try:
        loaded, _ = data.load_parts(freed, tokenizer)
    except LorakitError:
        if _are_here(section.train):
            raise
        return None, f"rows: {stops}", ""
    return _measured(loaded, None), "", stops


def _are_here(rows: Any) -> bool:
    """Whether a value of data.train or data.eval names files alone, and nothing of a hub."""
    return rows is None or isinstance(rows, float) or all(one.is_local for one in sources(rows, None))


def _measured(loaded: data.Loaded, held_out: int | None) -> Rows:
    tokens = loaded.tokens
    return Rows(
        tokens.lengths,
        tokens.num_targets,
        tokens.num_draws / len(tokens),
        len(tokens) - loaded.account.duplicates,
        held_out,
        loaded.stream is not None,
    )
