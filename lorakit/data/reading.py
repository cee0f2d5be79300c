"""Sources -> pieces of rows -> one count of all: what a pass over the rows of a recipe has to remember."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data import cache
from lorakit.data.account import KINDS, SHOWN_ROWS, together
from lorakit.data.formats import FIELDS, BadRow, detect, rename, unused
from lorakit.data.rows import Chunk, Row, hub_chunks, read_chunks, shown
from lorakit.data.tokenize import Done, Piece, Setting
from lorakit.errors import LorakitError
from lorakit.recipe.data import COMPRESSED, Data, Rows, Source, files_of, sources

_SHOWN_PROBLEMS = 20
_SHOWN_COLUMNS = 6
_NOTED_REASONS, _NOTED_PLACES = 10, 3  # of each kind, of each reason: what an account tells
_REASONS = 200  # of each kind; what comes after them is only counted
_REASON_LENGTH = 1000  # characters: a reason may quote its row
_LONG = re.compile(r"([\d,]+) tokens, (data\.max_length) is ([\d,]+)")

# What makes every row read so far bad is not cured by leaving them all out.
_DECIDES = (
    (r"^no (column|field) ", "data.columns says which column holds what"),
    (r"^the header has ", "data.header names the columns of files without a header line"),
    (r"the chat template", "data.chat_template takes the place of the tokenizer's own"),
    (r"^not (JSON|UTF-8)", "the end of its name says how a file is read; is it the right one?"),
    (r"", "data.format says what a row looks like"),
)


@dataclass
class Reason:
    """Rows of one kind that share a reason, or differ in their number of tokens only."""

    kind: str
    text: str  # as its first row has it
    places: list[str] = field(default_factory=list)  # of the first rows
    count: int = 0
    tokens: tuple[int, int] | None = None  # fewest and most, of rows that are too long

    def add(self, place: str, tokens: int | None) -> None:
        self.count += 1
        if len(self.places) <= SHOWN_ROWS:
            self.places.append(place)
        if tokens is not None:
            fewest, most = self.tokens or (tokens, tokens)
            self.tokens = min(fewest, tokens), max(most, tokens)

    def __str__(self) -> str:
        if self.tokens is None or self.tokens[0] == self.tokens[1]:
            return self.text
        counts = " to ".join(f"{number:,}" for number in self.tokens)
        return _LONG.sub(rf"longer than \2 \3: {counts} tokens", self.text)


@dataclass
class Reading:
    """What has been read of some sources, and what became of it."""

    sources: tuple[Source, ...]
    setting: Setting
    files: list[str] = field(default_factory=list)
    formats: dict[int, tuple[str, str]] = field(default_factory=dict)  # source -> (format, how it was known)
    samples: list[int] = field(default_factory=list)  # of each source
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    reasons: dict[tuple[str, str], Reason] = field(default_factory=dict)  # (kind, what rows share) -> rows
    others: dict[str, int] = field(default_factory=dict)  # kind -> rows of further reasons
    fatal_kinds: set[str] = field(default_factory=set)
    unused: dict[int, list[str]] = field(default_factory=dict)  # source -> columns that its format ignores

    _numbers: dict[str, int] = field(default_factory=dict)  # kind -> its reasons

    def __post_init__(self) -> None:
        self.samples = [0] * len(self.sources)

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    @property
    def name(self) -> str:
        first = self.sources[0].path.rsplit("/", 1)[-1]
        return first if len(self.sources) == 1 else f"{first} and {len(self.sources) - 1} more"

    def cache_key(self) -> str:
        """Empty when nobody can say whether the rows will be the same next time: a hub data set without a
        commit."""
        files: list[Path] = []
        for source in self.sources:
            if source.is_local:
                files += local_files(source)
            elif not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
                return ""
        section = self.setting.section
        fields = ("format", "columns", "header", "max_length", "on_long", "on_bad_row")
        facts = [
            [source.model_dump(exclude={"weight"}) for source in self.sources],
            {name: getattr(section, name) for name in fields},
            self.setting.train_on,
            [shown(file) for file in files],
        ]
        return cache.key(files, self.setting.tokenizer, facts)

    def pieces(self) -> Iterator[Piece]:
        """All rows, in order, as chunks that say what a row looks like."""
        for number, source in enumerate(self.sources):
            for chunk in limited(chunks_of(source, self.setting.section), source.limit):
                yield self.piece(number, chunk)

    def piece(self, number: int, chunk: Chunk) -> Piece:
        section = self.setting.section
        if number not in self.formats:
            found = recognised(chunk, section)
            if found:
                name, why, self.unused[number] = found
                self.formats[number] = name, why
            elif section.format != "auto":
                self.formats[number] = section.format, "as the recipe says"
        if chunk.file not in self.files:
            self.files.append(chunk.file)
        file = self.files.index(chunk.file)
        return Piece(chunk, self.formats.get(number, ("", ""))[0], number, file)

    def count(self, done: Done) -> None:
        self.samples[done.source] += done.batch.num_rows
        for kind, number in done.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + number
        for kind, place, reason in done.problems:
            self.first.setdefault(kind, f"{place}: {_shortened(reason)}")
            self._remember(kind, place, reason)
            if _fatal(kind, self.setting.section):
                self.fatal_kinds.add(kind)

    def _remember(self, kind: str, place: str, reason: str) -> None:
        long = _LONG.search(reason)
        shared = _LONG.sub("", reason) if long else reason
        known = self.reasons.get((kind, shared))
        if known is None:
            if self._numbers.get(kind, 0) == _REASONS:
                self.others[kind] = self.others.get(kind, 0) + 1
                return
            self._numbers[kind] = self._numbers.get(kind, 0) + 1
            known = self.reasons[kind, shared] = Reason(kind, _shortened(reason))
        known.add(place, int(long[1].replace(",", "")) if long else None)

    def raise_problems(self) -> None:
        """Raises: LorakitError with all problems so far, rows of the same reason together."""
        if not self.fatal_kinds:
            return
        fatal = [reason for reason in self.reasons.values() if reason.kind in self.fatal_kinds]
        lines = [together(str(reason), reason.places, reason.count) for reason in fatal[:_SHOWN_PROBLEMS]]
        others = sum(self.others.get(kind, 0) for kind in self.fatal_kinds)
        if hidden := sum(reason.count for reason in fatal[_SHOWN_PROBLEMS:]) + others:
            lines.append(f"... and {hidden:,} more")
        number = sum(reason.count for reason in fatal) + others
        lines.append(f"{number:,} of {self.num_rows:,} rows read so far cannot be trained as they are")
        raise LorakitError("\n".join(lines), "; ".join(self._cures(fatal)) + ".")

    def _cures(self, fatal: Sequence[Reason]) -> list[str]:
        most, cures = self.setting.section.max_length, []
        if "dropped" in self.fatal_kinds:
            longer = f"data.max_length above {most}"
            cures.append(f"{longer}, or data.on_long: truncate or drop, lets long rows pass")
        if any(reason.kind == "masked_out" and reason.tokens for reason in fatal):
            cures.append(
                f"data.max_length above {most} leaves something to train on in long rows,"
                " data.on_long: drop leaves them out"
            )
        if self.counts.get("bad", 0) == self.num_rows:
            texts = [next(cure for start, cure in _DECIDES if re.search(start, str(r))) for r in fatal]
            return cures + list(dict.fromkeys(texts))
        if all(reason.kind == "masked_out" for reason in fatal) and self._all_are(fatal):
            return cures or ["task.train_on decides what is trained; lorakit preview shows it"]
        if self.fatal_kinds & {"bad", "masked_out"}:
            cures.append(
                "data.on_bad_row: skip trains without the rows that are bad or have nothing to train on"
            )
        return cures

    def _all_are(self, fatal: Sequence[Reason]) -> bool:
        """Whether every row that was read is one of these."""
        return sum(reason.count for reason in fatal) == self.num_rows

    def _noted_reasons(self) -> dict[str, list[list[Any]]]:
        """kind -> [reason, first places, rows] of each, as JSON has it."""
        noted: dict[str, list[list[Any]]] = {}
        for kind in dict.fromkeys(kind for kind, _ in self.reasons):
            mine = [reason for reason in self.reasons.values() if reason.kind == kind]
            shown, rest = mine[:_NOTED_REASONS], mine[_NOTED_REASONS:]
            noted[kind] = [[str(reason), reason.places[:_NOTED_PLACES], reason.count] for reason in shown]
            if number := sum(reason.count for reason in rest) + self.others.get(kind, 0):
                noted[kind].append(["other reasons", [], number])
        return noted

    def note(self) -> dict[str, Any]:
        """What is kept beside the tokens."""
        names = {name for name, _ in self.formats.values()} or {self.setting.section.format}
        return {
            "files": self.files,
            "samples": self.samples,
            "rows": {"read": self.num_rows, **{kind: self.counts.get(kind, 0) for kind in KINDS}},
            "first": self.first,
            "reasons": self._noted_reasons(),
            "format": names.pop() if len(names) == 1 else "auto",
            "why": self._why(),
        }

    def _why(self) -> str:
        """How the formats were known, and which columns they do not use."""
        known = sorted(self.formats.items())
        if len({name for name, _ in self.formats.values()}) > 1:
            told = []
            for number, (name, _) in known:
                ignored = _not_used(self.unused.get(number, ()))
                file = self.sources[number].path.rsplit("/", 1)[-1]
                told.append(f"{file}: {name}" + (f" ({ignored})" if ignored else ""))
            return "; ".join(dict.fromkeys(told))
        whys = [why for _, (_, why) in known] or ["no row can be read"]
        columns = dict.fromkeys(column for number, _ in known for column in self.unused.get(number, ()))
        ignored = _not_used(list(columns))
        return "; ".join(dict.fromkeys([*whys, *([ignored] if ignored else [])]))


def rows_of(value: Rows, section: Data) -> Iterator[tuple[Row, str]]:
    """(row, format) of every row that `value` names. Raises: LorakitError as the readers do."""
    reading = Reading(sources(value, section.limit), Setting(None, section, "auto"))
    for piece in reading.pieces():
        for row in piece.chunk.rows():
            yield row, piece.format


def shown_sources(value: Rows) -> str:
    """What `value` names, as a user would type it."""
    paths = [source.path for source in sources(value, None)]
    return ", ".join(shown(Path(path)) if Path(path).is_absolute() else path for path in paths)


def source_names(listed: Sequence[Source]) -> list[str]:
    """A name for each source, as a user would type it."""
    return [
        shown(Path(s.path)) if s.is_local else ":".join(part for part in (s.path, s.config, s.split) if part)
        for s in listed
    ]


def local_files(source: Source) -> list[Path]:
    """Raises: LorakitError when there is none."""
    try:
        return files_of(source.path)
    except ValueError as error:
        raise LorakitError(str(error).replace(source.path, shown(Path(source.path)))) from None


def chunks_of(source: Source, section: Data) -> Iterator[Chunk]:
    """The rows of a source, its limit not counted. Raises: LorakitError when it cannot be read."""
    if not source.is_local:
        split, streaming = source.split or "train", section.streaming
        yield from hub_chunks(source.path, source.config, split, source.revision, streaming)
        return
    for file in local_files(source):
        plain = file.stem if file.suffix.lower() in COMPRESSED else file.name
        named = section.header if Path(plain).suffix.lower() in (".csv", ".tsv") else None
        chunks = read_chunks(file, header=named)
        yield from chunks if named is None else _without_header(chunks)


def _without_header(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """The chunks as they are. Raises: LorakitError when the first record is the header that was given."""
    for number, chunk in enumerate(chunks):
        first = chunk.first(1).rows()[:1] if not number else []
        if (
            first
            and first[0].value
            and {str(v).strip() for v in first[0].value.values()} == set(first[0].value)
        ):
            raise LorakitError(
                f"{first[0].place}: the first record is the header itself: delete data.header",
                "data.header is for files without a header line; data.columns gives columns other names.",
            )
        yield chunk


def limited(chunks: Iterator[Chunk], limit: int | None) -> Iterator[Chunk]:
    """The first `limit` rows; all without one."""
    for chunk in chunks:
        if limit is None:
            yield chunk
            continue
        yield chunk.first(limit)
        limit -= min(limit, len(chunk))
        if not limit:
            return


def recognised(chunk: Chunk, section: Data) -> tuple[str, str, list[str]] | None:
    """(format, how it was known, unused columns) by the first row that can be read, or None.

    Raises: LorakitError, with the place, when that row has the columns of no format.
    """
    for row in chunk.rows():
        if row.value is None:
            continue
        try:
            fields = rename(row.value, section.columns)
            name = detect(fields) if section.format == "auto" else section.format
        except BadRow:
            continue
        except LorakitError as error:
            cure = error.hint + ("" if section.header else _headless(chunk, row.value))
            raise LorakitError(f"{row.place}: {error.message}", cure) from None
        ignored = unused(fields, name, section.columns)
        if section.format != "auto":
            return name, "as the recipe says", ignored
        if chunk.form == ".txt" and not section.columns:
            return name, "one row per line of .txt", ignored
        there = FIELDS[name]
        told = f"columns {', '.join(there)} are" if len(there) > 1 else f"column {there[0]} is"
        return name, f"the {told} there", ignored
    return None


def _headless(chunk: Chunk, row: Mapping[str, Any]) -> str:
    """What to do about a CSV file whose first record, taken for a header, looks like a row."""
    if chunk.form not in (".csv", ".tsv") or not any(map(_looks_like_data, row)):
        return ""
    first = {1: "text", 2: "prompt, completion"}.get(len(row), "prompt, completion, ...")
    many = f"the {len(row)} columns" if len(row) > 1 else "the column"
    return f" Is the first line a row and no header? Then name {many}: data.header: [{first}]."


def _looks_like_data(name: str) -> bool:
    sentence = " " in name.strip() and re.search(r"[.,;:!?]", name)
    return len(name) > 40 or bool(sentence) or bool(re.fullmatch(r"\s*[-+]?\d+([.,]\d+)*\s*", name))


def _not_used(columns: Sequence[str]) -> str:
    if not columns:
        return ""
    more = f" and {len(columns) - _SHOWN_COLUMNS:,} more" if len(columns) > _SHOWN_COLUMNS else ""
    names = ", ".join(name if len(name) <= 40 else f"{name[:40]}…" for name in columns[:_SHOWN_COLUMNS])
    return f"columns not used: {names}{more}"


def _shortened(reason: str) -> str:
    return reason if len(reason) <= _REASON_LENGTH else f"{reason[:_REASON_LENGTH]} ..."


def _fatal(kind: str, section: Data) -> bool:
    if kind == "dropped":
        return section.on_long == "error"
    return kind in ("bad", "masked_out") and section.on_bad_row == "error"
