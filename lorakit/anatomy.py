"""What training did to a weight, in numbers: pure functions of the update D = U diag(s) V^T of one matrix W.

    norm            |D|, Frobenius: the root of the sum of s^2
    effective rank  exp(H(p)), H the entropy of p_i = s_i^2 / sum of s^2: r for r equal values, 1 for one
                    (after Roy and Vetterli 2007, "The effective rank", who take the shares of s itself: here
                    they are those of |D|^2)
    stable rank     |D|^2 / s_1^2, never above the effective rank
    amplification   |U^T D V| / |U^T W V| over the K leading directions: by how much the update enlarges
                    directions that W already has (Hu et al. 2021, arXiv 2106.09685, table 7, where K is the
                    rank of D, so that |U^T D V| is |D| itself)
    similarity      phi(i, j) = |U_i^T U'_j|^2 / min(i, j), from 0 (orthogonal) to 1 (one contains the other):
                    the paper's equation 4. Random subspaces of i and j dimensions among d have max(i, j) / d
                    on average

O out, I in, R rank. D and W are (O, I) here, whatever the model stores; all is computed in fp64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.adapters.lora_files import decompose


@dataclass(frozen=True)
class Update:
    """The change of one matrix, taken apart. K leading directions are kept, of S singular values."""

    u: Tensor  # (O, K)
    s: Tensor  # (S,), falling; K <= S
    v: Tensor  # (I, K)

    @property
    def num_directions(self) -> int:
        return self.u.shape[1]

    @property
    def norm(self) -> float:
        return float(self.s.norm())


def of_factors(a: Tensor, b: Tensor, scale: float) -> Update:
    """Of D = scale * B A, from the (R, R) product of two QR decompositions; all directions that are not zero.

    a: (R, I), b: (O, R).
    """
    u, s, vh = decompose(a, b, scale)
    return Update(u, s, vh.T)


def of_matrix(change: Tensor, directions: int | None = None) -> Update:
    """Of a D (O, I) that has no factors, with `directions` leading directions, or as many as its effective
    rank, rounded up.

    By the eigenvectors of D D^T or D^T D, whichever is smaller: five times as fast as an SVD, and exact for
    all but singular values below 1e-8 of the largest.
    """
    d = change.double()
    wide = d.shape[0] <= d.shape[1]
    values, vectors = torch.linalg.eigh(d @ d.T if wide else d.T @ d)
    s, near = values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    wanted = math.ceil(effective_rank(s) - 1e-6) if directions is None else directions
    real = s[:wanted] > 1e-7 * (s[0] if len(s) else 1.0)
    near = near[:, :wanted][:, real]
    far = (d.T @ near if wide else d @ near) / s[: len(real)][real]
    return Update(near, s, far) if wide else Update(far, s, near)


def of_dora(weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Update:
    """Of D = m V / |V| - W with V = W + scale * B A, row by row, which is W's in rank; its R leading
    directions.

    Without the difference of two near equal numbers: D = (m / |V| - 1) W + m / |V| * scale * B A.
    weight: (O, I), a: (R, I), b: (O, R), magnitude: (O,).
    """
    w, low = weight.double(), scale * b.double() @ a.double()
    lengths = torch.linalg.vector_norm(w + low, dim=1)
    factor = (magnitude.double() / lengths)[:, None]
    return of_matrix((factor - 1) * w + factor * low, len(a))


def effective_rank(s: Tensor) -> float:
    """exp of the entropy of the shares of |D|^2; 0 of an update that is zero."""
    if not s.any():
        return 0.0
    share = s.square() / s.square().sum()
    return float(torch.special.entr(share).sum().exp())


def stable_rank(s: Tensor) -> float:
    """|D|^2 / s_1^2; 0 of an update that is zero."""
    return float(s.square().sum() / s.max().square()) if s.any() else 0.0


def amplification(update: Update, weight: Tensor) -> float:
    """|U^T D V| / |U^T W V| over the update's leading directions; 0 of an update that is zero, infinite where
    W has nothing in them. weight: (O, I)."""
    if not update.num_directions:
        return 0.0
    inside = float((update.u.T @ weight.double() @ update.v).norm())
    own = float(update.s[: update.num_directions].norm())
    return own / inside if inside else math.inf


def similarity(one: Tensor, other: Tensor) -> float:
    """phi of two subspaces, each given by orthonormal columns (d, i) and (d, j); 0 where one is empty."""
    smaller = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum()) / smaller if smaller else 0.0


def cosine(one: Update, other: Update) -> float:
    """<D, D'> / (|D| |D'|) over their leading directions, from -1 to 1: alike in direction, sign and weight.

    0 where one of them is zero.
    """
    k, m = one.num_directions, other.num_directions
    s, t = one.s[:k], other.s[:m]
    if not (k and m):
        return 0.0
    inner = ((one.u.T @ other.u) * (one.v.T @ other.v) * s[:, None] * t).sum()
    return float(inner / (s.norm() * t.norm()))
