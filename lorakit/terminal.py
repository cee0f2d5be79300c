"""What people watch while they wait: lines and progress bars on stderr, from rank 0 only. Results go to
stdout."""

import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_shown: list["Progress"] = []  # on the screen now


def speaks() -> bool:
    """Whether this process is the one that talks: rank 0 of a torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One line (or several) to stderr, never wrapped."""
    if speaks():
        print(harmless(text), file=sys.stderr, flush=True)


@contextmanager
def progress() -> Iterator["Progress"]:
    """A rich progress display; silent when stderr is no terminal or another rank speaks."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not (speaks() and sys.stderr.isatty())
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as display:
        if not hidden:
            _shown.append(display)
        try:
            yield display
        finally:
            _shown[:] = [other for other in _shown if other is not display]


@contextmanager
def without_bars() -> Iterator[None]:
    """However the block ends, no bar stays on the screen, and the cursor is there again.

    A failure outside of track() leaves its generator open until Python comes round to it, or for ever.
    """
    try:
        yield
    finally:
        while _shown:
            _shown.pop().stop()


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items`, with a bar that says `what` is being done."""
    with progress() as display:
        task = display.add_task(what, total=total)
        for item in items:
            yield item
            display.advance(task)


# ------------------------------------------------------------------------------------------------------------
# Characters: data, file names and models are the work of others, and a terminal acts on some of them


def harmless(text: str) -> str:
    """`text` with signs for all that cannot be seen, its line ends as they are."""
    return "\n".join(map(visible, text.split("\n")))


def signs(text: str) -> Iterator[tuple[str, bool]]:
    """`text` as it may be shown, in runs: (characters, whether they are signs that stand for others)."""
    for is_sign, run in groupby(text, lambda character: _sign(character) != character):
        yield "".join(map(_sign, run)), is_sign


def visible(text: str) -> str:
    """`text` with signs for all that cannot be seen: no control character but a line end after its sign."""
    return "".join(map(_sign, text))


@lru_cache(maxsize=4096)
def _sign(character: str) -> str:
    r"""The character, or a sign for it: ↵, → or an escape such as \x1b, \u202e, \xa0.

    Unicode's categories C (control, format, private, unassigned) and Z (blanks) are what nobody can see.
    """
    if character in "\n\t":
        return {"\n": "↵\n", "\t": "→"}[character]
    if character != " " and unicodedata.category(character)[0] in "CZ":
        return character.encode("unicode_escape").decode()
    return character
