"""How A and B start, where the weight decides or PEFT draws otherwise: PiSSA, OLoRA, LoftQ, orthogonal rows.

W (out, in) is the weight, scale * B A the update. PiSSA and OLoRA start at a part B_0 A_0 of the weight and
take it away from W: a layer computes

    y = (W - scale * B_0 A_0) x + scale * B A x,

so that step 0 is the base but for rounding. The papers write W - scale * B_0 A_0 into the base. Here W stays
as it is, and A_0, B_0 are a second adapter that is frozen and subtracted (pairs.py): W keeps its
bits, the base on the disk is the one that was trained on, and what is shipped is a plain LoRA on it, of rank
2r: A' = [A; A - A_0], B' = scale * [B - B_0, B_0], a form that 16 bits round little (kernels/lora.py:
difference). Nobody has to decompose W again: PEFT does when it loads its own, and `pissa_niter_*` draws other
random numbers then. PEFT's forward, which computes where fast paths are off, subtracts two products, each
rounded by itself.

LoftQ starts at what quantization took from the weight, W - Q, and nothing is taken away: the weights of step
0 are nearer to the unquantized ones than Q is. Little nearer at small ranks, because what NF4 takes is noise
without strong directions; outputs need not be. One round only. The paper goes on and quantizes W - scale *
B A anew, which is another matrix than loading the base's files gives, so that no other tool, and no merge,
could put the adapter on its base. PEFT's loftq divides nothing by the scale and is right at alpha = rank
alone, as is its replace_lora_weights_loftq, which is of one round, too.

A is (rank, in), B is (out, rank).
"""

import torch
from torch import Tensor, nn

from lorakit.errors import LorakitError
from lorakit.recipe.methods import Lora

OVERSAMPLING, ITERATIONS = 2, 8  # of the fast decomposition: directions per direction wanted, passes
OTHER = 0.7  # |W - Q| / |W| from which W is not what became Q: NF4 of a normal W has 0.09, another W 1.4

Pair = tuple[Tensor, Tensor]  # A, B


def orthogonal(a: Tensor) -> Tensor:
    """As large as `a`: orthogonal rows of length 1/sqrt(3), as those of the default have on average; drawn
    uniformly from torch's generator. Saxe et al. 2013, arXiv 1312.6120. B is zero.

    PEFT's `orthogonal` is another start, for even ranks only: there A and B are both random, of rank / 2
    directions each, and B A is zero because those of A are orthogonal to those of B; the rows of A are not.
    """
    return nn.init.orthogonal_(torch.empty_like(a), gain=3**-0.5)


def from_weight(section: Lora, weight: Tensor, rank: int, scale: float, seed: int) -> Pair:
    """(A, B) that `section.init` makes of a weight (out, in); of loftq, of what was taken from one."""
    if section.init == "olora":
        return olora(weight, rank, scale)
    return pissa(weight, rank, scale, section.init_svd == "fast", seed)


def pissa(weight: Tensor, rank: int, scale: float, fast: bool = False, seed: int = 0) -> Pair:
    """(A, B) with scale * B A = U_r S_r V_r^T, the `rank` largest singular directions of W = U S V^T, half of
    the singular values in either. Meng et al. 2024, arXiv 2404.02948, equations 2 and 3.

    `fast`: by a randomised method (Halko et al. 2011, arXiv 0909.4061) of which `seed` decides the draws;
    what it leaves in W is a little more than singular value r + 1. Of noise, whose singular values hardly
    fall (loftq), it missed 5 % of |scale * B A|_F^2 at rank 4 of 1024, 2 % at 16.
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


def olora(weight: Tensor, rank: int, scale: float) -> Pair:
    """(A, B) with scale * B A = Q_r R_r of W = Q R: B is the first `rank` columns of Q, which are
    orthonormal, and A the first rows of R over the scale. Büyükakyüz 2024, arXiv 2406.01775.

    PEFT does not divide, and takes scale * Q_r R_r away: the same at alpha = rank, else more than there is.
    """
    q, r = torch.linalg.qr(weight)
    return r[:rank] / scale, q[:, :rank].contiguous()


def taken(name: str, stored: Tensor, held: Tensor) -> Tensor:
    """W - Q (out, in): what quantization took from the weight `name`, of which the files have `stored`, also
    (in, out), and the model `held`. With pissa() of it, |W - Q - scale * B A|_F is the root of the sum of the
    squares of its singular values past the `rank` largest. Li et al. 2023, arXiv 2310.08659, algorithm 1
    with T = 1.

    Raises: LorakitError where `stored` is not what `held` was made of.
    """
    weight = stored.to(held)
    for candidate in (weight, weight.mT):  # the files of a Conv1D have (in, out), which may be square
        if candidate.shape == held.shape and (candidate - held).norm() <= OTHER * candidate.norm():
            return candidate - held
    raise LorakitError(
        f"adapter.init: loftq cannot be had here: {name} in the base's files, {tuple(stored.shape)}, is not"
        f" what this layer, {tuple(held.shape)}, was quantized from",
        "Leave the layer out of adapter.targets, or write init: default.",
    )
