"""Synthetic black boxes: the FZooS quadratic, and standard test functions, shifted and rotated per client."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedsim.errors import InputError
from fedsim.problems.black_box import BlackBox, Noise
from fedsim.problems.data.draws import generator
from fedsim.problems.parameters import Seed
from fedsim.problems.problem import Nodes

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
REFLECTIONS = 8  # an even number: a rotation


@dataclass(frozen=True)
class SyntheticQuadraticParameters:
    """The FZooS quadratic: `f_i` differ, and may be non-convex, while their mean does not depend on how much.

    Attributes:
        dim: length of x. heterogeneity: the paper's C. noise: standard deviation of every query.
        seed: of coefficients and start, drawn as the authors' code does (theirs: 1234 and the four after it).
    """

    needs_data: ClassVar[bool] = False
    dim: Count = 300
    heterogeneity: Weight = 5.0
    noise: Noise = 0.0
    seed: Seed | None = None

    def problem(self, n: int, seed: int, base: Path) -> SyntheticQuadratic:
        """Return the problem for n clients."""
        return SyntheticQuadratic(n, self.dim, self.heterogeneity, self.noise, seed if self.seed is None else self.seed)


class SyntheticQuadratic(BlackBox):
    """With `u = 20 x - 10`: `f_i = (1/(10 d)) [sum_j (1 + C (a_ij - 1/N)) u_j^2 + sum_j (1 + C (b_ij - 1/N)) u_j + 1]`.

    `(a_1j .. a_Nj)` and `(b_1j .. b_Nj)` are Dirichlet(1/N, .., 1/N), so that the mean is
    `(1/(10 d)) [sum_j (u_j^2 + u_j) + 1]` for every C; least at x = 0.475, with value `-0.025 + 0.1 / d`.

    Reference: arXiv 2308.04077, section 6.1.
    """

    kind = "synthetic_quadratic"
    has_gradient = True

    def __init__(self, n: int, dim: int, heterogeneity: float, noise: float, seed: int) -> None:
        super().__init__(n, dim, noise)
        rng = np.random.RandomState(seed % 2**32)  # the authors' draws
        a, b = (rng.dirichlet(np.full(n, 1.0 / n), size=dim).T for _ in range(2))
        self._start = torch.from_numpy(rng.uniform(0.0, 1.0, dim))
        self._square, self._linear = (torch.from_numpy(1.0 + heterogeneity * (c - 1.0 / n)) for c in (a, b))

    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return `f_node` `[count]`."""
        u = 20.0 * points - 10.0
        return ((self._square[node] * u + self._linear[node]) * u).sum(dim=1).add(1.0) / (10.0 * self.dim)

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return the drawn start, uniform in the cube, on every row."""
        return self._start.expand(len(nodes), -1).clone()

    def optimum(self) -> torch.Tensor:
        """Return the minimiser of the mean."""
        return torch.full((self.dim,), 0.475, dtype=torch.float64)


def rosenbrock(u: torch.Tensor) -> torch.Tensor:
    """Return `sum_j 100 (u_{j+1} - u_j^2)^2 + (1 - u_j)^2` of rows; 0 at 1."""
    return (100.0 * (u[:, 1:] - u[:, :-1] ** 2) ** 2 + (1.0 - u[:, :-1]) ** 2).sum(dim=1)


def ackley(u: torch.Tensor) -> torch.Tensor:
    """Return `-20 exp(-0.2 rms(u)) - exp(mean cos 2 pi u) + 20 + e` of rows; 0 at 0."""
    rms = (u * u).mean(dim=1).clamp(min=1e-300).sqrt()
    return -20.0 * torch.exp(-0.2 * rms) - torch.exp(torch.cos(2.0 * math.pi * u).mean(dim=1)) + 20.0 + math.e


def levy(u: torch.Tensor) -> torch.Tensor:
    """Return Levy's function of rows; 0 at 1."""
    w = 1.0 + (u - 1.0) / 4.0
    first = torch.sin(math.pi * w[:, 0]) ** 2
    middle = ((w[:, :-1] - 1.0) ** 2 * (1.0 + 10.0 * torch.sin(math.pi * w[:, :-1] + 1.0) ** 2)).sum(dim=1)
    return first + middle + (w[:, -1] - 1.0) ** 2 * (1.0 + torch.sin(2.0 * math.pi * w[:, -1]) ** 2)


def rastrigin(u: torch.Tensor) -> torch.Tensor:
    """Return `10 d + sum_j u_j^2 - 10 cos(2 pi u_j)` of rows; 0 at 0."""
    return (u * u - 10.0 * torch.cos(2.0 * math.pi * u) + 10.0).sum(dim=1)


@dataclass(frozen=True)
class Standard:
    """A test function, its customary box, every coordinate of its minimiser, and the fewest there are."""

    function: Callable[[torch.Tensor], torch.Tensor]
    box: tuple[float, float]
    best: float
    least: int = 1


STANDARD = {
    "rosenbrock": Standard(rosenbrock, (-5.0, 10.0), 1.0, least=2),
    "ackley": Standard(ackley, (-32.768, 32.768), 0.0),
    "levy": Standard(levy, (-10.0, 10.0), 1.0),
    "rastrigin": Standard(rastrigin, (-5.12, 5.12), 0.0),
}


@dataclass(frozen=True)
class TestFunctionParameters:
    """A standard test function on its customary box, shifted and rotated per client.

    Attributes:
        function: rosenbrock, ackley, levy or rastrigin. dim: at least 1, for rosenbrock 2.
        shift: standard deviation of the clients' shifts, in units of the box's half width.
        rotate: turn every client's function around its minimiser, by 8 reflections of its own: an arbitrary rotation in
            up to 8 dimensions, in more one of a random subspace of 8.
        noise: standard deviation of every query.
    """

    __test__: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    function: Literal["rosenbrock", "ackley", "levy", "rastrigin"]
    dim: Count = 20
    shift: Weight = 0.05
    rotate: bool = True
    noise: Noise = 0.0
    seed: Seed | None = None

    def problem(self, n: int, seed: int, base: Path) -> ShiftedFunction:
        """Return the problem for n clients.

        Raises:
            InputError: fewer coordinates than the function's terms join.
        """
        if self.dim < STANDARD[self.function].least:
            raise InputError(
                f"problem.dim: {self.dim} given; {self.function} joins neighbouring coordinates and needs"
                f" {STANDARD[self.function].least}"
            )
        return ShiftedFunction(self, n, seed if self.seed is None else self.seed)


class ShiftedFunction(BlackBox):
    """`f_i(x) = f(x* + R_i (u - x* - s_i))`, u the point of the real box: minimiser `x* + s_i`.

    `R_i` is a product of reflections, so that no `dim x dim` matrix is needed.
    """

    kind = "test_function"
    has_gradient = True

    def __init__(self, p: TestFunctionParameters, n: int, seed: int) -> None:
        super().__init__(n, p.dim, p.noise)
        self._p, self._standard = p, STANDARD[p.function]
        rng = generator(seed, "test function")
        low, high = self._standard.box
        shifts = p.shift * (high - low) / 2.0 * rng.standard_normal((n, p.dim))
        axes = rng.standard_normal((n, REFLECTIONS if p.rotate else 0, p.dim))
        self._shifts = torch.from_numpy(shifts)
        self._axes = torch.from_numpy(axes / np.linalg.norm(axes, axis=2, keepdims=True))
        self._start = torch.from_numpy(rng.uniform(0.0, 1.0, p.dim))

    def evaluate(self, points: torch.Tensor, node: int) -> torch.Tensor:
        """Return `f_node` `[count]`."""
        low, high = self._standard.box
        v = low + (high - low) * points - self._standard.best - self._shifts[node]
        for axis in self._axes[node]:
            v = v - 2.0 * (v * axis).sum(dim=1, keepdim=True) * axis
        return self._standard.function(v + self._standard.best)

    def start(self, nodes: Nodes) -> torch.Tensor:
        """Return a point uniform in the cube, the same on every row."""
        return self._start.expand(len(nodes), -1).clone()

    def facts(self) -> dict[str, Any]:
        """Return which function it is."""
        return {"function": self._p.function, "real_box": list(self._standard.box)}
