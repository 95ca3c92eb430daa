"""A small network of tanh layers as plain functions, trained once: what attack and metric problems query."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray


def count(widths: tuple[int, ...]) -> int:
    """Return the number of weights and biases of layers of these widths."""
    return sum((inner + 1) * outer for inner, outer in pairwise(widths))


def logits(weights: torch.Tensor, widths: tuple[int, ...], inputs: torch.Tensor) -> torch.Tensor:
    """Return the outputs `[records, classes]` of one network, its weights flat `[count(widths)]`."""
    hidden, place = inputs, 0
    for layer, (inner, outer) in enumerate(pairwise(widths)):
        matrix = weights[place : place + inner * outer].view(inner, outer)
        bias = weights[place + inner * outer : place + (inner + 1) * outer]
        place += (inner + 1) * outer
        hidden = torch.addmm(bias, hidden if layer == 0 else torch.tanh(hidden), matrix)
    return hidden


def trained(
    widths: tuple[int, ...],
    inputs: NDArray[np.float64],
    labels: NDArray[np.int64],
    rng: np.random.Generator,
    l2: float,
    iterations: int,
) -> torch.Tensor:
    """Return weights that fit `labels [records]` by cross-entropy and `(l2/2) ||w||^2`, by L-BFGS from drawn ones."""
    from scipy.optimize import minimize

    features, classes = torch.from_numpy(np.ascontiguousarray(inputs)), torch.from_numpy(labels)
    first = np.concatenate(
        [
            np.r_[rng.standard_normal(inner * outer) / np.sqrt(inner), np.zeros(outer)]
            for inner, outer in pairwise(widths)
        ]
    )

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        w = torch.from_numpy(flat.copy()).requires_grad_()
        value = torch.nn.functional.cross_entropy(logits(w, widths, features), classes) + 0.5 * l2 * (w * w).sum()
        return float(value.detach()), torch.autograd.grad(value, w)[0].numpy()

    found = minimize(objective, first, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    return torch.from_numpy(np.ascontiguousarray(found.x))
