"""A smooth stand-in for `sqrt(2 chi1 chi2)`: p-norms in place of maxima, minimised by L-BFGS.

An evaluation costs one eigendecomposition `O(n^3)` and `O(m)`: it starts the interior point, and replaces it
on graphs with many edges per node, where matrices over pairs of edges are dear or no longer fit. The set
enters through the p-norm of its gauge, so the objective does not depend on the scale of the rates.

Where `p` is moderate the weights of the p-norms are the dual optimum of a nearby problem, so every stage
certifies a lower bound. This needs the rates themselves as variables, bounded below: in `log` variables
(softmax) a rate near zero hardly moves, the weights stay far from dual feasible, and bounds are 30 % off.
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
FLOOR = 1e-9  # least rate of an arc, in units of their mean
FULL = (4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0)


@dataclass(frozen=True)
class Smooth:
    """Arc rates inside the set, and the best lower bound that the stages' weights certify."""

    arcs: Vector
    bound: float


def minimise(
    topology: Topology, rates: RateSet, powers: tuple[float, ...] = FULL, steps: int = 300, certify: bool = True
) -> Smooth:
    """Follow the p-norm surrogate through growing powers and return the arcs reached.

    Args:
        topology: the graph, connected.
        rates: the affordable set.
        powers: the p of each stage; the larger, the closer to the true maxima.
        steps: L-BFGS iterations per stage at most.
        certify: also compute the lower bound (else it is 0).
    """
    from scipy.optimize import minimize

    arcs, bound = np.ones(rates.arcs), 0.0
    for power in powers:
        found = minimize(
            _value_and_slope,
            arcs,
            args=(topology, rates, power),
            jac=True,
            method="L-BFGS-B",
            bounds=[(FLOOR, None)] * rates.arcs,
            options={"maxiter": steps, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-9},
        )
        arcs = np.maximum(found.x / found.x.mean(), FLOOR)
        bound = max(bound, _bound(topology, rates, arcs, power)) if certify else bound
    return Smooth(arcs / ((rates.cover @ arcs) / rates.caps).max(), bound)


def _value_and_slope(arcs: Vector, topology: Topology, rates: RateSet, power: float) -> tuple[float, Vector]:
    values, vectors, inverse = decompose(topology, rates.merge @ arcs)
    slow, q = _soft_max(-np.log(values), power)
    resistances = forms(inverse, topology)
    far, r = _soft_max(np.log(resistances), power)
    load = (rates.cover @ arcs) / rates.caps
    heavy, k = _soft_max(np.log(load), power)
    by_edge = -0.5 * forms((vectors * (q / values)) @ vectors.T, topology)
    lap = weighted_laplacian(r / resistances, topology)
    by_edge -= 0.5 * forms(inverse @ lap @ inverse, topology)
    return 0.5 * slow + 0.5 * far + heavy, rates.merge.T @ by_edge + rates.cover.T @ (k / load / rates.caps)


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


def _bound(topology: Topology, rates: RateSet, arcs: Vector, power: float) -> float:
    """The certificate that the p-norms' own weights give at the end of a stage."""
    values, vectors, inverse = decompose(topology, rates.merge @ arcs)
    _, q = _soft_max(-np.log(values), power)
    _, r = _soft_max(np.log(forms(inverse, topology)), power)
    return lower_bound(topology, rates, (vectors * q) @ vectors.T, r, inverse)
