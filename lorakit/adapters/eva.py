"""EVA: A starts as the directions along which a layer's inputs vary most; ranks go where they explain most.

With x the inputs of a layer over the real tokens of a sample of the rows, and m their mean,

    C = sum over x of (x - m)(x - m)^T = V diag(s^2) V^T,    A = the first r rows of V^T,    B = 0,

so that step 0 is the base. Direction j of a layer explains s_j^2 / trace(C) of its inputs. All layers' first
floor(rho r) shares are ranked together, and the n r largest keep their direction: the sum of all ranks is
what equal ranks would have had, a layer gets between 0 and rho r, and its scale stays what it was (its alpha
follows its rank). The rows of A have length 1, LoRA's 1/sqrt(3) on average: at one learning rate Adam's first
steps of W are 1.7 times as long. Source: Paischer et al. 2024, arXiv 2410.07170.

As PEFT does, and as "explained variance" says, the mean is taken away; an SVD of x itself would spend its
first direction on it. PEFT stops a layer when its directions have settled (cosine above tau) and goes over
the same batches again until then: here every row of the sample is seen once. PEFT takes a layer of rank 0
out of the model; here it keeps an A of (0, in) and a B of (out, 0). PEFT's alpha of a re-ranked layer is
alpha r' / r, which moves the scale when it is rank-stabilized (by sqrt(r' / r)).

A is (rank, in), B is (out, rank); I: in.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters import Probe
from lorakit.adapters.inputs import see_inputs
from lorakit.adapters.pairs import factors

EXACT = 512  # of a matrix whose smaller side is at most this, all singular values are computed
NOTHING = 1e-6  # of the largest singular value; below it is what fp32 rounds
# Of the randomised decomposition of larger ones. Measured, inputs of 768 whose spread falls as slowly as
# 1 / sqrt(j), 8,192 of them in pieces of 512: 1e-4 of the subspace of the first 32 is missed, with four 6e-5.
_ITERATIONS = 2


# ------------------------------------------------------------------------------------------------------------
# What the inputs of a layer vary along: pure functions


@dataclass(frozen=True)
class Scatter:
    """C of the inputs that were seen, as R (M, I) with R^T R = C but for what was cut off."""

    count: int
    mean: Tensor  # (I,) fp64
    rows: Tensor  # (M, I) fp32, or the inputs' own dtype where that is wider
    total: Tensor  # () fp64: the trace of C, with what was cut off


def scatter_of(x: Tensor) -> Scatter:
    """Of inputs (N, I), N > 0: exact."""
    wide = x.double()
    mean = wide.mean(0)
    rows = wide - mean
    return Scatter(len(x), mean, rows.to(torch.promote_types(x.dtype, torch.float32)), rows.square().sum())


def joined(a: Scatter, b: Scatter) -> Scatter:
    """Of the inputs of both: exact. The means that were taken away differ, which is one row more (Ross et al.
    2008, lemma 1)."""
    count = a.count + b.count
    between = (a.mean - b.mean) * (a.count * b.count / count) ** 0.5
    rows = torch.cat([a.rows, b.rows, between[None].to(a.rows)])
    mean = (a.count * a.mean + b.count * b.mean) / count
    return Scatter(count, mean, rows, a.total + b.total + between.square().sum())


def cut(scatter: Scatter, keep: int) -> Scatter:
    """The strongest `keep` rows that mean the same, where there are more."""
    if len(scatter.rows) <= keep:
        return scatter
    wide = scatter.rows.double()
    if min(wide.shape) > EXACT:
        with torch.random.fork_rng(devices=[wide.device] if wide.is_cuda else []):
            torch.manual_seed(0)
            _, s, v = torch.svd_lowrank(wide, keep, _ITERATIONS)
        rows = s[:, None] * v.mT
    elif len(wide) <= wide.shape[1]:
        _, u = torch.linalg.eigh(wide @ wide.mT)  # ascending
        rows = u[:, -keep:].mT @ wide
    else:
        squares, v = torch.linalg.eigh(wide.mT @ wide)
        rows = squares[-keep:].clamp(min=0).sqrt()[:, None] * v[:, -keep:].mT
    return replace(scatter, rows=rows.to(scatter.rows))


def seen(before: Scatter | None, x: Tensor, keep: int) -> Scatter | None:
    """`before` and the inputs x (N, I) with it, in 2 `keep` rows at most; None when nothing was seen."""
    for part in x.split(4 * keep):
        if len(part):
            now = scatter_of(part)
            now = now if before is None else joined(before, now)
            before = cut(now, keep) if len(now.rows) > 2 * keep else now
    return before


def kept_rows(inside: int, directions: int) -> int:
    """Rows that a layer's scatter is cut down to: all it can have where `inside` is small, else more than the
    directions that are asked for, so that what is cut off moves these little."""
    return inside if inside <= EXACT else min(inside, max(128, 2 * directions))


def strongest(scatter: Scatter | None, inside: int, number: int) -> tuple[Tensor, Tensor]:
    """(shares (number,) that they explain, falling; directions (number, I), orthonormal), both fp64.

    Where the inputs vary along fewer, or none were seen, the rest is drawn at random and explains nothing.
    The largest entry of every direction is positive.
    """
    found, shares = torch.zeros(0, inside, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    if scatter is not None:
        _, s, vh = torch.linalg.svd(scatter.rows.double(), full_matrices=False)
        there = min(int((s > NOTHING * s.max()).sum()), number)
        found, shares = vh[:there], s[:there].square() / scatter.total
    missing = number - len(found)
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randn(missing, inside, generator=draw, dtype=torch.float64).to(found)
    directions = torch.linalg.qr(torch.cat([found, drawn]).mT).Q.mT
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return torch.cat([shares, shares.new_zeros(missing)]), directions * largest.sign()


def redistributed(shares: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The rank of every layer from the shares (falling) of its directions: the `budget` largest of all are
    kept; of equals the earlier direction, then the earlier layer."""
    ranked = sorted(
        (-share, number, layer) for layer, own in enumerate(shares) for number, share in enumerate(own)
    )
    kept = [layer for _, _, layer in ranked[:budget]]
    return [kept.count(layer) for layer in range(len(shares))]


# ------------------------------------------------------------------------------------------------------------
# A look at the data


@torch.no_grad()
def look(layers: Sequence[Any], most: Sequence[int], probe: Probe) -> list[tuple[Tensor, Tensor]]:
    """Of every layer (shares (most,), directions (most, I)) in fp64, the same on every rank."""
    sides, widest = [layer.in_features for layer in layers], max(most)
    keep = [kept_rows(inside, widest) for inside in sides]
    found: list[Scatter | None] = [None] * len(layers)
    # q, k and v are given one tensor: what was made of it is made once, and is one object from then on.
    last: tuple[Tensor, Scatter | None, Scatter | None] | None = None

    def see(index: int, given: Tensor, rows: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not given or last[1] is not found[index]:
            last = given, found[index], seen(found[index], rows, keep[index])
        found[index] = last[2]

    see_inputs(layers, probe, see)
    device = factors(layers[0])[0].device
    own = [next(i for i, other in enumerate(found) if other is scatter) for scatter in found]
    same = probe.from_all_ranks(torch.tensor(own, device=device)).T.tolist()  # (layers, ranks)
    answers: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for index, inside in enumerate(sides):
        if (key := (inside, *same[index])) not in answers:
            scatter = _of_all_ranks(found[index], inside, keep[index], device, probe)
            shares, directions = strongest(scatter, inside, min(widest, inside))
            one = probe.from_all_ranks(torch.cat([shares[:, None], directions], dim=1).to(device))[0]
            answers[key] = one[:, 0], one[:, 1:]
    chosen = [answers[inside, *key] for inside, key in zip(sides, same, strict=True)]
    return [(shares[:n], directions[:n]) for (shares, directions), n in zip(chosen, most, strict=True)]


def _of_all_ranks(
    own: Scatter | None, inside: int, keep: int, device: torch.device, probe: Probe
) -> Scatter | None:
    """What all ranks have seen of a layer's inputs."""
    flat = torch.zeros(2 + (1 + keep) * inside, dtype=torch.float64, device=device)
    if own is not None:
        own = cut(own, keep)
        told = torch.cat([own.total.new_tensor([own.count]), own.total[None], own.mean, own.rows.flatten()])
        flat[: len(told)] = told
    found: Scatter | None = None
    for part in probe.from_all_ranks(flat):
        if count := int(part[0]):
            rows = part[2 + inside :].reshape(keep, inside)
            now = Scatter(count, part[2 : 2 + inside], rows, part[1])
            found = now if found is None else cut(joined(found, now), 2 * keep)
    return found
