"""The cache of tokens: what it is keyed by, and that nothing half written is ever used."""

import copy
import errno
import fcntl
import json
import os
import pwd
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data import cache, load
from lorakit.data.tokens import Entry as Stored
from lorakit.data.tokens import as_batch
from lorakit.errors import LorakitError
from lorakit.recipe.data import Data
from lorakit.recipe.section import Section
from tests.conftest import ROOT

NUMBER = 2600  # rows: more than are kept in memory
LONG = 6000  # rows that take a while
DAY = 24 * 3600


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps({"prompt": f"{n} ", "completion": str(n % 7)}) for n in range(NUMBER))
    Path("d.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def loaded(tokenizer: Any, *names: str, **fields: Any) -> Any:
    paths = tuple(str(Path(name).absolute()) for name in names or ("d.jsonl",))
    return load(paths, Data(train=paths, **fields), tokenizer, "auto")


def entries() -> list[Path]:
    return sorted(path for path in (cache.root() / "data").glob("*") if path.is_dir())


def samples(found: Any) -> list[tuple[list[int], list[int]]]:
    return [tuple(array.tolist() for array in found.tokens.sample(i)) for i in range(len(found.tokens))]


def test_a_second_start_reads_no_row_and_has_the_same_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loaded(tokenizer)
    assert [entry.stat().st_mode & 0o077 for entry in entries()[0].parents[:1]] == [0]

    def never(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a row was read")

    monkeypatch.setattr("lorakit.data.reading.read_chunks", never)
    second = loaded(tokenizer)
    assert samples(first) == samples(second)
    assert (
        list(first.tokens.places) == list(second.tokens.places) == [f"d.jsonl:{n + 1}" for n in range(NUMBER)]
    )
    assert first.account.as_dict() == second.account.as_dict()
    assert (first.format, first.why) == (second.format, second.why)
    assert first.tokens.fingerprint() == second.tokens.fingerprint()


def test_workers_and_this_process_make_the_same_tokens(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the rows, whoever was first; the fingerprint does not know how they came about."""
    many = loaded(tokenizer)
    monkeypatch.setattr("lorakit.data.num_cores", lambda: 1)
    shutil.rmtree(cache.root())
    alone = loaded(tokenizer)
    assert samples(many) == samples(alone)
    monkeypatch.setattr("lorakit.data.FIRST_ROWS", 10 * NUMBER)
    shutil.rmtree(cache.root())
    in_memory = loaded(tokenizer)
    assert entries() == []
    assert samples(many) == samples(in_memory)
    assert len({found.tokens.fingerprint() for found in (many, alone, in_memory)}) == 1


def test_few_rows_are_not_kept(tokenizer: Any) -> None:
    Path("few.jsonl").write_text('{"prompt": "1", "completion": "2"}\n' * 1000)
    loaded(tokenizer, "few.jsonl")
    assert entries() == []


def touched() -> None:
    os.utime("d.jsonl", ns=(1, 1))


def edited() -> None:
    """One digit, the size and the time as before."""
    stat = os.stat("d.jsonl")
    text = Path("d.jsonl").read_text()
    Path("d.jsonl").write_text(text.replace('"7 "', '"8 "', 1))
    os.utime("d.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat("d.jsonl").st_size == stat.st_size


@pytest.mark.parametrize("change", [touched, edited])
def test_a_changed_file_is_read_again(tokenizer: Any, change: Any) -> None:
    before = loaded(tokenizer).tokens.fingerprint()
    change()
    assert (loaded(tokenizer).tokens.fingerprint() == before) is (change is touched)
    assert len(entries()) == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"max_length": 100},
        {"on_long": "truncate"},
        {"on_bad_row": "skip"},
        {"limit": 2500},
        {"format": "prompt-completion"},
        {"columns": {"prompt": "completion", "completion": "prompt"}},
    ],
)
def test_each_field_that_decides_tokens_has_an_entry_of_its_own(
    tokenizer: Any, fields: dict[str, Any]
) -> None:
    loaded(tokenizer)
    loaded(tokenizer, **fields)
    assert len(entries()) == 2


def test_tokenizer_template_and_task_have_entries_of_their_own(tokenizer: Any) -> None:
    loaded(tokenizer)
    path = str(Path("d.jsonl").absolute())
    load(path, Data(train=path), tokenizer, "all")
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    loaded(other)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["xyz"])
    loaded(more)
    parts = copy.deepcopy(tokenizer)
    parts.split_special_tokens = True
    loaded(parts)
    assert len(entries()) == 5


def test_a_tokenizer_that_was_used_has_the_key_it_had(tokenizer: Any) -> None:
    """A call, and rendering, leave other lengths to cut and to pad at in it."""
    used = copy.deepcopy(tokenizer)
    used.backend_tokenizer.enable_truncation(7)
    used.backend_tokenizer.enable_padding(length=9)
    keys = [cache.key([], used, {})]
    used(["1 2", "3"], truncation=True, max_length=4)
    keys.append(cache.key([], used, {}))
    loaded(used)
    assert {*keys, cache.key([], used, {})} == {cache.key([], tokenizer, {})}


def test_what_does_not_decide_tokens_shares_an_entry(tokenizer: Any) -> None:
    loaded(tokenizer)
    loaded(tokenizer, packing=False)
    path = {"path": str(Path("d.jsonl").absolute()), "weight": 2.0}
    section = Data.model_validate({"train": path})
    assert isinstance(section.train, Section)
    doubled = load(section.train, section, tokenizer, "auto")
    assert len(entries()) == 1
    assert doubled.tokens.num_draws == 2 * NUMBER


def damage_cut(entry: Path) -> None:
    os.truncate(entry / "tokens.arrow", 1000)


def damage_note(entry: Path) -> None:
    (entry / "entry.json").write_text('{"files": [')


def damage_bytes(entry: Path) -> None:
    """As long as before, and no Arrow file."""
    size = (entry / "tokens.arrow").stat().st_size
    (entry / "tokens.arrow").write_bytes(b"\0" * size)


def damage_gone(entry: Path) -> None:
    (entry / "tokens.arrow").unlink()


@pytest.mark.parametrize("damage", [damage_cut, damage_note, damage_bytes, damage_gone])
def test_a_damaged_entry_is_made_again(tokenizer: Any, damage: Any, capsys) -> None:
    first = samples(loaded(tokenizer))
    [entry] = entries()
    damage(entry)
    capsys.readouterr()
    assert samples(loaded(tokenizer)) == first
    told = capsys.readouterr().err
    assert damage is damage_gone or "is damaged" in told
    assert entries() == [entry]
    assert samples(loaded(tokenizer)) == first
    assert "is damaged" not in capsys.readouterr().err


def test_rows_that_are_refused_leave_no_entry(tokenizer: Any) -> None:
    with Path("d.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(Exception, match=f"d.jsonl:{NUMBER + 1}: not JSON"):
        loaded(tokenizer)
    assert entries() == []


def test_a_place_that_cannot_be_written_costs_the_cache_only(
    tokenizer: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("LORAKIT_CACHE", str(here / "file" / "below"))
    assert len(loaded(tokenizer).tokens) == NUMBER
    assert "LORAKIT_CACHE" in capsys.readouterr().err


def test_a_user_without_a_home_has_no_cache(tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def nobody(number: int) -> Any:
        raise KeyError(number)

    for name in ("LORAKIT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(cache.Unwritable):
        cache.root()
    assert len(loaded(tokenizer).tokens) == NUMBER
    assert "no cache: this user has no home directory; LORAKIT_CACHE" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_has_no_cache(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys, number: int
) -> None:
    def unknown(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", unknown)
    assert len(loaded(tokenizer).tokens) == NUMBER
    assert f"no cache: [Errno {number}]" in capsys.readouterr().err
    assert entries() == []


def batch() -> Any:
    return as_batch([Stored(np.arange(5, dtype=np.int32), np.ones(5, np.uint8))])


def passed() -> cache.Entry:
    entry = cache.Entry()
    with entry.locked():
        with entry.writing() as sink:
            sink.add(batch())
        entry.commit({})
    return entry


def test_a_passing_entry_leaves_neither_a_folder_nor_a_lock() -> None:
    found = passed().read()
    assert found is not None
    assert found[0][0].column("ids").to_pylist() == [[0, 1, 2, 3, 4]]
    assert list((cache.root() / "data").iterdir()) == []


def test_a_mapped_file_that_stays_in_its_folder_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: it has another name there until it is closed."""
    entry, remove = passed(), os.rmdir

    def in_use(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(entry.folder)) or path == entry.folder.name:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        remove(path, *arguments, **options)

    monkeypatch.setattr(os, "rmdir", in_use)
    found = entry.read()
    assert found is not None
    assert entry.folder.exists()
    assert found[0][0].num_rows == 1


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Within the block alone: the tests' own output may go to a file that is larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_nothing_stays(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match="cannot write tokens: File too large"), largest_file(4096):
        loaded(tokenizer)
    assert entries() == []


def test_a_disk_that_is_full_at_the_end_is_told() -> None:
    """The last bytes are written when the file is closed, and the note by commit()."""
    entry = cache.Entry("0" * 32)
    with entry.locked():
        told = pytest.raises(LorakitError, match="cannot write tokens")
        with told, ExitStack() as stack, entry.writing() as sink:
            sink.add(batch())
            stack.enter_context(largest_file(0))
        with pytest.raises(LorakitError, match="cannot write tokens"), largest_file(0):
            entry.commit({})


@pytest.mark.parametrize("error", [OSError(errno.EIO, "d.jsonl"), OSError(errno.ENOSPC, "elsewhere")])
def test_what_fails_beside_the_cache_is_no_full_disk(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(*arguments: Any) -> Any:
        raise error

    monkeypatch.setattr("lorakit.data.tokenize_all", fail)
    with pytest.raises(OSError) as caught:
        loaded(tokenizer)
    assert caught.value is error
    assert entries() == []


def aged(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def stored(name: str, days: float, *files: str) -> Path:
    folder = cache.root() / "data" / name
    folder.mkdir(parents=True)
    for file in files:
        (folder / file).write_text("x" * 1000)
    aged(folder, days)
    return folder


def test_what_was_not_used_for_thirty_days_goes_with_the_next_commit(
    tokenizer: Any, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorakit.data.num_cores", lambda: 1)  # forks hold the locks until they end
    old = [
        stored("a" * 32, 31, "tokens.arrow", "entry.json"),
        stored("b" * 32 + ".new", 31, "tokens.arrow"),
        stored("passing-12-0123abcd", 31, ".nfs0001"),
        stored("passing-12-0123abce.new", 31, "tokens.arrow"),
    ]
    mine = [
        stored("c" * 32, 29, "tokens.arrow", "entry.json"),
        stored("d" * 32 + ".new", 29, "tokens.arrow"),
        stored("e" * 32, 31, "letters.txt"),
        stored("photos", 31, "entry.json"),
        stored("photos.new", 31, "tokens.arrow"),
        stored("passing", 31, "entry.json"),
        stored("f" * 32, 31, "tokens.arrow", "entry.json"),
    ]
    home = cache.root() / "data"
    (home / ("a" * 32 + ".lock")).touch()
    with (home / ("f" * 32 + ".lock")).open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        loaded(tokenizer)
        assert [path.exists() for path in old] == [False] * len(old)
        assert [path.exists() for path in mine] == [True] * len(mine)
        assert not (home / ("a" * 32 + ".lock")).exists()
        assert (home / ("f" * 32 + ".lock")).exists()
    told = [line for line in capsys.readouterr().err.splitlines() if "removed" in line]
    assert len(told) == 1
    assert "4 entries, 0 MB, unused for 30 days" in told[0]
    cache.sweep(home)
    assert not mine[-1].exists()
    assert "1 entry" in capsys.readouterr().err
    cache.sweep(home)
    assert capsys.readouterr().err == ""


def test_reading_an_entry_is_using_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorakit.data.num_cores", lambda: 1)  # forks hold the locks until they end
    loaded(tokenizer)
    [entry] = entries()
    aged(entry, 31)
    loaded(tokenizer)
    cache.sweep(entry.parent)
    assert entries() == [entry]
    aged(entry, 31)
    cache.sweep(entry.parent)
    assert entries() == []


def test_who_waits_for_a_lock_that_is_removed_takes_the_new_one() -> None:
    """Else two processes would hold locks of the same name."""
    entry = cache.Entry("0" * 32)
    entry.folder.parent.mkdir(parents=True)
    lock = entry.folder.with_name(f"{entry.folder.name}.lock")
    with ThreadPoolExecutor(1) as pool:
        with lock.open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)

            def wait() -> bool:
                with entry.locked(), lock.open("a") as second:
                    try:
                        fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return True
                    return False

            waiting = pool.submit(wait)
            time.sleep(0.3)
            assert not waiting.done()
            lock.unlink()
        assert waiting.result(timeout=10)


LOAD = """
import sys
from transformers import AutoTokenizer
from lorakit.data import load
from lorakit.recipe.data import Data
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
found = load(sys.argv[2], Data(train=sys.argv[2]), tokenizer, "auto")
print(len(found.tokens), found.tokens.fingerprint())
"""


def start(tiny: Path, here: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", LOAD, str(tiny / "model"), str(here / "d.jsonl")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=here, stdout=pipe, stderr=pipe, text=True)


def test_two_processes_at_once_make_one_entry(tiny: Path, here: Path) -> None:
    both = [start(tiny, here) for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert told[0][0] == told[1][0]
    assert told[0][0].startswith(f"{NUMBER} ")
    assert len(entries()) == 1


def test_a_process_killed_in_the_middle_leaves_nothing_that_is_used(
    tiny: Path, here: Path, tokenizer: Any
) -> None:
    """Neither an entry nor a process: its workers see that it is gone."""
    with (here / "d.jsonl").open("a") as file:
        file.writelines(json.dumps({"prompt": "1 " * 400, "completion": "2"}) + "\n" for _ in range(LONG))
    process = start(tiny, here)
    tokens = None
    while tokens is None or tokens.stat().st_size < 100_000:
        assert process.poll() is None, process.communicate()
        tokens = next((here / "cache").glob("data/*.new/tokens.arrow"), None)
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= 2 or len(os.sched_getaffinity(0)) < 2
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert [entry.suffix for entry in entries()] == [".new"]
    found = loaded(tokenizer)
    assert len(found.tokens) == NUMBER + LONG
    assert [entry.suffix for entry in entries()] == [""]
    again = loaded(tokenizer)
    assert np.array_equal(found.tokens.lengths, again.tokens.lengths)
