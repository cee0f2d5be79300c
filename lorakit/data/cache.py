"""Tokenized data on disk, so that the second start on the same rows does not read them.

An entry is a folder: tokens.arrow (record batches of tokens.SCHEMA) and entry.json, written last. Its name is
a digest of all that decides the tokens: the files (path, size, times), the tokenizer, its template, the
recipe's fields and the code that tokenizes. It is built in a folder beside it, by one process at a time, and
renamed: whoever sees an entry sees all of it. Entries that nobody used for a month go when another is made.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from lorakit.data.tokens import SCHEMA, Digest, mapped
from lorakit.errors import LorakitError
from lorakit.terminal import say

_PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")
_NAME = re.compile(r"([0-9a-f]{32}|passing-[0-9a-f-]+)(\.new|\.lock)?")  # of all that is made here
_DAYS = 30  # an entry stays unused


class Unwritable(Exception):
    """There is no place for a cache."""


def root() -> Path:
    """Where entries lie: $LORAKIT_CACHE, or lorakit in the user's cache directory.

    Raises: Unwritable when it is below a home directory that nobody knows.
    """
    try:
        if chosen := os.environ.get("LORAKIT_CACHE"):
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorakit"
    except RuntimeError:  # a container whose user is a bare number
        raise Unwritable("this user has no home directory") from None


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
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # as before rendering, so that the key is the same after it
    backend.no_truncation()
    digest.update(backend.to_str().encode())
    named = [tokenizer.chat_template, tokenizer.special_tokens_map, type(tokenizer).__name__]
    named.append(tokenizer.split_special_tokens)
    packages = [version(package) for package in _PACKAGES]
    digest.update(json.dumps([named, packages, facts], sort_keys=True, default=str).encode())
    for code in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(code.read_bytes())
    return digest.hexdigest()[:32]


class Entry:
    """One entry of the cache, there or to be written. Without a name it is forgotten once it is mapped."""

    def __init__(self, name: str = "", home: Path | None = None) -> None:
        self.passing = not name
        self._name = name or f"passing-{os.getpid()}-{secrets.token_hex(4)}"
        self._home = home

    @cached_property
    def folder(self) -> Path:
        """Where it lies. Raises: Unwritable."""
        return (self._home or root() / "data") / self._name

    @property
    def _staged(self) -> Path:
        return _beside(self.folder, "new")

    def read(self) -> tuple[tuple[pa.RecordBatch, ...], dict[str, Any]] | None:
        """(record batches, what was noted with them), or None when the entry is not there, or damaged."""
        try:
            note = json.loads((self.folder / "entry.json").read_text())
            tokens = self.folder / "tokens.arrow"
            if tokens.stat().st_size != note["bytes"]:
                raise ValueError("cut short")
            found = mapped(tokens), note
        except (FileNotFoundError, Unwritable):
            return None
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            say(f"note      {self.folder} is damaged ({error}): the rows are tokenized again")
            return None
        if self.passing:  # the mapping keeps the file until it is no longer used; NFS keeps it in the folder
            shutil.rmtree(self.folder, ignore_errors=True)
        else:
            with suppress(OSError):  # the cache of another user
                os.utime(self.folder)
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time; a process that is killed lets go. Raises: Unwritable."""
        lock = None
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.passing:  # nobody else has its name
                self._staged.mkdir()
            else:
                lock = _locked(_beside(self.folder, "lock"))
        except OSError as error:
            raise Unwritable(str(error)) from None
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    @contextmanager
    def writing(self) -> Iterator["Sink"]:
        """A sink for the record batches, to be kept by commit() or dropped by discard(); only while locked.

        Raises: LorakitError when the disk is full.
        """
        shutil.rmtree(self._staged, ignore_errors=True)  # of a process that was killed
        with _told(self.folder.parent):
            self._staged.mkdir()
            file = (self._staged / "tokens.arrow").open("wb")
        try:
            with _told(self.folder.parent):
                writer = pa.ipc.new_file(file, SCHEMA)
            yield Sink(writer, self.folder.parent)
            with _told(self.folder.parent):
                writer.close()
                file.close()
        finally:
            with suppress(OSError):  # what was raised before says more
                file.close()

    def commit(self, note: dict[str, Any]) -> None:
        """Make what was written the entry. Raises: LorakitError when the disk is full."""
        tokens = self._staged / "tokens.arrow"
        with _told(self.folder.parent):
            note = {**note, "bytes": tokens.stat().st_size}
            (self._staged / "entry.json").write_text(json.dumps(note))
            for path in (tokens, self._staged / "entry.json"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self.folder, ignore_errors=True)
            self._staged.rename(self.folder)
        sweep(self.folder.parent)

    def discard(self) -> None:
        shutil.rmtree(self._staged, ignore_errors=True)


class Sink:
    """Takes record batches, and knows the fingerprint of all of them."""

    def __init__(self, writer: pa.RecordBatchFileWriter, home: Path) -> None:
        self._writer, self._home, self._digest = writer, home, Digest()

    def add(self, batch: pa.RecordBatch) -> None:
        """Raises: LorakitError when the disk is full."""
        with _told(self._home):
            self._writer.write_batch(batch)
        self._digest.add(batch)

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f"{folder.name}.{kind}")


@contextmanager
def _told(home: Path) -> Iterator[None]:
    """For our own writes alone: in the body of writing() other things fail, too."""
    try:
        yield
    except OSError as error:
        raise LorakitError(
            f"{home}: cannot write tokens: {error.strerror or error}",
            "Make room there, or set LORAKIT_CACHE to a directory elsewhere.",
        ) from None


def _locked(path: Path) -> IO[str]:
    """The lock file, held until it is closed. Raises: OSError where locks are not known."""
    told = False
    while True:
        lock = path.open("a")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    say("data      another process is tokenizing the same rows: waiting for it")
                told = True
                fcntl.flock(lock, fcntl.LOCK_EX)
            with suppress(FileNotFoundError):  # removed by sweep() while this process waited
                if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                    return lock
        except BaseException:
            lock.close()
            raise
        lock.close()


# ------------------------------------------------------------------------------------------------------------
# What nobody uses any more


def sweep(home: Path) -> None:
    """Remove the entries that nobody used for 30 days, and what killed processes left; say so.

    Only what has a name and a note as they are given here: the directory may be one that a user chose.
    """
    names: set[str] = set()
    with suppress(OSError):
        names = {match[1] for path in home.iterdir() if (match := _NAME.fullmatch(path.name))}
    sizes = [_remove(home / name) for name in sorted(names)]
    if number := sum(size > 0 for size in sizes):
        freed = f"{number} {'entry' if number == 1 else 'entries'}, {sum(sizes) / 1e6:,.0f} MB"
        say(f"note      {freed}, unused for {_DAYS} days, removed from {home}")


def _remove(folder: Path) -> int:
    """Bytes that were freed."""
    staged, lock = _beside(folder, "new"), _beside(folder, "lock")
    try:
        if _recent(folder, staged):
            return 0
        with lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _recent(folder, staged):  # used meanwhile
                return 0
            ours = folder.name.startswith("passing-") or (folder / "entry.json").is_file()
            if ours and folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(staged, ignore_errors=True)
                folder.rename(staged)  # whoever sees an entry sees all of it
            size = sum(path.stat().st_size for path in staged.glob("*"))
            shutil.rmtree(staged, ignore_errors=True)
            lock.unlink()
            return size
    except OSError:  # somebody holds the lock, or removes it as well
        return 0


def _recent(*folders: Path) -> bool:
    since = time.time() - _DAYS * 24 * 3600
    return any(folder.exists() and folder.stat().st_mtime > since for folder in folders)
