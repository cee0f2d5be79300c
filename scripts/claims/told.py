"""The results for people: a table in the README, lines on the terminal, a picture of R1. Pure functions, but
for `bring`."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

BEGIN = "<!-- made by scripts/compare_methods.py --table: change nothing here -->"
END = "<!-- end of what is made by it -->"

Found = Mapping[str, Any]  # what the JSON file holds


def as_json(result: Found) -> str:
    """`result` with every cell on a line of its own."""
    rest = json.dumps({key: value for key, value in result.items() if key != "cells"}, indent=1)
    cells = ",\n".join("  " + json.dumps(cell) for cell in result["cells"])
    return f'{rest.removesuffix("}").rstrip()},\n "cells": [\n{cells}\n ]\n}}\n'


def table(result: Found) -> list[str]:
    """Markdown: an expectation per row."""
    rows = ["| | expected, written down before | published | found here | held |", "|---" * 5 + "|"]
    for name, claim in result["claims"].items():
        for index, verdict in enumerate(claim["verdicts"]):
            first = (name, claim["published"]) if index == 0 else ("", "")
            held = "yes" if verdict["held"] else "**no**"
            cells = [first[0], verdict["expected"], first[1], verdict["found"], held]
            rows.append(row(cells))
        for note in claim["afterwards"]:
            rows.append(row(["", f"*looked at afterwards:* {note['question']}", "", note["found"], ""]))
    return rows


def row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def lines(result: Found) -> Iterator[str]:
    """For the terminal: verdicts, and what every method had at its best rate."""
    for name, claim in result["claims"].items():
        yield f"{name}  {claim['hypothesis']}"
        for verdict in claim["verdicts"]:
            yield f"    {'held    ' if verdict['held'] else 'NOT HELD'}  {verdict['expected']}"
            yield f"              {verdict['found']}"
        for note in claim["afterwards"]:
            yield f"    afterwards  {note['question']}: {note['found']}"
        for sweep in claim["sweeps"]:
            edge = ", at the edge of the grid" if sweep["at_edge"] else ""
            widened = f", grid widened to {sweep['widened_to']}" if sweep["widened_to"] else ""
            size = f"{sweep['method']:<12}{sweep['trained']:>12,} trained"
            yield f"    {size}  {sweep['mean']:.4f} ± {sweep['sd']:.4f} at {sweep['lr']:g}{edge}{widened}"


# ------------------------------------------------------------------------------------------------------------
# Picture

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 62, 28, 48, 48
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.ground { fill: #ffffff }
.grid { stroke: #d0d7de; stroke-width: 1 }
.lora { stroke: #0969da; fill: #0969da }
.full { stroke: #bc4c00; fill: #bc4c00 }
polyline { fill: none !important; stroke-width: 2 }
text.lora, text.full { stroke: none }
.x { text-anchor: middle }
.y { text-anchor: end }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.ground { fill: #0d1117 }
.grid { stroke: #30363d }
.lora { stroke: #58a6ff; fill: #58a6ff }
.full { stroke: #f0883e; fill: #f0883e }
}"""


def picture(result: Found) -> str:
    """R1 as an SVG document: held-out loss against the learning rate, LoRA and full; a dot is a seed. What
    ends above the base-to-best range is cut off at the upper edge."""
    sweeps = {sweep["method"]: sweep["rates"] for sweep in result["claims"]["R1"]["sweeps"]}
    points = [(lr, loss) for rates in sweeps.values() for lr, losses in rates for loss in losses]
    rates = sorted({lr for lr, _ in points})
    low = min(loss for _, loss in points if loss is not None)
    finite = sorted(loss for _, loss in points if loss is not None)
    high = min(finite[-1], low + 4 * (finite[len(finite) // 2] - low) + 1e-9)
    wide = math.log(rates[-1] / rates[0]) or 1.0

    def place(lr: float, loss: float | None) -> tuple[float, float]:
        shown = min(high, high if loss is None else loss)
        x = LEFT + (WIDTH - LEFT - RIGHT) * math.log(lr / rates[0]) / wide
        return x, TOP + (HEIGHT - TOP - BOTTOM) * (high - shown) / (high - low or 1.0)

    drawn = []
    for lr in rates:
        x = place(lr, low)[0]
        drawn.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        drawn.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{lr:g}</text>')
    for index in range(5):
        loss = low + (high - low) * index / 4
        y = place(rates[0], loss)[1]
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text class="y" x="{LEFT - 8}" y="{y + 4:.1f}">{loss:.2f}</text>')
    for method, found in sweeps.items():
        drawn += curve(method, [(lr, losses) for lr, losses in found], place)
    title = "Held-out loss against the learning rate"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            '<rect class="ground" width="100%" height="100%" rx="6"/>',
            f'<text class="title" x="16" y="26">{title}</text>',
            f'<text class="lora" x="{WIDTH - 190}" y="26">LoRA, rank 16</text>',
            f'<text class="full" x="{WIDTH - 90}" y="26">full</text>',
            *drawn,
            f'<text x="16" y="{HEIGHT - 10}">learning rate; losses above {high:.2f} at the upper edge</text>',
            "</svg>\n",
        ]
    )


def curve(method: str, rates: list[tuple[float, list[float | None]]], place: Any) -> Iterator[str]:
    """Dots of the seeds, and a line through the means of rates that all seeds ran at without diverging."""
    most = max(len(losses) for _, losses in rates)
    whole = [(lr, losses) for lr, losses in rates if len(losses) == most and None not in losses]
    through = [place(lr, sum(losses) / most) for lr, losses in whole]  # type: ignore[arg-type]
    yield f'<polyline class="{method}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in through)}"/>'
    for lr, losses in rates:
        for loss in losses:
            x, y = place(lr, loss)
            told = "diverged" if loss is None else f"{loss:.4f}"
            yield (
                f'<circle class="{method}" cx="{x:.1f}" cy="{y:.1f}" r="3">'
                f"<title>{method} at {lr:g}: {told}</title></circle>"
            )


# ------------------------------------------------------------------------------------------------------------


def bring(file: Path, root: Path) -> None:
    """The table into README.md between its marks, the picture beside `file`."""
    result = json.loads(file.read_text())
    readme = root / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    made = "\n".join([BEGIN, *table(result), END])
    readme.write_text(before + made + rest.split(END, 1)[1])
    if "R1" in result["claims"]:
        file.with_suffix(".svg").write_text(picture(result))
