"""The length scale that explains the values best: a grid of likelihoods, which clients can add up."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.surrogate.kernels import Kernel, Name, lower_squares
from fedsim.surrogate.posterior import log_likelihood

STEPS = 16


def grid(dim: int) -> NDArray[np.float64]:
    """Return the length scales tried `[STEPS]`: from 0.03 to 10 times the unit cube's diagonal, evenly in logarithm."""
    return math.sqrt(dim) * np.logspace(-1.5, 1.0, STEPS)


def likelihoods(name: Name, points: torch.Tensor, values: torch.Tensor, noise: float) -> torch.Tensor:
    """Return the log marginal likelihood of one client's values at every length scale of the grid, `[STEPS]`."""
    z = points - points.mean(dim=0)
    squares = lower_squares(z, (z * z).sum(dim=1))
    found = [log_likelihood(Kernel(name, float(s)), squares, values, noise) for s in grid(points.shape[1])]
    return torch.tensor(found, dtype=torch.float64)


def best(likelihood: torch.Tensor, dim: int) -> float:
    """Return the length scale of the highest likelihood, by a parabola through the best of the grid and its neighbours.

    Likelihoods of several clients on the same grid may have been added up before: that is their joint one.
    """
    scales, top = grid(dim), int(likelihood.argmax())
    if float(likelihood.min()) == float(likelihood.max()):
        return float(scales[STEPS // 2])  # equal values tell nothing
    if top in (0, STEPS - 1):
        return float(scales[top])
    left, middle, right = (float(likelihood[top + k]) for k in (-1, 0, 1))
    bend = left - 2.0 * middle + right
    shift = 0.5 * (left - right) / bend if bend < 0.0 else 0.0
    step = math.log(scales[1] / scales[0])
    return float(scales[top]) * math.exp(shift * step)
