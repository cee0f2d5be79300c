"""The comparison: its verdicts on made-up results, its sweeps, its resumption, what is committed of it."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lorakit.recipe import load_recipe
from tests.conftest import ROOT, load_script

NEWEST = sorted((ROOT / "docs").glob("compare_methods-*.json"))[-1:]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(ROOT / "scripts")  # it has a package beside it
    yield load_script("compare_methods")


@pytest.fixture
def registered(script: Any) -> Any:
    return script.registered


@pytest.fixture
def sweep(script: Any) -> Any:
    from claims import sweep

    return sweep


# ------------------------------------------------------------------------------------------------------------
# Sweeps


def swept(sweep: Any, first: tuple[int, ...], whole: bool, lowest: float, seeds: int = 3) -> Any:
    """A sweep over parabolas whose lowest points lie a little further right for every seed."""
    losses: dict[tuple[int, int], float] = {}
    while needed := sweep.missing(losses, first, range(seeds), whole):
        for number, seed in needed:
            losses[number, seed] = 1 + (number - lowest - 0.1 * seed) ** 2
    return losses


def test_rates_are_a_grid_around_a_thousandth(sweep: Any) -> None:
    assert [sweep.rate(number) for number in (-3, -1, 0, 1, 2, 3)] == [
        1e-4,
        4.6e-4,
        1e-3,
        2.2e-3,
        4.6e-3,
        1e-2,
    ]


def test_all_seeds_run_at_the_best_rate_and_beside_it_alone(sweep: Any) -> None:
    losses = swept(sweep, (-2, -1, 0, 1, 2), whole=False, lowest=0.1)
    assert set(losses) == {(n, 0) for n in range(-2, 3)} | {(n, s) for n in (-1, 0, 1) for s in (1, 2)}
    assert sweep.best(losses, (-2, -1, 0, 1, 2), range(3)).number == 0


def test_a_best_rate_at_the_edge_widens_the_grid(sweep: Any) -> None:
    for lowest, widened in ((4.2, (3, 4, 5)), (-3.1, (-4, -3))):
        found = sweep.best(swept(sweep, (-2, -1, 0, 1, 2), True, lowest), (-2, -1, 0, 1, 2), range(3))
        assert found.number == round(lowest)
        assert found.widened == widened
        assert not found.at_edge


def test_the_first_seed_widens_the_grid_alone(sweep: Any) -> None:
    losses = swept(sweep, (-2, -1, 0, 1, 2), whole=False, lowest=5.1)
    assert {number for number, seed in losses if seed == 0} == set(range(-2, 7))
    assert {number for number, seed in losses if seed > 0} == {4, 5, 6}


def test_a_grid_grows_no_further_than_five_rates_and_says_so(sweep: Any) -> None:
    found = sweep.best(swept(sweep, (0, 1, 2), False, lowest=40.0), (0, 1, 2), range(3))
    assert found.number == 7 and found.at_edge


def test_where_other_seeds_are_best_elsewhere_the_mean_decides_with_both_its_neighbours(sweep: Any) -> None:
    losses: dict[tuple[int, int], float] = {}
    while needed := sweep.missing(losses, (-2, -1, 0, 1, 2), range(3), False):
        for number, seed in needed:  # the first seed is best at 0, the two others at 3
            losses[number, seed] = abs(number - (3 if seed else 0))
    found = sweep.best(losses, (-2, -1, 0, 1, 2), range(3))
    assert found.number in (2, 3) and found.per_seed == (0, 3, 3) and not found.at_edge


def test_a_rate_at_which_a_seed_diverged_is_not_the_best(sweep: Any) -> None:
    losses = {(n, s): 1.0 - n / 10 for n in range(4) for s in range(2)} | {(2, 1): math.inf, (3, 0): math.inf}
    assert sweep.best(losses, (0, 1, 2, 3), range(2)).number == 1


def best(sweep: Any, number: int, *losses: float, per_seed: tuple[int, ...] = ()) -> Any:
    return sweep.Best(number, losses, per_seed or (number,) * len(losses), (), False)


def test_vertex_of_a_parabola(sweep: Any) -> None:
    means = {number: 3 + 2 * (number - 1.3) ** 2 for number in (0, 1, 2, 3)}
    assert sweep.vertex(means, 1) == pytest.approx(1.3) == sweep.vertex(means, 2)


def test_figures_of_a_sweep(sweep: Any) -> None:
    one, other = best(sweep, 0, 1.0, 2.0, 3.0), best(sweep, 3, 1.5, 1.5, 4.5)
    assert one.mean == 2.0 and one.sd == 1.0 and one.lr == 1e-3
    assert sweep.pooled_sd(one, other) == pytest.approx(math.sqrt((1 + 3) / 2))
    assert sweep.wins(one, other) == 2 and sweep.wins(other, one) == 1


# ------------------------------------------------------------------------------------------------------------
# Verdicts


def held(verdicts: Any) -> list[bool]:
    return [verdict.held for verdict in verdicts]


@pytest.mark.parametrize(("apart", "within"), [(1, False), (2, True), (3, True), (4, True), (5, False)])
def test_r1_asks_for_a_ratio_of_4_to_30(sweep: Any, registered: Any, apart: int, within: bool) -> None:
    found = list(registered.judge_rates(best(sweep, apart - 1, 1.0, 1.1), best(sweep, -1, 1.0, 1.1)))
    assert held(found) == [within]
    if apart == 3:
        assert found[0].found.startswith("x 10 (by seed 10, 10): LoRA 1.0500 ± 0.0707 at 0.0046, full")


def test_r2_bears_a_tie_of_all_layers_and_the_mlp_but_none_with_attention(
    sweep: Any, registered: Any
) -> None:
    every, mlp = best(sweep, 0, 1.0, 1.2), best(sweep, 0, 0.98, 1.16)
    assert held(registered.judge_targets(every, mlp, best(sweep, 0, 1.3, 1.3))) == [True, True]
    assert held(registered.judge_targets(every, best(sweep, 0, 0.7, 0.9), best(sweep, 0, 0.6, 1.3))) == [
        False,
        False,
    ]


def curves(**others: list[float]) -> dict[int, list[list[float]]]:
    falling = [4.0, 3.9, 3.5]
    return {16: [falling] * 2} | {int(name[1:]): [losses] * 2 for name, losses in others.items()}


def test_r3_early_curves(registered: Any) -> None:
    near, far = [4.0, 3.93, 3.52], [4.0, 3.93, 3.54]
    assert held(registered.judge_early(curves(r1=far, r4=near, r32=near))) == [True]  # rank 1 is only told
    assert held(registered.judge_early(curves(r4=near, r32=far))) == [False]
    still = {rank: [[4.0, 3.99]] for rank in (4, 16, 32)}
    assert held(registered.judge_early(still)) == [False]  # what does not move, tells nothing


def test_r3_capacity_grows_in_every_seed(registered: Any) -> None:
    assert held(registered.judge_capacity({16: (90, 95), 1: (5, 7), 4: (40, 50)}, 100)) == [True]
    assert held(registered.judge_capacity({16: (100, 100), 1: (5, 7), 4: (40, 100)}, 100)) == [False]


def test_r5_asks_in_every_seed(sweep: Any, registered: Any) -> None:
    found = {
        "q,k": best(sweep, 0, 1.0, 1.0),
        "q,v": best(sweep, 0, 0.9, 0.9),
        "v,o": best(sweep, 0, 0.1, 1.0),
    }
    assert held(registered.judge_projections(found | {"q,k,v,o": best(sweep, 0, 2.0, 2.0)})) == [
        True,
        False,
        False,
    ]


def test_r6_parity_is_within_a_standard_deviation_on_either_side(sweep: Any, registered: Any) -> None:
    plain = best(sweep, 0, 1.0, 1.1, 1.2)
    for shift, wanted in ((0.09, True), (-0.09, True), (0.11, False), (-0.11, False)):
        moved = best(sweep, 0, 1.0 + shift, 1.1 + shift, 1.2 + shift)
        assert held(registered.judge_parity(moved, plain)) == [wanted]


def test_r6_rounding_asks_for_two_standard_errors(registered: Any) -> None:
    def rows(*totals: float) -> dict[str, list[list[float]]]:
        return {part: [[total, 10] for total in totals] for part in ("text", "task")}

    formats = {
        "none": rows(20, 20),
        "nf4": rows(21, 21),
        "fp4": rows(23, 23.5),
        "int4": rows(21.28, 21.08),
    }  # 1.8 of them
    assert held(registered.judge_rounding(formats)) == [True, False]


def test_the_standard_error_of_a_paired_difference(registered: Any) -> None:
    """Rows of equal length: the textbook's sd / sqrt(n) of the differences per token."""
    worse, better = [[12.0, 4], [13.0, 4], [17.0, 4]], [[10.0, 4], [12.0, 4], [14.0, 4]]
    gap, error = registered.paired(worse, better)
    assert gap == pytest.approx(6 / 12)
    assert error == pytest.approx(1.0 / math.sqrt(3) / 4)  # differences 2, 1, 3: sd 1


# ------------------------------------------------------------------------------------------------------------
# What is compared


def test_contestants_have_the_same_number_of_parameters(script: Any, registered: Any) -> None:
    base = script.made.BaseSize()
    made = {name: sections["adapter"] for name, sections in registered.methods(base).items()}
    # width 128, MLP 512: attention 4 * 256 = 1024 per rank and layer, MLP 3 * 640 = 1920, both 2944
    assert made["attention"]["rank"] * 1024 == made["lora"]["rank"] * 2944 == 47104
    assert made["mlp"]["rank"] * 1920 == 48000  # 1.9 % more
    assert [made[name]["rank"] for name in ("q,k", "q,v", "v,o", "q,k,v,o")] == [8, 8, 8, 4]
    assert {made[f"rank {rank}"]["alpha"] for rank in (1, 4, 16, 32)} == {32.0}


def test_every_recipe_is_valid_and_is_what_a_cell_says(
    script: Any, registered: Any, tiny: Path, tmp_path: Path
) -> None:
    cells = script.cells
    for name, sections in registered.methods(script.made.BaseSize()).items():
        for kind, steps in (("task", 100), ("early", 20), ("pairs", 200)):
            cell = cells.Cell(kind, name, 2, seed=1)
            values = cells.recipe_of(cell, sections, cells.Runs(), tiny) | {"output": str(tmp_path / "run")}
            values["model"]["path"] = str(tiny / "model")
            for field in ("train", "eval"):
                values["data"][field] = str(tiny / "train.jsonl")
            (tmp_path / "recipe.yaml").write_text(json.dumps(values))
            recipe = load_recipe(tmp_path / "recipe.yaml")
            assert recipe.optimizer.lr == 4.6e-3 and recipe.training.max_steps == steps
            assert recipe.training.seed == 1 and recipe.training.precision == "fp32"
            assert recipe.model.quantize == ("nf4" if name == "qlora" else "none")


def test_no_prompt_is_trained_and_held_out(script: Any, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("mr,ref\n" + "".join(f'"name[{i % 50}], x","it is {i}"\n' for i in range(200)))
    train, held_out = script.made.task_rows(file, 1000)
    assert len(train) + len(held_out) == 200 and held_out
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    short = [row for part in script.made.task_rows(file, 20) for row in part]
    assert len(short) == 10  # "name[0], x = it is 0" has 20 characters: one digit each


def test_a_folder_of_another_base_is_not_taken_over(script: Any, tmp_path: Path) -> None:
    for name in ("text.txt", "task.csv"):
        (tmp_path / name).write_text("x")
    (tmp_path / "base.json").write_text(json.dumps({"sources": ["another"], "size": {}, "hash": "h"}))
    with pytest.raises(SystemExit, match="other files or sizes"):
        script.made.make([tmp_path / "text.txt"], tmp_path / "task.csv", tmp_path, script.made.BaseSize())


def test_text_is_cut_at_ends_of_lines(script: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"q": "One.", "n": 3, "a": "Two three."}, {"q": "Four."}]))
    assert script.made.text_of(tmp_path / "a.json") == "One.\nTwo three.\nFour."
    assert script.made.pieces("One.\nTwo three.\nFour.", 6) == ["One.\nTwo three."]


def test_random_pairs_have_a_key_each(script: Any) -> None:
    words = [f"{a}{b}" for a in "abcdefghijklm" for b in "abcdefghijklmnopqrst"]  # 260
    rows = script.made.random_pairs(words, 500, 3)
    assert len({row["prompt"] for row in rows}) == 500
    used = [word for row in rows for word in row["completion"].split()]
    assert len(used) == 1500 and set(used) <= set(words[-128:]) and len(set(used)) > 120
    assert rows == script.made.random_pairs(words, 500, 3)
    assert script.made.whole_words(["Ġthe", "he", "ĠThe", "Ġ", "Ġ4", "Ġa"]) == ["a", "the"]


def test_int4_by_hand(script: Any) -> None:
    import torch

    int4 = script.cells.quantized.int4
    weight = torch.zeros(2, 64)
    weight[0, :5] = torch.tensor([14.0, 3.1, -2.9, -14.0, 0.9])
    weight[1, :3] = torch.tensor([-0.7, 0.26, 0.24])  # a block of its own: steps of 0.1
    found = int4(weight)
    assert found[0, :5].tolist() == [14.0, 4.0, -2.0, -14.0, 0.0]
    assert found[1, :3] == pytest.approx([-0.7, 0.3, 0.2])
    assert not found[:, 5:].any() and torch.equal(int4(torch.zeros(1, 64)), torch.zeros(1, 64))


def test_nf4_gives_back_the_levels_of_the_paper(script: Any) -> None:
    """QLoRA, appendix E: levels times the largest of a block are what they were; between two, the nearer."""
    import torch

    levels = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
    levels += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
    block = torch.tensor(levels * 4)
    weight = torch.stack([3 * block, 5 * block])
    assert torch.allclose(script.cells.quantized.rounded(weight, "nf4"), weight, atol=1e-5)
    assert not torch.allclose(script.cells.quantized.rounded(weight, "fp4"), weight, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------
# Resuming


class Inline:
    """A pool of one worker: this process."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: Any) -> None: ...

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(call(*arguments))
        return future


@pytest.fixture
def pretended(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """pretended(most) runs R5 with cells whose losses are made up and which stop after `most` of them; it
    returns what ran."""
    cells = script.cells
    (tmp_path / "cells").mkdir()

    def call(most: int, base: str = "base") -> list[str]:
        ran: list[str] = []

        def run(cell: Any, method: Any, runs: Any, base: str, work: Path) -> Any:
            if len(ran) == most:
                raise KeyboardInterrupt
            ran.append(cell.name)
            result = cells.wanted_of(cell, method, runs, base) | {
                "held_out": 1 + (cell.number - 3) ** 2 + len(cell.method),
                "seconds": 0.0,
            }
            (work / "cells" / f"{cell.name}.json").write_text(json.dumps(result))
            return result

        monkeypatch.setattr(cells, "run", run)
        monkeypatch.setattr(script, "ProcessPoolExecutor", Inline)
        sizes = script.made.BaseSize()
        with contextlib.suppress(KeyboardInterrupt):
            script.run_all(["R5"], 2, 1, {"hash": base}, tmp_path, sizes, cells.Runs())
        return ran

    return call


def test_what_has_run_is_not_run_again(pretended: Any) -> None:
    first = pretended(5)
    rest = pretended(1000)
    assert len(first) == 5 and not set(first) & set(rest)
    assert len(first + rest) == 4 * (5 + 3)  # four contestants: five rates, three of them with both seeds
    assert pretended(1000) == []


def test_cells_of_another_base_do_not_count(pretended: Any) -> None:
    assert len(pretended(1000)) == len(pretended(1000, "another")) == 32


# ------------------------------------------------------------------------------------------------------------
# What is told


def tiny_result() -> dict[str, Any]:
    rates = [[1e-3, [2.0, 2.1]], [2.2e-3, [1.5, 1.6]], [4.6e-3, [1.9, None]]]
    sweep = {"trained": 1, "lr": 2.2e-3, "mean": 1.55, "sd": 0.1, "rates": rates}
    sweep |= {"widened_to": [4.6e-3], "at_edge": False}
    verdicts = [
        {"expected": "a | b", "found": "1 < 2", "held": True},
        {"expected": "c", "found": "3", "held": False},
    ]
    sweeps = [sweep | {"kind": "task", "method": name} for name in ("lora", "full")]
    notes = [{"question": "q", "found": "4"}]
    claim = {"hypothesis": "h", "published": "p", "verdicts": verdicts, "sweeps": sweeps, "afterwards": notes}
    return {"about": {}, "claims": {"R1": claim}, "cells": [{"a": 1}, {"b": [2, 3]}]}


def test_table_has_an_expectation_per_row(script: Any) -> None:
    rows = script.told.table(tiny_result())
    after = "|  | *looked at afterwards:* q |  | 4 |  |"
    assert rows[2:] == ["| R1 | a \\| b | p | 1 < 2 | yes |", "|  | c |  | 3 | **no** |", after]
    lines = list(script.told.lines(tiny_result()))
    assert "    NOT HELD  c" in lines and any("grid widened to [0.0046]" in line for line in lines)


def test_json_has_a_cell_per_line(script: Any) -> None:
    text = script.told.as_json(tiny_result())
    assert json.loads(text) == tiny_result()
    assert '  {"b": [2, 3]}' in text.splitlines()


def test_picture_shows_every_seed(script: Any) -> None:
    root = ElementTree.fromstring(script.told.picture(tiny_result()))
    space = "{http://www.w3.org/2000/svg}"
    dots = [(float(dot.get("cx", "")), float(dot.get("cy", ""))) for dot in root.iter(f"{space}circle")]
    assert len(dots) == 12 and all(0 <= x <= 640 and 0 <= y <= 340 for x, y in dots)
    lines = [line.get("points", "").split() for line in root.iter(f"{space}polyline")]
    assert [len(points) for points in lines] == [2, 2]  # a rate at which a seed diverged is not joined
    assert [dot for dot in dots if dot[1] == max(y for _, y in dots)]


# ------------------------------------------------------------------------------------------------------------
# What is committed


@pytest.mark.skipif(not NEWEST, reason="nothing is committed yet")
def test_committed_verdicts_are_what_the_committed_cells_say(script: Any) -> None:
    committed = json.loads(NEWEST[0].read_text())
    about = committed["about"]
    found = {script.cells.Cell(**cell["cell"]): cell for cell in committed["cells"]}
    results = script.Results(found, range(about["seeds"]), about["runs"]["pairs"])
    again = json.loads(json.dumps(script.summary(results, list(committed["claims"]))))
    assert again == committed["claims"]
    assert {cell["base"] for cell in committed["cells"]} == {about["base"]["hash"]}


@pytest.mark.skipif(not NEWEST, reason="nothing is committed yet")
def test_the_readme_has_the_newest_results(script: Any) -> None:
    text = (ROOT / "README.md").read_text()
    made = text.split(script.told.BEGIN)[1].split(script.told.END)[0].strip().splitlines()
    committed = json.loads(NEWEST[0].read_text())
    assert made == script.told.table(committed)
    assert NEWEST[0].with_suffix(".svg").read_text() == script.told.picture(committed)
    assert f"docs/{NEWEST[0].name}" in text


# ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_of_it_runs_at_a_tiny_size_and_resumes(tmp_path: Path) -> None:
    text = "Once upon a time there was a house.\nIt was red, and it was old.\n"
    (tmp_path / "text.txt").write_text("".join(f"{i}. {text}" for i in range(300)))
    (tmp_path / "task.csv").write_text("mr,ref\n" + "".join(f"name[{i}],It is {i}.\n" for i in range(200)))
    command = [sys.executable, ROOT / "scripts" / "compare_methods.py", "--quick", "--seeds", "2"]
    command += ["--text", tmp_path / "text.txt", "--tasks", tmp_path / "task.csv"]
    command += ["--work", tmp_path / "work", "--output", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["claims"]) == ["R1", "R2", "R3", "R5", "R6"]
    for claim in found["claims"].values():
        assert claim["verdicts"] and all(verdict["found"] for verdict in claim["verdicts"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "cells").iterdir()}
    assert json.loads((tmp_path / "found.json").read_text())["claims"] == found["claims"]
