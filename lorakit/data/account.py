"""The account of a data set: where every row that was read went, and what is left to train on.

Rows are counted while they are read; tokens, lengths and repetitions are measured on what was kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lorakit.data.tokens import TokenData

KINDS = ("kept", "truncated", "dropped", "masked_out", "bad")
_ROWS = ("read", *KINDS)

# The line of a recipe that decides what becomes of a row of a kind.
CURES = {
    "truncated": "data.on_long: truncate cut them; data.max_length keeps them whole",
    "dropped": "data.on_long: drop left them out; truncate or a larger data.max_length keeps them",
    "masked_out": "data.on_bad_row: skip left them out; task.train_on decides what is trained",
    "bad": "data.on_bad_row: skip left them out",
    "no_trained_end": "a model does not learn to stop from them; data.max_length and task.train_on decide it",
}
_MEASURED = ("duplicates", "repeated_ids", "also_in_train")

SHOWN_ROWS = 8  # of one reason, beside its first row


@dataclass
class Account:
    """Each row that was read is in exactly one of kept, truncated, dropped, masked_out and bad."""

    read: int = 0
    kept: int = 0  # trained whole
    truncated: int = 0  # trained without its end (on_long: truncate)
    dropped: int = 0  # too long (on_long: drop)
    masked_out: int = 0  # nothing left to predict (on_bad_row: skip)
    bad: int = 0  # not readable as a sample (on_bad_row: skip)
    duplicates: int = 0  # rows with the tokens of an earlier one: reported, never dropped
    repeated_ids: int = 0  # rows whose field "id" an earlier row has
    also_in_train: int = 0  # held-out rows that stand in the training rows too
    samples: int = 0  # more than rows with task.train_on: each-turn
    tokens: int = 0
    trained_tokens: int = 0
    trained_ends: int = 0  # samples in which an end token (of a turn or of the text) is trained
    no_trained_end: int = 0  # samples in which none is
    lengths: dict[int, int] = field(default_factory=dict)  # upper bound, a power of two -> samples
    longest: str = ""  # "file:row (N tokens)"
    first: dict[str, str] = field(default_factory=dict, repr=False)  # kind -> its first row, and why
    # kind -> [reason, its first places, its rows] of every distinct reason, in the order they were met
    reasons: dict[str, list[list[Any]]] = field(default_factory=dict, repr=False)
    # of each source: name, kept (rows with a sample), samples, weight, draws (samples of an epoch)
    sources: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def rows(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _ROWS}

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "lengths": {str(bound): n for bound, n in self.lengths.items()}}

    def __str__(self) -> str:
        gone = [f"{getattr(self, kind):,} {words(kind)}" for kind in KINDS[1:] if getattr(self, kind)]
        return ", ".join([f"{self.read:,} rows read", f"{self.kept:,} kept", *gone])

    def told(self, kind: str) -> list[str]:
        """The rows of a kind by the reason why they are there; nothing when there are none."""
        if not getattr(self, kind):
            return []
        return [together(*reason) for reason in self.reasons.get(kind, ())] or [self.first[kind]]

    def measure(self, tokens: TokenData) -> None:
        """Fill in all that is known of the samples themselves."""
        self.samples = len(tokens)
        self.tokens, self.trained_tokens = tokens.num_tokens, tokens.num_trained
        self._measure_ends(tokens)
        self._measure_sources(tokens)
        lengths = tokens.lengths
        bounds = np.exp2(np.ceil(np.log2(lengths))).astype(np.int64)
        self.lengths = {int(bound): int((bounds == bound).sum()) for bound in np.unique(bounds)}
        at = int(lengths.argmax())
        self.longest = f"{tokens.places[at]} ({lengths[at]:,} tokens)"
        self.duplicates = self._repeated(tokens, tokens.column("hash"), "duplicates")
        self.repeated_ids = self._repeated(tokens, tokens.column("id_hash"), "repeated_ids")

    def _measure_ends(self, tokens: TokenData) -> None:
        ends, cut = tokens.column("ends"), tokens.column("cut")
        self.trained_ends = int(ends.sum())
        self.no_trained_end = len(ends) - self.trained_ends
        self.first.pop("no_trained_end", None)
        if self.no_trained_end:
            self.first["no_trained_end"] = tokens.places[int(ends.argmin())]
        if self.truncated and "truncated" not in self.first and cut.any():
            at = int(cut.argmax())
            self.first["truncated"] = (
                f"{tokens.places[at]}: longer than data.max_length {tokens.lengths[at]:,}"
            )

    def _measure_sources(self, tokens: TokenData) -> None:
        if len(tokens.parts) != len(self.sources):  # a stream, whose samples are mixed
            self.sources = []
            return
        found = []
        for source, part in zip(self.sources, tokens.parts, strict=True):
            span = slice(part.start, part.stop)
            kept = int(tokens.begins_row[span].sum())
            numbers = {"kept": kept, "samples": part.stop - part.start}
            name = {"name": source["name"]}
            found.append({**name, **numbers, "weight": part.weight, "draws": part.num_draws})
        self.sources = found

    def _repeated(self, tokens: TokenData, marks: np.ndarray, kind: str) -> int:
        """Number of samples whose mark (0: none) an earlier sample has; the first of them is remembered."""
        marked = np.flatnonzero(marks)
        order = marked[np.argsort(marks[marked], kind="stable")]
        again = np.flatnonzero(marks[order[1:]] == marks[order[:-1]]) + 1
        if len(again):
            place = again[order[again].argmin()]
            self.first[kind] = f"{tokens.places[order[place]]} repeats {tokens.places[order[place - 1]]}"
        return len(again)

    def compare(self, held_out: TokenData, train: TokenData) -> None:
        """Count the held-out samples that are trained on."""
        mine, trained = held_out.column("hash"), train.column("hash")
        found = np.flatnonzero(np.isin(mine, trained))
        self.also_in_train = len(found)
        if len(found):
            same = int(np.flatnonzero(trained == mine[found[0]])[0])
            self.first["also_in_train"] = f"{held_out.places[found[0]]} is {train.places[same]}"


def account_of(
    rows: Mapping[str, int],
    first: Mapping[str, str],
    reasons: Mapping[str, list[list[Any]]] | None = None,
    sources: Sequence[str] = (),
) -> Account:
    """The account of rows that were counted before; `sources`: the name of each, in their order."""
    account = Account(first=dict(first), reasons=dict(reasons or {}))
    account.sources = [{"name": name} for name in sources]
    for name, number in rows.items():
        setattr(account, name, number)
    return account


def together(reason: str, places: Sequence[str], count: int) -> str:
    """`a.jsonl:3: reason (also rows 7, 9, b.jsonl:2 and 5 more)`: `count` rows, some of their places known.

    A row is told by its number alone while its file is that of the first.
    """
    if not places:
        return f"{reason} ({count:,} rows)"
    line = f"{places[0]}: {reason}"
    if count == 1:
        return line
    file, near = places[0].rpartition(":")[0], True
    shown, words = places[1 : SHOWN_ROWS + 1], []
    for place in shown:
        name, _, number = place.rpartition(":")
        near = near and name == file
        words.append(number if near else place)
    rows = ("rows " if count > 2 else "row ") if words and words[0].isdigit() else ""
    more = count - 1 - len(shown)
    last = f" and {more:,} more" if more and words else f"{more:,} more" if more else ""
    return f"{line} (also {rows}{', '.join(words)}{last})"


def words(kind: str) -> str:
    """The name of a count of the account, as people read it."""
    return {"repeated_ids": "repeated ids", "also_in_train": "also in training"}.get(
        kind, kind.replace("_", " ")
    )


def table(parts: Sequence[tuple[str, Account]]) -> list[str]:
    """The account as lines: one column for each part (name, account), what is zero everywhere left out."""
    accounts = [account for _, account in parts]
    rows: list[tuple[str, list[str]]] = [("rows", [name for name, _ in parts])]
    for kind in (*_ROWS, *_MEASURED):
        counts = [getattr(account, kind) for account in accounts]
        if any(counts) or kind in ("read", "kept"):
            rows.append((words(kind), [f"{count:,}" for count in counts]))
    if any(account.samples != account.kept + account.truncated for account in accounts):
        rows.append(("samples", [f"{account.samples:,}" for account in accounts]))
    if any(account.no_trained_end for account in accounts):
        rows.append((words("no_trained_end"), [f"{account.no_trained_end:,}" for account in accounts]))
    rows.append(("tokens", [f"{account.tokens:,}" for account in accounts]))
    shares = [100 * account.trained_tokens / max(1, account.tokens) for account in accounts]
    trained = zip(accounts, shares, strict=True)
    rows.append(("trained tokens", [f"{a.trained_tokens:,} ({share:.1f} %)" for a, share in trained]))
    lines = _aligned(rows)
    for name, account in parts:
        lines += _sources(name, account)
    for name, account in parts:
        lines += ["", *_histogram(name, account)]
    for name, account in parts:
        lines += [line for kind in account.first for line in _told(name, account, kind)]
    return lines


def _aligned(rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    width = max(len(name) for name, _ in rows)
    wide = [max(map(len, cells)) for cells in zip(*(cells for _, cells in rows), strict=True)]
    return [
        f"{name:<{width}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, wide, strict=True))
        for name, cells in rows
    ]


def _sources(name: str, account: Account) -> list[str]:
    """A line for each source, where there are several or their weights count."""
    if len(account.sources) < 2 and all(source["weight"] == 1 for source in account.sources):
        return []
    rows = [(f"{name}: sources", ["rows kept", "samples", "weight", "samples per epoch"])]
    for source in account.sources:
        numbers = [f"{source['kept']:,}", f"{source['samples']:,}", f"{source['weight']:g}"]
        rows.append((source["name"], [*numbers, f"{source['draws']:,}"]))
    return ["", *_aligned(rows)]


def _histogram(name: str, account: Account) -> list[str]:
    most = max(account.lengths.values(), default=1)
    number = max((len(f"{n:,}") for n in account.lengths.values()), default=1)
    lines = [f"{name}: samples by length in tokens; the longest is {account.longest}"]
    for bound, count in account.lengths.items():
        bar = "#" * max(1, round(40 * count / most))
        lines.append(f"{f'{bound // 2 + 1:,} to {bound:,}':>18}  {count:>{number},}  {bar}")
    return lines


def _told(name: str, account: Account, kind: str) -> list[str]:
    known = account.told(kind)
    if not known:
        return []
    line = f"{name}: first {words(kind)}: {known[0]}"
    cure = CURES.get(kind)
    return ["", line, *(f"  {other}" for other in known[1:]), *([f"  {cure}"] if cure else [])]
