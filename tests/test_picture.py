"""The heat map of ranks: an SVG that any reader of XML takes, whose cells are the numbers of params.json."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from lorakit.picture import RANKS, rank_heat_map
from tests.conftest import ROOT

SVG = "{http://www.w3.org/2000/svg}"


def parsed(svg: str) -> ElementTree.Element:
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert {element.tag for element in root.iter()} <= {
        f"{SVG}{t}" for t in ["svg", "g", "title", "style", "rect", "text"]
    }
    return root


def told(svg: str) -> dict[str, tuple[int, int]]:
    """Module -> (rank in its tooltip, number in its cell)."""
    found = {}
    for group in parsed(svg).iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title")
        if title is not None:
            name, rank = re.fullmatch(r"(.*): rank (\d+).*", title).groups()
            found[name] = (int(rank), int(group.findtext(f"{SVG}text")))
    return found


def params(ranks: dict[str, int], **more: Any) -> dict[str, Any]:
    return {"modules": [{"name": name, "rank": rank, "init_rank": 12} | more for name, rank in ranks.items()]}


def test_the_picture_of_the_readme_is_what_the_code_draws_from_the_numbers_beside_it() -> None:
    svg = (ROOT / "docs" / "adalora-ranks.svg").read_text("utf-8")
    numbers = json.loads((ROOT / "docs" / "adalora-ranks.json").read_text())
    assert svg == rank_heat_map(numbers)
    assert "](docs/adalora-ranks.svg)" in (ROOT / "README.md").read_text()
    assert sum(module["rank"] for module in numbers["modules"]) == 4 * 21, "the command of the README: 4 each"


def test_a_run_that_decides_its_ranks_draws_them_and_any_other_does_not(write_recipe, cli, tmp_path: Path):
    adapter = {"method": "adalora", "init_rank": 4, "target_rank": 2, "interval": 1}
    recipe = write_recipe(adapter=adapter, training={"max_steps": 10, "batch_size": 2})
    assert cli("train", recipe)[0] == 0
    numbers = json.loads((tmp_path / "run" / "params.json").read_text())
    ranks = {module["name"]: module["rank"] for module in numbers["modules"]}
    assert len(set(ranks.values())) > 1
    cells = told((tmp_path / "run" / RANKS).read_text())
    assert cells == {name: (rank, rank) for name, rank in ranks.items()}
    assert f"]({RANKS})" in (tmp_path / "run" / "params.md").read_text()

    recipe = write_recipe(training={"max_steps": 1, "batch_size": 2})
    assert cli("train", recipe, "--output", tmp_path / "plain")[0] == 0
    assert not (tmp_path / "plain" / RANKS).exists()
    assert RANKS not in (tmp_path / "plain" / "params.md").read_text()


def test_hundreds_of_layers_keep_their_numbers_and_the_names_of_their_columns_in_sight() -> None:
    names = ("self_attn.q_proj", "mlp.down_proj")
    ranks = {f"model.layers.{n}.{name}": (7 * n) % 13 for n in range(200) for name in names}
    svg = rank_heat_map(params(ranks))
    assert told(svg) == {name: (rank, rank) for name, rank in ranks.items()}
    texts = [(float(text.get("y")), text.text) for text in parsed(svg).iter(f"{SVG}text")]
    heads = sorted(y for y, text in texts if text == "q_proj")
    assert len(heads) == 5  # every 40 rows
    assert max(after - before for before, after in pairwise(heads)) < 1000  # pixels: less than a screen
    places = [(rect.get("x"), rect.get("y")) for rect in parsed(svg).iter(f"{SVG}rect")]
    assert len(places) == len(set(places)), "no cell covers another"
    (_, _, width, height) = map(float, parsed(svg).get("viewBox").split())
    assert max(y for y, _ in texts) < height < 200 * 30
    assert width < 900


def test_the_sums_are_those_of_the_columns_and_a_missing_module_is_a_gap() -> None:
    ranks = {"h.0.a": 3, "h.0.b": 4, "h.1.a": 5, "h.10.a": 1}
    svg = rank_heat_map(params(ranks))
    assert told(svg).keys() == ranks.keys()
    lowest = max(float(text.get("y")) for text in parsed(svg).iter(f"{SVG}text"))
    below = [text.text for text in parsed(svg).iter(f"{SVG}text") if float(text.get("y")) == lowest]
    assert below == ["sum", "9", "4"]


def test_two_stacks_of_layers_stay_apart() -> None:
    svg = rank_heat_map(params({"vision.layers.0.q": 1, "text.layers.0.q": 2, "head": 3}))
    layers = [text.text for text in parsed(svg).iter(f"{SVG}text") if text.get("class") == "layer"]
    assert layers == ["layer", "vision.layers.0", "text.layers.0", "-", "sum"]


def test_a_name_cannot_leave_its_place() -> None:
    name = 'h.0.<script>alert("&")</script>\x1b\x00'
    svg = rank_heat_map(params({name: 2}))
    assert "<script" not in svg and "\x1b" not in svg
    assert list(told(svg)) == ['h.0.<script>alert("&")</script>\\x1b\\x00']


def test_layers_that_share_an_adapter_are_outlined() -> None:
    modules = [{"name": f"h.{n}.q", "rank": 8, "trainable": 8} for n in range(4)]
    modules[3] |= {"shared_with": "h.1.q", "importance": 0.25}
    svg = rank_heat_map({"modules": [*modules, {"name": "head", "rank": 0, "trainable": 9}]})
    kinds = {}
    for group in parsed(svg).iter(f"{SVG}g"):
        if group.findtext(f"{SVG}title"):
            kinds[group.findtext(f"{SVG}title").split(":")[0]] = group.find(f"{SVG}rect").get("class")
    assert kinds == {"h.0.q": None, "h.1.q": "shared", "h.2.q": None, "h.3.q": "shared"}
    assert "h.3.q: rank 8, importance 0.2500, shared" in svg


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    shares = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("top", [1, 12, 256])
def test_every_number_reads_on_its_colour_and_more_is_darker(top: int) -> None:
    svg = rank_heat_map(params({f"h.{rank}.q": rank for rank in range(1, top + 1)}))
    inks, seen = {"cell black": 0.0, "cell white": 1.0}, []
    for group in parsed(svg).iter(f"{SVG}g"):
        if group.findtext(f"{SVG}title"):
            ground = luminance(group.find(f"{SVG}rect").get("fill"))
            light, dark = sorted((ground, inks[group.find(f"{SVG}text").get("class")]), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5
            seen.append(ground)
    assert seen == sorted(seen, reverse=True)


def test_nothing_decided_is_an_empty_picture() -> None:
    assert told(rank_heat_map({"modules": []})) == {}
