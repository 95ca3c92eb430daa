"""Black boxes: n functions on the unit cube of which only noisy values can be had."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import numpy as np
import torch
from pydantic import Field

from fedsim.errors import Unsupported
from fedsim.problems.problem import Minibatch, Nodes, Problem

Noise = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class BlackBox(Problem):
    """Functions `f_i` on `[0, 1]^dim`; a point outside is answered as the nearest one inside.

    A subclass gives `evaluate`; where that is made of differentiable torch operations, `has_gradient = True` makes the
    exact gradient available too. Real boxes are mapped to the unit cube coordinate by coordinate.

    Attributes:
        noise: standard deviation of what is added to every answer; the recorded loss has none.
    """

    kind = "black_box"
    box = (0.0, 1.0)
    has_gradient = False
    common_start = True

    def __init__(self, n: int, dim: int, noise: float = 0.0) -> None:
        self.n, self.dim, self.noise = n, dim, noise
        self.records = np.zeros(n, dtype=np.int64)

    @abstractmethod
    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return `f_node` at `points [count, dim]` of the unit cube: float64 `[count]`."""

    def values(self, points: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(points[i, j])` `[rows, count]`."""
        inside = points.double().clamp(0.0, 1.0)
        return torch.stack([self.evaluate(inside[row], int(node)) for row, node in enumerate(nodes)])

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`."""
        with torch.no_grad():
            return self.values(x.expand(len(nodes), -1)[:, None], nodes)[:, 0]

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]` by automatic differentiation, where there is one."""
        if not self.has_gradient:
            raise Unsupported(f"problem {self.kind!r} is a black box: it has values, no gradients")
        at = x.detach().clone().requires_grad_()
        return torch.autograd.grad(self.values(at[:, None], nodes).sum(), at)[0]

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the middle of the cube on every row; subclasses say better."""
        return torch.full((len(nodes), self.dim), 0.5, dtype=torch.float64)
