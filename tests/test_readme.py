"""Every command of the README runs, as a user would run it, and prints what the README says it prints."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorakit.recipe import load_recipe
from lorakit.recipe.data import FORMAT_FIELDS, sources
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
BUILT_IN_THE_CHECKOUT = ("make setup", "make test", "source .venv/bin/activate")  # what runs this test


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has after `make setup`, with the environment that runs this test in place of .venv."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
        os.utime(folder / name, (0, 0))  # older than .ready, so that make never sets up the real environment
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / ".venv").mkdir()
    (folder / ".venv" / ".ready").touch()
    (folder / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    return folder


def run(command: str, folder: Path) -> str:
    here = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of the make that runs the tests
        here.pop(name, None)
    merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # as a terminal shows it
    done = subprocess.run(command, shell=True, cwd=folder, env=here, text=True, timeout=300, **merged)
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def without_numbers(text: str) -> list[str]:
    """Lines with every number and the spaces before it made alike: losses differ between machines."""
    return [re.sub(r"\s*[\d.,]+(e[+-]\d+)?", " #", line).rstrip() for line in text.strip().splitlines()]


def test_every_command_of_the_readme_runs(checkout: Path) -> None:
    found = [command for command in commands() if command not in BUILT_IN_THE_CHECKOUT]
    assert found[0] == "make quickstart"
    assert len(found) >= 10
    printed = {command: run(command, checkout) for command in found}
    for command in ("make test", "make setup"):
        assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()

    shown = [without_numbers(block) for block in re.findall(r"```text\n(.*?)```", README, re.DOTALL)]
    ends = without_numbers(printed["make quickstart"].replace(f"{checkout}/", ""))
    assert shown[0] == ends[-len(shown[0]) :]
    text = next(text for command, text in printed.items() if command.startswith("lorakit merge"))
    assert without_numbers(text.replace(f"{checkout}/", "")) in shown
    text = next(text for command, text in printed.items() if command.startswith("lorakit inspect"))
    change = next(block for block in shown if block[0].startswith("adapter   runs/first"))
    assert {*change} - {*without_numbers("...")} <= {*without_numbers(text.replace(f"{checkout}/", ""))}
    account = next(text for command, text in printed.items() if command.startswith("lorakit preview"))
    table = without_numbers(account.partition("\n\n")[2].partition("[[trained]]")[0])
    trained = next(block for block in shown if block[0].startswith("rows"))
    assert trained[: len(table)] == table
    advice = next(text for command, text in printed.items() if command.startswith("lorakit advise"))
    assert without_numbers(advice) in shown


def test_the_job_of_the_readme_runs(checkout: Path, tmp_path: Path) -> None:
    job = re.search(r"```yaml\n(- run: pip.*?)```", README, re.DOTALL)
    assert job
    install, *lines = [line.removeprefix("- run: ") for line in job.group(1).splitlines()]
    assert install == "pip install ."  # tests/test_wheel.py installs it
    for line in lines:
        run(line, tmp_path)


def test_the_data_of_the_readme_are_valid(tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(data:.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "recipe.yaml").write_text(f"model: {{path: owner/name}}\noutput: run\n{text}")
    section = load_recipe(tmp_path / "recipe.yaml").data
    assert [source.weight for source in sources(section.train, None)] == [1, 2, 1]
    for format_name in FORMAT_FIELDS:
        assert f"`{format_name}`" in README


def test_the_recipe_of_the_readme_is_valid(tmp_path: Path) -> None:
    text = re.search(r"```yaml\n(# yaml.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    sections = set(yaml.safe_load(text))
    assert recipe.adapter.rank_pattern == {"down_proj": 8}
    assert sections >= {"model", "adapter", "data", "optimizer", "training", "eval", "output"}
