"""A smooth stand-in for `sqrt(2 chi1 chi2)`: p-norms in place of maxima, minimised by L-BFGS.

It starts the interior point, and replaces it beyond some 4,000 edges, where matrices over pairs of edges
no longer fit: an evaluation costs one eigendecomposition `O(n^3)` and `O(m)`. Rates are `exp(theta)`; the
set enters through the p-norm of its gauge, so the objective does not depend on the scale of the rates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.certificate import forms, lower_bound, weighted_laplacian
from fedsim.topology.sets import RateSet
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
WARM = (4.0, 16.0)
FULL = (4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)


@dataclass(frozen=True)
class Smooth:
    """Arc rates inside the set, and the lower bound that the surrogate's own weights certify."""

    arcs: Vector
    bound: float


def minimise(topology: Topology, rates: RateSet, powers: tuple[float, ...] = FULL, steps: int = 200) -> Smooth:
    """Follow the p-norm surrogate through growing powers and return the arcs reached.

    Args:
        topology: the graph, connected.
        rates: the affordable set.
        powers: the p of each stage; the larger, the closer to the true maxima.
        steps: L-BFGS iterations per stage at most.
    """
    from scipy.optimize import minimize

    theta = np.zeros(rates.arcs)
    for power in powers:
        found = minimize(
            _value_and_slope,
            theta,
            args=(topology, rates, power),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": steps, "maxcor": 20},
        )
        theta = found.x - found.x.max()
    arcs = np.exp(theta)
    arcs = arcs / ((rates.cover @ arcs) / rates.caps).max()
    return Smooth(arcs, _bound(topology, rates, arcs, powers))


def _value_and_slope(theta: Vector, topology: Topology, rates: RateSet, power: float) -> tuple[float, Vector]:
    arcs = np.exp(theta - theta.max())
    values, vectors, inverse = decompose(topology, rates.merge @ arcs)
    slow, q = _soft_max(-np.log(values), power)
    resistances = forms(inverse, topology)
    far, r = _soft_max(np.log(resistances), power)
    load = (rates.cover @ arcs) / rates.caps
    heavy, k = _soft_max(np.log(load), power)
    by_edge = -0.5 * forms((vectors * (q / values)) @ vectors.T, topology)
    lap = weighted_laplacian(r / resistances, topology)
    by_edge -= 0.5 * forms(inverse @ lap @ inverse, topology)
    slope = rates.merge.T @ by_edge + rates.cover.T @ (k / load / rates.caps)
    return 0.5 * slow + 0.5 * far + heavy, slope * arcs


def decompose(topology: Topology, weights: Vector) -> tuple[Vector, NDArray[np.float64], NDArray[np.float64]]:
    """Return positive eigenvalues `[n-1]`, their vectors `[n, n-1]` and the pseudo-inverse of the Laplacian."""
    from scipy.linalg import eigh

    values, vectors = eigh(weighted_laplacian(weights, topology), driver="evd", check_finite=False)
    values, vectors = np.maximum(values[1:], 1e-300), vectors[:, 1:]
    return values, vectors, (vectors / values) @ vectors.T


def _soft_max(logs: Vector, power: float) -> tuple[float, Vector]:
    """`(1/p) log sum exp(p logs)` and its weights."""
    top = logs.max()
    weights = np.exp(power * (logs - top))
    total = weights.sum()
    return float(top + np.log(total) / power), weights / total


def _bound(topology: Topology, rates: RateSet, arcs: Vector, powers: tuple[float, ...]) -> float:
    """The best certificate among the weights that the powers give at the end point."""
    values, vectors, inverse = decompose(topology, rates.merge @ arcs)
    resistances = forms(inverse, topology)
    bounds = []
    for power in powers:
        _, q = _soft_max(-np.log(values), power)
        _, r = _soft_max(np.log(resistances), power)
        bounds.append(lower_bound(topology, rates, (vectors * q) @ vectors.T, r, inverse))
    return max(bounds)
