"""The recipes that come with lorakit: beside the package in a checkout, inside it once installed.

A recipe is a file, in methods/ where it shows a method, or a folder with a recipe.yaml and what that needs;
its name is that of the file without suffix, or of the folder.
"""

import re
import shutil
import tempfile
from pathlib import Path

from lorakit.errors import LorakitError, did_you_mean

INSTALLED = Path(__file__).parent / "_recipes"
IN_CHECKOUT = Path(__file__).parent.parent / "recipes"
SCHEMA = "recipe.schema.json"


def folder() -> Path:
    """Where the recipes lie."""
    return INSTALLED if INSTALLED.is_dir() else IN_CHECKOUT


def recipes() -> dict[str, Path]:
    """Name -> its YAML file: sorted by name, those of the methods last."""
    files = {path.stem: path for path in folder().glob("*.yaml")}
    folders = {path.parent.name: path for path in folder().glob("*/recipe.yaml")}
    methods = {path.stem: path for path in folder().glob("methods/*.yaml")}
    return dict(sorted((files | folders).items())) | dict(sorted(methods.items()))


def find(name: str) -> Path:
    """The YAML file of a recipe.

    Raises: LorakitError for a name that is none, with the nearest one and all there are.
    """
    known = recipes()
    if name not in known:
        near = did_you_mean(name, known)
        raise LorakitError(
            f"no recipe is called {name!r}" + (f". {near}" if near else ""), f"There are: {', '.join(known)}"
        )
    return known[name]


def purpose(recipe: Path) -> str:
    """What a recipe is for: the first sentence of its header, below the line that names the schema."""
    lines = recipe.read_text("utf-8").splitlines()
    header = [line[1:].strip() for line in lines if line.startswith("#") and "$schema=" not in line]
    return re.split(r"(?<=\.)\s", " ".join(header).strip())[0]


def listing() -> str:
    """A line per recipe: name and purpose."""
    known = recipes()
    width = max(map(len, known), default=0)
    return "\n".join(f"{name:{width}}  {purpose(path)}" for name, path in known.items())


def copy(name: str, destination: Path) -> Path:
    """Copy a recipe, and what it needs, into the directory `destination`; returns the copy's YAML file.

    All lies there as it lies here: the schema where the recipe's first line looks for it, a recipe that it
    extends beside it, the folder whose model and data it uses too. Raises: LorakitError when the copy would
    replace something.
    """
    source = find(name)
    wanted = _needed(source)
    target = destination / wanted[0].relative_to(folder())
    if target.exists() or target.is_symlink():
        raise LorakitError(f"{target} exists", "Move it away, or give another folder.")
    try:
        for path in (folder() / SCHEMA, *reversed(wanted)):
            place = destination / path.relative_to(folder())
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                _copy(path, place)
    except OSError as error:
        raise LorakitError(f"{error.filename or destination}: {error.strerror or error}") from None
    return destination / source.relative_to(folder())


def _needed(recipe: Path) -> list[Path]:
    """What a recipe needs, itself first: its folder, or its file with the recipes that it extends, which lie
    beside it, and the folders of other recipes that it names."""
    if recipe.name == "recipe.yaml":
        return [recipe.parent]
    text = recipe.read_text("utf-8")
    extends = re.search(r"^extends: *(\S+)", text, re.MULTILINE)
    others = dict.fromkeys(re.findall(r": \.\./([\w-]+)/", text))
    return [
        recipe,
        *(_needed(recipe.parent / extends[1]) if extends else []),
        *(folder() / name for name in others),
    ]


def _copy(source: Path, target: Path) -> None:
    """All of it or nothing: the copy is renamed once it is whole."""
    with tempfile.TemporaryDirectory(prefix=".copy-", dir=target.parent) as staging:
        whole = Path(staging) / source.name
        # copyfile takes the content alone: what is installed may be read-only.
        if source.is_dir():
            shutil.copytree(source, whole, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source, whole)
        whole.rename(target)


def check_not_installed(recipe: Path) -> None:
    """Raises: LorakitError for a recipe inside the installed package, where an edit is lost with the next
    upgrade."""
    place = recipe.absolute().resolve()
    if not INSTALLED.is_dir() or not place.is_relative_to(INSTALLED.resolve()):
        return
    known = {path.resolve(): name for name, path in recipes().items()}
    raise LorakitError(
        f"{recipe} belongs to the installed package: an edit would be lost with the next upgrade",
        f"Make it yours first: lorakit recipes copy {known.get(place, 'NAME')} .",
    )
