"""What `lorakit inspect` found, as tables and as a picture. The numbers are explained in inspection.py."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorakit import picture
from lorakit.picture import Cell, HeatMap, by_place, column_names

Entry = dict[str, Any]
Row = tuple[str, ...]


def summed(layers: Sequence[Mapping[str, Any]]) -> Entry:
    """Norm of all of `layers` as one vector, against that of their weights where all of these are known."""
    norm = math.hypot(*(entry["norm"] for entry in layers))
    sizes = [entry["weight_norm"] for entry in layers]
    size = None if None in sizes else math.hypot(*sizes)
    return {"norm": norm, "weight_norm": size, "relative": ratio(norm, size)}


def ratio(norm: float, size: float | None) -> float | None:
    """norm / size; None where the size is unknown, or is zero and the norm is not."""
    if size:
        return norm / size
    return 0.0 if size == norm == 0 else None


def by_name(layers: Iterable[Entry]) -> list[Entry]:
    """One entry per layer: its experts together, with the rank and the spectrum of the first, and the means
    of their effective and stable ranks and of their amplification."""
    groups: dict[str, list[Entry]] = {}
    for entry in layers:
        groups.setdefault(entry["name"], []).append(entry)
    found = []
    for inside in groups.values():
        means = {}
        for key in ("effective_rank", "stable_rank", "amplification"):
            values = [entry[key] for entry in inside if entry[key] is not None]
            means[key] = math.fsum(values) / len(values) if values else None
        share = math.fsum(entry["share"] for entry in inside)
        found.append(inside[0] | summed(inside) | means | {"share": share})
    return found


# ------------------------------------------------------------------------------------------------------------
# Tables


def as_text(found: Mapping[str, Any]) -> str:
    here = found["weight_norm"] is not None
    size = f", {_percent(found['relative'])} of the weights' {found['weight_norm']:.4g}" if here else ""
    facts = [
        ("adapter", f"{found['adapter']}: {found['method']}"),
        ("base", found["base"] if found["without_base"] is None else f"not read: {found['without_base']}"),
        ("change", f"|D| = {found['norm']:.4g}{size}"),
    ]
    lines = [f"{word:<9} {text}" for word, text in facts]
    lines += ["", *_table(_layer_rows(by_name(found["layers"]), here))]
    for title, key in (("kind of module", "kinds"), ("layer", "depths")):
        lines += ["", *_table(_group_rows(title, found[key], here))]
    if found["against"]:
        lines += ["", *_told_against(found["against"])]
    return "\n".join(lines)


def _layer_rows(layers: Sequence[Entry], here: bool) -> list[Row]:
    head: Row = ("module", "rank", "alpha", "scale", "|D|", *(("|D|/|W|", "amplified") if here else ()))
    rows = [(*head, "singular values", "effective", "stable", "share")]
    for entry in layers:
        alpha, scale = ("" if entry[key] is None else f"{entry[key]:.4g}" for key in ("alpha", "scale"))
        factor = "" if entry["amplification"] is None else _two(entry["amplification"])
        beside = (_percent(entry["relative"]), factor) if here else ()
        values = entry["singular_values"]
        ends = " .. ".join(f"{value:.2g}" for value in (*values[:1], *values[1:][-1:]))
        ranks = (f"{entry[key]:.1f}" for key in ("effective_rank", "stable_rank"))
        own: Row = (entry["name"], _rank(entry), alpha, scale, f"{entry['norm']:.4g}")
        rows.append((*own, *beside, ends, *ranks, f"{100 * entry['share']:.1f} %"))
    return rows


def _rank(entry: Mapping[str, Any]) -> str:
    """How large the adapter is there: its rank, where a method moved ranks from which, or the tuner."""
    if not entry["rank"] and "init_rank" not in entry:
        return str(entry["trained_as"])
    told = f"{entry['rank']} from {entry['init_rank']}" if "init_rank" in entry else str(entry["rank"])
    return f"{told}, shared" if "shared_with" in entry else told


def _group_rows(title: str, groups: Sequence[Entry], here: bool) -> list[Row]:
    rows: list[Row] = [(title, "number", "|D|", *(("|D|/|W|",) if here else ()), "share of |D|^2")]
    for entry in groups:
        beside = (_percent(entry["relative"]),) if here else ()
        number, share = f"x {entry['number']}", f"{100 * entry['share']:.1f} %"
        rows.append((entry["name"], number, f"{entry['norm']:.4g}", *beside, share))
    return rows


_MEANING = (
    "left, right: share of the outputs' and of the inputs' directions that both have (arXiv 2106.09685,"
    " equation 4); first: of the strongest alone; chance: of random ones; cosine: of the changes themselves"
)


def _told_against(against: Mapping[str, Any]) -> list[str]:
    lines = [f"against   {against['adapter']}"]
    for key, word in (("only_here", "there"), ("only_there", "here")):
        if names := against[key]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            lines.append(f"not {word:<5} {names[0]}{more}")
    sides = ("left", "right")
    head = (f"{what}{side}" for what in ("", "first ", "chance ") for side in sides)
    rows: list[Row] = [("module", "ranks", *head, "cosine")]
    for entry in against["layers"]:
        place = entry["name"] if entry["expert"] is None else f"{entry['name']}[{entry['expert']}]"
        ranks = "{} {}".format(*entry["ranks"])
        numbers = (f"{entry[what + side]:.3f}" for what in ("", "first_", "chance_") for side in sides)
        rows.append((place, ranks, *numbers, f"{entry['cosine']:+.3f}"))
    return [*lines, "", *_table(rows), "", _MEANING]


def _two(value: float) -> str:
    """Two digits, however small; whole numbers where these are more."""
    return f"{value:.2g}" if value < 99.5 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    if value is None:
        return ""
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:,.0f} %"


def _table(rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------------------
# Picture


def heat_map(found: Mapping[str, Any]) -> str:
    """An SVG document, layer by module: |D| / |W|, or the share of |D|^2 where the base is not here."""
    here = found["weight_norm"] is not None
    word, key = ("|D| / |W|", "relative") if here else ("share of |D|^2", "share")
    layers = by_name(found["layers"])
    cells, sums = by_place(layers), {}
    for name in column_names(cells):
        column = [inside[name] for inside in cells.values() if name in inside]
        sums[name] = _percent(summed(column)["relative"] if here else math.fsum(e["share"] for e in column))
    drawn = {
        row: {name: _cell(entry, word, entry[key] or 0.0) for name, entry in inside.items()}
        for row, inside in cells.items()
    }
    top = max((entry[key] or 0.0 for entry in layers), default=0.0)
    legend = [Cell(top * part / 4, _percent(top * part / 4), "") for part in range(5)]
    together = f": {_percent(found['relative'])} over all" if here else ""
    title = f"{word}, layer by module{together}"
    return picture.svg(HeatMap(title, word, legend, drawn, ("all", sums)))


def _cell(entry: Mapping[str, Any], word: str, value: float) -> Cell:
    has_one = entry["rank"] or "init_rank" in entry
    rank = f"rank {_rank(entry)}" if has_one else _rank(entry)
    told = f"{entry['name']}: {word} {_percent(value)}, |D| {entry['norm']:.4g}, {rank}"
    return Cell(value, _percent(value), told)
