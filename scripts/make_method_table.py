"""Bring what is known of methods, starts, optimizers and schedules into the README's tables, and what methods
cost into the headers of recipes/methods/.

    python scripts/make_method_table.py [--check]

The tables come from the registries in lorakit/recipe/ (TRAITS, INITS, OPTIMIZERS, SCHEDULES): what a layer
computes, what is said of it, the trained parameters of a layer as its formula spells them, what it refuses
and why. The costs come from the newest docs/bench_methods-*.json (scripts/bench_methods.py). --check: write
nothing, exit 1 where something is not as this script makes it.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from lorakit.recipe.inits import INITS, Init
from lorakit.recipe.optimizer import OPTIMIZERS
from lorakit.recipe.schedule import SCHEDULES
from lorakit.recipe.traits import TRAITS, Traits

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RECIPES = ROOT / "recipes" / "methods"
BEGIN = "<!-- made by scripts/make_method_table.py: change TRAITS in lorakit/recipe/traits.py -->"
BEGIN_INITS = "<!-- made by scripts/make_method_table.py: change INITS in lorakit/recipe/inits.py -->"
BEGIN_OPTIMIZERS = BEGIN.replace("TRAITS", "OPTIMIZERS").replace("traits.py", "optimizer.py")
BEGIN_SCHEDULES = BEGIN.replace("TRAITS", "SCHEDULES").replace("traits.py", "schedule.py")
END = "<!-- end of what is made -->"
COST = re.compile(r"^# Cost beside LoRA's: .*\n# \(.*\)\.\n", re.MULTILINE)
KINDS = {"embedding": "embeddings", "experts": "experts", "dropout": "dropout"}  # the others are bases
UPPER_BOUNDS = ("lora-drop",)  # of layers that share, one counts
WORDS = {"step_s": "step", "peak_bytes": "memory", "adapter_bytes": "file", "checkpoint_bytes": "checkpoint"}


class Term:
    """A symbol that writes down what is done to it: the formula of a count from the function that counts."""

    def __init__(self, text: str, is_sum: bool = False) -> None:
        self.text, self.is_sum = text, is_sum

    def __add__(self, other: "Term") -> "Term":
        return Term(f"{self.text} + {other.text}", True)

    def __mul__(self, other: "Term") -> "Term":
        inside = [f"({term.text})" if term.is_sum else term.text for term in (self, other)]
        return Term("".join(inside) if inside[1].startswith("(") else "·".join(inside))


def formula(traits: Traits) -> str:
    """Trained parameters of a layer, such as R(I + O)."""
    if traits.num_trained is None:
        return "as PEFT's layers have"
    count: Any = traits.num_trained
    return count(Term("I"), Term("O"), Term("R")).text


def newest_costs() -> dict[str, Any] | None:
    """The newest file of bench_methods.py, its name with it; None before there is one."""
    files = sorted((ROOT / "docs").glob("bench_methods-*.json"))
    return {"file": files[-1].name} | json.loads(files[-1].read_text()) if files else None


def method_table(costs: dict[str, Any] | None) -> str:
    """The table of the README, markers and all."""
    columns = ["`method`", "a layer computes", "trained per layer", "good for", "refuses", "source"]
    if costs:
        columns[3:3] = ["step", "memory"]
    rows = []
    for method, traits in TRAITS.items():
        recipe = recipe_of(method)
        link = f"[`{method}`](recipes/methods/{recipe}.yaml)" if recipe else f"`{method}`"
        most = "at most " if method in UPPER_BOUNDS else ""
        row = [link, traits.update, most + formula(traits), traits.says]
        row += [refusals(traits), source(traits.source)]
        if costs:
            row[3:3] = against_lora(costs, recipe)
        rows.append(row)
    return table(BEGIN, columns, rows)


def init_table() -> str:
    """The README's table of how A and B start, markers and all."""
    rows = []
    for name, init in INITS.items():
        link = f"[`{name}`](recipes/methods/{name}.yaml)" if name == recipe_of(name) else f"`{name}`"
        rows.append([link, init.start, init.says, refusals(init), source(init.source)])
    return table(BEGIN_INITS, ["`init`", "A and B before step 0", "good for", "refuses", "source"], rows)


def optimizer_table() -> str:
    rows = []
    for name, traits in OPTIMIZERS.items():
        lr = f"{traits.section.model_fields['lr'].default:g}"
        rows.append([f"`{name}`", traits.update, traits.state, lr, traits.says, source(traits.source)])
    columns = ["`name`", "an update, before `lr`", "bytes of state per trained parameter", "`lr`"]
    return table(BEGIN_OPTIMIZERS, [*columns, "good for", "source"], rows)


def schedule_table() -> str:
    rows = [[f"`{name}`", t.formula, t.says, source(t.source)] for name, t in SCHEDULES.items()]
    return table(BEGIN_SCHEDULES, ["`name`", "share of `lr` after the warm-up", "good for", "source"], rows)


def table(begin: str, columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown between its marks."""
    lines = [begin, f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, END])


def recipe_of(method: str) -> str:
    """The recipe that shows a method: the one of its name, else the first whose name begins with it."""
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    return method if method in names else next((n for n in names if n.startswith(f"{method}-")), "")


def against_lora(costs: dict[str, Any], name: str) -> list[str]:
    """Cells of step and memory; empty where a recipe was not measured."""
    ratio = costs["summary"].get(name, {}).get("against_lora")
    return [f"x {ratio[quantity]:.2f}" if ratio else "" for quantity in ("step_s", "peak_bytes")]


def refusals(traits: Traits | Init) -> str:
    """Kinds of layers, of bases and of settings with the reason, without what to do about it."""
    reasons = {kind: why.partition("; ")[0].format("such") for kind, why in traits.refuses.items()}
    return "; ".join(f"{KINDS.get(kind, f'{kind} bases')}: {why}" for kind, why in reasons.items())


def source(text: str) -> str:
    return re.sub(r"^arXiv (\S+)$", r"[\1](https://arxiv.org/abs/\1)", text)


def cost_lines(name: str, costs: dict[str, Any] | None) -> str:
    """The two lines of a recipe's header that say what the method costs."""
    if costs is None or name not in costs["summary"]:
        return "# Cost beside LoRA's: not measured yet\n# (scripts/bench_methods.py).\n"
    ratio, about = costs["summary"][name]["against_lora"], costs["about"]
    told = ", ".join(f"{word} x {ratio[quantity]:.2f}" for quantity, word in WORDS.items())
    versions = ", ".join(f"{package} {about['versions'][package]}" for package in ("torch", "peft"))
    where = f"{about['threads']} CPU cores, {versions}"
    return f"# Cost beside LoRA's: {told}\n# (docs/{costs['file']}: {where}).\n"


def wanted() -> dict[Path, str]:
    """Every file that holds something made here, as it should be."""
    costs = newest_costs()
    text = README.read_text()
    for made in (method_table(costs), init_table(), optimizer_table(), schedule_table()):
        before, rest = text.split(made.splitlines()[0])
        text = before + made + rest.split(END, 1)[1]
    files = {README: text}
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = path.read_text()
        assert len(COST.findall(recipe)) == 1, f"{path}: expected two lines on its cost"
        files[path] = COST.sub(lambda _, stem=path.stem: cost_lines(stem, costs), recipe)
    return files


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    changed = {path: text for path, text in wanted().items() if path.read_text() != text}
    for path, text in changed.items():
        print(path.relative_to(ROOT))
        if not check:
            path.write_text(text)
    return 1 if check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
