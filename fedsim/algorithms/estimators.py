"""Gradients from function values: finite differences along drawn directions, or the problem's own gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.algorithms.algorithm import Draws, Oracle
from fedsim.errors import InputError

Mask = NDArray[np.bool_] | None


@dataclass(frozen=True)
class FiniteDifferences:
    """`(1/Q) sum_q scale (y(x + smoothing u_q) - y(x)) / smoothing u_q`, with `Q + 1` queries.

    Attributes:
        kind: gaussian (`u ~ N(0, I)`, scale 1), sphere (u on the unit sphere, scale dim), coordinate (u a unit vector,
            drawn without repetition, scale dim): unbiased to first order in `smoothing`; orthonormal (Gaussian
            directions made orthonormal, scale 1, as the FZooS code does): its mean is the gradient divided by dim.
        directions: Q; at most dim for coordinate and orthonormal.
        smoothing: the paper's lambda, in units of x.
    """

    kind: Literal["gaussian", "sphere", "coordinate", "orthonormal"]
    directions: Annotated[int, Field(ge=1)] = 20
    smoothing: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01

    @property
    def queries(self) -> int:
        """Queries of one estimate."""
        return self.directions + 1

    def check(self, dim: int) -> None:
        """Refuse more directions than there are.

        Raises:
            InputError: Q > dim where directions must differ.
        """
        if self.kind in ("coordinate", "orthonormal") and self.directions > dim:
            raise InputError(
                f"algorithm.estimator.directions: {self.directions} given, but {self.kind} directions in dimension"
                f" {dim} are at most {dim}; use fewer, or kind: gaussian"
            )

    def __call__(self, f: Oracle, x: torch.Tensor, rng: Draws, purpose: str, rows: Mask = None) -> torch.Tensor:
        """Return the estimates `[rows, dim]` at `x [rows, dim]`.

        Points are kept inside the problem's box: at its walls differences across them are smaller than the slope.
        """
        u = self.along(rng, purpose, x.shape[1])
        points = f.inside(torch.cat([x[:, None].double(), x[:, None].double() + self.smoothing * u], dim=1))
        y = f.query(points, rows)
        scale = x.shape[1] if self.kind in ("sphere", "coordinate") else 1
        slopes = (y[:, 1:] - y[:, :1]) * (scale / (self.smoothing * self.directions))
        return (slopes[:, :, None] * u).sum(dim=1).to(x.dtype)

    def along(self, rng: Draws, purpose: str, dim: int) -> torch.Tensor:
        """Return the directions `[rows, Q, dim]`."""
        if self.kind == "coordinate":
            return self._coordinates(rng.uniform(purpose, dim))
        u = rng.normal(purpose, self.directions * dim).view(-1, self.directions, dim)
        if self.kind == "sphere":
            return u / u.norm(dim=2, keepdim=True)
        if self.kind == "orthonormal":
            return torch.stack([_orthonormal(row) for row in u]) if len(u) else u
        return u

    def _coordinates(self, keys: torch.Tensor) -> torch.Tensor:
        chosen = keys.sort(dim=1, stable=True).indices[:, : self.directions]
        return torch.nn.functional.one_hot(chosen, keys.shape[1]).double()


def _orthonormal(u: torch.Tensor) -> torch.Tensor:
    """Return what Gram and Schmidt make of the rows of u: QR, with the signs that its reflections lose.

    With signs that depend on u, forward differences would have a mean along the first coordinates.
    """
    q, r = torch.linalg.qr(u.T)
    return (q * r.diagonal().sign()).T


@dataclass(frozen=True)
class Exact:
    """The problem's own gradient, on all records."""

    kind: Literal["exact"]

    @property
    def queries(self) -> int:
        """Queries of one estimate."""
        return 0

    def check(self, dim: int) -> None:
        """Nothing to refuse."""

    def __call__(self, f: Oracle, x: torch.Tensor, rng: Draws, purpose: str, rows: Mask = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        return f.gradient(x, None, rng, rows)


Estimator = Annotated[FiniteDifferences | Exact, Field(discriminator="kind")]
