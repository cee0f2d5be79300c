"""AdaLoRA training of the toy of lora_by_hand, in numpy and fp64 from the formulas alone.

    Wk' = Wk + alpha_k / (init_rank + 1e-5) * Pk diag(lk) Qk

The objective of a step is the mean loss over its trained tokens plus weight * mean over M of |M M^T - I|, M
being Q1, P1^T, Q2 and P2^T. Of every entry w of P, l and Q with gradient g:

    I = |w g|,  S <- beta1 S + (1 - beta1) I,  U <- beta2 U + (1 - beta2) |I - S|

and triplet i of layer k scores S U of l_i plus the means of S U over column i of P and row i of Q. After the
update of step t (counted from 1) the triplets outside the b(t) best of both layers lose their l: every
`interval` steps between start and settled, and at settled; after that the same ones in every step.

    b(t) = target + floor((init - target) (1 - (t - start) / (settled - start))^3)

Neither torch nor lorakit is imported; every derivative is by hand. Source: Zhang et al. 2023, arXiv
2303.10512, equations 7 to 14, and their released code for the penalty and the schedule.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tests.oracles import lora_by_hand
from tests.oracles.lora_by_hand import Arrays, Document

LAYERS = (1, 2)


@dataclass(frozen=True)
class Settings:
    """What AdaLoRA needs beside the settings of LoRA, whose alphas, optimizer and schedule hold here too."""

    target_rank: int
    start: int  # the last step of the warm-up
    settled: int  # the step after which the choice stands
    interval: int
    beta1: float
    beta2: float
    orthogonal_weight: float


@dataclass(frozen=True)
class Trained:
    """What a run gives, step by step."""

    losses: list[float]  # without the penalty
    norms: list[float]  # of the whole gradient, before clipping
    kept: list[dict[int, list[bool]]]  # layer -> its triplets, after the step
    scores: Arrays  # S U of every entry at the last decision
    gaps: list[float]  # by how much, of its size, the worst kept score is above the best that is not
    final: Arrays


def budget(step: int, first: int, settings: Settings) -> int:
    """Triplets of both layers that stay after step `step`; `first` of them at the start."""
    last = settings.target_rank * len(LAYERS)
    if step <= settings.start:
        return first
    gone = min(step, settings.settled) - settings.start
    left = 1 - Fraction(gone, settings.settled - settings.start)
    return last + math.floor((first - last) * left**3)


def train(
    frozen: Arrays,
    start: Arrays,
    steps: Sequence[Sequence[Document]],
    settings: Settings,
    lora: lora_by_hand.Settings,
) -> Trained:
    """`frozen`: E (V, I), P (T, I), W1 (H, I), W2 (V, H). `start`: Pk (out, R), Lk (R,), Qk (R, in)."""
    weights = {name: array.copy() for name, array in start.items()}
    zeros = {name: np.zeros_like(array) for name, array in start.items()}
    mean, square, sensitivity, uncertainty = (dict(zeros) for _ in range(4))
    kept = {layer: np.ones(len(start[f"L{layer}"]), dtype=bool) for layer in LAYERS}
    first = sum(len(mask) for mask in kept.values())
    told = Trained([], [], [], {}, [], weights)
    for index, documents in enumerate(steps):
        step = index + 1
        loss, gradient = loss_and_gradient(frozen, weights, documents, settings, lora)
        for name, weight in weights.items():
            now = np.abs(weight * gradient[name])
            sensitivity[name] = settings.beta1 * sensitivity[name] + (1 - settings.beta1) * now
            distance = np.abs(now - sensitivity[name])
            uncertainty[name] = settings.beta2 * uncertainty[name] + (1 - settings.beta2) * distance
        norm = math.sqrt(sum(float(np.sum(array**2)) for array in gradient.values()))
        told.losses.append(loss)
        told.norms.append(norm)
        clip = min(1.0, lora.max_grad_norm / (norm + 1e-6))
        for name, weight in weights.items():
            clipped = clip * gradient[name]
            mean[name] = lora.beta1 * mean[name] + (1 - lora.beta1) * clipped
            square[name] = lora.beta2 * square[name] + (1 - lora.beta2) * clipped**2
            lr = lora_by_hand.learning_rate(index, len(steps), lora)
            weight *= 1 - lr * (0.0 if name[0] == "L" else lora.weight_decay)
            size = np.sqrt(square[name] / (1 - lora.beta2**step)) + lora.eps
            weight -= lr * mean[name] / (1 - lora.beta1**step) / size
        decides = settings.start < step < settings.settled and step % settings.interval == 0
        if decides or step == settings.settled:
            place = budget(step, first, settings)
            score = {name: sensitivity[name] * uncertainty[name] for name in weights}
            told.scores.update(score)
            of_layer = {k: score[f"L{k}"] + score[f"P{k}"].mean(0) + score[f"Q{k}"].mean(1) for k in LAYERS}
            falling = np.sort(np.concatenate(list(of_layer.values())))[::-1]
            kept = {k: scores >= falling[place - 1] for k, scores in of_layer.items()}
            told.gaps.append(1 - falling[place] / falling[place - 1] if place < first else 1.0)
        if decides or step >= settings.settled:
            for layer, mask in kept.items():
                weights[f"L{layer}"][~mask] = 0.0
        told.kept.append({layer: mask.tolist() for layer, mask in kept.items()})
    return told


def loss_and_gradient(
    frozen: Arrays,
    weights: Arrays,
    documents: Sequence[Document],
    settings: Settings,
    lora: lora_by_hand.Settings,
) -> tuple[float, Arrays]:
    """(mean loss over the trained tokens, the derivative of it plus the penalty by every P, L and Q)."""
    scales, moved = {}, dict(frozen)
    for k, alpha in zip(LAYERS, (lora.alpha1, lora.alpha2), strict=True):
        p, diagonal, q = (weights[f"{kind}{k}"] for kind in "PLQ")
        scales[k] = alpha / (len(diagonal) + 1e-5)
        moved[f"W{k}"] = frozen[f"W{k}"] + scales[k] * p @ np.diag(diagonal) @ q
    loss, by_matrix = _derivative_by_matrices(moved, documents, lora)
    gradient = {}
    share = settings.orthogonal_weight / (2 * len(LAYERS))
    for k in LAYERS:
        p, diagonal, q = (weights[f"{kind}{k}"] for kind in "PLQ")
        by_update = scales[k] * by_matrix[k]  # (out, in)
        gradient[f"P{k}"] = by_update @ q.T * diagonal + share * _derivative_of_penalty(p.T).T
        gradient[f"L{k}"] = np.einsum("or,oi,ri->r", p, by_update, q)
        gradient[f"Q{k}"] = diagonal[:, None] * (p.T @ by_update) + share * _derivative_of_penalty(q)
    return loss, gradient


def penalty(weights: Arrays) -> float:
    """Mean over all P and Q of the distance to matrices with orthonormal columns and rows."""
    rows = [weights[f"Q{k}"] for k in LAYERS] + [weights[f"P{k}"].T for k in LAYERS]
    return float(np.mean([np.sqrt(np.sum((m @ m.T - np.eye(len(m))) ** 2)) for m in rows]))


def _derivative_of_penalty(matrix: np.ndarray) -> np.ndarray:
    """Of |M M^T - I| by M."""
    off = matrix @ matrix.T - np.eye(len(matrix))
    return 2 * off @ matrix / np.sqrt(np.sum(off**2))


def _derivative_by_matrices(
    moved: Arrays, documents: Sequence[Document], lora: lora_by_hand.Settings
) -> tuple[float, dict[int, np.ndarray]]:
    """(loss, its derivative by W1 and W2): that by B, where the scale is 1, A the identity and B zero."""
    whole = {}
    for k in LAYERS:
        rows, columns = moved[f"W{k}"].shape
        whole |= {f"A{k}": np.eye(columns), f"B{k}": np.zeros((rows, columns))}
    unit = lora_by_hand.Settings(
        alpha1=float(len(whole["A1"])),
        alpha2=float(len(whole["A2"])),
        lr=lora.lr,
        lr_ratio=1.0,
        warmup_steps=lora.warmup_steps,
        weight_decay=0.0,
        max_grad_norm=lora.max_grad_norm,
    )
    loss, gradient = lora_by_hand.loss_and_gradient(moved, whole, documents, unit)
    return loss, {k: gradient[f"B{k}"] for k in LAYERS}
