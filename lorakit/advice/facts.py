"""What advice rests on: a recipe, the shapes of its model, and the lengths of its rows. No torch.

Nothing here depends on the hardware. Rows are counted before data.max_length and before a share is held out,
so that what a recipe does to them follows from its fields alone: taking an advice needs no second reading.

Shapes: S samples.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.plan import choose_targets, count_steps
from lorakit.recipe import Recipe, load_recipe
from lorakit.recipe.methods import auto_alpha
from lorakit.recipe.traits import TRAITS, init_of
from lorakit.shapes import Shapes
from lorakit.targets import Target, select_modules


@dataclass(frozen=True)
class Base:
    """What config.json says of the model."""

    kind: str  # model_type
    hidden: int | None
    context: int | None  # positions that it was made for
    stored: str  # dtype of its weights, as config.json names it
    shapes: Shapes


@dataclass(frozen=True)
class Rows:
    """The training rows as samples, in no order."""

    lengths: np.ndarray  # (S,) tokens, before data.max_length
    targets: np.ndarray  # (S,) trained tokens among them
    per_sample: float  # how often a sample is seen in an epoch: the weights of the sources
    distinct: int
    held_out: int | None  # samples of data.eval, where that names files that can be read
    stream: bool  # these are the first of a stream


@dataclass(frozen=True)
class Facts:
    path: Path
    overrides: tuple[str, ...]
    recipe: Recipe
    base: Base | None
    rows: Rows | None
    missing: tuple[str, ...]  # what is not here, and so is not held against anything
    stops: str = ""  # what of the rows `lorakit train` refuses

    def taken(self, settings: Mapping[str, Any]) -> "Facts":
        """The same with fields of the recipe changed. Raises: LorakitError when that is no valid recipe."""
        overrides = (*self.overrides, *map(setting, settings, settings.values()))
        found = replace(self, recipe=load_recipe(self.path, overrides), overrides=overrides)
        _ = found.targets  # ranks and targets that do not fit the model are refused here
        return found

    @property
    def method(self) -> str:
        return str(self.adapter.method)

    @property
    def adapter(self) -> Any:
        """The section of whichever method it is."""
        return self.recipe.adapter

    def value(self, dotted: str) -> Any:
        """A field of the recipe, or None where the method or optimizer has no such field."""
        section, _, field = dotted.partition(".")
        return getattr(getattr(self.recipe, section), field, None)

    # --------------------------------------------------------------------------------------------------------
    # Of the model

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """The adapted layers; none where the model is not known, or brings them with start_from.

        Raises: RecipeError for what `lorakit validate` refuses.
        """
        if self.base is None or self.method == "full" or self.value("adapter.start_from"):
            return ()
        quantized = self.recipe.model.quantize != "none"
        whole, _ = select_modules(self.base.shapes, self.value("adapter.train_also"), quantized)
        return tuple(choose_targets(self.recipe, self.base.shapes.layers, whole))

    @property
    def trainable(self) -> int | None:
        """Parameters of the adapter alone, where they follow from the shapes."""
        counted = TRAITS[self.method].num_trained
        if not self.targets or counted is None:
            return None
        return sum(t.layer.num_experts * counted(*_sides(t), self._rank_of(t)) for t in self.targets)

    @property
    def trained_shapes(self) -> list[tuple[int, ...]]:
        """Those of the parameters that `trainable` counts, each on its own."""
        assert self.trainable is not None
        shapes: list[tuple[int, ...]] = []
        for target in self.targets:
            (inside, outside), rank = _sides(target), self._rank_of(target)
            pair: list[tuple[int, ...]] = [(rank, inside), (outside, rank)]
            stacked = (target.layer.num_experts,) if target.layer.num_experts > 1 else ()
            of_method: dict[str, list[tuple[int, ...]]] = {
                "dora": [*pair, (outside,)],
                "lora-fa": pair[1:],
                "adalora": [*pair, (rank, 1)],
                "vera": [(rank,), (outside,)],
            }
            found = of_method.get(self.method, pair)
            shapes += [(*stacked, *shape) for shape in found]
        return shapes

    @property
    def per_rank(self) -> int:
        """Parameters that one more of adapter.rank adds; layers with a pattern of their own stay."""
        counted = TRAITS[self.method].num_trained
        assert counted is not None
        return sum(
            t.layer.num_experts * (counted(*_sides(t), 2) - counted(*_sides(t), 1)) for t in self._by_rank
        )

    @property
    def largest_rank(self) -> int:
        """The smaller side of the narrowest layer that adapter.rank decides."""
        return min((min(_sides(target)) for target in self._by_rank), default=0)

    @property
    def _by_rank(self) -> list[Target]:
        rank = self.value("adapter.rank")
        return [target for target in self.targets if self._rank_of(target) == rank]

    def _rank_of(self, target: Target) -> int:
        return int(self.adapter.init_rank if self.method == "adalora" else target.rank)

    @property
    def scale(self) -> float | None:
        """What the product of the factors is multiplied by: alpha / rank, alpha / sqrt(rank); with the share
        of Delta-LoRA's weight in it. None for a method without alpha."""
        section = self.adapter
        alpha = getattr(section, "alpha", None)
        if alpha is None:
            return None
        alpha = auto_alpha(section)[0] if alpha == "auto" else alpha
        root = getattr(section, "scaling", "") == "rank_stabilized"
        return float(alpha / (section.rank**0.5 if root else section.rank) * self.scale_factor)

    @property
    def step_alpha(self) -> float | None:
        """scale * rank, which is alpha at standard scaling: what Adam's first steps of W go with.

        With B = 0 a step moves W by scale * dB A. Adam moves every number of B by about its learning rate,
        whatever scale and rank are, and the rank products of a sum have one sign: scale * rank * lr.
        None where that is not so: no such factors, or a start that is W's own and so as large as W; and where
        start_from brings it.
        """
        if self.scale is None or self.starts_in_weight or self.value("adapter.start_from"):
            return None
        return float(self.scale * self.adapter.rank)

    @property
    def starts_in_weight(self) -> bool:
        """Whether the factors start as a part of W (PiSSA, OLoRA): the smaller the scale, the larger they."""
        return init_of(self.adapter).pairs == 2

    @property
    def scale_factor(self) -> float:
        return 1.0 + self.adapter.delta_ratio if self.method == "delta-lora" else 1.0

    # --------------------------------------------------------------------------------------------------------
    # Of the rows

    @property
    def kept(self) -> np.ndarray:  # (S,) whether data.on_long leaves the sample in
        assert self.rows is not None
        short = self.rows.lengths <= self.recipe.data.max_length
        return short | (self.recipe.data.on_long != "drop")

    @property
    def samples(self) -> int | None:
        """Samples of an epoch that are trained on; of a stream, of the run."""
        if self.rows is None:
            return None
        if self.rows.stream:
            return (self.steps or 0) * self.recipe.training.batch_size
        held_out = self.recipe.data.eval
        share = held_out if isinstance(held_out, float) else 0.0
        return max(1, round(float(self.kept.sum()) * self.rows.per_sample * (1 - share)))

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the run."""
        if self.recipe.training.max_steps is not None:
            return self.recipe.training.max_steps
        return None if self.rows is None else count_steps(self.recipe, self.samples or 1)

    @property
    def passes(self) -> float | None:
        """How often a sample is seen."""
        if self.rows is None or not self.samples:
            return None
        training = self.recipe.training
        if training.max_steps is None:
            return float(training.epochs)
        return training.max_steps / -(-self.samples // training.batch_size)  # the last of an epoch is smaller

    @property
    def trained_tokens(self) -> int | None:
        """Different tokens that are trained in the run: those of one epoch, or of its part that is seen.

        Of a sample that is cut its end is taken for trained.
        """
        if self.rows is None or not self.kept.any():
            return None
        beyond = np.maximum(self.rows.lengths - self.recipe.data.max_length, 0)
        each = np.maximum(self.rows.targets - beyond, 0)[self.kept]
        seen = min(1.0, self.passes or 0.0) * (self.samples or 0)
        return round(float(each.mean()) * seen)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` shows of it."""
        base, rows = self.base, self.rows
        model = base and {
            "type": base.kind,
            "parameters": base.shapes.num_parameters,
            "hidden_size": base.hidden,
            "context": base.context,
        }
        found = rows and {
            "samples": self.samples,
            "trained_tokens": self.trained_tokens,
            "mean_length": round(float(rows.lengths.mean()), 1),
            "longest": int(rows.lengths.max()),
            "too_long": int((rows.lengths > self.recipe.data.max_length).sum()),
            "held_out": rows.held_out,
        }
        capacity = self.trainable and 2 * self.trainable
        adapter = {"method": self.method, "trainable": self.trainable, "capacity_bits": capacity}
        return {
            "model": model,
            "data": found,
            "adapter": adapter | {"scale": self.scale},
            "steps": self.steps,
            "missing": list(self.missing),
            "stops": self.stops,
        }

    def as_text(self) -> str:
        lines = []
        if self.base is not None:
            hidden = f", hidden size {self.base.hidden:,}" if self.base.hidden else ""
            number = f"{self.base.shapes.num_parameters:,} parameters"
            lines.append(f"model     {self.base.kind}: {number}{hidden}")
        if self.trainable is not None:
            room = f"room for {2 * self.trainable:,} bits at most (2 each)"
            lines.append(f"adapter   {self.method}: {self.trainable:,} trainable parameters, {room}")
        if self.rows is not None:
            lengths, first = self.rows.lengths, f" (by the first {len(self.rows.lengths):,})"
            longest = f"{lengths.mean():,.0f} tokens on average, {lengths.max():,} at most"
            known = first if self.rows.stream else ""
            lines.append(f"data      {self.samples:,} samples of {longest}{known}; {self._trained()}")
        if self.steps is not None:
            passes = f"; passes over the data: {self.passes:.3g}" if self.passes is not None else ""
            lines.append(f"run       {self.steps:,} steps{passes}")
        lines += [f"stops     {self.stops}"] if self.stops else []
        return "\n".join([*lines, *(f"not judged: {text}" for text in self.missing)])

    def _trained(self) -> str:
        tokens = self.trained_tokens or 0
        return f"{tokens:,} different trained tokens: about as many bits"


def _sides(target: Target) -> tuple[int, int]:
    return target.layer.in_features, target.layer.out_features


def setting(dotted: str, value: Any) -> str:
    """The argument of --set that writes `value` into a field."""
    plain = isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum()
    return f"{dotted}={value if plain else json.dumps(value)}"
