"""What is expected, written down before it was run, and how each expectation is judged. Pure functions.

Every method is compared at its own best learning rate (sweep.py), over the same seeds; a seed is the start of
the adapter and the order of the rows, the base is one. Losses are nats per token, held out. Whatever comes
out is reported: an expectation that is not held stays here as it was.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from claims.cells import Cell, Sections
from claims.made import BaseSize
from claims.sweep import Best, Losses, best, mean_losses, missing, pooled_sd, rate, vertex, wins

# ------------------------------------------------------------------------------------------------------------
# Methods

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
RANK = 16  # of LoRA on all linear layers, whose size R2's other contestants have
PAIR_RANK = 8  # of LoRA on two projections, whose size R5's other contestant has
EARLY_RANKS = (1, 4, 16, 32)
CAPACITY_RANKS = (1, 4, 16)
EARLY_LOWER = (3, 6)  # places on the grid of rates, below LoRA's best: a tenth and a hundredth of it
FIXED_ALPHA = 32.0  # R3; what alpha: auto is at rank 16


def trained_per_rank(base: BaseSize, modules: Sequence[str]) -> int:
    """Trained parameters of rank 1 on these modules of all layers: in + out of each."""
    return base.layers * sum(
        2 * base.hidden if name in ATTENTION else base.hidden + base.mlp for name in modules
    )


def equal_rank(base: BaseSize, modules: Sequence[str], like: Sequence[str], rank: int) -> int:
    """The rank at which LoRA on `modules` trains as many parameters as on `like` at `rank`, or nearly."""
    return round(trained_per_rank(base, like) * rank / trained_per_rank(base, modules))


def methods(base: BaseSize) -> dict[str, Sections]:
    """Name -> sections of the recipe. alpha is auto, twice the rank, but where R3 fixes it."""

    def lora(modules: Sequence[str], rank: int) -> Sections:
        return {"adapter": {"method": "lora", "rank": rank, "targets": list(modules)}}

    every = (*ATTENTION, *MLP)
    plain = {"method": "lora", "rank": RANK}
    four_bit = {"quantize": "nf4", "compute_dtype": "fp32"}
    pairs = {"q,k": ("q_proj", "k_proj"), "q,v": ("q_proj", "v_proj"), "v,o": ("v_proj", "o_proj")}
    fixed = {
        f"rank {rank}": {"adapter": {"method": "lora", "rank": rank, "alpha": FIXED_ALPHA}}
        for rank in {*EARLY_RANKS, *CAPACITY_RANKS}
    }
    return {
        "full": {"adapter": {"method": "full"}},
        "lora": {"adapter": plain},
        "qlora": {"adapter": plain, "model": four_bit},
        "mlp": lora(MLP, equal_rank(base, MLP, every, RANK)),
        "attention": lora(ATTENTION, equal_rank(base, ATTENTION, every, RANK)),
        **{name: lora(modules, PAIR_RANK) for name, modules in pairs.items()},
        "q,k,v,o": lora(ATTENTION, equal_rank(base, ATTENTION, pairs["q,v"], PAIR_RANK)),
        **fixed,
    }


# ------------------------------------------------------------------------------------------------------------
# Verdicts


@dataclass(frozen=True)
class Verdict:
    expected: str
    found: str
    held: bool


@dataclass(frozen=True)
class Note:
    """What was looked at when the verdicts were known. It says more of them, and changes none."""

    question: str
    found: str


def told(found: Best) -> str:
    return f"{found.mean:.4f} ± {found.sd:.4f} at {found.lr:g}"


def judge_rates(lora: Best, full: Best) -> Iterator[Verdict]:
    """R1."""
    ratio = lora.lr / full.lr
    each = [10 ** ((a - b) / 3) for a, b in zip(lora.per_seed, full.per_seed, strict=True)]
    yield Verdict(
        "LoRA's best learning rate is 4 to 30 times that of full fine-tuning",
        f"x {ratio:.3g} (by seed {', '.join(f'{one:.3g}' for one in each)}): "
        f"LoRA {told(lora)}, full {told(full)}",
        4 <= ratio <= 30,
    )


def judge_targets(all_linear: Best, mlp: Best, attention: Best) -> Iterator[Verdict]:
    """R2."""
    sd = pooled_sd(all_linear, mlp)
    yield Verdict(
        "all linear layers are no worse than the MLP alone, by more than a standard deviation over seeds",
        f"all {told(all_linear)}, MLP {told(mlp)}",
        all_linear.mean - mlp.mean <= sd,
    )
    yield lower(mlp, attention, "the MLP alone", "attention alone")


def lower(one: Best, other: Best, name: str, other_name: str) -> Verdict:
    """`one` has the lower loss, in every seed."""
    won = wins(one, other)
    return Verdict(
        f"{name} ends below {other_name}, in every seed",
        f"{told(one)} against {told(other)}; below in {won} of {len(one.losses)} seeds",
        won == len(one.losses),
    )


EarlyLosses = Mapping[int, Sequence[Sequence[float]]]  # rank -> seeds -> steps


def early(losses: EarlyLosses) -> tuple[dict[int, float], float]:
    """(rank -> most that its curve is apart from rank 16's, fall of rank 16's), both as shares of the loss;
    curves are means over the seeds."""
    curves = {rank: [mean(step) for step in zip(*seeds, strict=True)] for rank, seeds in losses.items()}
    reference = curves.pop(RANK)
    apart = {
        rank: max(abs(a / b - 1) for a, b in zip(curve, reference, strict=True))
        for rank, curve in sorted(curves.items())
    }
    return apart, 1 - reference[-1] / reference[0]


def told_early(losses: EarlyLosses) -> str:
    apart, fall = early(losses)
    each = ", ".join(f"{value:.2%} (rank {rank})" for rank, value in apart.items())
    return f"at most {each} apart; the loss fell by {fall:.0%}"


def judge_early(losses: EarlyLosses) -> Iterator[Verdict]:
    """R3. Without a fall of the loss nothing would be shown."""
    apart, fall = early(losses)
    yield Verdict(
        "alpha fixed, the losses of the first 20 steps of ranks 4 and 32 are within 1 % of rank 16's, "
        "while the loss falls by more than 5 %",
        told_early(losses),
        all(value < 0.01 for rank, value in apart.items() if rank > 1) and fall > 0.05,
    )


def judge_capacity(recalled: Mapping[int, Sequence[int]], pairs: int) -> Iterator[Verdict]:
    """R3. `recalled`: rank -> pairs of every seed, at the rank's best rate."""
    ranks = sorted(recalled)
    steps = list(pairwise(ranks))
    grows = all(a < b for low, high in steps for a, b in zip(recalled[low], recalled[high], strict=True))
    each = ", ".join(f"{mean(recalled[rank]):.0f} (rank {rank})" for rank in ranks)
    yield Verdict(
        f"of {pairs} random pairs more are recalled at rank 4 than at 1, and at 16 than at 4, in every seed",
        f"{each}; by seed {'; '.join(', '.join(map(str, recalled[rank])) for rank in ranks)}",
        grows,
    )


def judge_projections(found: Mapping[str, Best]) -> Iterator[Verdict]:
    """R5."""
    for name in ("q,v", "v,o", "q,k,v,o"):
        yield lower(found[name], found["q,k"], f"{{{name}}}", "{q,k}")


def judge_parity(qlora: Best, lora: Best) -> Iterator[Verdict]:
    """R6, training."""
    gap, sd = qlora.mean - lora.mean, pooled_sd(qlora, lora)
    yield Verdict(
        "LoRA on the NF4 base ends within a standard deviation over seeds of LoRA on the base itself",
        f"{gap:+.4f}, sd {sd:.4f}: NF4 {told(qlora)}, fp32 {told(lora)}",
        abs(gap) < sd,
    )


def judge_rounding(rows: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]) -> Iterator[Verdict]:
    """R6, no training. `rows`: format -> "text" or "task" -> [summed loss, tokens] of every row."""
    base = per_token(rows["none"]["text"])
    for other in ("fp4", "int4"):
        gap, error = paired(rows[other]["text"], rows["nf4"]["text"])
        ours, theirs = (per_token(rows[name]["text"]) - base for name in ("nf4", other))
        task = {
            name: per_token(rows[name]["task"]) - per_token(rows["none"]["task"]) for name in ("nf4", other)
        }
        yield Verdict(
            f"rounded to NF4 the base loses less than rounded to {other.upper()}, by more than two standard "
            "errors over the held-out text",
            f"loss {base:.4f}: NF4 {ours:+.4f}, {other.upper()} {theirs:+.4f}, apart {gap:.4f} ± {error:.4f}"
            f" (on the task {task['nf4']:+.4f}, {task[other]:+.4f})",
            gap > 2 * error,
        )


def per_token(rows: Sequence[Sequence[float]]) -> float:
    return sum(total for total, _ in rows) / sum(tokens for _, tokens in rows)


def paired(worse: Sequence[Sequence[float]], better: Sequence[Sequence[float]]) -> tuple[float, float]:
    """(difference of the losses per token, its standard error), from the differences of the same rows."""
    tokens = sum(count for _, count in better)
    gaps = [a - b for (a, _), (b, _) in zip(worse, better, strict=True)]
    gap = sum(gaps) / tokens
    left = [one - gap * count for one, (_, count) in zip(gaps, better, strict=True)]
    return gap, math.sqrt(sum(one**2 for one in left) * len(gaps) / (len(gaps) - 1)) / tokens


def curve(losses: Losses) -> list[tuple[float, list[float | None]]]:
    """[(learning rate, losses of the seeds that ran at it)]; a loss of None diverged."""
    numbers = sorted({number for number, _ in losses})
    return [
        (rate(number), [None if math.isinf(loss) else loss for (n, _), loss in losses.items() if n == number])
        for number in numbers
    ]


# ------------------------------------------------------------------------------------------------------------
# The register


@dataclass(frozen=True)
class Sweep:
    kind: str
    method: str
    first: tuple[int, ...]  # rates that run in any case
    whole: bool = False  # all seeds at all of them


FULL_RATES, LORA_RATES, PAIR_RATES = (-2, -1, 0, 1, 2), (1, 2, 3, 4, 5), (1, 2, 3)


class Results:
    """What has run so far."""

    def __init__(self, cells: Mapping[Cell, Sections], seeds: Sequence[int], pairs: int) -> None:
        self.cells, self.seeds, self.pairs = cells, seeds, pairs

    def losses(self, sweep: Sweep) -> Losses:
        return {
            (cell.number, cell.seed): math.inf if result["held_out"] is None else result["held_out"]
            for cell, result in sorted(self.cells.items(), key=lambda item: (item[0].number, item[0].seed))
            if (cell.kind, cell.method) == (sweep.kind, sweep.method) and cell.seed in self.seeds
        }

    def missing(self, sweep: Sweep) -> list[Cell]:
        needed = missing(self.losses(sweep), sweep.first, self.seeds, sweep.whole)
        return [Cell(sweep.kind, sweep.method, number, seed) for number, seed in sorted(needed)]

    def best(self, sweep: Sweep) -> Best:
        return best(self.losses(sweep), sweep.first, self.seeds)


LORA = Sweep("task", "lora", LORA_RATES, whole=True)
FULL = Sweep("task", "full", FULL_RATES, whole=True)
QLORA = Sweep("task", "qlora", LORA_RATES)
TARGETS = {name: Sweep("task", name, LORA_RATES) for name in ("mlp", "attention")}
PROJECTIONS = {name: Sweep("task", name, LORA_RATES) for name in ("q,k", "q,v", "v,o", "q,k,v,o")}
CAPACITY = {rank: Sweep("pairs", f"rank {rank}", PAIR_RATES) for rank in CAPACITY_RANKS}
FORMATS = ("none", "nf4", "fp4", "int4")


def early_cells(results: Results, number: int) -> dict[int, list[Cell]]:
    """Rank -> the cells of all seeds at a rate."""
    return {rank: [Cell("early", f"rank {rank}", number, s) for s in results.seeds] for rank in EARLY_RANKS}


def early_losses(results: Results, number: int) -> dict[int, list[Any]]:
    found = early_cells(results, number)
    return {rank: [results.cells[cell]["losses"] for cell in cells] for rank, cells in found.items()}


def early_needed(results: Results) -> list[Cell]:
    """At LoRA's best rate, and at those that were looked at afterwards, once it is known."""
    if results.missing(LORA):
        return []
    best = results.best(LORA).number
    numbers = (best, *(best - lower for lower in EARLY_LOWER))
    return [cell for n in numbers for cells in early_cells(results, n).values() for cell in cells]


def afterwards_rates(results: Results) -> Iterator[Note]:
    """R1: the minima are flat, and the grid is coarse."""
    if results.best(LORA).at_edge or results.best(FULL).at_edge:
        return
    lowest = [
        vertex(mean_losses(results.losses(sweep), results.seeds), results.best(sweep).number)
        for sweep in (LORA, FULL)
    ]
    ratio = 10 ** ((lowest[0] - lowest[1]) / 3)
    yield Note("the same of the lowest points of parabolas through the best three rates", f"x {ratio:.3g}")


def afterwards_ranks(results: Results) -> Iterator[Note]:
    """R3: the rate that is best for a run with a warm-up may be too high for its first steps without one."""
    best = results.best(LORA).number
    for lower in EARLY_LOWER:
        found = told_early(early_losses(results, best - lower))
        yield Note(f"the first 20 steps at a rate of {rate(best - lower):g}", found)


def judge_ranks(results: Results) -> Iterator[Verdict]:
    """R3."""
    yield from judge_early(early_losses(results, results.best(LORA).number))
    counted = {}
    for rank, sweep in CAPACITY.items():
        number = results.best(sweep).number
        at_best = [results.cells[Cell("pairs", sweep.method, number, seed)] for seed in results.seeds]
        counted[rank] = [result.get("recalled", 0) for result in at_best]
    yield from judge_capacity(counted, results.pairs)


def judge_four_bits(results: Results) -> Iterator[Verdict]:
    """R6."""
    yield from judge_parity(results.best(QLORA), results.best(LORA))
    yield from judge_rounding({form: results.cells[Cell("quantized", form)]["rows"] for form in FORMATS})


@dataclass(frozen=True)
class Claim:
    hypothesis: str
    published: str
    sweeps: tuple[Sweep, ...]
    judge: Callable[[Results], Iterator[Verdict]]
    more: Callable[[Results], list[Cell]] = lambda results: []
    afterwards: Callable[[Results], Iterator[Note]] = lambda results: iter(())


CLAIMS = {
    "R1": Claim(
        "the learning rate of full fine-tuning is far too low for LoRA",
        "about 10, 15 in short runs (LoRA Without Regret)",
        (LORA, FULL),
        lambda results: judge_rates(results.best(LORA), results.best(FULL)),
        afterwards=afterwards_rates,
    ),
    "R2": Claim(
        "of the same number of trained parameters, where they sit decides, and the MLP is the better place",
        "all-linear ≥ MLP > attention (LoRA Without Regret; QLoRA, 2305.14314)",
        (LORA, *TARGETS.values()),
        lambda results: judge_targets(*(results.best(sweep) for sweep in (LORA, *TARGETS.values()))),
    ),
    "R3": Claim(
        "the rank is capacity, not speed: it changes nothing early on, and decides how much can be learned",
        "curves of all ranks coincide until one runs out (LoRA Without Regret)",
        (LORA, *CAPACITY.values()),
        judge_ranks,
        early_needed,
        afterwards_ranks,
    ),
    "R5": Claim(
        "adapting Wq and Wk is the worst use of a budget",
        "WikiSQL, MNLI: {q,k} 71.4, 91.3; {q,v} 73.7, 91.3; all four 73.7, 91.7 (LoRA, table 5)",
        tuple(PROJECTIONS.values()),
        lambda results: judge_projections({name: results.best(s) for name, s in PROJECTIONS.items()}),
    ),
    "R6": Claim(
        "4 bits cost nothing that training does not win back, and NF4 is the right 4 bits",
        "QLoRA: MMLU 53.1 with NF4, 53.0 in 16 bits; perplexity NF4 27.4, FP4 31.1, Int4 34.3 (tables 2, 4)",
        (LORA, QLORA),
        judge_four_bits,
        lambda results: [Cell("quantized", form) for form in FORMATS],
    ),
}


def needed(results: Results, names: Sequence[str]) -> list[Cell]:
    """Cells that the claims still need, each once, in the order in which the claims stand."""
    found: dict[Cell, None] = {}
    for name in names:
        claim = CLAIMS[name]
        for cell in [c for sweep in claim.sweeps for c in results.missing(sweep)] + claim.more(results):
            if cell not in results.cells:
                found[cell] = None
    return list(found)
