"""Optimal gossip rates by a primal-dual interior point, for graphs too large for a general SDP solver.

The problem (the better form of Nabli & Oyallon, JMLR 2025, Prop. 7, with the same optimum): arc rates
`l`, scalars `t`, `g`,

    minimise g   subject to   Lap(E l) >= t J,   R_e(E l) <= t for every edge,   M l <= g caps,   l >= 0,

`J = I - 11^T/n`. Duals: `Y` (PSD), `p`, `y`, `z`. The optimum is `g = sqrt(2 chi1 chi2)`, the rates
`E l / g`. With `X = (Lap - tJ)^+`, `P = Lap^+`, `K_X = B^T X B` and slack `s = t - R`, the Newton matrix over edges is

    H = K_X o K_Y + 2 K_P o (B^T P Lap(p) P B) + S diag(p/s) S,   S = K_P o K_P

(`o` entrywise; HKM direction), plus what the set adds. Everything is dense: O(m^3 + n^3) a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.certificate import forms, lower_bound, weighted_laplacian
from fedsim.topology.sets import RateSet
from fedsim.topology.spectral import pseudo_inverse
from fedsim.topology.surrogate import WARM, minimise
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
STEPS = 60


@dataclass(frozen=True)
class Solution:
    """Rates `[m]` inside the set, the certified lower bound of the optimum."""

    rates: Vector
    bound: float


def solve(topology: Topology, rates: RateSet, tolerance: float) -> Solution:
    """Minimise `sqrt(2 chi1 chi2)` over the set to a certified relative gap.

    Stops at the gap `tolerance`, when steps no longer gain, or when rounding leaves a matrix that cannot be
    factorised; the returned bound says how far it came.
    """
    point = _start(topology, rates)
    best, bound, stalled = _Best(topology, rates), 0.0, 0
    best.offer(rates.merge @ point.l)
    for _ in range(STEPS):
        try:
            moved = point.step()
        except np.linalg.LinAlgError:
            break
        stalled = stalled + 1 if moved < 1e-3 else 0
        best.offer(rates.merge @ point.l)
        if point.gap < 3 * tolerance or stalled:
            bound = max(bound, point.bound())
            if best.value - bound < tolerance * best.value:
                break
        if stalled > 2:
            break
    return Solution(best.rates, max(bound, point.bound()))


class _Best:
    """The best rates seen, by their true value."""

    def __init__(self, topology: Topology, rates: RateSet) -> None:
        self.topology, self.set = topology, rates
        self.value, self.rates = np.inf, np.ones(topology.m)

    def offer(self, edges: Vector) -> None:
        value = required(self.topology, self.set, edges)
        if value < self.value:
            self.value, self.rates = value, edges / self.set.gauge(edges)


def required(topology: Topology, rates: RateSet, edges: Vector) -> float:
    """Return `sqrt(2 chi1 chi2)` of edge rates once scaled into the set; every edge of the graph counts."""
    laplacian = weighted_laplacian(edges, topology)
    second = np.linalg.eigvalsh(laplacian)[1]
    if second <= 0:
        return np.inf
    resistance = forms(pseudo_inverse(laplacian), topology).max()
    return float(np.sqrt(resistance / second)) * rates.gauge(edges)


def _start(topology: Topology, rates: RateSet) -> _Point:
    """A strictly feasible point: some steps of the surrogate, mixed with equal rates."""
    arcs = minimise(topology, rates, WARM, steps=30, certify=False).arcs
    arcs = 0.9 * arcs + 0.1 * arcs.mean()
    edges = rates.merge @ arcs
    laplacian = weighted_laplacian(edges, topology)
    second = np.linalg.eigvalsh(laplacian)[1]
    resistance = forms(pseudo_inverse(laplacian), topology).max()
    scale = 1.1 * np.sqrt(resistance / second)
    load = ((rates.cover @ arcs) / rates.caps).max()
    return _Point(topology, rates, scale * arcs, float(np.sqrt(second * resistance)), 1.1 * scale * load)


class _Point:
    """A strictly feasible primal point with positive duals, and one Newton step from it."""

    def __init__(self, topology: Topology, rates: RateSet, l: Vector, t: float, g: float) -> None:
        self.topology, self.set = topology, rates
        self.u, self.v = topology.edges.T
        self.l, self.t, self.g = l, t, g
        self._evaluate()
        mu = 1 / (rates.caps / self.q).sum()
        self.Y, self.p, self.z, self.y = mu * self.X, mu / self.s, mu / l, mu / self.q
        self.last = 1.0

    def _evaluate(self) -> None:
        """Slacks and inverses at (l, t, g)."""
        n = self.topology.n
        self.lap = weighted_laplacian(self.set.merge @ self.l, self.topology)
        self.P = pseudo_inverse(self.lap)
        self.S1 = self.lap - self.t * (np.eye(n) - 1 / n)
        self.X = pseudo_inverse(self.S1)
        self.s = self.t - forms(self.P, self.topology)
        self.q = self.g * self.set.caps - self.set.cover @ self.l

    @property
    def complementarity(self) -> float:
        """`<Y, S1> + p.s + z.l + y.q`, which is the duality gap once the duals are feasible."""
        return float((self.Y * self.S1).sum() + self.p @ self.s + self.z @ self.l + self.y @ self.q)

    @property
    def gap(self) -> float:
        """Relative duality gap, not certified."""
        return self.complementarity / self.g

    def bound(self) -> float:
        """Certified lower bound from the present duals."""
        return lower_bound(self.topology, self.set, self.Y, self.p, self.P)

    def step(self) -> float:
        """Move towards the central path; return the smaller of the primal and dual step lengths."""
        size = self.topology.n - 1 + len(self.p) + len(self.z) + len(self.y)
        centring = min(0.8, max(0.1, 1 - self.last))  # short steps ask for more centring
        mu = centring * self.complementarity / size
        d = _Direction(self, mu)
        primal = self._primal_step(d)
        dual = self._dual_step(d)
        self.last = min(primal, dual)
        return self.last

    def _primal_step(self, d: _Direction) -> float:
        length = min(1.0, 0.95 * _room(self.l, d.l), 0.95 * _room(self.q, d.q), 0.95 * _room(self.s, d.s))
        length = min(length, 0.95 * _room_psd(self.S1, d.S1))
        old, slack = (self.l, self.t, self.g), self.s
        while True:
            self.l, self.t, self.g = old[0] + length * d.l, old[1] + length * d.t, old[2] + length * d.g
            try:
                self._evaluate()
            except np.linalg.LinAlgError:
                self.s = -slack
            if (self.s > 0.02 * slack).all() or length < 1e-12:
                return length
            length *= 0.8

    def _dual_step(self, d: _Direction) -> float:
        length = min(1.0, *(0.95 * _room(x, dx) for x, dx in ((self.z, d.z), (self.y, d.y), (self.p, d.p))))
        length = min(length, 0.95 * _room_psd(self.Y, d.Y))
        self.Y = self.Y + length * d.Y
        self.p, self.z, self.y = self.p + length * d.p, self.z + length * d.z, self.y + length * d.y
        return length


class _Direction:
    """Newton's direction for complementarity products equal to `mu`."""

    def __init__(self, at: _Point, mu: float) -> None:
        self.at, self.mu = at, mu
        XY = at.X @ at.Y
        K_P = _gram(at.P, at)
        self.S = K_P**2
        self.kappa = forms(0.5 * (XY + XY.T), at.topology)
        self.tau = float(np.trace(XY) + (at.p / at.s).sum())
        self.h = self.kappa - self.S @ (at.p / at.s)
        self.g0 = mu * (forms(at.X, at.topology) + self.S @ (1 / at.s))
        self._solve(self._newton_matrix(K_P))
        self._rest(XY)

    def _newton_matrix(self, K_P: Matrix) -> Matrix:
        """`H`, built in place: three matrices over pairs of edges are alive at once."""
        from scipy.linalg import get_blas_funcs

        at = self.at
        (square,) = get_blas_funcs(("syrk",), (K_P,))
        H = square(1.0, (self.S * np.sqrt(at.p / at.s)).T, trans=1, lower=0)
        K_P *= 2 * _gram(at.P @ weighted_laplacian(at.p, at.topology) @ at.P, at)
        H += K_P
        K_X = _gram(at.X, at)
        K_X *= _gram(at.Y, at)
        H += K_X
        return H

    def _solve(self, H: Matrix) -> None:
        """Eliminate the edges by Cholesky, then solve for the caps' duals, `t` and `g`."""
        from scipy.linalg import cho_factor, cho_solve

        at, mu, cover, merge = self.at, self.mu, self.at.set.cover, self.at.set.merge
        D = at.l / at.z
        delta = merge @ D
        C = ((cover * D) @ merge.T) / delta
        N = ((cover * D) @ cover.T).toarray() - (C * delta) @ C.T
        C = C.toarray()
        pull = merge @ (D * (mu / at.l))
        u0 = cover @ (D * mu / at.l) - C @ pull
        H[np.diag_indices(len(H))] += 1 / delta
        factor = cho_factor(H, lower=False, overwrite_a=True, check_finite=False)
        solved = cho_solve(factor, np.column_stack([pull / delta + self.g0, self.h, C.T]), check_finite=False)
        r, h, c = solved[:, 0], solved[:, 1], solved[:, 2:]
        K, caps = len(at.y), at.set.caps
        small = np.zeros((K + 2, K + 2))
        small[:K, :K] = np.diag(at.q / at.y) + N + C @ c
        small[:K, K] = -(C @ h)
        small[K, :K] = -(C @ h)
        small[K, K] = self.h @ h - self.tau
        small[:K, K + 1] = small[K + 1, :K] = caps
        trace = mu * (np.trace(at.X) - (1 / at.s).sum())
        right = np.concatenate([mu / at.y + u0 + C @ r, [trace - self.h @ r, 1.0]])
        found = np.linalg.solve(small, right)
        dual, self.t, self.g = found[:K], float(found[K]), float(found[K + 1])
        self.w = r - c @ dual + self.t * h
        lam = (self.w - pull + merge @ (D * (cover.T @ dual))) / delta
        self.l = D * (mu / at.l - cover.T @ dual + merge.T @ lam)
        self.y = dual - at.y

    def _rest(self, XY: Matrix) -> None:
        """The eliminated directions."""
        at, mu, n = self.at, self.mu, self.at.topology.n
        self.S1 = weighted_laplacian(self.w, at.topology) - self.t * (np.eye(n) - 1 / n)
        bent = at.X @ self.S1 @ at.Y
        self.Y = mu * at.X - at.Y - 0.5 * (bent + bent.T)
        self.s = self.t + self.S @ self.w
        self.p = mu / at.s - at.p - (at.p / at.s) * self.s
        self.z = mu / at.l - at.z - (at.z / at.l) * self.l
        self.q = self.g * at.set.caps - at.set.cover @ self.l


def _gram(matrix: Matrix, at: _Point) -> Matrix:
    """`B^T matrix B` over pairs of edges `[m, m]`."""
    half = matrix[at.u] - matrix[at.v]
    across = half.T
    return across[at.u] - across[at.v]


def _room(x: Vector, dx: Vector) -> float:
    """The longest step that keeps `x` positive."""
    shrinking = dx < 0
    return float((-x[shrinking] / dx[shrinking]).min()) if shrinking.any() else np.inf


def _room_psd(matrix: Matrix, change: Matrix) -> float:
    """The longest step that keeps a matrix PSD on the zero-sum subspace."""
    from scipy.linalg import cholesky, eigh, solve_triangular

    n = len(matrix)
    shift = np.trace(matrix) / n / n
    lower = cholesky(matrix + shift, lower=True, check_finite=False)
    half = solve_triangular(lower, change, lower=True, check_finite=False)
    least = eigh(
        solve_triangular(lower, half.T, lower=True, check_finite=False), eigvals_only=True, subset_by_index=(0, 0)
    )[0]
    return -1 / least if least < 0 else np.inf
