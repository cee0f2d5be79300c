"""What is written of the methods: a recipe for each that runs, the README's table as the registry has it, and
costs as they were measured."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3MoeConfig

from lorakit.adapters import METHODS
from lorakit.plan import make_plan
from lorakit.recipe import load_recipe
from lorakit.recipe.inits import INITS
from lorakit.recipe.methods import Lora
from lorakit.recipe.optimizer import LORA_PLUS, OPTIMIZERS, AdamW
from lorakit.recipe.schedule import SCHEDULES
from lorakit.recipe.traits import TRAITS, Traits
from tests import architectures
from tests.conftest import ROOT, load_script, metrics

RECIPES = sorted((ROOT / "recipes" / "methods").glob("*.yaml"))
README = (ROOT / "README.md").read_text()

QUICKSTART = ROOT / "recipes" / "quickstart"
# Qwen3-30B-A3B as it is published: 30,532,122,624 parameters.
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "tie_word_embeddings": False,
}
MIXTURE = {"lora-experts"}  # the others train the quickstart's model

table = load_script("make_method_table")


def header(path: Path) -> str:
    lines = path.read_text().splitlines()
    return " ".join(line.removeprefix("#").strip() for line in lines[: lines.index("model:")])


def row(method: str) -> list[str]:
    (line,) = [line for line in README.splitlines() if line.startswith(f"| [`{method}`]")]
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


# ------------------------------------------------------------------------------------------------------------
# The recipes


def test_every_method_has_a_recipe() -> None:
    shown = {load_recipe(path).adapter.method for path in RECIPES}
    assert shown == set(METHODS) == set(TRAITS)


OFFLINE = [path for path in RECIPES if path.stem not in MIXTURE]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_header_says_what_it_is_for_and_what_not(path: Path) -> None:
    said = header(path)
    for word in ("For: ", "Not for: ", "Cost beside LoRA's: ", "Measured: ", "Source: "):
        assert said.count(word) == 1, word
    assert "@" not in said
    found = INITS[path.stem].source if path.stem in INITS else TRAITS[load_recipe(path).adapter.method].source
    assert path.stem in ("lora-plus", "rslora", "sophia") or found.removeprefix("arXiv ") in said


@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
def test_a_recipe_is_planned(path: Path, cli) -> None:
    recipe, said = load_recipe(path), header(path)
    code, out, err = cli("count-params", path, "--json")
    assert code == 0, err
    params = json.loads(out)
    assert params["trainable"] > 0
    assert params["adapter_bytes"]["float32"] == 4 * params["trainable"]
    told = re.search(r"with ([\d,]+) trained parameters", said)
    if told and "lora-drop" not in path.stem:  # what that keeps depends on the data
        assert params["trainable"] == int(told[1].replace(",", ""))
    assert make_plan(recipe, num_samples=400, decisions={}).total_steps == 125


def test_experts_are_counted_by_hand(cli, tmp_path: Path) -> None:
    """E rank (in + out) for either parameter of the experts, and the attention."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_MOE))
    path = ROOT / "recipes" / "methods" / "lora-experts.yaml"
    code, out, err = cli("count-params", path, "--set", f"model.path={tmp_path}", "--json")
    assert code == 0, err
    experts = 48 * 128 * 4 * ((2048 + 2 * 768) + (768 + 2048))
    attention = 48 * 4 * (2 * (2048 + 4096) + 2 * (2048 + 512))
    params = json.loads(out)
    assert params["trainable"] == experts + attention
    assert params["total"] - params["trainable"] == 30_532_122_624
    assert f"{experts / 1e6:.0f}M" in header(path) and f"{attention / 1e6:.1f}M" in header(path)


@pytest.mark.slow
@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
def test_a_recipe_trains(path: Path, cli, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, _, err = cli("train", path, "--set", "training.max_steps=20", "--output", run)
    assert code == 0, err
    losses = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_the_recipe_of_a_mixture_trains(cli, tmp_path: Path) -> None:
    """On one that is made here, with the quickstart's tokenizer and data."""
    shutil.copytree(QUICKSTART / "model", tmp_path / "model")
    vocabulary = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    small = {"hidden_size": 32, "moe_intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**small, intermediate_size=48, vocab_size=vocabulary)
    architectures.build(config).save_pretrained(tmp_path / "model")
    data = [
        f"data.{key}={QUICKSTART / file}"
        for key, file in (("train", "train.jsonl"), ("eval", "held_out.jsonl"))
    ]
    values = [*data, f"model.path={tmp_path / 'model'}", "training.max_steps=20", "data.max_length=384"]
    settings = [word for value in [*values, "optimizer.lr=1e-2"] for word in ("--set", value)]
    path = ROOT / "recipes" / "methods" / "lora-experts.yaml"
    code, _, err = cli("train", path, *settings, "--output", tmp_path / "run")
    assert code == 0, err
    losses = [line["eval_loss"] for line in metrics(tmp_path / "run") if "eval_loss" in line]
    assert losses[-1] < losses[0]


# ------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_of_the_readme_is_what_the_registry_says() -> None:
    for path, text in table.wanted().items():
        assert path.read_text() == text, f"{path}: python scripts/make_method_table.py"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_has_every_reason_and_the_formula_of_its_count(method: str) -> None:
    traits, (link, update, formula, *rest) = TRAITS[method], row(method)
    path = re.fullmatch(r"\[`.*`\]\((.*)\)", link)[1]
    assert load_recipe(ROOT / path).adapter.method == method
    assert update == traits.update
    assert traits.says in rest
    refused = rest[-2]
    assert refused.count(": ") >= len(traits.refuses)
    for why in traits.refuses.values():
        assert why.split("; ")[0].split("{}")[0] in refused
    assert traits.source.removeprefix("arXiv ") in rest[-1]
    if traits.num_trained is not None:
        spelled = formula.removeprefix("at most ").replace("·", "*").replace("R(", "R*(")
        values = {"I": 7, "O": 11, "R": 3}
        assert eval(spelled, {"__builtins__": {}}, values) == traits.num_trained(7, 11, 3)


@pytest.mark.parametrize("name", INITS)
def test_a_row_of_a_start_has_every_reason(name: str) -> None:
    init, (lines,) = INITS[name], [re.findall(rf"^\| \[?`{name}`.*$", README, re.MULTILINE)]
    (line,) = [line for line in lines if init.start in line]
    assert init.says in line
    assert init.source.removeprefix("arXiv ") in line
    for why in init.refuses.values():
        assert why.split("; ")[0].split("{}")[0] in line
    if path := re.search(r"\((recipes/.*?)\)", line):
        assert load_recipe(ROOT / path[1]).adapter.init == name  # type: ignore[union-attr]


@pytest.mark.parametrize(("registry", "field"), [(OPTIMIZERS, "update"), (SCHEDULES, "formula")])
def test_a_row_of_an_optimizer_or_a_schedule_is_its_entry_in_the_registry(registry: Any, field: str) -> None:
    for name, traits in registry.items():
        (line,) = [line for line in README.splitlines() if line.startswith(f"| `{name}` |")]
        for part in (getattr(traits, field), traits.says, traits.source.removeprefix("arXiv ")):
            assert part in line
        if registry is OPTIMIZERS:
            assert f"| {traits.section.model_fields['lr'].default:g} |" in line


def test_a_formula_keeps_its_brackets() -> None:
    def traits(count: Any) -> Traits:
        return Traits(TRAITS["lora"].section, "", "", "", count)

    assert table.formula(traits(lambda inside, outside, rank: rank * (inside + outside))) == "R(I + O)"
    assert table.formula(traits(lambda inside, outside, rank: (inside + rank) * outside)) == "(I + R)·O"
    assert table.formula(traits(lambda inside, outside, rank: rank + outside * rank)) == "R + O·R"


def test_every_statement_on_the_evidence_has_its_number_in_the_defaults() -> None:
    """The third column of "What the primers say" against the grammar's defaults."""
    section = README.split("### What the primers say")[1].split("\n## ")[0]
    for oracle in re.findall(r"`(test_o\d\d)`", section):
        assert f"def {oracle}_" in (ROOT / "tests" / "oracles" / "test_methods.py").read_text()
    adapter, optimizer = Lora(), AdamW()
    for default in ("rank: 16", "targets: all-linear", "dropout: 0.0", "alpha: auto"):
        assert f"`{default}`" in section
        key, value = default.split(": ")
        assert str(getattr(adapter, key)) == value
    assert "`lr: 2e-4`" in section and optimizer.lr == 2e-4
    assert "`lr_ratio: lora+` is 4" in section and LORA_PLUS == 4


# ------------------------------------------------------------------------------------------------------------
# The benchmark


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # it has a package beside it
    return load_script("bench_methods")


def run(method: str, turn: int, step: float, peak: int) -> dict[str, Any]:
    sizes = {"trained": 10, "adapter_bytes": 40, "checkpoint_bytes": 120}
    return {"method": method, "turn": turn, "step_s": step, "peak_bytes": peak, "others_share": 0.0} | sizes


def test_ratios_are_to_lora_in_the_same_turn(bench: Any) -> None:
    runs = [run("lora", 0, 1.0, 100), run("dora", 0, 1.5, 120), run("lora", 1, 2.0, 100)]
    runs += [run("dora", 1, 2.2, 110), run("lora", 2, 1.0, 100), run("dora", 2, 1.3, 300)]
    found = bench.summary(runs)
    assert found["lora"]["against_lora"]["step_s"] == 1.0
    assert found["dora"]["step_s"] == 1.5
    assert found["dora"]["against_lora"]["step_s"] == 1.3
    assert found["dora"]["against_lora"]["peak_bytes"] == 1.2


def test_every_method_is_in_the_benchmark_with_a_recipe_that_is_valid(
    bench: Any, tiny: Path, tmp_path: Path
) -> None:
    every = bench.contestants()
    assert next(iter(every)) == "lora"
    assert len(every) == len(OFFLINE)
    assert {sections["adapter"]["method"] for sections in every.values()} == set(METHODS)
    made = {"model": str(tiny / "model"), "rows": str(tiny)}
    for name, sections in every.items():
        (tmp_path / f"{name}.yaml").write_text(
            json.dumps(bench.recipe_of(sections, made, bench.QUICK, 12, tmp_path / name))
        )
        load_recipe(tmp_path / f"{name}.yaml")


@pytest.mark.slow
def test_the_benchmark_runs_every_method(bench: Any, tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    words = ["--quick", "--turns", "1", "--steps", "3", "--work", tmp_path / "work", "--json", file]
    command = [sys.executable, ROOT / "scripts" / "bench_methods.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())["summary"]
    assert set(found) == set(bench.contestants())
    for method, line in found.items():
        assert all(line[quantity] > 0 for quantity in bench.QUANTITIES), method
    assert found["lora-fa"]["trained"] < found["lora"]["trained"] < found["dora"]["trained"]
    assert found["full"]["checkpoint_bytes"] > found["lora"]["checkpoint_bytes"]


def test_a_cost_is_told_with_its_file_and_versions() -> None:
    ratio = {"step_s": 1.259, "peak_bytes": 1.07, "adapter_bytes": 1.0, "checkpoint_bytes": 0.5}
    about = {"threads": 2, "versions": {"torch": "2.13.0", "peft": "0.21.2"}}
    costs = {
        "file": "bench_methods-2026-11-21.json",
        "about": about,
        "summary": {"x": {"against_lora": ratio}},
    }
    lines = table.cost_lines("x", costs)
    assert "step x 1.26, memory x 1.07, file x 1.00, checkpoint x 0.50" in lines
    assert "docs/bench_methods-2026-11-21.json: 2 CPU cores, torch 2.13.0, peft 0.21.2" in lines
    assert table.COST.fullmatch(lines)
    assert max(map(len, lines.splitlines())) <= 110
