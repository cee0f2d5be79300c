"""What a user is told when something is wrong: place, cause and cure, and the exit code that goes with it.

Everything a user can cause is a LorakitError; any other exception is a bug of ours and shows its traceback.
"""

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass


class LorakitError(Exception):
    """A message for the user. `hint` is the cure; `exit_code` is 2: found before step 0, nothing was
    trained."""

    exit_code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class RunError(LorakitError):
    """Something failed while running: disk, I/O, non-finite numbers, memory."""

    exit_code = 1


class Interrupted(LorakitError):
    """A signal ended the run. Under `lorakit train` a resumable checkpoint was written first, if a step was
    done."""

    exit_code = 130


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe or with data: where (file:line:column), which field, what and how to cure
    it."""

    where: str
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.where}  " if self.where else ""
        return f"{place}{self.field}: {self.message}" if self.field else f"{place}{self.message}"


class RecipeError(LorakitError):
    """All problems of a recipe at once, one per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def out_of_memory(error: BaseException) -> bool:
    """Of Python, of a GPU or of torch on a CPU; told by name, so that nothing needs torch to ask."""
    kind = type(error).__name__
    return isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)


_DEBUG = "Add --debug to see what it was doing."
_LESS_MEMORY = {  # the cure by verb; train has a message of its own
    "merge": "It holds the base in fp32 and the merged model beside it: take a machine with more memory.",
    "eval": "Without --exact-match, or with long rows cut, it needs less:"
    " --set data.max_length=N --set data.on_long=truncate.",
    "generate": "A smaller --batch-size or --max-new-tokens needs less.",
    "chat": "A smaller --max-new-tokens or a shorter conversation needs less.",
}


def as_told(error: Exception, verb: str) -> LorakitError | None:
    """The error as a user of `verb` should hear it: memory and disk fail for anybody; None: a bug of ours."""
    if isinstance(error, LorakitError):
        return error
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if out_of_memory(error):
        cure = _LESS_MEMORY.get(verb, "Close other programs, or take a machine with more memory.")
        if type(error).__name__ == "OutOfMemoryError":
            cure += "\n  On the CPU, in its memory: CUDA_VISIBLE_DEVICES= before the command."
        return RunError(f"out of memory: {first}", cure)
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return RunError(f"stopped: {first}", "Make room there, then run it again." if full else _DEBUG)
    if type(error).__name__ == "SafetensorError":
        return RunError(f"stopped: {first}", f"A weight file is damaged, or the disk is full. {_DEBUG}")
    return None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`Did you mean "rank"?` when one of `choices` is near `word`, else the empty string."""
    near = nearest(word, choices)
    return f'Did you mean "{near}"?' if near else ""


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that `word` may be a slip of."""
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None
