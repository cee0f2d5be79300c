"""What an adapter did to its base, layer by layer: norms, spectra, ranks, amplification, and how much of it
another adapter did as well. The numbers are defined in anatomy.py, the files read in pieces.py.

One matrix is in memory at a time, with its update and, where the base is here, its weight. `as_dict` is the
result, whose shape does not change:

    adapter, method, base, without_base (null, or why the base's weights are not known)
    norm, weight_norm, relative     of everything that was trained, together
    layers[]    name, expert, kind, depth, trained_as, in, out, rank, alpha, scale, norm, weight_norm,
                relative (norm / weight_norm), share (of the sum of all squared norms), singular_values (the
                largest 256), directions (how many of D's are compared: all that are not zero where it has
                factors), effective_rank, stable_rank, amplification; where the run knows them init_rank,
                explained, importance, shared_with. rank, alpha and scale are the method's where a run knows
                them (where ranks moved, scale = alpha / init_rank), else the file's; in a method's export to
                plain LoRA the scale is one
    kinds[], depths[]               name, number, norm, weight_norm, relative, share
    against     adapter, only_here[], only_there[], layers[]: name, expert, ranks [i, j], left and right
                (phi(i, j) of the output's and of the input's directions), shared_rank (m = min(i, j)),
                shared_left, shared_right (phi(m, m)), first_left, first_right (phi(1, 1)), chance_left,
                chance_right (phi(i, j) of random directions), cosine (of D and D')

What is unknown is null: all of a weight without its base, what no factors have, infinite amplification.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorakit import anatomy
from lorakit.anatomy import Update
from lorakit.errors import LorakitError
from lorakit.inspection_view import as_text, heat_map, ratio, summed
from lorakit.picture import place_of
from lorakit.pieces import Changes, Piece, read
from lorakit.saved import find, warn_of_other_base
from lorakit.terminal import track

_LONGEST = 256  # singular values that are told of one matrix

Entry = dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    found: Entry  # as the module says

    def as_dict(self) -> Entry:
        return self.found

    def as_text(self) -> str:
        return as_text(self.found)

    def as_svg(self) -> str:
        return heat_map(self.found)


def inspect(place: str | Path, base: str | None = None, against: str | Path | None = None) -> Inspection:
    """What lies at `place`, a run, an adapter or a checkpoint, beside the weights of its base where they are.

    `base`: in place of the one that is recorded. `against`: another adapter, of a model with layers of the
    same names and sides. Raises: LorakitError when there is no adapter, or nothing that both adapt.
    """
    saved = [find(Path(folder)) for folder in (place, against) if folder is not None]
    if len(saved) == 2:
        warn_of_other_base(*saved)
    trained, *others = (read(one, base) for one in saved)
    other = others[0] if others else None
    theirs = {piece.key: piece for piece in other.pieces} if other else {}
    common = {p.key for p in trained.pieces if p.key in theirs and theirs[p.key].sides == p.sides}
    if other and not common:
        raise LorakitError(
            f"{against} and {place} adapt no layer of the same name and sides", _alike(trained, other)
        )
    layers: list[Entry] = []
    similar: list[Entry] = []
    for piece in track(trained.pieces, "inspecting", total=len(trained.pieces)):
        update = _update(piece)
        if update.norm == 0 and (trained.method == "full" or piece.name.endswith(".bias")):
            continue  # it was not trained
        layers.append(_entry(piece, update) | trained.notes.get(piece.name, {}))
        if piece.key in common:
            similar.append(_against(piece, update, _update(theirs[piece.key])))
    found: Entry = {
        "adapter": str(trained.folder),
        "method": trained.method,
        "base": None if trained.base is None else str(trained.base),
        "without_base": trained.without_base,
        **summed(layers),
        "layers": layers,
        **_groups(layers),
        "against": None,
    }
    if other:
        ours = {piece.key for piece in trained.pieces}
        found["against"] = {
            "adapter": str(other.folder),
            "only_here": sorted({name for name, _ in ours - common}),
            "only_there": sorted({name for name, _ in theirs.keys() - common}),
            "layers": similar,
        }
    return Inspection(found)


# ------------------------------------------------------------------------------------------------------------
# Entries


def _update(piece: Piece) -> Update:
    """Raises: LorakitError where it holds what is no number."""
    try:
        update = piece.update()
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        update = None
    if update is None or not update.s.isfinite().all():
        raise LorakitError(
            f"{piece.name}: its change is not finite: it holds infinities or what is no number",
            "Its training diverged, or its file is damaged; an earlier checkpoint may be sound.",
        )
    return update


def _entry(piece: Piece, update: Update) -> Entry:
    weight = piece.weight().double() if piece.weight else None
    size = None if weight is None else float(weight.norm())
    amplified = None if weight is None else _finite(anatomy.amplification(update, weight))
    outside, inside = piece.sides
    return {
        "name": piece.name,
        "expert": piece.expert,
        "kind": _kind(piece.name),
        "depth": place_of(piece.name)[1],
        "trained_as": piece.trained_as,
        "in": inside,
        "out": outside,
        "rank": piece.rank,
        "alpha": piece.alpha,
        "scale": piece.scale,
        "norm": update.norm,
        "weight_norm": size,
        "relative": ratio(update.norm, size),
        "share": 0.0,
        "singular_values": update.s[:_LONGEST].tolist(),
        "directions": update.num_directions,
        "effective_rank": anatomy.effective_rank(update.s),
        "stable_rank": anatomy.stable_rank(update.s),
        "amplification": amplified,
    }


def _against(piece: Piece, one: Update, other: Update) -> Entry:
    """How alike the two are: subspaces whatever their ranks, and the updates themselves."""
    i, j = one.num_directions, other.num_directions
    outside, inside = piece.sides
    found: Entry = {"name": piece.name, "expert": piece.expert, "ranks": [i, j], "shared_rank": min(i, j)}
    for side, ours, theirs, width in (
        ("left", one.u, other.u, outside),
        ("right", one.v, other.v, inside),
    ):
        least = min(i, j)
        found[side] = anatomy.similarity(ours, theirs)
        found[f"shared_{side}"] = anatomy.similarity(ours[:, :least], theirs[:, :least])
        found[f"first_{side}"] = anatomy.similarity(ours[:, :1], theirs[:, :1])
        found[f"chance_{side}"] = max(i, j) / width if least else 0.0
    return found | {"cosine": anatomy.cosine(one, other)}


def _groups(layers: list[Entry]) -> Entry:
    """Sums by kind of module and by depth; fills in each layer's share. Mutates `layers`."""
    total = sum(entry["norm"] ** 2 for entry in layers)
    for entry in layers:
        entry["share"] = entry["norm"] ** 2 / total if total else 0.0
    return {"kinds": _by("kind", layers), "depths": _by("depth", layers)}


def _by(key: str, layers: Sequence[Entry]) -> list[Entry]:
    groups: dict[str, list[Entry]] = {}
    for entry in layers:
        groups.setdefault(entry[key], []).append(entry)
    return [
        {"name": name, "number": len(inside)}
        | summed(inside)
        | {"share": math.fsum(entry["share"] for entry in inside)}
        for name, inside in groups.items()
    ]


def _kind(name: str) -> str:
    """Layers that differ only in their number are of one kind."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _alike(one: Changes, other: Changes) -> str:
    """Why no layer is of both: other sides, or other names."""
    theirs = {piece.key: piece for piece in other.pieces}
    if same := next((piece for piece in one.pieces if piece.key in theirs), None):
        sides = ["{} x {}".format(*piece.sides) for piece in (same, theirs[same.key])]
        return f"{same.name} is {sides[0]} in one and {sides[1]} in the other: they are of different models."
    names = [trained.pieces[0].name if trained.pieces else "nothing" for trained in (one, other)]
    return f"One begins with {names[0]}, the other with {names[1]}."
