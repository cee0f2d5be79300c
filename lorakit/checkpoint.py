"""Checkpoints that are whole or not there: staged, synced, given checksums last, renamed, verified.

checkpoints/step-000500/ holds adapter_model.safetensors (the method's own tensors), adapter_config.json,
optimizer.safetensors, state.json and manifest.json with the size and SHA-256 of each. A directory without a
valid manifest is no checkpoint. Order is by step, never by clock. No random state is saved: it is a function
of seed, step, micro-batch and rank.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from lorakit.adapters import write_tensors
from lorakit.errors import LorakitError

_NAME = re.compile(r"step-(\d{6,})$")


@dataclass(frozen=True)
class Checkpoint:
    adapter: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save(root: Path, step: int, checkpoint: Checkpoint, adapter_config: dict[str, Any], keep: int) -> Path:
    """Write checkpoints/step-NNNNNN, then delete all but the newest `keep`. Returns its directory."""
    final, staged = root / f"step-{step:06d}", root / f".step-{step:06d}.new"
    root.mkdir(exist_ok=True)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        _stage(staged, checkpoint, adapter_config)
        commit(staged, final)
    except BaseException:  # a full disk stays full if what was half written stays
        shutil.rmtree(staged, ignore_errors=True)
        raise
    for old in folders(root)[:-keep]:
        if old != final:
            shutil.rmtree(old)
    return final


def _stage(staged: Path, checkpoint: Checkpoint, adapter_config: dict[str, Any]) -> None:
    staged.mkdir()
    write_tensors(staged / "adapter_model.safetensors", checkpoint.adapter)
    write_tensors(staged / "optimizer.safetensors", checkpoint.optimizer)
    (staged / "state.json").write_text(json.dumps(checkpoint.state, indent=2, sort_keys=True) + "\n")
    if adapter_config:
        (staged / "adapter_config.json").write_text(
            json.dumps(adapter_config, indent=2, sort_keys=True) + "\n"
        )


def commit(staged: Path, final: Path) -> None:
    """Sync every file, write the manifest last, rename, and read it all back.

    Raises: LorakitError when what is on the disk is not what was written.
    """
    files = sorted(path for path in staged.iterdir() if path.is_file())
    manifest = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
    (staged / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in [*files, staged / "manifest.json", staged]:
        sync(path)
    if final.exists():  # a damaged one of the same step, or one that a resume from further back makes again
        shutil.rmtree(final)
    staged.rename(final)
    sync(final.parent)
    if reason := damage(final):
        raise LorakitError(f"{final}: {reason}, though it was just written: the disk is not to be trusted")


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str:
    """Why `folder` is no checkpoint, or the empty string: every file of the manifest is there, with size and
    sum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, wanted in manifest.items():
            path = folder / name
            if path.stat().st_size != wanted["bytes"] or sha256(path) != wanted["sha256"]:
                return f"{name} is damaged"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be used ({error})"
    return ""


def step_of(folder: Path) -> int:
    """500 of checkpoints/step-000500."""
    return int(folder.name.removeprefix("step-"))


def folders(root: Path) -> list[Path]:
    """Directories named like checkpoints, the oldest step first; nothing says that they are whole."""
    found = [
        path
        for path in root.glob("step-*")
        if _NAME.match(path.name) and path.is_dir() and not path.is_symlink()
    ]
    return sorted(found, key=step_of)


def newest(root: Path, say: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint; damaged ones are named and passed over."""
    for folder in reversed(folders(root)):
        reason = damage(folder)
        if not reason:
            return folder
        say(f"warning: {folder} is not used: {reason}")
    return None


def load(folder: Path) -> Checkpoint:
    """A checkpoint, verified. Raises: LorakitError when it is damaged."""
    if reason := damage(folder):
        raise LorakitError(f"{folder} is no usable checkpoint: {reason}")
    return Checkpoint(
        adapter=load_file(folder / "adapter_model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        state=json.loads((folder / "state.json").read_text()),
    )
