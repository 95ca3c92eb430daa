"""A lower bound of `sqrt(2 chi1 chi2)` over all affordable rates, from any dual guess.

For PSD `Q` of trace 1 with `Q 1 = 0` and probabilities `p` on edges, let `a_e = b_e^T Q b_e`,
`d_e = b_e^T P Lap(p) P b_e` and `rho = sum_f p_f b_f^T P b_f` with `P` the pseudo-inverse of some
Laplacian. Every affordable `w` then has `lambda_2(w) <= a . w` and `max_e R_e(w) >= 2 rho - d . w` scaled,
so `sqrt(2 chi1 chi2) >= 2 rho / h(s a + d / s)` for every `s > 0`, `h` the support function of the set.
The bound needs no trust in the solver that made `Q`, `p` and `P`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.sets import RateSet
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


def forms(matrix: Matrix, topology: Topology) -> Vector:
    """Return `b_e^T matrix b_e` of every edge `[m]`, `matrix` symmetric `[n, n]`."""
    u, v = topology.edges.T
    diagonal = matrix.diagonal()
    return diagonal[u] + diagonal[v] - 2 * matrix[u, v]


def weighted_laplacian(weights: Vector, topology: Topology) -> Matrix:
    """Return the dense Laplacian `[n, n]` of edge weights `[m]`."""
    n = topology.n
    u, v = topology.edges.T
    matrix = np.zeros((n, n))
    matrix[u, v] = matrix[v, u] = -weights
    matrix[np.diag_indices(n)] = np.bincount(u, weights, n) + np.bincount(v, weights, n)
    return matrix


def lower_bound(topology: Topology, rates: RateSet, q: Matrix, p: Vector, inverse: Matrix) -> float:
    """Return the bound for dual guesses `q` `[n, n]` (PSD), `p` `[m]` (>= 0) and `inverse` (some `Lam^+`).

    `q` is projected on the zero-sum subspace and `q`, `p` are normalised here.
    """
    centred = _centre(_centre(0.5 * (q + q.T)).T)
    centred = _positive_part(centred)
    a = forms(centred, topology) / np.trace(centred)
    weights = np.maximum(p, 0)
    weights = weights / weights.sum()
    d = forms(inverse @ weighted_laplacian(weights, topology) @ inverse, topology)
    rho = float(weights @ forms(inverse, topology))
    return 2 * rho / _least(lambda s: rates.support(s * a + d / s), np.sqrt(d.max() / a.max()))


def _centre(matrix: Matrix) -> Matrix:
    return matrix - matrix.mean(axis=0)


def _positive_part(matrix: Matrix) -> Matrix:
    """Drop negative eigenvalues, which rounding may leave."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, 0)) @ vectors.T


def _least(function, near: float) -> float:
    """Minimise a quasi-convex function of `s > 0` by golden section in `log s` around `near`."""
    ratio = (np.sqrt(5) - 1) / 2
    low, high = np.log(near) - 4, np.log(near) + 4
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(np.exp(left)), function(np.exp(right))
    while high - low > 1e-5:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(np.exp(left))
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(np.exp(right))
    return float(min(at_left, at_right))
