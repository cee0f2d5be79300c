"""The cache of tokens: what it is keyed by, and that nothing half written is ever used."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data import cache, load
from lorakit.recipe.data import Data
from lorakit.recipe.section import Section
from tests.conftest import ROOT

NUMBER = 2600  # rows: more than are kept in memory


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
    import copy

    loaded(tokenizer)
    path = str(Path("d.jsonl").absolute())
    load(path, Data(train=path), tokenizer, "all")
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    loaded(other)
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["xyz"])
    loaded(more)
    assert len(entries()) == 4


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
        file.writelines(json.dumps({"prompt": "1 " * 400, "completion": "2"}) + "\n" for _ in range(20_000))
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
    assert len(found.tokens) == NUMBER + 20_000
    assert [entry.suffix for entry in entries()] == [""]
    again = loaded(tokenizer)
    assert np.array_equal(found.tokens.lengths, again.tokens.lengths)
