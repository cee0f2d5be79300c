"""What people watch while they wait: lines and progress bars on stderr, from rank 0 only. Results go to
stdout."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
        print(text, file=sys.stderr, flush=True)


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
