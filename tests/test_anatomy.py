"""What an update is, in numbers: planted spectra and subspaces in numpy, and hand-worked matrices of two."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lorakit import anatomy
from lorakit.anatomy import of_dora, of_factors, of_matrix

OUT, IN = 24, 40


def orthonormal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


def planted(values: list[float], scale: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor, np.ndarray]:
    """(A, B, D) with scale * B A = D = U diag(values) V^T; neither A nor B is orthogonal itself."""
    rank = len(values)
    u, v = orthonormal(OUT, rank, seed), orthonormal(IN, rank, seed + 1)
    mix = np.random.default_rng(seed + 2).normal(size=(rank, rank)) + 3 * np.eye(rank)
    a, b = np.linalg.inv(mix) @ v.T, u @ np.diag(values) @ mix / scale
    return torch.from_numpy(a), torch.from_numpy(b), u @ np.diag(values) @ v.T


def columns(matrix: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(matrix))


# ------------------------------------------------------------------------------------------------------------
# Spectra


@pytest.mark.parametrize("scale", [1.0, 16 / math.sqrt(4)])
def test_the_spectrum_that_was_planted_is_found(scale: float) -> None:
    values = [5.0, 2.0, 1.0, 0.25]
    a, b, dense = planted(values, scale)
    found = of_factors(a, b, scale)
    assert found.s.tolist() == pytest.approx(values, rel=1e-12)
    assert found.norm == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    assert found.num_directions == 4
    assert np.allclose((found.u * found.s @ found.v.T).numpy(), dense, atol=1e-12)
    assert np.allclose(found.u.T @ found.u, np.eye(4)) and np.allclose(found.v.T @ found.v, np.eye(4))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_matrix_without_factors_has_the_singular_values_of_numpy(shape: tuple[int, int]) -> None:
    dense = np.random.default_rng(3).normal(size=shape)
    u, s, vt = np.linalg.svd(dense, full_matrices=False)
    found = of_matrix(torch.from_numpy(dense), 5)
    assert found.s.tolist() == pytest.approx(s.tolist(), rel=1e-10)
    assert (found.u.shape, found.v.shape) == ((shape[0], 5), (shape[1], 5))
    for ours, theirs in ((found.u, u[:, :5]), (found.v, vt[:5].T)):
        assert np.allclose(np.abs(np.sum(ours.numpy() * theirs, axis=0)), 1)
    assert np.allclose((found.u * found.s[:5] @ found.v.T).numpy(), u[:, :5] * s[:5] @ vt[:5])


def test_what_is_not_asked_for_is_the_effective_rank_rounded_up() -> None:
    _, _, dense = planted([2.0, 2.0, 2.0, 1e-3])
    assert of_matrix(torch.from_numpy(dense)).num_directions == 4  # 3.00000...
    _, _, dense = planted([2.0, 2.0, 2.0])
    assert of_matrix(torch.from_numpy(dense)).num_directions == 3


def test_effective_and_stable_rank_by_hand() -> None:
    for rank in (1, 3, 8):
        equal = torch.full((rank,), 0.7, dtype=torch.float64)
        assert anatomy.effective_rank(equal) == pytest.approx(rank)
        assert anatomy.stable_rank(equal) == pytest.approx(rank)
    two = torch.tensor([3.0, 1.0]).double().sqrt()  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert anatomy.effective_rank(two) == pytest.approx(math.exp(entropy))
    assert anatomy.stable_rank(two) == pytest.approx(4 / 3)
    one = torch.tensor([2.0, 0.0, 0.0])
    assert (anatomy.effective_rank(one), anatomy.stable_rank(one)) == (1.0, 1.0)


def test_nothing_is_zero_and_never_no_number() -> None:
    weight = torch.ones(OUT, IN)
    nothing = [
        of_factors(torch.randn(4, IN), torch.zeros(OUT, 4), 2.0),
        of_factors(torch.zeros(0, IN), torch.zeros(OUT, 0), 2.0),
        of_matrix(torch.zeros(OUT, IN)),
        of_dora(weight, torch.randn(4, IN), torch.zeros(OUT, 4), 2.0, weight.double().norm(dim=1)),
    ]
    one = of_factors(*planted([1.0])[:2], 1.0)
    for update in nothing:
        assert update.norm == 0 and update.num_directions == 0
        assert anatomy.effective_rank(update.s) == anatomy.stable_rank(update.s) == 0
        assert anatomy.amplification(update, weight) == 0
        assert anatomy.similarity(update.u, one.u) == anatomy.similarity(one.v, update.v) == 0
        assert anatomy.cosine(update, one) == anatomy.cosine(one, update) == 0


def test_triplets_of_zeros_are_no_directions() -> None:
    a, b, dense = planted([3.0, 1.0])
    wide_a, wide_b = torch.zeros(6, IN).double(), torch.zeros(OUT, 6).double()
    wide_a[[0, 4]], wide_b[:, [0, 4]] = a, b
    found = of_factors(wide_a, wide_b, 1.0)
    assert found.s.tolist() == pytest.approx([3.0, 1.0]) and found.num_directions == 2
    assert found.norm == pytest.approx(np.linalg.norm(dense))


@pytest.mark.parametrize("scale", [2.0, 0.5])
def test_dora_is_the_dense_difference_in_fp64(scale: float) -> None:
    a, b, _ = planted([0.5, 0.2, 0.1])
    generator = np.random.default_rng(5)
    w, m = generator.normal(size=(OUT, IN)), generator.uniform(0.5, 2, size=OUT)
    v = w + scale * (b @ a).numpy()
    dense = m[:, None] * v / np.linalg.norm(v, axis=1, keepdims=True) - w
    found = of_dora(torch.from_numpy(w), a, b, scale, torch.from_numpy(m))
    assert found.s.tolist() == pytest.approx(np.linalg.svd(dense, compute_uv=False).tolist(), rel=1e-9)
    assert found.num_directions == 3


# ------------------------------------------------------------------------------------------------------------
# Against the weight


def test_amplification_by_hand() -> None:
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    change = torch.zeros(4, 4)
    change[0, 0], change[2, 2] = 6.0, -2.0  # inside them W has 4 and 2
    update = of_factors(change[[0, 2]], torch.eye(4)[:, [0, 2]], 1.0)
    assert anatomy.amplification(update, weight) == pytest.approx(math.hypot(6, 2) / math.hypot(4, 2))
    assert anatomy.amplification(of_matrix(change, 1), weight) == pytest.approx(6 / 4)
    across = torch.zeros(4, 4)
    across[0, 1] = 1.0  # from where W reads to where it does not write
    assert anatomy.amplification(of_matrix(across), weight) == math.inf


def test_amplification_of_the_weights_own_directions_is_their_ratio() -> None:
    w = np.random.default_rng(7).normal(size=(OUT, IN))
    u, s, vt = np.linalg.svd(w, full_matrices=False)
    least = torch.from_numpy(0.1 * u[:, -3:] @ vt[-3:])  # in the three weakest directions of W
    wanted = 0.1 * math.sqrt(3) / np.linalg.norm(s[-3:])
    assert anatomy.amplification(of_matrix(least, 3), torch.from_numpy(w)) == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------------------
# Two adapters: equation 4 of the paper


def test_known_subspaces() -> None:
    basis = orthonormal(OUT, 8, 11)
    turn = np.linalg.qr(np.random.default_rng(12).normal(size=(4, 4)))[0]
    one, turned, other = columns(basis[:, :4]), columns(basis[:, :4] @ turn), columns(basis[:, 4:])
    assert anatomy.similarity(one, turned) == pytest.approx(1)
    assert anatomy.similarity(one, other) == pytest.approx(0, abs=1e-12)
    assert anatomy.similarity(one, columns(basis[:, 2:6])) == pytest.approx(2 / 4)
    assert anatomy.similarity(one[:, :2], one) == pytest.approx(1), "one contains the other"
    assert anatomy.similarity(one, columns(basis[:, 3:5])) == pytest.approx(1 / 2)


@pytest.mark.parametrize(("i", "j"), [(4, 4), (2, 6), (8, 3)])
def test_o26_similarity_of_itself_is_one_and_by_chance_is_that_of_random_subspaces(i: int, j: int) -> None:
    dimensions, number = 32, 400
    own = columns(orthonormal(dimensions, i, 1))
    assert anatomy.similarity(own, own) == pytest.approx(1, abs=1e-14)
    found = [
        anatomy.similarity(*(columns(orthonormal(dimensions, *pair)) for pair in ((i, n), (j, 9999 - n))))
        for n in range(number)
    ]
    wanted = i * j / (dimensions * min(i, j))
    assert np.mean(found) == pytest.approx(wanted, abs=5 * np.std(found) / math.sqrt(number))
    assert np.std(found) < wanted / 2  # else the line above says nothing


def test_cosine_is_that_of_the_two_dense_updates() -> None:
    a, b, one = planted([3.0, 1.0, 0.5])
    other = planted([2.0, 1.5], seed=20)[2]
    mixed = 0.7 * one + other
    found = anatomy.cosine(of_factors(a, b, 1.0), of_matrix(torch.from_numpy(mixed), 5))
    wanted = np.sum(one * mixed) / np.linalg.norm(one) / np.linalg.norm(mixed)
    assert abs(wanted) > 0.3
    assert found == pytest.approx(wanted)
    assert anatomy.cosine(of_factors(a, b, 1.0), of_factors(a, b, -3.0)) == pytest.approx(-1)
