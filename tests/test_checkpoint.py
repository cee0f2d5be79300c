"""Checkpoints: whole or not there, whatever is done to their files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lorakit import checkpoint
from lorakit.errors import LorakitError


def content(value: float = 1.0) -> checkpoint.Checkpoint:
    tensors = {"b": torch.full((3, 2), value), "a": torch.arange(4.0)}
    return checkpoint.Checkpoint(
        tensors, {"exp_avg|a": torch.ones(4), "step|a": torch.tensor(3.0)}, {"step": 3}
    )


def save(root: Path, step: int, keep: int = 2) -> Path:
    return checkpoint.save(root, step, content(step), {"peft_type": "LORA"}, keep)


def test_round_trip_and_names(tmp_path: Path) -> None:
    folder = save(tmp_path, 500)
    assert folder.name == "step-000500"
    found = checkpoint.load(folder)
    assert torch.equal(found.adapter["b"], torch.full((3, 2), 500.0))
    assert found.optimizer["step|a"].item() == 3
    assert found.state == {"step": 3}
    assert {p.name for p in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }


def test_only_the_newest_are_kept_in_order_of_step_not_of_time(tmp_path: Path) -> None:
    for step in (900, 1000, 1_000_000, 1100):
        save(tmp_path, step)
        os.utime(tmp_path / f"step-{step:06d}", (0, 0))
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-001100", "step-1000000"]


def test_order_is_of_numbers_and_what_was_just_written_stays(tmp_path: Path) -> None:
    save(tmp_path, 999_900, keep=1)
    assert save(tmp_path, 1_000_000, keep=1).exists()
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-1000000"]
    assert save(tmp_path, 5, keep=1).exists()


def test_foreign_directories_survive(tmp_path: Path) -> None:
    for name in ("step-mine", "checkpoint-7", "steps"):
        (tmp_path / name).mkdir()
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    (tmp_path / "step-000001").symlink_to(elsewhere)
    for step in (10, 20, 30):
        save(tmp_path, step, keep=1)
    assert elsewhere.is_dir()
    assert {p.name for p in tmp_path.iterdir()} == {
        "step-mine",
        "checkpoint-7",
        "steps",
        "step-000001",
        "step-000030",
    }


FILES = [
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "adapter_config.json",
    "manifest.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["first", "middle", "last", "empty", "half", "short", "gone", "longer"])
def test_any_damage_is_seen_and_the_one_before_is_used(name: str, how: str, tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    path = newer / name
    raw = bytearray(path.read_bytes())
    place = {"first": 0, "middle": len(raw) // 2, "last": len(raw) - 1}.get(how)
    if place is not None:
        raw[place] ^= 0x20
        path.write_bytes(raw)
    elif how == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"empty": b"", "half": raw[: len(raw) // 2], "short": raw[:-1], "longer": raw + b"x"}[how]
        )
    said: list[str] = []
    if name == "manifest.json" and how in ("last", "short", "longer"):
        pytest.skip("a line end more or less at the end of the manifest says the same")
    assert checkpoint.damage(newer)
    with pytest.raises(LorakitError):
        checkpoint.load(newer)
    assert checkpoint.newest(tmp_path, said.append) == older
    assert str(newer) in said[0]


def test_swapped_files_are_seen(tmp_path: Path) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    shutil.copy(one / "adapter_model.safetensors", two / "adapter_model.safetensors")
    assert checkpoint.damage(two) == "adapter_model.safetensors is damaged"


def test_safetensors_metadata_is_one_key(tmp_path: Path) -> None:
    raw = (save(tmp_path, 1) / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


SAVE = """
import sys
sys.path.insert(0, sys.argv[2])
from tests.test_checkpoint import save
from pathlib import Path
save(Path(sys.argv[1]), 2)
"""


class Killed(BaseException):
    pass


def test_a_failure_at_any_point_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path, monkeypatch) -> None:
    """Each call to the disk in turn is the last one; then the next save must still succeed."""
    calls = ["fsync", "rename", "replace", "mkdir"]
    for number in range(1, 40):
        place = tmp_path / str(number)
        place.mkdir()
        save(place, 1)
        count = 0

        def deadly(real, number=number):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    raise Killed
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patched:
            for name in calls:
                patched.setattr(os, name, deadly(getattr(os, name)))
            try:
                save(place, 2)
                untouched = True
            except Killed:
                untouched = False
        assert checkpoint.newest(place, print) is not None
        assert checkpoint.newest(save(place, 3).parent, print).name == "step-000003"
        if untouched:
            assert number > 5, "the fault was never injected"
            return
    raise AssertionError("the save never passed untouched")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_kill_at_any_call_leaves_a_whole_checkpoint(call: str, tmp_path: Path) -> None:
    """One system call after the other is made deadly, until a save passes untouched."""
    root = str(Path(__file__).parent.parent)
    for number in range(1, 40):
        place = tmp_path / str(number)
        place.mkdir()
        save(place, 1)
        inject = f"inject={call},renameat,renameat2:signal=KILL:when={number}"
        inject = inject if call == "rename" else f"inject=fsync:signal=KILL:when={number}"
        command = [
            "strace",
            "-f",
            "-qq",
            "-o",
            "/dev/null",
            "-e",
            inject,
            sys.executable,
            "-c",
            SAVE,
            str(place),
            root,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert checkpoint.newest(place, print) is not None
        if done.returncode == 0:
            assert number > 1, "the fault was never injected"
            return
    raise AssertionError("the save never passed untouched")
