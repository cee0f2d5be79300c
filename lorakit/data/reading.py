"""Sources -> pieces of rows -> one count of all: what a pass over the rows of a recipe has to remember."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.data import cache
from lorakit.data.account import KINDS
from lorakit.data.formats import FIELDS, BadRow, detect, rename
from lorakit.data.rows import Chunk, Row, hub_chunks, read_chunks, shown
from lorakit.data.tokenize import Done, Piece, Setting
from lorakit.errors import LorakitError
from lorakit.recipe.data import COMPRESSED, Data, Rows, Source, files_of, sources

_SHOWN_PROBLEMS = 20
_SHOWN_ROWS = 8


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
    fatal: dict[str, list[str]] = field(default_factory=dict)  # reason -> places
    fatal_kinds: set[str] = field(default_factory=set)

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
            if section.format != "auto":
                self.formats[number] = section.format, "as the recipe says"
            elif found := recognised(chunk, section):
                self.formats[number] = found
        if chunk.file not in self.files:
            self.files.append(chunk.file)
        file = self.files.index(chunk.file)
        return Piece(chunk, self.formats.get(number, ("", ""))[0], number, file)

    def count(self, done: Done) -> None:
        self.samples[done.source] += done.batch.num_rows
        for kind, number in done.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + number
        for kind, place, reason in done.problems:
            self.first.setdefault(kind, f"{place}: {reason}")
            if _fatal(kind, self.setting.section):
                self.fatal_kinds.add(kind)
                self.fatal.setdefault(reason, []).append(place)

    def raise_problems(self) -> None:
        """Raises: LorakitError with all problems so far, rows of the same reason together."""
        if not self.fatal:
            return
        lines = [_told(reason, places) for reason, places in list(self.fatal.items())[:_SHOWN_PROBLEMS]]
        number = sum(map(len, self.fatal.values()))
        if hidden := sum(len(places) for places in list(self.fatal.values())[_SHOWN_PROBLEMS:]):
            lines.append(f"... and {hidden:,} more")
        lines.append(f"{number:,} of {self.num_rows:,} rows read so far cannot be trained as they are")
        section, cures = self.setting.section, []
        if "dropped" in self.fatal_kinds:
            longer = f"data.max_length above {section.max_length}"
            cures.append(f"{longer}, or data.on_long: truncate or drop, lets long rows pass")
        if self.fatal_kinds & {"bad", "masked_out"}:
            cures.append(
                "data.on_bad_row: skip trains without the rows that are bad or have nothing to train on"
            )
        raise LorakitError("\n".join(lines), "; ".join(cures) + ".")

    def note(self) -> dict[str, Any]:
        """What is kept beside the tokens."""
        known = [self.formats[number] for number in sorted(self.formats)]
        names = {name for name, _ in known} or {self.setting.section.format}
        whys = [why for _, why in known] or ["no row can be read"]
        if len(names) > 1:
            whys = [
                f"{self.sources[n].path.rsplit('/', 1)[-1]}: {name}" for n, (name, _) in self.formats.items()
            ]
        return {
            "files": self.files,
            "samples": self.samples,
            "rows": {"read": self.num_rows, **{kind: self.counts.get(kind, 0) for kind in KINDS}},
            "first": self.first,
            "format": names.pop() if len(names) == 1 else "auto",
            "why": whys[0] if len(names) <= 1 and len(whys) == 1 else "; ".join(dict.fromkeys(whys)),
        }


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
        yield from read_chunks(file, header=named)


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


def recognised(chunk: Chunk, section: Data) -> tuple[str, str] | None:
    """(format, how it was known) by the first row that can be read, or None.

    Raises: LorakitError, with the place, when that row has the columns of no format.
    """
    for row in chunk.rows():
        if row.value is None:
            continue
        try:
            name = detect(rename(row.value, section.columns))
        except BadRow:
            continue
        except LorakitError as error:
            raise LorakitError(f"{row.place}: {error.message}", error.hint) from None
        return name, f"the columns {', '.join(FIELDS[name])} are there"
    return None


def _fatal(kind: str, section: Data) -> bool:
    if kind == "dropped":
        return section.on_long == "error"
    return kind in ("bad", "masked_out") and section.on_bad_row == "error"


def _told(reason: str, places: Sequence[str]) -> str:
    """`a.jsonl:3: reason (also rows 7, 9)`."""
    line = f"{places[0]}: {reason}"
    if len(places) == 1:
        return line
    numbers = [place.rpartition(":")[2] for place in places[1 : _SHOWN_ROWS + 1]]
    more = f" and {len(places) - _SHOWN_ROWS - 1:,} more" if len(places) > _SHOWN_ROWS + 1 else ""
    return f"{line} (also row{'s' if len(places) > 2 else ''} {', '.join(numbers)}{more})"
