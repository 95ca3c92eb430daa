"""Small things that many tests need."""

from dataclasses import dataclass

import numpy as np
import torch

from fedsim.algorithms.algorithm import SyncAlgorithm
from fedsim.algorithms.requests import Mean, Mix, Rows, Shared
from fedsim.problems.quadratic import Quadratic


def quadratic(n: int = 12, dim: int = 5, seed: int = 0) -> Quadratic:
    """Return diagonal quadratics with curvatures in [1, 4]."""
    rng = np.random.default_rng(seed)
    return Quadratic(1 + 3 * rng.random((n, dim)), rng.normal(size=(n, dim)))


@dataclass
class TrackingState:
    """Model, tracker, gradient and a shared value."""

    x: Rows
    y: Rows
    g: Rows
    mean: Shared


@dataclass(frozen=True)
class Tracking(SyncAlgorithm):
    """Gradient tracking, with a global mean in every round so that shared state is exercised."""

    kind = "tracking"
    paper = "test"
    provenance = "paper"
    eta: float = 0.05

    async def start(self, x0, f, rng):
        g = f.gradient(x0)
        return TrackingState(x0, g, g, await Mean(x0))

    async def round(self, s, k, f, rng):
        x = await Mix(s.x - self.eta * s.y)
        g = f.gradient(x)
        y = await Mix(s.y + g - s.g)
        return TrackingState(x, y, g, await Mean(x + 0.0 * rng.normal("noise", x.shape[1])))


def bits(tensor: torch.Tensor) -> bytes:
    """Return the bits of a tensor."""
    return tensor.detach().contiguous().numpy().tobytes()
