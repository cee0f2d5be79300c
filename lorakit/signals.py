"""SIGINT, SIGTERM and SIGUSR1 end a run with a resumable checkpoint; a second one ends it at once.

The loop asks Stop between steps. Before there is anything to save, a signal is a KeyboardInterrupt. Python
drops an exception that is raised within a finaliser (an object that happens to be freed just then): such a
signal is raised again a moment later, and never forgotten. Signals reach Python's main thread alone: in any
other they stay the business of the program that started it.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lorakit.terminal import speaks

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_AGAIN_AFTER = 0.01  # seconds


class Stop:
    def __init__(self) -> None:
        self.armed = False
        self.requested = False
        self._early = ""  # the signal that came before arm()

    def arm(self) -> None:
        """From now on a signal is a request, not an exception: there is something worth saving.

        Raises: KeyboardInterrupt when a signal came before, and something caught it.
        """
        self.armed = True
        if self._early:
            raise KeyboardInterrupt(self._early)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGALRM  # ours: the signal before it was dropped
        name = self._early if again else signal.Signals(number).name
        if self.requested:
            _tell(f"{name} again: stopped at once, without a checkpoint of the last steps")
            os._exit(130)
        if not self.armed:
            self._early = name
            raise KeyboardInterrupt(name)
        if not again:
            self.requested = True
            _tell(f"{name}: finishing this step, then a checkpoint (once more: stop at once, without one)")


def _tell(text: str) -> None:
    """A line on stderr from rank 0, by a call that is safe in a signal handler."""
    if speaks():
        os.write(2, f"{text}\n".encode())


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def listen() -> Iterator[Stop]:
    """A Stop that receives the signals while the context lasts; outside the main thread none ever arrives.

    The alarm of a program that calls lorakit stays its own, but for the moment in which a signal that was
    dropped is raised again.
    """
    stop = Stop()
    if not _in_main_thread():
        yield stop
        return
    before: dict[int, Any] = {number: signal.signal(number, stop._receive) for number in _SIGNALS}
    report_dropped = sys.unraisablehook
    timer: tuple[float, float] | None = None  # the program's, once ours took its place

    def raise_again(dropped: Any) -> None:
        nonlocal timer
        lost = issubclass(dropped.exc_type, KeyboardInterrupt) and not stop.armed and _in_main_thread()
        if not lost:
            report_dropped(dropped)
            return
        if signal.SIGALRM not in before:
            before[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop._receive)
        replaced = signal.setitimer(signal.ITIMER_REAL, _AGAIN_AFTER)
        timer = timer or replaced

    sys.unraisablehook = raise_again
    try:
        yield stop
    finally:
        sys.unraisablehook = report_dropped
        if timer is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        if timer is not None:
            signal.setitimer(signal.ITIMER_REAL, *timer)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals wait until the end of this block: what is being cleaned up gets clean."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
