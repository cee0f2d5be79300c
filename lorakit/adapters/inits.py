"""How A and B start from the weight W (out, in) that they adapt: PiSSA.

The update is scale * B A, and what starts at B_0 A_0 is taken away from the weight: a layer computes

    y = (W - scale * B_0 A_0) x + scale * B A x,

so that step 0 is the base. The papers write W - scale * B_0 A_0 into the base. Here W stays as it is, and
A_0, B_0 are a second adapter that is frozen and subtracted (pairs.py): nothing is rounded to the base's
dtype, the base on the disk is the one that was trained on, and what is shipped is a plain LoRA on it, of
rank 2r: A' = [A; A_0], B' = scale * [B, -B_0]. It is read alike everywhere, because nobody has to decompose W
again.

A is (rank, in), B is (out, rank).
"""

import torch
from torch import Tensor

from lorakit.recipe.methods import Lora

OVERSAMPLING, ITERATIONS = 2, 8  # of the fast decomposition: directions per direction wanted, passes

Pair = tuple[Tensor, Tensor]  # A, B


def from_weight(section: Lora, weight: Tensor, rank: int, scale: float, seed: int) -> Pair:
    """(A, B) that `section.init` makes of a weight (out, in)."""
    return pissa(weight, rank, scale, section.init_svd == "fast", seed)


def pissa(weight: Tensor, rank: int, scale: float, fast: bool = False, seed: int = 0) -> Pair:
    """(A, B) with scale * B A = U_r S_r V_r^T, the `rank` largest singular directions of W = U S V^T, half of
    the singular values in either. Meng et al. 2024, arXiv 2404.02948, equations 2 and 3.

    `fast`: by a randomised method (Halko et al. 2011, arXiv 0909.4061) of which `seed` decides the draws;
    what it leaves in W is a little more than singular value r + 1.
    """
    if fast:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(weight, min(OVERSAMPLING * rank, *weight.shape), ITERATIONS)
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    half = (s[:rank] / scale).sqrt()
    return half[:, None] * vh[:rank], u[:, :rank] * half
