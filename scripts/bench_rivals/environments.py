"""A virtual environment for each rival that cannot share one with lorakit, made by package names."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@dataclass(frozen=True)
class Environment:
    """What pip is given, the torch that lorakit runs on first; and what is taken out again."""

    packages: tuple[str, ...]
    unwanted: tuple[str, ...] = ()


def same(*names: str) -> tuple[str, ...]:
    """Packages in the versions that lorakit runs on."""
    found = []
    for name in names:
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            found.append(name)
    return tuple(found)


ENVIRONMENTS = {
    "trl": Environment(
        (*same("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes"), "trl==1.16.0")
    ),
    # Its pins bring transformers 5.6 and peft 0.18. torchaudio and torchvision are for sound and pictures,
    # and their usual builds do not load beside a CPU build of torch.
    "llama-factory": Environment(
        (*same("torch", "bitsandbytes"), "llamafactory==0.9.5"), ("torchaudio", "torchvision")
    ),
}


def interpreter(name: str, work: Path) -> str:
    """The Python of a contestant; its environment is made when it is not there yet.

    Raises: RuntimeError that says why it cannot be made.
    """
    if name not in ENVIRONMENTS:
        return sys.executable
    wanted, folder = ENVIRONMENTS[name], work / "venvs" / name
    python, mark = str(folder / "bin" / "python"), folder / "made.json"
    if mark.exists() and json.loads(mark.read_text()) == json.loads(json.dumps(asdict(wanted))):
        return python
    print(f"{name}: making its environment: {', '.join(wanted.packages)}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "-q", *wanted.packages],
        *([[*pip, "uninstall", "-q", "-y", *wanted.unwanted]] if wanted.unwanted else []),
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"its environment cannot be made: {last_words(done.stderr)}")
    mark.write_text(json.dumps(asdict(wanted)))
    return python


def last_words(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search("error", line, re.IGNORECASE)]
    return " | ".join((errors or lines)[-3:])[-600:]
