"""What is handed to cvxpy: the gossip-rate SDP and two optimal mixing matrices, for small graphs."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.topology.certificate import lower_bound, weighted_laplacian
from fedsim.topology.interior_point import Solution
from fedsim.topology.sets import RateSet
from fedsim.topology.spectral import pseudo_inverse
from fedsim.topology.topology import Topology

if TYPE_CHECKING:
    import cvxpy as cp

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
RATES_LIMIT = 60  # nodes of the gossip-rate SDP (34 s at 50 nodes and 85 edges on one core)
MIXING_LIMIT = 60  # nodes of FDLA and fastest mixing (over 100 s at 100 nodes)


def solve(topology: Topology, rates: RateSet) -> Solution:
    """Solve the better form of Nabli & Oyallon (JMLR 2025), Prop. 7, by Clarabel.

    Minimise `g` with `Lap >= t J`, `[[Lap + 11^T/n, I], [I, W]] >= 0`, `b_e^T W b_e <= t`, rates in `g` times
    the set: one matrix inequality of size 2n in place of one per edge, and no variable `u` (whose printed
    bound `u >= 1` is wrong where `chi1 < 2 chi2`).

    Raises:
        InputError: more nodes than cvxpy can handle, or the solver fails.
    """
    import cvxpy as cp

    n, (tails, heads) = topology.n, topology.edges.T
    if n > RATES_LIMIT:
        raise InputError(
            f"rates of {topology.name!r}: cvxpy takes up to {RATES_LIMIT} nodes here, got {n}; "
            "use solver: interior_point"
        )
    arcs, t, g = cp.Variable(rates.arcs, nonneg=True), cp.Variable(), cp.Variable()
    inverse = cp.Variable((n, n), symmetric=True)
    spread = np.full((n, n), 1 / n)
    lap = _laplacian(topology, rates.merge @ arcs)
    resistance = cp.diag(inverse)[tails] + cp.diag(inverse)[heads] - 2 * _entries(inverse, tails, heads)
    connected = lap - t * (np.eye(n) - spread) >> 0
    near = resistance <= t
    affordable = rates.cover @ arcs <= g * rates.caps
    schur = cp.bmat([[lap + spread, np.eye(n)], [np.eye(n), inverse]]) >> 0
    _minimise(cp.Problem(cp.Minimize(g), [connected, near, affordable, schur]), topology.name)
    edges = np.maximum(rates.merge @ np.maximum(_value(arcs), 0), 1e-12 * float(_value(g)))
    pinv = pseudo_inverse(weighted_laplacian(edges, topology))
    bound = lower_bound(topology, rates, _dual(connected), _dual(near), pinv)
    return Solution(edges / rates.gauge(edges), bound)


def fdla(topology: Topology) -> Vector:
    """Return the edge weights `[m]` of the fastest linear averaging, any sign (Xiao & Boyd, 2004, eq. 17)."""
    return _fastest(topology, nonnegative=False)


def fastest_mixing(topology: Topology) -> Vector:
    """Return the edge weights `[m]` of the fastest mixing Markov chain, `W >= 0` (Boyd, Diaconis & Xiao, 2004)."""
    return _fastest(topology, nonnegative=True)


def _fastest(topology: Topology, nonnegative: bool) -> Vector:
    """Minimise the spectral norm of `I - Lap(w) - 11^T/n`."""
    import cvxpy as cp

    n, name = topology.n, "fastest_mixing" if nonnegative else "fdla"
    if n > MIXING_LIMIT:
        raise InputError(
            f"mixing {name}: cvxpy takes up to {MIXING_LIMIT} nodes here, got {n}; "
            "use mixing: {kind: metropolis}, or a matrix of your own with mixing: {file: ...}"
        )
    weights, norm = cp.Variable(topology.m, nonneg=nonnegative), cp.Variable()
    moved = np.eye(n) - 1 / n - _laplacian(topology, weights)
    constraints: list[cp.Constraint] = [moved << norm * np.eye(n), moved >> -norm * np.eye(n)]
    if nonnegative:
        touches = np.abs(_incidence(topology))
        constraints.append(touches @ weights <= 1)
    _minimise(cp.Problem(cp.Minimize(norm), constraints), topology.name)
    return _value(weights)


def _incidence(topology: Topology) -> Any:
    from scipy.sparse import coo_array

    m, (tails, heads) = topology.m, topology.edges.T
    signs = np.concatenate([np.ones(m), -np.ones(m)])
    where = (np.concatenate([tails, heads]), np.concatenate([np.arange(m), np.arange(m)]))
    return coo_array((signs, where), shape=(topology.n, m)).tocsr()


def _laplacian(topology: Topology, weights: cp.Expression) -> cp.Expression:
    """`sum_e w_e b_e b_e^T` as one sparse matrix times the weights."""
    import cvxpy as cp
    from scipy.sparse import csc_array

    n, (u, v) = topology.n, topology.edges.T
    e = np.arange(topology.m)
    places = np.concatenate([u * n + u, v * n + v, u * n + v, v * n + u])
    signs = np.repeat([1.0, 1.0, -1.0, -1.0], topology.m)
    table = csc_array((signs, (places, np.tile(e, 4))), shape=(n * n, topology.m))
    return cp.reshape(table @ weights, (n, n), order="C")


def _entries(matrix: cp.Expression, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> cp.Expression:
    import cvxpy as cp

    return cp.vec(matrix, order="C")[rows * matrix.shape[1] + columns]


def _minimise(problem: cp.Problem, name: str) -> None:
    import cvxpy as cp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an inaccurate end is accepted: the certificate judges it
        try:
            problem.solve(solver=cp.CLARABEL)
        except cp.SolverError as error:
            raise InputError(f"topology {name!r}: Clarabel failed: {error}; use another solver or kind") from None
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise InputError(f"topology {name!r}: Clarabel ended with status {problem.status}")


def _value(variable: cp.Variable) -> Vector:
    return np.asarray(variable.value, dtype=float)


def _dual(constraint: cp.Constraint) -> Matrix:
    return np.asarray(constraint.dual_value, dtype=float)


def installed_solvers() -> list[str]:
    """Return the names of the convex solvers that cvxpy finds."""
    import cvxpy as cp

    return list(cp.installed_solvers())
