"""The run directory: one place, one writer, and files that are either whole or not there.

<output>/ recipe.yaml resolved.yaml run.json metrics.jsonl data.md params.json params.md adapter/ checkpoints/
          .lock; a stream's journal: stream.jsonl; where ranks are decided: ranks.svg
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from lorakit.errors import LorakitError
from lorakit.recipe import Recipe, comparable


class Run:
    """An output directory that this process may write. `open_run` makes one."""

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self.started = False
        # Held while this object lives; the system frees it when the process dies, however it dies.
        self.lock = lock

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def record(self) -> dict[str, Any]:
        """run.json, or an empty mapping before there is one."""
        return read_record(self.path)

    def update(self, **fields: Any) -> None:
        """Change fields of run.json; the others stay."""
        self.write("run.json", json.dumps(self.record() | fields, indent=2, allow_nan=False) + "\n")

    def start(self, **fields: Any) -> None:
        """run.json from scratch: from here on this directory holds a run."""
        self.started = True
        self.write("run.json", json.dumps(fields, indent=2) + "\n")

    def fail(self, error: BaseException) -> None:
        """Record how a run ended; a directory in which no run ever started is left as it was found."""
        with contextlib.suppress(OSError):  # the disk may be what failed
            if self.started:
                status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
                self.update(status=status, error=str(error))
            elif not (self.path / "run.json").exists():
                (self.path / ".lock").unlink(missing_ok=True)
                if not any(self.path.iterdir()):
                    self.path.rmdir()

    def close(self) -> None:
        """Let another process write here."""
        self.lock.close()

    def write(self, name: str, text: str) -> None:
        """A file of the run, replaced as a whole."""
        new = self.path / f".{name}.new"
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / name)
        self._sync()

    def _sync(self) -> None:
        """Bring the names in the run directory to the disk."""
        handle = os.open(self.path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)

    def append_metrics(self, line: dict[str, Any]) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def cut_metrics(self, step: int) -> None:
        """Keep the lines up to `step`: what came after a checkpoint happens again."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        kept = []
        for line in lines:
            try:
                values = json.loads(line)
                if values["step"] <= step and "ranks" not in values:  # told again at the end of the run
                    kept.append(line + "\n")
            except (ValueError, KeyError):  # a line that a kill cut short
                continue
        self.write("metrics.jsonl", "".join(kept))

    def replace_folder(self, name: str, new: Path) -> None:
        """Put the finished folder `new` in the place of the run's folder `name`."""
        old, final = self.path / f".{name}.old", self.path / name
        shutil.rmtree(old, ignore_errors=True)
        if final.exists():
            final.rename(old)
        new.rename(final)
        self._sync()
        shutil.rmtree(old, ignore_errors=True)

    def recover(self) -> None:
        """Finish a replacement of a folder that a kill interrupted, and remove what was half written."""
        for old in self.path.glob(".*.old"):
            final = self.path / old.name[1:-4]
            shutil.rmtree(old) if final.exists() else old.rename(final)
        for new in [*self.path.glob(".*.new"), *self.checkpoints.glob(".step-*.new")]:
            shutil.rmtree(new) if new.is_dir() else new.unlink()


def must_exist(place: Path) -> None:
    """Raises: LorakitError where `place` is no directory, and so neither a run nor an adapter."""
    if not place.is_dir():
        told = f"{place} is a file" if place.is_file() else f"{place}: no such directory"
        raise LorakitError(told, "Give a run directory or an adapter directory.")


def read_record(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((path / "run.json").read_text()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise LorakitError(f"{path / 'run.json'}: cannot be read: {error}") from None


def open_run(output: Path, resume: str) -> Run:
    """The run directory `output`, made if need be, and locked against a second writer.

    Raises: LorakitError when it cannot be written, holds another run (unless resuming) or something else.
    """
    if output.exists() and not output.is_dir():
        raise LorakitError(f"output: {output} is a file")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a")
    except OSError as error:
        raise LorakitError(f"output: cannot write to {output}: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # whatever lies there is the other process's: touch nothing
        lock.close()
        message = f"output: another process is writing {output}"
        raise LorakitError(message, "Wait for it, or choose another place.") from None
    run = Run(output, lock)
    try:
        _claim(run, resume)
    except BaseException as error:
        run.fail(error)
        run.close()
        raise
    return run


def _claim(run: Run, resume: str) -> None:
    """Raises: LorakitError when this process may not write the run."""
    output = run.path
    run.recover()
    holds_run = (output / "run.json").exists()
    if holds_run and resume == "never":
        other = shlex.quote(f"{output}-2")
        raise LorakitError(
            f"output: {output} already holds a run",
            f"{continue_hint(output)}\n  Start another: lorakit train RECIPE --output {other}",
        )
    strangers = sorted(entry.name for entry in output.iterdir() if entry.name != ".lock")
    if strangers and not holds_run:
        message = f"output: {output} is not empty and holds no run ({strangers[0]})"
        raise LorakitError(message, "Choose another place.")
    probe = output / ".probe.new"
    try:
        probe.write_bytes(b"x" * 4096)
    except OSError as error:
        raise LorakitError(f"output: cannot write to {output}: {error.strerror}") from None
    finally:
        probe.unlink(missing_ok=True)


def continue_hint(output: Path) -> str:
    """The command that continues the run of `output`, with as many processes as it had."""
    num_ranks = read_record(output).get("num_ranks", 1)
    launcher = (
        "lorakit" if num_ranks == 1 else f"torchrun --standalone --nproc-per-node {num_ranks} -m lorakit"
    )
    return f"Continue it: {launcher} train {shlex.quote(str(output / 'resolved.yaml'))} --resume auto"


def check_space(output: Path, needed_bytes: int, product: str) -> None:
    """Raises: LorakitError when the disk cannot hold what the run will write beside what it wrote already.

    `product`: the folder of the run that holds what was trained.
    """
    written = sum(
        path.stat().st_size
        for folder in ("checkpoints", product)
        for path in (output / folder).rglob("*")
        if path.is_file()
    )
    free = shutil.disk_usage(output).free
    if free + written < needed_bytes:
        needs = f"checkpoints and {product}/ need {(needed_bytes - written) / 1e6:,.1f} MB more"
        raise LorakitError(f"output: {output} has {free / 1e6:,.1f} MB free; {needs}")


def check_recipe(record: dict[str, Any], recipe: Recipe) -> None:
    """Raises: LorakitError with every field in which a run's recipe differs from this one.

    A field that says what was decided then (as in resolved.yaml) is the same as the one it was decided for.
    """
    if not record:
        return
    before, now = record.get("recipe", {}), json.loads(json.dumps(comparable(recipe)))
    decided = {name: decision["value"] for name, decision in record.get("decisions", {}).items()}
    _refuse(
        f"{name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in sorted(before.keys() | now.keys())
        if now.get(name) not in (before.get(name), decided.get(name, before.get(name)))
        and not (now.get(name) == "auto" and name in decided)
    )


def check_facts(record: dict[str, Any], facts: dict[str, Any]) -> None:
    """Raises: LorakitError when the rows, the model or the number of processes are not what they were."""
    before, now = record.get("fingerprints", {}), facts["fingerprints"]
    found = [
        f"{name}: not the same {'weights' if name == 'model' else 'rows or tokens'}"
        for name in now
        if before.get(name) != now[name]
    ]
    if record.get("num_ranks") != facts["num_ranks"]:
        found.append(f"processes: {record.get('num_ranks')} then, {facts['num_ranks']} now")
    _refuse(found)


def _refuse(differences: Iterable[str]) -> None:
    if found := list(differences):
        raise LorakitError(
            "this run cannot be continued, because the result would be another:\n  " + "\n  ".join(found),
            "Restore what it was, or start a new run with --output.",
        )
