"""What a recipe's targets select among a model's layers, and with which rank and alpha. No torch.

A target is a preset, the end of a module path, or a regular expression for the whole path. In: I, out: O,
rank: R.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lorakit.errors import did_you_mean
from lorakit.shapes import Layer, Shapes, embedding_of

PRESETS = ("all-linear", "attention", "mlp")


@dataclass(frozen=True)
class Target:
    """A layer with the rank and alpha of its adapter."""

    layer: Layer
    rank: int
    alpha: float


def matches(pattern: str, name: str) -> bool:
    """A plain name matches the end of the path, whole parts only; anything else is a regular expression for
    all of it."""
    if re.fullmatch(r"[\w.\-]+", pattern):
        return name == pattern or name.endswith("." + pattern)
    return re.fullmatch(pattern, name) is not None


def bad_pattern(pattern: str) -> str:
    """Why `pattern` is no regular expression, or the empty string."""
    try:
        re.compile(pattern)
    except re.error as error:
        return f'"{pattern}" is no regular expression: {error}'
    return "" if len(pattern) <= 500 else "a pattern of more than 500 characters"


def is_attention(name: str) -> bool:
    return any("attn" in part.lower() or "attention" in part.lower() for part in name.split("."))


def _in_preset(preset: str, layer: Layer) -> bool:
    if layer.kind == "embedding" or layer.role:
        return False
    if preset == "attention":
        return is_attention(layer.name)
    if preset == "mlp":  # what is left of a decoder block: its path has a number
        return not is_attention(layer.name) and any(part.isdigit() for part in layer.name.split("."))
    return True


def select(layers: Sequence[Layer], targets: str | Sequence[str]) -> tuple[list[Layer], list[str]]:
    """(the layers that `targets` names, in model order; what is wrong with `targets`, empty when nothing
    is)."""
    wanted = [targets] if isinstance(targets, str) else list(targets)
    return _chosen([layer for layer in layers if layer.kind != "experts"], wanted, PRESETS)


def select_experts(layers: Sequence[Layer], patterns: Sequence[str]) -> tuple[list[Layer], list[str]]:
    """(the 3-D expert weights that `patterns` name, in model order; what is wrong with the patterns)."""
    experts = [layer for layer in layers if layer.kind == "experts"]
    if patterns and not experts:
        return [], ["this model has no 3-D expert weights; what are layers of their own is named by targets"]
    return _chosen(experts, patterns, ())


def _chosen(
    layers: Sequence[Layer], wanted: Sequence[str], presets: Sequence[str]
) -> tuple[list[Layer], list[str]]:
    chosen: dict[str, Layer] = {}
    problems = []
    for pattern in wanted:
        if pattern in presets:
            found = [layer for layer in layers if _in_preset(pattern, layer)]
        elif reason := bad_pattern(pattern):
            problems.append(reason)
            continue
        else:
            found = [layer for layer in layers if matches(pattern, layer.name)]
        if not found:
            problems.append(f'"{pattern}" matches nothing. {candidates(layers, pattern)}')
        chosen.update({layer.name: layer for layer in found})
    return [layer for layer in layers if layer.name in chosen], problems


QUANTIZED = "is quantized and cannot be trained whole; adapt it instead"
TIED = "shares its weights with the other end of the model; adapt it instead (targets)"


def select_whole(
    modules: Sequence[str], patterns: Iterable[str], refusal: Callable[[str], str]
) -> tuple[list[str], list[str]]:
    """(those of `modules` that `patterns` name, to be trained whole; what is wrong with the patterns).

    `modules`: all that have parameters. `refusal`: why a module cannot be trained whole, or the empty string.
    """
    chosen: list[str] = []
    problems = []
    for pattern in patterns:
        if reason := bad_pattern(pattern):
            problems.append(reason)
            continue
        found = [name for name in modules if matches(pattern, name)]
        if not found:
            problems.append(f'"{pattern}" matches no module with parameters')
        problems += [f"{name} {reason}" for name in found if (reason := refusal(name))]
        chosen += [name for name in found if name not in chosen]
    # What lies in a module trained whole is trained with it.
    return [name for name in chosen if not {*modules_above(name)} & {*chosen}], problems


def select_modules(shapes: Shapes, patterns: Iterable[str], quantized: bool) -> tuple[list[str], list[str]]:
    """select_whole over the modules of `shapes`: as layers.whole_modules finds them in the model itself."""
    names = [name for parameter in shapes.parameters for name in modules_above(parameter)]
    head = next((layer for layer in shapes.layers if layer.role == "head"), None)
    names += [head.name] if head else []

    def refusal(name: str) -> str:
        inside = [layer for layer in shapes.layers if f"{layer.name}.".startswith(f"{name}.")]
        if quantized and any(layer.kind in ("linear", "conv1d") and layer is not head for layer in inside):
            return QUANTIZED
        is_end = any(layer.name == name and _is_end(layer, head) for layer in inside)
        return TIED if shapes.tied and is_end else ""

    return select_whole(list(dict.fromkeys(names)), patterns, refusal)


def _is_end(layer: Layer, head: Layer | None) -> bool:
    """Whether a layer is the output head or the embedding of its vocabulary."""
    return layer is head or (
        head is not None and layer.kind == "embedding" and layer.in_features == head.out_features
    )


def twice(layers: Sequence[Layer], whole: Sequence[str]) -> str:
    """Why the modules `whole` cannot be trained beside the adapted `layers`, or the empty string: the first
    layer that is one of them or lies in one."""
    for layer in layers:
        for name in whole:
            if f"{layer.name}.".startswith(f"{name}."):
                field = "target_parameters" if layer.kind == "experts" else "targets"
                around = "" if layer.name == name else f"in {name} "
                adapted = f"{layer.name} {around}is adapted (adapter.{field})"
                return f"{adapted} and cannot be trained whole too; leave it out of one of the two"
    return ""


def select_parameters(
    parameters: Iterable[str], patterns: Sequence[str], tied: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """(those of `parameters` that `patterns` name, by themselves or by a module around them; what is wrong
    with the patterns). All of them where there is no pattern.

    `tied`: name of a parameter that shares its values with another -> that other, which is in `parameters`.
    """
    parameters = list(parameters)
    if not patterns:
        return parameters, []
    names = {**{name: name for name in parameters}, **tied}
    chosen, problems = set(), []
    for pattern in patterns:
        if reason := bad_pattern(pattern):
            problems.append(reason)
            continue
        found = {
            names[name]
            for name in names
            if any(matches(pattern, place) for place in (*modules_above(name), name))
        }
        if not found:
            parts = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            near = did_you_mean(pattern, list(parts))
            problems.append(f'"{pattern}" matches no module and no parameter. {near}'.rstrip())
        chosen |= found
    return [name for name in parameters if name in chosen], problems


def select_rows(
    layers: Sequence[Layer], tokens: Sequence[str | int], tied: bool, moved: Sequence[str]
) -> tuple[Layer | None, list[str]]:
    """(the input embedding, what keeps its rows of `tokens` from being trained by themselves).

    `tied`: whether the output head shares them. `moved`: the layers and modules that move already.
    """
    table = embedding_of(layers)
    if table is None:
        return None, ["this model has no input embedding"] if tokens else []
    numbers = [token for token in tokens if isinstance(token, int)]
    beyond = [
        f"{n} is no row of {table.name}, which has {table.in_features}"
        for n in numbers
        if n >= table.in_features
    ]
    ends = [table.name, *(layer.name for layer in layers if tied and layer.role == "head")]
    twice = [end for end in ends for name in moved if tokens and f"{end}.".startswith(f"{name}.")]
    return table, [*beyond, *(f"{end} is adapted or trained whole already" for end in twice)]


def modules_above(parameter: str) -> Iterator[str]:
    """a, then a.b, for a.b.weight."""
    parts = parameter.split(".")[:-1]
    return (".".join(parts[: depth + 1]) for depth in range(len(parts)))


def candidates(layers: Iterable[Layer], pattern: str = "") -> str:
    """The distinct last names of `layers`: what a user can choose from."""
    names = list(dict.fromkeys(layer.name.rsplit(".", 1)[-1] for layer in layers))
    return f"{did_you_mean(pattern, names)} Layers of this model: {', '.join(names)}".strip()


def assign(
    layers: Sequence[Layer],
    rank: int,
    alpha: float | Literal["auto"],
    rank_pattern: Mapping[str, int],
    alpha_pattern: Mapping[str, float],
) -> tuple[list[Target], list[tuple[str, str]]]:
    """(each layer with its rank and alpha; problems as (field, message)).

    alpha "auto" is twice the layer's own rank. A pattern that matches none of the adapted layers is a
    problem, and so is a rank above a layer's smaller side, where B A could not have that rank.
    """
    problems: list[tuple[str, str]] = []
    for field, patterns in (("adapter.rank_pattern", rank_pattern), ("adapter.alpha_pattern", alpha_pattern)):
        for pattern in patterns:
            reason = bad_pattern(pattern)
            if not reason and not any(matches(pattern, layer.name) for layer in layers):
                reason = f'"{pattern}" matches none of the adapted layers. {candidates(layers, pattern)}'
            if reason:
                problems.append((field, reason))
    if problems:
        return [], problems
    found = []
    sides: dict[str, int] = {}  # last name of the layers that are too narrow -> the smallest of their sides
    first: Target | None = None
    for layer in layers:
        ranks = [value for pattern, value in rank_pattern.items() if matches(pattern, layer.name)]
        alphas = [value for pattern, value in alpha_pattern.items() if matches(pattern, layer.name)]
        own_rank = ranks[-1] if ranks else rank
        own_alpha = alphas[-1] if alphas else (2.0 * own_rank if alpha == "auto" else alpha)
        target = Target(layer, own_rank, own_alpha)
        found.append(target)
        side = min(layer.in_features, layer.out_features)
        if own_rank > side:
            name = layer.name.rsplit(".", 1)[-1]
            sides[name] = min(side, sides.get(name, side))
            first = first or target
    if first is not None:
        cure = {name: value for name, value in rank_pattern.items() if name not in sides} | sides
        line = ", ".join(f"{name}: {value}" for name, value in cure.items())
        shape = f"{first.layer.out_features} x {first.layer.in_features}"
        message = f"{first.rank} is above the smaller side of {first.layer.name} ({shape}); write adapter."
        by_pattern = any(matches(pattern, first.layer.name) for pattern in rank_pattern)
        field = "adapter.rank_pattern" if by_pattern else "adapter.rank"
        problems.append((field, message + "rank_pattern: {" + line + "}"))
    return found, problems
