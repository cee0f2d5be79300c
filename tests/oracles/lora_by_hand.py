"""LoRA training of a toy in numpy and fp64 from the formulas alone: the loop's numbers, by another way.

The toy predicts each token from the one before it and that one's place in its document, and nothing else:

    x = E[id] + P[place],  h = tanh(W1' x),  z = W2' h,  p = softmax(z)
    Wk' = Wk + (alpha_k / rank_k) Bk Ak

E, P, W1 and W2 are frozen. The loss of a step is the sum of -log p[next id] over the trained tokens of all
its documents, divided by their number. Neither torch nor lorakit is imported; every derivative is by hand.

Shapes: T tokens of the longest document, I embedding, H hidden, V vocabulary, R rank, M trained tokens of a
step.
Sources: Hu et al. 2021, arXiv 2106.09685, equation 3; Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm
2, with the weight decay multiplied by the learning rate, as torch has it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Arrays = dict[str, np.ndarray]
Document = tuple[np.ndarray, np.ndarray]  # (T,) token ids; (T,) 1 where the token is to be predicted


@dataclass(frozen=True)
class Settings:
    """What a run is trained with, beside its arrays and documents."""

    alpha1: float
    alpha2: float
    lr: float  # of A at the end of the warm-up
    lr_ratio: float  # learning rate of B over that of A
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8


def train(
    frozen: Arrays, start: Arrays, steps: Sequence[Sequence[Document]], settings: Settings
) -> tuple[list[float], list[float], Arrays]:
    """(loss of every step, norm of its gradient before clipping, A1, B1, A2, B2 after the last step).

    `frozen`: E (V, I), P (T, I), W1 (H, I), W2 (V, H).
    `start`: A1 (R1, I), B1 (H, R1), A2 (R2, H), B2 (V, R2).
    """
    weights = {name: array.copy() for name, array in start.items()}
    mean = {name: np.zeros_like(array) for name, array in start.items()}  # of the gradient
    square = {name: np.zeros_like(array) for name, array in start.items()}  # of its elementwise square
    losses, norms = [], []
    for step, documents in enumerate(steps):
        loss, gradient = loss_and_gradient(frozen, weights, documents, settings)
        norm = math.sqrt(sum(float(np.sum(array**2)) for array in gradient.values()))
        kept = min(1.0, settings.max_grad_norm / (norm + 1e-6))
        losses.append(loss)
        norms.append(norm)
        for name, weight in weights.items():
            lr = learning_rate(step, len(steps), settings) * (settings.lr_ratio if name[0] == "B" else 1.0)
            clipped = kept * gradient[name]
            mean[name] = settings.beta1 * mean[name] + (1 - settings.beta1) * clipped
            square[name] = settings.beta2 * square[name] + (1 - settings.beta2) * clipped**2
            mean_unbiased = mean[name] / (1 - settings.beta1 ** (step + 1))
            square_unbiased = square[name] / (1 - settings.beta2 ** (step + 1))
            weight *= 1 - lr * settings.weight_decay
            weight -= lr * mean_unbiased / (np.sqrt(square_unbiased) + settings.eps)
    return losses, norms, weights


def loss_and_gradient(
    frozen: Arrays, weights: Arrays, documents: Sequence[Document], settings: Settings
) -> tuple[float, Arrays]:
    """(mean loss over the trained tokens, its derivative by A1, B1, A2 and B2)."""
    a1, b1, a2, b2 = (weights[name] for name in ("A1", "B1", "A2", "B2"))
    scale1, scale2 = settings.alpha1 / len(a1), settings.alpha2 / len(a2)
    w1, w2 = frozen["W1"] + scale1 * b1 @ a1, frozen["W2"] + scale2 * b2 @ a2
    predictions = [(ids[i - 1], i - 1, ids[i]) for ids, trained in documents for i in np.flatnonzero(trained)]
    before, place, target = np.array(predictions).T  # (M,) each
    x = frozen["E"][before] + frozen["P"][place]  # (M, I)
    h = np.tanh(x @ w1.T)  # (M, H)
    z = h @ w2.T  # (M, V)
    z -= z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    dz = (np.exp(log_p) - np.eye(z.shape[1])[target]) / len(target)  # (M, V)
    dw2 = dz.T @ h  # (V, H)
    dw1 = ((dz @ w2) * (1 - h**2)).T @ x  # (H, I)
    gradient = {
        "A1": scale1 * b1.T @ dw1,
        "B1": scale1 * dw1 @ a1.T,
        "A2": scale2 * b2.T @ dw2,
        "B2": scale2 * dw2 @ a2.T,
    }
    return -float(np.mean(log_p[np.arange(len(target)), target])), gradient


def learning_rate(step: int, num_steps: int, settings: Settings) -> float:
    """Of A: a straight line up to `lr` in the last step of the warm-up, then half a cosine that would be zero
    one step after the last."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    angle = math.pi * (step - settings.warmup_steps) / (num_steps - settings.warmup_steps)
    return settings.lr * (1 + math.cos(angle)) / 2
