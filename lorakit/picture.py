"""Numbers of layers as a picture: a heat map, layer by module. Of a run whose method decides where its ranks
go, the ranks; of any adapter, how far it moved each weight.

SVG written by hand: nothing to install, no script, no font but the reader's own, nothing of it elsewhere. It
paints its own ground, light or dark as the reader's system is. Layers are rows, one below the other, and the
names of the columns come again every REPEAT rows, so that hundreds of layers read as three do.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from lorakit.terminal import harmless

Entry = Mapping[str, Any]  # one of params.json's modules
Cells = dict[str, dict[str, Entry]]  # layer -> name of the module within it -> its entry

RANKS = "ranks.svg"  # its name in a run

# Pixels.
HEIGHT, GAP, MARGIN = 20, 2, 16
LETTER = 7.4  # the widest that a system's letters of 12 px come out at on average
REPEAT = 40  # rows between two lines of names
LEGEND = 9  # squares in the legend, at most

RAMP = ((0.0, (226, 238, 249)), (0.5, (74, 144, 205)), (1.0, (8, 48, 107)))
BLACK_FROM = 0.18  # luminance from which black reads better than white: at least 4.5 : 1 on either side
STYLE = """\
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-weight: 600; font-size: 14px }
.ground { fill: #ffffff }
.none { fill: none; stroke: #8b949e; stroke-dasharray: 3 2 }
.shared { fill: none; stroke: #4a90cd }
.name, .cell { text-anchor: middle }
.layer { text-anchor: end }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }
.ground { fill: #0d1117 }
}
text.black { fill: #000000 }
text.white { fill: #ffffff }"""


def rank_cells(params: Mapping[str, Any]) -> Cells:
    """The layers whose ranks the method decides, by layer number and name within the layer, in the order of
    params.json."""
    modules = params["modules"]
    shares = any("shared_with" in entry for entry in modules)
    return by_place([entry for entry in modules if "init_rank" in entry or (shares and entry["rank"])])


def by_place(entries: Sequence[Entry]) -> Cells:
    """`entries` by layer number and name within the layer, in their order. Where a model has several stacks
    of layers, the stack's name stands before the number."""
    places = [place_of(entry["name"]) for entry in entries]
    several = len({stack for stack, _, _ in places} - {""}) > 1
    cells: Cells = {}
    for (stack, layer, name), entry in zip(places, entries, strict=True):
        row = f"{stack}.{layer}" if stack and several else layer
        cells.setdefault(row, {})[name] = entry
    return cells


def column_names(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The modules that any layer has, in order of their first appearance."""
    return list(dict.fromkeys(name for row in cells.values() for name in row))


def place_of(name: str) -> tuple[str, str, str]:
    """("model.layers", "3", "self_attn.q_proj") of model.layers.3.self_attn.q_proj."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    if not numbers:
        return "", "-", name
    at = numbers[0]
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


@dataclass(frozen=True)
class Cell:
    """A square of a heat map. Its colour is `value`'s share of the largest; 0 has none."""

    value: float
    text: str
    told: str  # the tooltip
    outlined: bool = False  # in place of a colour


@dataclass(frozen=True)
class HeatMap:
    """What is drawn: layer -> name of the module within it -> its cell; and what is written around it."""

    title: str
    word: str  # of the legend
    legend: Sequence[Cell]
    cells: Mapping[str, Mapping[str, Cell]]
    last: tuple[str, Mapping[str, str]]  # the row below: its name, and what stands in each column
    outlined: str = ""  # what an outline means, if there is any

    @property
    def top(self) -> float:
        return max((cell.value for row in self.cells.values() for cell in row.values()), default=0)


def rank_heat_map(params: Mapping[str, Any]) -> str:
    """An SVG document of the ranks in `params` (the content of params.json). Every cell has its rank in it
    and the module's whole name as a tooltip; layers that share one adapter are outlined, not filled."""
    cells = rank_cells(params)
    shared, sums = _shared(cells), {}
    for name in column_names(cells):
        sums[name] = f"{sum(row[name]['rank'] for row in cells.values() if name in row):,}"
    ranks = sorted({entry["rank"] for row in cells.values() for entry in row.values()})
    if len(ranks) > LEGEND:
        ranks = [round(index * max(ranks) / (LEGEND - 1)) for index in range(LEGEND)]
    drawn = {
        layer: {name: _rank_cell(entry, entry["name"] in shared) for name, entry in row.items()}
        for layer, row in cells.items()
    }
    legend = [Cell(rank, str(rank), "") for rank in ranks]
    outlined = "one adapter for all of its kind" if shared else ""
    return svg(HeatMap(_title(cells), "rank", legend, drawn, ("sum", sums), outlined))


def svg(picture: HeatMap) -> str:
    """The SVG document."""
    cells, names, top = picture.cells, column_names(picture.cells), picture.top
    widths = [max(46.0, *(LETTER * len(text) + 10 for text in _column(picture, name))) for name in names]
    left = MARGIN + LETTER * max([len("layer"), *map(len, cells)]) + 8
    starts = [left + sum(widths[:index]) for index in range(len(names) + 1)]
    drawn, y = [*_legend(picture, MARGIN, MARGIN + 26)], float(MARGIN + 56)
    for number, (layer, row) in enumerate(cells.items()):
        if number % REPEAT == 0:
            drawn += _head(names, starts, widths, left, y)
            y += 2 * HEIGHT
        drawn.append(_text(left - 8, y, layer, "layer"))
        for column, name in enumerate(names):
            if name in row:
                drawn += _square((starts[column], y, widths[column]), row[name], top)
        y += HEIGHT
    word, texts = picture.last
    drawn.append(_text(left - 8, y + 4, word, "layer"))
    for name, start, width in zip(names, starts, widths, strict=False):
        drawn.append(_text(start + width / 2, y + 4, texts[name], "name"))
    right = max(starts[-1], MARGIN + (740 if picture.outlined else 440)) + MARGIN
    bottom = y + 4 + HEIGHT + MARGIN
    size = f'viewBox="0 0 {right:.0f} {bottom:.0f}" width="{right:.0f}" height="{bottom:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}>',
            f"<title>{_safe(picture.title)}</title>",
            f"<style>\n{STYLE}\n</style>",
            '<rect class="ground" width="100%" height="100%" rx="6"/>',
            _text(MARGIN, MARGIN, picture.title, "title"),
            *drawn,
            "</svg>\n",
        ]
    )


def _title(cells: Cells) -> str:
    entries = [entry for row in cells.values() for entry in row.values()]
    if shared := _shared(cells):
        return f"Adapters, layer by module: {len(shared):,} of {len(entries):,} layers share theirs"
    total = sum(entry["rank"] for entry in entries)
    mean = total / len(entries) if entries else 0.0
    return f"Ranks, layer by module: {mean:.3g} on average over {len(entries):,} layers"


def _shared(cells: Cells) -> set[str]:
    """Names of the layers whose adapter is that of other layers too, the one that they name among them."""
    pairs = [
        (entry["name"], entry["shared_with"])
        for row in cells.values()
        for entry in row.values()
        if entry.get("shared_with")
    ]
    return {name for pair in pairs for name in pair}


def _legend(picture: HeatMap, x: float, y: float) -> Iterator[str]:
    yield _text(x, y, picture.word, "key")
    x += max(40.0, LETTER * len(picture.word) + 8)
    width = max(40.0, *(LETTER * len(cell.text) + 8 for cell in picture.legend)) if picture.legend else 40.0
    for cell in picture.legend:
        yield from _square((x, y, width), cell, picture.top)
        x += width
    if picture.outlined:
        yield from _square((x + 12, y, 40), Cell(0, "", "", outlined=True), picture.top)
        yield _text(x + 58, y, picture.outlined, "key")


def _head(
    names: Sequence[str], starts: Sequence[float], widths: Sequence[float], left: float, y: float
) -> Iterator[str]:
    """The names of the columns, in two lines: what a module is in (when that changes), and what it is."""
    yield _text(left - 8, y + HEIGHT, "layer", "layer")
    before = ""
    for name, start, width in zip(names, starts, widths, strict=False):
        above, below = _two_lines(name)
        if above != before:
            yield _text(start + GAP, y, above, "above")
        before = above
        yield _text(start + width / 2, y + HEIGHT, below, "name")


def _column(picture: HeatMap, name: str) -> Iterator[str]:
    """All that is written in a column."""
    yield from (*_two_lines(name), picture.last[1][name])
    yield from (row[name].text for row in picture.cells.values() if name in row)


def _two_lines(name: str) -> tuple[str, str]:
    above, _, below = name.rpartition(".")
    return above, below


def _rank_cell(entry: Entry, shared: bool) -> Cell:
    told = f"{entry['name']}: rank {entry['rank']}"
    if "init_rank" in entry:
        told += f" of {entry['init_rank']}"
    if "importance" in entry:
        told += f", importance {entry['importance']:.4f}"
    if shared:
        told += ", shared"
    return Cell(entry["rank"], str(entry["rank"]), told, shared)


def _square(place: tuple[float, float, float], cell: Cell, top: float) -> Iterator[str]:
    """A rectangle at (x, y, width) with the cell's text in it; outlined where there is nothing to colour."""
    x, y, width = place
    box = f'x="{x + GAP / 2:.1f}" y="{y + GAP / 2:.1f}" width="{width - GAP:.1f}" height="{HEIGHT - GAP}"'
    yield f"<g><title>{_safe(cell.told)}</title>" if cell.told else "<g>"
    if cell.outlined or not cell.value:
        yield f'<rect class="{"shared" if cell.outlined else "none"}" {box} rx="3"/>'
        ink = ""
    else:
        colour = _colour(cell.value / top)
        yield f'<rect fill="#{bytes(colour).hex()}" {box} rx="3"/>'
        ink = " black" if _luminance(colour) >= BLACK_FROM else " white"
    if cell.text:
        yield _text(x + width / 2, y, cell.text, f"cell{ink}")
    yield "</g>"


def _colour(share: float) -> tuple[int, int, int]:
    """RAMP at `share` of the largest value, in (0, 1]."""
    (low, start), (high, end) = RAMP[:2] if share <= RAMP[1][0] else RAMP[1:]
    part = (share - low) / (high - low)
    red, green, blue = (round(a + part * (b - a)) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _luminance(colour: Sequence[int]) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2)."""
    shares = [value / 255 for value in colour]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _text(x: float, y: float, text: str, kind: str) -> str:
    """A line of text in the row that begins at `y`."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y + HEIGHT * 0.7:.1f}">{_safe(text)}</text>'


def _safe(text: str) -> str:
    """`text` as XML holds it: control characters spelled out, markup escaped."""
    return escape(harmless(text))
