"""The command line: each verb parses, calls one function and prints. Nothing heavy is imported before a verb
runs.

before.py has the verbs of recipes, finished.py those of what was trained; app.py is what both share.
"""

import logging
import os
import sys
import traceback

from lorakit.cli import before, finished  # noqa: F401  (their verbs enter the program)
from lorakit.cli.app import app
from lorakit.errors import RunError, as_told
from lorakit.terminal import harmless, say, speaks, without_bars

__all__ = ["app", "main"]


def main() -> None:
    """The `lorakit` command: a user's mistake ends in one message and its exit code, never in a traceback."""
    words = [word for word in sys.argv[1:] if word != "--debug"]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it speaks while it is imported
    try:
        with without_bars():
            app(words, prog_name="lorakit")
    except Exception as error:
        told = as_told(error, next(iter(words), ""))
        if told is None:
            raise
        if "--debug" in sys.argv[1:]:
            traceback.print_exc()
        if speaks() or isinstance(told, RunError):  # what fails while running may fail on one rank only
            print(harmless(f"lorakit: {told}"), file=sys.stderr)
        _leave(told.exit_code)
    except (KeyboardInterrupt, SystemExit) as end:  # Typer makes the second of the first
        if isinstance(end, SystemExit) and end.code != 130:
            raise
        say("lorakit: interrupted")
        _leave(130)


def _leave(code: int) -> None:
    """End with `code`. After a signal at once: where it arrived within an import, the interpreter would
    forget the code and end as if killed."""
    if code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
