"""`lorakit recipes`: what is listed is there, a copy is whole and loads, nothing is ever replaced."""

import filecmp
import os
import shutil
from pathlib import Path

import pytest

from lorakit import shipped
from lorakit.errors import LorakitError
from lorakit.recipe import load_recipe
from tests.conftest import ROOT

METHODS = sorted(path.stem for path in ROOT.glob("recipes/methods/*.yaml"))
NAMES = sorted([path.stem for path in ROOT.glob("recipes/*.yaml")] + ["quickstart"]) + METHODS


def test_every_recipe_is_listed_with_its_purpose(cli) -> None:
    code, out, _ = cli("recipes", "list")
    lines = [line.split(maxsplit=1) for line in out.splitlines()]
    assert code == 0
    assert [name for name, _ in lines] == NAMES
    assert all(len(purpose) > 20 and purpose.endswith(".") for _, purpose in lines)
    assert "$schema" not in out


def test_the_purpose_is_the_first_sentence_of_the_header(tmp_path: Path) -> None:
    recipe = tmp_path / "x.yaml"
    recipe.write_text(
        "# yaml-language-server: $schema=s.json\n#\n# Of 0.6B, two\n# lines. And more.\nmodel:\n"
    )
    assert shipped.purpose(recipe) == "Of 0.6B, two lines."
    recipe.write_text("model: {path: x}\n")
    assert shipped.purpose(recipe) == ""


def test_show_prints_the_file_as_it_stands(cli) -> None:
    code, out, _ = cli("recipes", "show", "quickstart")
    assert code == 0
    assert out == (ROOT / "recipes" / "quickstart" / "recipe.yaml").read_text()


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_loads_and_its_schema_is_found(name: str, tmp_path: Path, cli) -> None:
    code, out, _ = cli("recipes", "copy", name, tmp_path / "new folder")
    assert code == 0
    path, following = out.splitlines()
    assert following == f"next: lorakit train '{path}'"  # quoted: the folder has a space
    load_recipe(path)
    schema = Path(path).read_text().splitlines()[0].split("$schema=")[1]
    assert filecmp.cmp(Path(path).parent / schema, ROOT / "recipes" / "recipe.schema.json", shallow=False)
    assert not list((tmp_path / "new folder").glob(".*")), "the staging folder is gone"


def test_a_folder_is_copied_whole(tmp_path: Path) -> None:
    path = shipped.copy("quickstart", tmp_path)
    assert path == tmp_path / "quickstart" / "recipe.yaml"
    original = ROOT / "recipes" / "quickstart"
    files = [file.relative_to(original) for file in original.rglob("*") if file.is_file()]
    assert len(files) >= 7  # recipe, two of data; config, weights, tokenizer and its template
    for file in files:
        assert (path.parent / file).read_bytes() == (original / file).read_bytes()
        assert os.access(path.parent / file, os.W_OK)


def test_a_recipe_is_copied_with_the_one_it_extends_and_never_over_the_users(tmp_path: Path) -> None:
    mine = tmp_path / "smollm2-135m-lora.yaml"
    mine.write_text("mine")
    shipped.copy("smollm2-135m-full", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "recipe.schema.json",
        "smollm2-135m-full.yaml",
        "smollm2-135m-lora.yaml",
    ]
    assert mine.read_text() == "mine"


def test_a_recipe_of_a_method_is_copied_with_the_model_and_data_that_it_uses(tmp_path: Path) -> None:
    path = shipped.copy("dora", tmp_path)
    assert path == tmp_path / "methods" / "dora.yaml"
    recipe = load_recipe(path)
    assert Path(recipe.model.path).resolve() == (tmp_path / "quickstart" / "model").resolve()
    assert (tmp_path / "quickstart" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "quickstart" / "train.jsonl").is_file()

    (tmp_path / "quickstart" / "train.jsonl").write_text("mine")
    assert shipped.copy("lora", tmp_path) == tmp_path / "methods" / "lora.yaml"
    assert (tmp_path / "quickstart" / "train.jsonl").read_text() == "mine"


@pytest.mark.parametrize("name", ["quickstart", "smollm2-135m-lora", "lora"])
def test_what_exists_is_not_replaced(name: str, tmp_path: Path, cli) -> None:
    assert cli("recipes", "copy", name, tmp_path)[0] == 0
    places = {"quickstart": "quickstart/recipe.yaml", "lora": "methods/lora.yaml"}
    target = tmp_path / places.get(name, f"{name}.yaml")
    target.write_text("mine")
    code, out, err = cli("recipes", "copy", name, tmp_path)
    assert (code, out) == (2, "")
    assert "exists" in err
    assert target.read_text() == "mine"


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, cli) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = cli("recipes", "copy", "quickstart", tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in err and "Traceback" not in err


@pytest.mark.parametrize("call", [("show", "quickstrat"), ("copy", "quickstrat", "somewhere")])
def test_an_unknown_name_gets_the_nearest_and_the_list(call: tuple[str, ...], cli) -> None:
    code, out, err = cli("recipes", *call)
    assert (code, out) == (2, "")
    assert 'Did you mean "quickstart"?' in err
    assert all(name in err for name in NAMES)


def test_a_name_is_never_a_path(cli) -> None:
    for name in ("../scripts", "quickstart/recipe", "", "."):
        assert cli("recipes", "show", name)[0] == 2


def test_an_installed_recipe_is_not_trained_in_place(tmp_path: Path, monkeypatch, cli) -> None:
    """An installed package, played by a copy of the recipes; test_wheel.py has a real one."""
    inside = tmp_path / "_recipes"
    monkeypatch.setattr(shipped, "INSTALLED", inside)
    recipe = ROOT / "recipes" / "quickstart" / "recipe.yaml"
    shipped.check_not_installed(recipe)  # in a checkout, all is the user's own

    shutil.copytree(ROOT / "recipes", inside)
    shipped.check_not_installed(recipe)
    with pytest.raises(LorakitError, match="installed package"):
        shipped.check_not_installed(inside / "quickstart" / "recipe.yaml")

    (tmp_path / "link").symlink_to(inside)
    code, _, err = cli(
        "train", tmp_path / "link" / "quickstart" / "recipe.yaml", "--output", tmp_path / "run"
    )
    assert code == 2
    assert "lorakit recipes copy quickstart ." in err
    assert not (tmp_path / "run").exists()
