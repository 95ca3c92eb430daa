"""The derived Gaussian process of one client: gradient of the posterior mean, and its uncertainty.

FZooS, section 4.1 (Shu, Lin, Dai & Low, arXiv 2308.04077). Clients are taken one at a time: on a CPU two-dimensional
calls are as fast as batched ones, since a client's matrices stay in the cache, and no client's bits depend on the
others that share the call.
"""

from __future__ import annotations

import torch

from fedsim.surrogate.kernels import Kernel, lower_squares, squared_distances

LARGEST_NOISE = 1.0  # as much noise as signal: past it the data are no longer explained by the kernel at all


class Posterior:
    """`K + noise I` of one client's points, factored once and extended when points are added.

    Args:
        kernel: of the process, prior mean 0 and variance 1. noise: variance of the values' noise, in their units.

    Attributes:
        noise: as it is used; it grows tenfold while the matrix is not positive definite to rounding.
        raised: how often it had to grow.
    """

    def __init__(self, kernel: Kernel, noise: float) -> None:
        self.kernel, self.noise, self.raised = kernel, noise, 0
        self.factor: torch.Tensor | None = None
        self._z = torch.empty(0)

    def condition(self, points: torch.Tensor, x: torch.Tensor, known: int = 0) -> None:
        """Take `points [n, dim]` as the data, seen from `x [dim]`; the first `known` are those of the last call."""
        self._z = points - x
        self._norms = (self._z * self._z).sum(dim=1)
        if known and self.factor is not None and self._extended(known):
            return
        self.factor = self.factored(lower_squares(self._z, self._norms))

    def factored(self, squares: torch.Tensor) -> torch.Tensor:
        """Return the factor of `K + noise I` of points with such `lower_squares`, which are overwritten."""
        k = self.kernel.value(squares)
        while True:
            k.fill_diagonal_(1.0 + self.noise)
            factor, info = torch.linalg.cholesky_ex(k)
            if int(info) == 0 or not self.noise < LARGEST_NOISE:  # nor where it is no number
                return factor
            self.noise *= 10.0
            self.raised += 1

    def _extended(self, known: int) -> bool:
        """Append rows to the factor in O(n^2); False where that fails and the whole must be factored again."""
        assert self.factor is not None
        old, new = self._z[:known], self._z[known:]
        if not len(new):
            return True
        cross = self.kernel.value(squared_distances(old, new))
        below = torch.linalg.solve_triangular(self.factor, cross, upper=False)
        own = self.kernel.value(squared_distances(new, new).fill_diagonal_(0.0)).fill_diagonal_(1.0 + self.noise)
        corner, info = torch.linalg.cholesky_ex(own - below.T @ below)
        if int(info):
            return False
        n = len(self._z)
        whole = torch.zeros((n, n), dtype=self._z.dtype)
        whole[:known, :known], whole[known:, :known], whole[known:, known:] = self.factor, below.T, corner
        self.factor = whole
        return True

    def weights(self, values: torch.Tensor) -> torch.Tensor:
        """Return `alpha = (K + noise I)^-1 values` `[n]`."""
        assert self.factor is not None
        return torch.cholesky_solve(values[:, None], self.factor)[:, 0]

    def gradient(self, alpha: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the posterior mean at x, `[dim]`: `sum_t alpha_t q(|x - x_t|) (x_t - x)`."""
        return (self.kernel.slope(self._norms) * alpha) @ self._z

    def trace(self, offsets: torch.Tensor) -> torch.Tensor:
        """Return the trace of the gradient's covariance at `x + offsets [m, dim]`: `[m]`, in O(m n (dim + n)).

        It lies in `[0, kappa dim]`. The largest eigenvalue would not tell candidates apart: it is kappa wherever
        there are fewer points than dimensions.
        """
        assert self.factor is not None
        inverse = torch.cholesky_inverse(self.factor)
        w = self.kernel.slope(squared_distances(offsets, self._z))
        products = offsets @ self._z.T
        wb = w @ inverse
        own = (offsets * offsets).sum(dim=1) * (wb * w).sum(dim=1)
        mixed = (((w * products) @ inverse) * w).sum(dim=1)
        pairs = ((w @ (inverse * (self._z @ self._z.T))) * w).sum(dim=1)
        total = self.kernel.curvature * offsets.shape[1]
        return (total - (own - 2.0 * mixed + pairs)).clamp(0.0, total)


def log_likelihood(kernel: Kernel, squares: torch.Tensor, values: torch.Tensor, noise: float) -> float:
    """Return the log marginal likelihood of `values [n]` at points with such `lower_squares`, without its constant."""
    factor = Posterior(kernel, noise).factored(squares.clone())
    half = torch.linalg.solve_triangular(factor, values[:, None], upper=False)
    return -0.5 * float((half * half).sum()) - float(factor.diagonal().log().sum())
