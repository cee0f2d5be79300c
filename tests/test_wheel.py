"""What a user installs: the wheel in a clean environment without the checkout, down to a trained adapter."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, metrics


def call(folder: Path, *command: str | Path, code: int = 0) -> str:
    """stdout and stderr of a command in `folder`, which must end with `code`."""
    # PYTHONPATH could lead to the checkout.
    here = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=here, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that has the wheel, and the dependencies of the running one behind it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves things beside what it builds
    unbuilt = shutil.ignore_patterns("__pycache__")
    for name in ("lorakit", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=unbuilt)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, source)
    call(folder, *pip, *build)
    (wheel,) = folder.glob("lorakit-*.whl")
    assert wheel.stat().st_size < 2_500_000

    venv.create(folder / "clean", symlinks=True)
    python = folder / "clean" / "bin" / "python"
    call(folder, *pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    (own,) = folder.glob("clean/lib/python*/site-packages")
    # Lines of .pth files there are not followed: an editable install of the checkout stays out of sight.
    (own / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    place = call(folder, python, "-c", "import lorakit; print(lorakit.__file__)").strip()
    assert Path(place).is_relative_to(own)
    shutil.rmtree(source)
    return python.parent


def test_from_a_wheel_to_a_trained_adapter(bin_folder: Path, tmp_path: Path) -> None:
    lorakit = bin_folder / "lorakit"
    listed = call(tmp_path, lorakit, "recipes", "list").splitlines()
    files = [
        path
        for pattern in ("*.yaml", "*/recipe.yaml", "methods/*.yaml")
        for path in ROOT.glob(f"recipes/{pattern}")
    ]
    assert len(listed) == len(files)
    shown = call(tmp_path, lorakit, "recipes", "show", "quickstart")
    assert shown == (ROOT / "recipes" / "quickstart" / "recipe.yaml").read_text()

    told = call(tmp_path, lorakit, "recipes", "copy", "quickstart", ".")
    assert "next: lorakit train quickstart/recipe.yaml" in told
    call(tmp_path, lorakit, "validate", "quickstart/recipe.yaml")
    call(tmp_path, lorakit, "train", "quickstart/recipe.yaml", "--set", "training.max_steps=20")
    run = tmp_path / "runs" / "quickstart"
    losses = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert losses[-1] < losses[0] / 2
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "finished"


def test_the_installed_recipe_itself_is_not_trained(bin_folder: Path, tmp_path: Path) -> None:
    inside = call(tmp_path, bin_folder / "python", "-c", "import lorakit.shipped as s; print(s.folder())")
    recipe = Path(inside.strip()) / "quickstart" / "recipe.yaml"
    told = call(tmp_path, bin_folder / "lorakit", "train", recipe, code=2)
    assert "lorakit recipes copy quickstart ." in told
    assert not (tmp_path / "runs").exists()
