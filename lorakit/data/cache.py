"""Tokenized data on disk, so that the second start on the same rows does not read them.

An entry is a folder: tokens.arrow (record batches of tokens.SCHEMA) and entry.json, written last. Its name is
a digest of all that decides the tokens: the files (path, size, times), the tokenizer, its template, the
recipe's fields and the code that tokenizes. It is built in a folder beside it, by one process at a time, and
renamed: whoever sees an entry sees all of it.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from lorakit.data.tokens import SCHEMA, Digest, mapped
from lorakit.errors import LorakitError
from lorakit.terminal import say

_PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")


def root() -> Path:
    """Where entries lie: $LORAKIT_CACHE, or lorakit in the user's cache directory."""
    if chosen := os.environ.get("LORAKIT_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit"


def key(files: Sequence[Path], tokenizer: Any, facts: Any) -> str:
    """The name of the entry: 32 hexadecimal digits. `facts`: whatever else decides the tokens, as JSON.

    Files count by path, size and the times of their last change (of content and of inode), which no edit
    leaves alone; no row is read.
    """
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        seen = [str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        digest.update(json.dumps(seen).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    named = [tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    packages = [version(package) for package in _PACKAGES]
    digest.update(json.dumps([named, packages, facts], sort_keys=True, default=str).encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    return digest.hexdigest()[:32]


class Unwritable(Exception):
    """There is no place for a cache."""


class Entry:
    """One entry of the cache, there or to be written. Without a name it is forgotten once it is mapped."""

    def __init__(self, name: str = "", home: Path | None = None) -> None:
        self.passing = not name
        self.folder = (home or root() / "data") / (name or f"passing-{os.getpid()}")
        self._staged = self.folder.with_name(f"{self.folder.name}.new")

    def read(self) -> tuple[tuple[pa.RecordBatch, ...], dict[str, Any]] | None:
        """(record batches, what was noted with them), or None when the entry is not there, or damaged."""
        try:
            note = json.loads((self.folder / "entry.json").read_text())
            tokens = self.folder / "tokens.arrow"
            if tokens.stat().st_size != note["bytes"]:
                raise ValueError("cut short")
            found = mapped(tokens), note
            if self.passing:  # the mapping keeps the file until it is no longer used
                shutil.rmtree(self.folder)
            return found
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            say(f"note      {self.folder} is damaged ({error}): the rows are tokenized again")
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; a process that is killed lets go. Raises: Unwritable."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = self.folder.with_name(f"{self.folder.name}.lock").open("a")
        except OSError as error:
            raise Unwritable(str(error)) from None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("data      another process is tokenizing the same rows: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def writing(self) -> Iterator["Sink"]:
        """A sink for the record batches, to be kept by commit(); only while locked.

        Raises: LorakitError when the disk is full.
        """
        shutil.rmtree(self._staged, ignore_errors=True)  # of a process that was killed
        try:
            self._staged.mkdir()
            with (self._staged / "tokens.arrow").open("wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
                yield Sink(writer)
        except OSError as error:
            raise LorakitError(
                f"{self._staged.parent}: cannot write tokens: {error.strerror or error}",
                "Make room there, or set LORAKIT_CACHE to a directory elsewhere.",
            ) from None
        finally:
            if not (self._staged / "tokens.arrow").exists():
                shutil.rmtree(self._staged, ignore_errors=True)

    def commit(self, note: dict[str, Any]) -> None:
        """Make what was written the entry."""
        tokens = self._staged / "tokens.arrow"
        note = {**note, "bytes": tokens.stat().st_size}
        (self._staged / "entry.json").write_text(json.dumps(note))
        for path in (tokens, self._staged / "entry.json"):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(self.folder, ignore_errors=True)
        self._staged.rename(self.folder)

    def discard(self) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)


class Sink:
    """Takes record batches, and knows the fingerprint of all of them."""

    def __init__(self, writer: pa.RecordBatchFileWriter) -> None:
        self._writer, self._digest = writer, Digest()

    def add(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self._digest.add(batch)

    def fingerprint(self) -> str:
        return self._digest.hexdigest()
