"""A signal is never forgotten, wherever it arrives."""

import contextlib
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from lorakit.signals import listen


class Finalised:
    """Sends SIGINT from within its own finaliser, where Python drops exceptions."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)  # the handler runs here at the latest


def test_a_signal_in_a_finaliser_arrives_a_moment_later(capfd: pytest.CaptureFixture[str]) -> None:
    with listen(), pytest.raises(KeyboardInterrupt, match="SIGINT"):
        Finalised()
        time.sleep(5)
    assert capfd.readouterr().err == ""


def test_a_signal_that_a_library_caught_is_found_when_the_loop_is_about_to_start() -> None:
    with listen() as stop:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            stop.arm()


def test_an_armed_stop_is_asked_for_and_raises_nothing() -> None:
    with listen() as stop:
        stop.arm()
        assert not stop.requested
        signal.raise_signal(signal.SIGUSR1)
        assert stop.requested


def test_the_handlers_and_hooks_of_before_come_back() -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM)], sys.unraisablehook
    with listen():
        assert signal.getsignal(signal.SIGINT) is not before[0][0]
    assert ([signal.getsignal(n) for n in (signal.SIGINT, signal.SIGALRM)], sys.unraisablehook) == before


@pytest.mark.parametrize("dropped", [False, True])
def test_the_alarm_of_a_host_stays_set(dropped: bool) -> None:
    """Also where its timer had to serve to raise a dropped signal again."""
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    signal.setitimer(signal.ITIMER_REAL, 60, 30)
    try:
        with listen(), pytest.raises(KeyboardInterrupt) if dropped else contextlib.nullcontext():
            if dropped:
                Finalised()
                time.sleep(5)
        seconds, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 50 < seconds <= 60
        assert interval == 30
        assert not rung
        signal.raise_signal(signal.SIGALRM)
        assert rung == [signal.SIGALRM]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_an_alarm_of_a_host_rings_while_a_run_lasts() -> None:
    """It is neither a signal to lorakit nor the second one that ends a run at once."""
    rung: list[int] = []
    handler = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        with listen() as stop:
            signal.raise_signal(signal.SIGALRM)
            stop.arm()
            stop.requested = True
            signal.raise_signal(signal.SIGALRM)
        assert len(rung) == 2
    finally:
        signal.signal(signal.SIGALRM, handler)


def test_a_host_may_train_in_a_thread_of_its_own(write_recipe, tmp_path: Path) -> None:
    """Python lets the main thread alone set handlers: in another, nothing is touched and nothing stops."""
    from lorakit.recipe import load_recipe
    from lorakit.train import train

    recipe = load_recipe(write_recipe())
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    seen: list[object] = []

    def work() -> None:
        try:
            seen.append(train(recipe))
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert seen == [tmp_path / "run"]
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
