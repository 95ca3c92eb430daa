"""Quadratics, given or random, and averaging."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.problems.compiled import GRADIENT, LOSS, CompiledProblem, dot
from fedsim.problems.problem import Nodes


@njit(GRADIENT, cache=True)
def _gradient(slot, x, indices, weights, reals, ints, scratch, out):  # pragma: no cover - compiled
    d, n, wide = ints[0], ints[1], ints[2]
    node = ints[3 + slot]
    centre = n * wide + node * d
    for c in range(d):
        scratch[c] = x[c] - reals[centre + c]
    if wide == d:
        for c in range(d):
            out[c] = reals[node * d + c] * scratch[c]
    else:
        for c in range(d):
            out[c] = dot(reals, node * wide + c * d, scratch, 0, d)


@njit(LOSS, cache=True)
def _loss(slot, x, reals, ints, scratch):  # pragma: no cover - compiled
    d, n, wide = ints[0], ints[1], ints[2]
    node = ints[3 + slot]
    centre = n * wide + node * d
    for c in range(d):
        scratch[c] = x[c] - reals[centre + c]
    value = 0.0
    for c in range(d):
        row = reals[node * d + c] * scratch[c] if wide == d else dot(reals, node * wide + c * d, scratch, 0, d)
        value += row * scratch[c]
    return 0.5 * value


class Quadratic(CompiledProblem):
    """`f_i(x) = (1/2) (x - b_i)' A_i (x - b_i)`.

    Args:
        curvature: `[n, dim]` diagonals, or symmetric `[n, dim, dim]`.
        centre: `[n, dim]`, the `b_i`.
        extremes: `[n, 2]` least and largest eigenvalue of each `A_i`, where they are known.

    Raises:
        InputError: shapes that do not fit, a number that is not finite, or a curvature that is not symmetric or not
            positive definite.
    """

    kind = "quadratic"
    _gradient, _loss = staticmethod(_gradient), staticmethod(_loss)

    def __init__(
        self,
        curvature: NDArray[np.float64],
        centre: NDArray[np.float64],
        extremes: NDArray[np.float64] | None = None,
    ) -> None:
        self.n, self.dim = centre.shape
        if curvature.shape not in ((self.n, self.dim), (self.n, self.dim, self.dim)):
            raise InputError(f"problem {self.kind}: curvatures {curvature.shape} and centres {centre.shape} do not fit")
        self.diagonal = curvature.ndim == 2
        self._refuse_unusable(curvature, centre)
        self.records = np.zeros(self.n, dtype=np.int64)
        self._curvature, self._centre, self._scratch = curvature, centre, self.dim
        self._reals = np.concatenate([curvature.ravel(), centre.ravel()])
        self._ints = np.concatenate([[self.dim, self.n, curvature[0].size], np.arange(self.n)]).astype(np.int64)
        if extremes is None:
            values = np.sort(curvature, axis=1) if self.diagonal else np.linalg.eigvalsh(curvature)
            extremes = np.asarray(values[:, [0, -1]], dtype=np.float64)
        self.mu, self.L = least, _ = np.ascontiguousarray(extremes.T)
        if not (least > 0).all():
            node = int(np.argmin(least))
            raise InputError(
                f"problem {self.kind}: node {node}'s curvature has the eigenvalue {least[node]:g}; > 0 needed"
            )

    def _refuse_unusable(self, curvature: NDArray[np.float64], centre: NDArray[np.float64]) -> None:
        for name, values in (("curvature", curvature), ("centre", centre)):
            if not np.isfinite(values).all():
                node = int(np.argmin(np.isfinite(values).reshape(self.n, -1).all(axis=1)))
                raise InputError(f"problem {self.kind}: node {node}'s {name} holds NaN or infinity; numbers needed")
        if not self.diagonal:
            gap = np.abs(curvature - curvature.transpose(0, 2, 1)).max(axis=(1, 2))
            if (gap > 1e-12 * np.abs(curvature).max(axis=(1, 2))).any():
                raise InputError(f"problem {self.kind}: node {int(gap.argmax())}'s curvature is not symmetric")

    def optimum(self) -> torch.Tensor:
        """Return the solution of `sum_i A_i (x - b_i) = 0`."""
        a, b = self._curvature, self._centre
        if self.diagonal:
            return torch.from_numpy((a * b).sum(axis=0) / a.sum(axis=0))
        return torch.from_numpy(np.linalg.solve(a.sum(axis=0), np.einsum("nij,nj->i", a, b)))

    def dual_gradient(self, s: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `b_i + A_i^{-1} s_i`."""
        own, centre = self._curvature[nodes], torch.from_numpy(self._centre[nodes])
        if self.diagonal:
            return centre + s / torch.from_numpy(own)
        inverse = torch.from_numpy(np.stack([np.linalg.inv(a) for a in own]))
        return centre + (inverse * s[:, None, :]).sum(dim=2)

    def start(self, nodes: Nodes) -> torch.Tensor | None:
        """Return the nodes' own minimisers, `[rows, dim]`."""
        return torch.from_numpy(self._centre[nodes].copy())


class Consensus(Quadratic):
    """`f_i(x) = ||x - b_i||^2 / 2`; the optimum is the mean of the `b_i` `[n, dim]`."""

    kind = "consensus"

    def __init__(self, values: NDArray[np.float64]) -> None:
        super().__init__(np.ones_like(values), values, np.ones((len(values), 2)))


def random_quadratic(
    n: int, dim: int, condition: float, heterogeneity: float, diagonal: bool, rng: np.random.Generator
) -> Quadratic:
    """Return quadratics with eigenvalues spread evenly in the logarithm from 1 to `condition` on every node.

    Diagonal ones have them in a random order, full ones in a random orthonormal basis, of each node's own. With
    `dim = 1` the nodes' curvatures are spread so, in a random order.
    """
    centre = heterogeneity * rng.standard_normal((n, dim))
    if dim == 1:
        return Quadratic(rng.permutation(np.geomspace(1.0, condition, n))[:, None], centre)
    values = np.geomspace(1.0, condition, dim)
    extremes = np.repeat([[values[0], values[-1]]], n, axis=0)
    if diagonal:
        return Quadratic(rng.permuted(np.broadcast_to(values, (n, dim)).copy(), axis=1), centre, extremes)
    basis = np.linalg.qr(rng.standard_normal((n, dim, dim)))[0]
    curvature = np.einsum("nik,k,njk->nij", basis, values, basis)
    return Quadratic((curvature + curvature.transpose(0, 2, 1)) / 2, centre, extremes)
