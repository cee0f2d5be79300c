"""A look at the data before step 0, for methods that decide something by it (adapters.Probe).

The rows are drawn by the seed from those of one epoch, each seen once. Where a method trains on them, they
are laid out, clipped and stepped as in the run itself, at the learning rate that its schedule rises to.
Nothing of it stays but what the method makes of it: the optimizer is forgotten, and the run is the same
whether its probe was interrupted or not.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from lorakit import base_model, loop, optim
from lorakit.data.batches import Step, collate, layout, order, step_of
from lorakit.data.tokens import Part
from lorakit.errors import RecipeError, RunError
from lorakit.loop import TrainState
from lorakit.micro_batch import MicroBatch
from lorakit.prepare import Prepared
from lorakit.recipe import Recipe
from lorakit.recipe.section import share_of
from lorakit.terminal import progress, say, track

_NEVER = 1 << 30  # steps; the loop does everything after the last one all the same


def draw_samples(parts: tuple[Part, ...], share: float, seed: int) -> list[int]:
    """Indices of the samples of a probe: below 1 `share` of an epoch's samples, from 1 so many.

    Raises: ValueError when an epoch has fewer.
    """
    pool = order(parts, seed, 0)
    number = share if isinstance(share, int) else max(1, round(share_of(share, len(pool))))
    if number > len(pool):
        raise ValueError(f"{number} samples, but an epoch has {len(pool)}")
    picked: list[int] = np.random.Generator(np.random.PCG64([seed, 0, 3])).permutation(pool)[:number].tolist()
    return picked


class RunProbe:
    """The probe of a run that is prepared."""

    def __init__(self, ready: Prepared, recipe: Recipe, ranks: Accelerator) -> None:
        self.ready, self.recipe, self.ranks = ready, recipe, ranks
        self.samples: list[int] = []
        self.budget, self.packing = ready.plan["training.micro_batch_tokens"], ready.plan["data.packing"]

    def draw(self, share: float) -> int:
        """See adapters.Probe. Raises: RecipeError for too many samples."""
        try:
            parts, seed = self.ready.rows.tokens.parts, self.recipe.training.seed
            self.samples = draw_samples(parts, share, seed)
        except ValueError as error:
            raise RecipeError([self.recipe.problem("adapter.probe", str(error))]) from None
        return len(self.samples)

    def train(self, share: float) -> None:
        """See adapters.Probe. Raises: RecipeError for too many samples; RunError for a loss that is no
        number."""
        self.draw(share)
        tokens, recipe, ranks = self.ready.rows.tokens, self.recipe, self.ranks
        size, rank, num_ranks = recipe.training.batch_size, ranks.process_index, ranks.num_processes
        num_steps = -(-len(self.samples) // size)
        say(f"probe     {len(self.samples):,} samples in {num_steps:,} steps, to see which layers matter")

        def batch_at(step: int) -> Step:
            samples = self.samples[step * size : (step + 1) * size]
            return step_of(samples, tokens, self.budget, self.packing, rank, num_ranks)

        with progress() as display:
            bar = display.add_task("probe", total=num_steps)
            try:
                loop.run(
                    objective=ranks.prepare(self.ready.objective),
                    adapter=self.ready.adapter,
                    optimizer=optim.build(recipe.optimizer, self.ready.adapter.trained()),
                    batch_at=batch_at,
                    lr_at=lambda step: recipe.optimizer.lr,
                    evaluate=None,
                    observer=_Shown(lambda done: display.update(bar, completed=done)),
                    state=TrainState(),
                    cadence=loop.Cadence(_NEVER, _NEVER, _NEVER, False, None),
                    total_steps=num_steps,
                    seed=recipe.training.seed,
                    max_grad_norm=recipe.optimizer.max_grad_norm,
                    device=ranks.device,
                    autocast=self.ready.autocast,
                    rank=rank,
                    num_ranks=num_ranks,
                    all_ranks_sum=self.sum_over_ranks,
                )
            except loop.NotFinite as error:
                raise RunError(f"in the probe, {error.message}", "Lower optimizer.lr.") from None
        ranks.free_memory()  # the wrapper for several processes, whose parameters may not be the run's

    def micro_batches(self) -> Iterator[MicroBatch]:
        tokens, ranks = self.ready.rows.tokens, self.ranks
        laid_out = layout(self.samples, tokens.lengths, self.budget, self.packing)
        own = laid_out[ranks.process_index :: ranks.num_processes]
        for samples in track(own, "probe", len(own)):
            yield collate(samples, tokens, self.packing).to(ranks.device)

    def forward(self, micro: MicroBatch) -> None:
        objective: Any = self.ready.objective
        objective.eval()
        before, objective.repeats_shapes = objective.repeats_shapes, False  # rows as they are
        try:
            with torch.no_grad(), self.ready.autocast():
                objective(micro)
        finally:
            objective.repeats_shapes = before

    def stored(self, parameter: str) -> Tensor:
        return base_model.stored(self.ready.base.folder, parameter)

    def sum_over_ranks(self, tensor: Tensor) -> Tensor:
        summed: Tensor = self.ranks.reduce(tensor, "sum")
        return summed

    def from_all_ranks(self, tensor: Tensor) -> Tensor:
        found: Tensor = self.ranks.gather(tensor[None])
        return found


class _Shown:
    """An observer that moves a bar and keeps nothing."""

    def __init__(self, move: Any) -> None:
        self.move = move

    def stepped(self, state: TrainState) -> None:
        self.move(state.step)

    def metrics(self, line: dict[str, Any]) -> None:
        pass

    def best(self, state: TrainState) -> None:
        pass

    def checkpoint(self, state: TrainState) -> None:
        pass
