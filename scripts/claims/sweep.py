"""Learning rates: which runs a sweep still needs, and what it found. Pure functions.

Rates lie on one grid for all methods, 10^(1/3) apart; a rate is named by its number on it, 0 being 1e-3.
A loss of infinity is a run that diverged.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

Losses = Mapping[tuple[int, int], float]  # (rate, seed) -> held-out loss

MOST_WIDENED = 5  # rates on either side


def rate(number: int) -> float:
    """..., 4.6e-4, 1e-3, 2.2e-3, 4.6e-3, 1e-2, ..."""
    return float(f"{10 ** (number / 3 - 3):.2g}")


def missing(losses: Losses, first: Sequence[int], seeds: Sequence[int], whole: bool) -> set[tuple[int, int]]:
    """The (rate, seed) still to run; empty when the sweep is done.

    The first seed runs at every rate of `first` (all seeds, where `whole`). While its best lies at an edge,
    the grid grows there. Then all seeds run at the best rate and its two neighbours, and at those of the best
    mean over the seeds where that is another rate, so that the best mean has a worse one on either side.
    """
    seed = seeds[0]
    needed = {(number, s) for number in first for s in (seeds if whole else seeds[:1])}
    if unknown := needed - losses.keys():
        return unknown
    tried = [number for number, s in losses if s == seed]
    lowest = min(tried, key=lambda number: losses[number, seed])
    low, high = first[0] - MOST_WIDENED, first[-1] + MOST_WIDENED
    edge = {min(tried): -1, max(tried): 1}.get(lowest)
    if edge and low <= lowest + edge <= high:
        return {(lowest + edge, seed)}

    def around(centre: int) -> set[tuple[int, int]]:
        near = [number for number in (centre - 1, centre, centre + 1) if low <= number <= high]
        return {(number, s) for number in near for s in seeds} - losses.keys()

    if unknown := around(lowest):  # all of them first: a mean over some would send the sweep elsewhere
        return unknown
    means = mean_losses(losses, seeds)
    return around(min(means, key=lambda number: means[number]))


def mean_losses(losses: Losses, seeds: Sequence[int]) -> dict[int, float]:
    """Rate -> mean loss, of the rates at which every seed has run."""
    rates = sorted({number for number, _ in losses})
    full = [number for number in rates if all((number, seed) in losses for seed in seeds)]
    return {number: mean(losses[number, seed] for seed in seeds) for number in full}


@dataclass(frozen=True)
class Best:
    """A method at its best rate."""

    number: int
    losses: tuple[float, ...]  # of the seeds
    per_seed: tuple[int, ...]  # best rate of every seed, among those that it ran at
    widened: tuple[int, ...]  # rates beside those planned
    at_edge: bool  # nothing worse was found on one side

    @property
    def lr(self) -> float:
        return rate(self.number)

    @property
    def mean(self) -> float:
        return mean(self.losses)

    @property
    def sd(self) -> float:
        """Over the seeds, n - 1 below the line; 0 for one seed."""
        return stdev(self.losses) if len(self.losses) > 1 else 0.0


def best(losses: Losses, first: Sequence[int], seeds: Sequence[int]) -> Best:
    """The rate of the lowest mean. Raises: ValueError where no rate has all seeds."""
    means = mean_losses(losses, seeds)
    number = min(means, key=lambda number: means[number])
    per_seed = [min((n for n, s in losses if s == seed), key=lambda n: losses[n, seed]) for seed in seeds]
    tried = sorted({n for n, _ in losses})
    return Best(
        number,
        tuple(losses[number, seed] for seed in seeds),
        tuple(per_seed),
        tuple(n for n in tried if n not in first),
        number in (min(means), max(means)),
    )


def vertex(means: Mapping[int, float], number: int) -> float:
    """Where the parabola through the means at `number` and its two neighbours is lowest: a place on the grid
    of rates, between its numbers."""
    left, middle, right = (means[number + step] for step in (-1, 0, 1))
    return number + (left - right) / (2 * (left - 2 * middle + right))


def pooled_sd(one: Best, other: Best) -> float:
    """Root of the mean of two variances over the same number of seeds."""
    return math.sqrt((one.sd**2 + other.sd**2) / 2)


def wins(lower: Best, upper: Best) -> int:
    """Seeds in which `lower` has the lower loss: paired, each method at its own best rate."""
    return sum(a < b for a, b in zip(lower.losses, upper.losses, strict=True))
