"""Isotropic kernels with prior variance 1, as functions of squared distances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

Name = Literal["se", "matern52"]


@dataclass(frozen=True)
class Kernel:
    """Squared exponential `exp(-r^2 / (2 l^2))`, or Matern-5/2 `(1 + u + u^2/3) exp(-u)` with `u = sqrt(5) r / l`.

    Attributes:
        name: se or matern52. scale: the length scale l, in units of the points.
    """

    name: Name
    scale: float

    def value(self, squared: torch.Tensor) -> torch.Tensor:
        """Return `k` at squared distances; `squared` is overwritten."""
        if self.name == "se":
            return squared.mul_(-0.5 / self.scale**2).exp_()
        u = squared.sqrt_().mul_(math.sqrt(5.0) / self.scale)
        polynomial = u * (1.0 / 3.0) + 1.0
        polynomial.mul_(u).add_(1.0)
        return u.neg_().exp_().mul_(polynomial)

    def slope(self, squared: torch.Tensor) -> torch.Tensor:
        """Return q with `grad_x k(x, x') = -q (x - x')`."""
        if self.name == "se":
            return torch.exp(squared * (-0.5 / self.scale**2)) / self.scale**2
        u = squared.sqrt() * (math.sqrt(5.0) / self.scale)
        return (5.0 / (3.0 * self.scale**2)) * (1.0 + u) * torch.exp(-u)

    @property
    def curvature(self) -> float:
        """kappa: the prior variance of every component of the gradient."""
        return (1.0 if self.name == "se" else 5.0 / 3.0) / self.scale**2

    def frequencies(self, count: int, dim: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Return draws `[count, dim]` of the kernel's spectral density at length scale 1."""
        z = rng.standard_normal((count, dim))
        return z if self.name == "se" else z * np.sqrt(5.0 / rng.chisquare(5.0, size=(count, 1)))


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `||a_i - b_j||^2` `[m, n]` from the Gram matrix; centre the points first, or digits are lost."""
    products = a @ b.T
    return products.mul_(-2.0).add_((a * a).sum(dim=1)[:, None]).add_((b * b).sum(dim=1)[None]).clamp_(min=0.0)


def lower_gram(rows: torch.Tensor, times: float) -> torch.Tensor:
    """Return `times rows rows'` on and below the diagonal, 0 above: half of a product's cost. `rows [n, k]` float64."""
    return torch.from_numpy(_syrk()(times, rows.numpy().T, trans=1, lower=1))


@cache
def _syrk() -> Any:
    from scipy.linalg import get_blas_funcs

    return get_blas_funcs("syrk", dtype=np.float64)


def lower_squares(z: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return `||z_i - z_j||^2` on and below the diagonal, what a factorisation reads; `norms [n]` are the `||z_i||^2`.

    Centre the points first, or digits are lost.
    """
    return lower_gram(z, -2.0).add_(norms).add_(norms[:, None]).clamp_(min=0.0)
