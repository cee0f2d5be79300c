"""Who may import whom, how large things may get, what stays light: DESIGN as a test."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "lorakit"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A module imports only what stands in a row above its own (or in its own package).
LEVELS = [
    {"errors", "terminal"},
    {"recipe", "shipped", "output_file"},
    {"shapes", "picture"},
    {"targets", "inspection_view"},
    {"plan"},
    {"kernels", "layers", "micro_batch", "advice"},
    {"model_files", "tokenizer"},
    {"adapter_file", "validate"},
    {"base_model", "data", "adapters"},
    {"optim", "tasks", "anatomy"},
    {"runs", "checkpoint", "report", "signals", "devices"},
    {"saved"},
    {"proof"},
    {"decoding"},
    {"loop", "evaluate", "fast", "preview", "count", "merge", "generate"},
    {"score", "chat", "preview_html", "pieces", "advise"},
    {"inspection"},
    {"writer"},
    {"prepare"},
    {"probe"},
    {"train"},
    {"startup"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: number for number, row in enumerate(LEVELS) for name in row}
PACKAGES = {"recipe", "kernels", "data", "adapters", "tasks", "optim", "cli", "advice"}


def parts(path: Path) -> list[str]:
    return [part for part in path.relative_to(PACKAGE).with_suffix("").parts if part != "__init__"]


def imports(path: Path) -> list[list[str]]:
    """The lorakit modules that a file imports, anywhere in it, as lists of parts below lorakit."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lorakit":
            base = node.module.split(".")[1:]
            for alias in node.names:
                deeper = PACKAGE.joinpath(*base, alias.name)
                module = deeper.with_suffix(".py").exists() or deeper.is_dir()
                found.append([*base, alias.name] if module else base)
        elif isinstance(node, ast.Import):
            found += [
                alias.name.split(".")[1:] for alias in node.names if alias.name.split(".")[0] == "lorakit"
            ]
    return [target for target in found if target]


def test_every_module_has_a_level() -> None:
    tops = {parts(path)[0] for path in SOURCES if parts(path)}
    assert tops == set(LEVEL)


@pytest.mark.parametrize("path", [p for p in SOURCES if parts(p)], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    me = parts(path)
    for target in imports(path):
        if target[0] == me[0]:
            continue
        assert LEVEL[target[0]] < LEVEL[me[0]], (
            f"{'/'.join(me)} imports {'.'.join(target)}, which stands above it"
        )
        leaf_to_leaf = len(me) > 1 and len(target) > 1 and target[0] in PACKAGES - {"recipe", "kernels"}
        assert not leaf_to_leaf, f"leaf {'/'.join(me)} imports the leaf {'.'.join(target)} of another package"


def test_the_loop_never_sees_a_recipe() -> None:
    assert not {target[0] for target in imports(PACKAGE / "loop.py")} & {
        "recipe",
        "plan",
        "base_model",
        "runs",
    }


LIGHT = "import sys, lorakit, lorakit.cli, lorakit.recipe, lorakit.plan, lorakit.count; print(*sys.modules)"


def test_the_light_modules_load_nothing_heavy() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "numpy", "pyarrow"}
    assert not heavy & set(loaded)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_budgets(path: Path) -> None:
    """A smell detector: files about 300 lines, functions about 60; the loop and its wiring up to 110."""
    text = path.read_text()
    assert text.count("\n") <= 380
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            size = (node.end_lineno or 0) - node.lineno + 1
            allowed = 110 if node.name in ("run", "_train") else 60
            assert size <= allowed, f"{path.name}:{node.lineno} {node.name} has {size} lines"


def test_names_say_what_is_inside() -> None:
    banned = ("util", "helper", "misc", "common", "manager", "handler")
    assert not [path for path in SOURCES if any(word in path.stem for word in banned)]


def test_no_pickle_and_nothing_that_runs_data_as_code() -> None:
    """Weights and state are safetensors and JSON; YAML is composed, never constructed."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"pickle", "joblib", "marshal", "shelve"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "eval",
                    "exec",
                    "torch.load",
                    "torch.save",
                    "yaml.load",
                    "yaml.full_load",
                ), path


def test_no_error_is_left_as_work_to_do() -> None:
    for path in SOURCES:
        for word in ("TODO", "FIXME", "XXX", "NotImplementedError"):
            assert word not in path.read_text(), f"{path}: {word}"
