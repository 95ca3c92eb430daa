"""The sets of gossip rates that a network can afford (Nabli & Oyallon, JMLR 2025, section 4: C1, C2, C3).

Each is `{w = E l : M l <= caps, l >= 0}` over the rates `l` of arcs: an arc is an edge for C1 and C3, and
a directed half of an edge (the node that starts the exchange) for C2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Sparse = Any  # a scipy.sparse.csr_array; scipy brings no types
SetKind = Literal["total", "node_rate", "node_bandwidth"]


@dataclass(frozen=True, eq=False)
class RateSet:
    """A set of affordable rates.

    Attributes:
        kind: `total` (C1: all edges share one budget), `node_rate` (C2: what each node starts),
            `node_bandwidth` (C3: what each node takes part in).
        costs: float64 `[m]`, cost of one exchange on each edge.
        caps: float64 `[K]`, the budget (K = 1), or one cap per node (K = n).
        cover: sparse `[K, A]`, cost of each arc to each cap.
        merge: sparse `[m, A]` of ones, the edge of each arc.
    """

    kind: SetKind
    costs: Vector
    caps: Vector
    cover: Sparse
    merge: Sparse

    @property
    def arcs(self) -> int:
        """Number of arcs A."""
        return self.cover.shape[1]

    def gauge(self, rates: Vector) -> float:
        """Return the least `g` for which `rates` lie in `g` times the set."""
        if self.kind != "node_rate":
            return float(((self.cover @ rates) / self.caps).max())
        return float(self.split(rates)[1])

    def split(self, rates: Vector) -> tuple[Vector, float]:
        """Return arc rates that add up to `rates` with the least gauge, and that gauge."""
        if self.kind != "node_rate":
            return rates, self.gauge(rates)
        if not self.costs.any() or len(rates) > 200_000:
            raise InputError(f"set node_rate: the limit is 200,000 edges, got {len(rates)}; use set node_bandwidth")
        from scipy.optimize import linprog
        from scipy.sparse import csr_array, hstack

        gauge = csr_array(-self.caps[:, None])
        found = linprog(
            np.concatenate([np.zeros(self.arcs), [1.0]]),
            A_ub=hstack([self.cover, gauge]),
            b_ub=np.zeros(len(self.caps)),
            A_eq=hstack([self.merge, csr_array((len(rates), 1))]),
            b_eq=rates,
            method="highs",
        )
        arcs = np.maximum(found.x[:-1], 0)
        return arcs, float(((self.cover @ arcs) / self.caps).max())

    def normalise(self, rates: Vector) -> Vector:
        """Return the largest multiple of `rates` inside the set."""
        return rates / self.gauge(rates)

    def support(self, values: Vector) -> float:
        """Return an upper bound of `max {values . w : w in the set}`, exact to the last digits.

        C1 and C2 in closed form; C3 by the dual linear programme, whose solution is made feasible.
        """
        per_cost = values / self.costs
        if self.kind == "total":
            return float(self.caps[0] * per_cost.max())
        if self.kind == "node_rate":
            best = np.zeros(len(self.caps))
            ends, arc_values = self.cover.tocoo().row, np.concatenate([per_cost, per_cost])
            np.maximum.at(best, ends, arc_values[self.cover.tocoo().col])
            return float(self.caps @ best)
        return self._bandwidth_support(per_cost)

    def _bandwidth_support(self, per_cost: Vector) -> float:
        """`min caps . y` with `y_i + y_j >= v_ij / c_ij`, `y >= 0`."""
        from scipy.optimize import linprog

        ones = (self.cover > 0).astype(float)
        found = linprog(self.caps, A_ub=-ones.T.tocsr(), b_ub=-per_cost, method="highs")
        y = np.maximum(found.x, 0)
        short = max(0.0, float((per_cost - ones.T @ y).max()))
        return float(self.caps @ (y + short / 2))


def rate_set(topology: Topology, kind: SetKind = "total", caps: float | Vector | None = None) -> RateSet:
    """Return the set of rates over a topology's edges, with its costs.

    Args:
        topology: the graph; `topology.costs` weigh every exchange.
        kind: which set (`RateSet`).
        caps: the budget of `total`, or a node's cap: one number, or one per node number (default 1).

    Raises:
        InputError: an unknown kind, caps that are not positive or not as many as nodes, a server.
    """
    if kind not in get_args(SetKind):
        names = get_args(SetKind)
        raise InputError(f"rates: unknown set {kind!r}{did_you_mean(kind, names)}; known are {', '.join(names)}")
    if topology.is_server:
        raise InputError(f"rates of {topology.name!r}: a server has no edges, so no gossip rates")
    costs = np.ones(topology.m) if topology.costs is None else topology.costs
    cover, merge = COVERS[kind](topology, costs)
    return RateSet(kind, costs, _caps(topology, cover.shape[0], caps), cover, merge)


def _caps(topology: Topology, count: int, given: float | Vector | None) -> Vector:
    try:
        caps = np.asarray(1.0 if given is None else given, dtype=float)
    except (TypeError, ValueError):
        raise InputError(f"rates of {topology.name!r}: caps must be numbers, got {given!r}") from None
    if caps.ndim > 1 or (caps.ndim == 1 and len(caps) != count):
        raise InputError(f"rates of {topology.name!r}: caps must be one number or {count}, got shape {caps.shape}")
    if not (np.isfinite(caps).all() and (caps > 0).all()):
        raise InputError(f"rates of {topology.name!r}: caps must be positive numbers, got {given!r}")
    return np.broadcast_to(caps, (count,)).astype(float)


Cover = tuple[Sparse, Sparse]


def _total(topology: Topology, costs: Vector) -> Cover:
    from scipy.sparse import csr_array, eye_array

    return csr_array(costs[None, :]), eye_array(topology.m, format="csr")


def _node_rate(topology: Topology, costs: Vector) -> Cover:
    from scipy.sparse import coo_array, eye_array, hstack

    m = topology.m
    starts = np.concatenate(topology.edges.T)
    cover = coo_array((np.concatenate([costs, costs]), (starts, np.arange(2 * m))), shape=(topology.n, 2 * m))
    return cover.tocsr(), hstack([eye_array(m), eye_array(m)], format="csr")


def _node_bandwidth(topology: Topology, costs: Vector) -> Cover:
    from scipy.sparse import coo_array, eye_array

    m = topology.m
    ends, arcs = np.concatenate(topology.edges.T), np.concatenate([np.arange(m), np.arange(m)])
    cover = coo_array((np.concatenate([costs, costs]), (ends, arcs)), shape=(topology.n, m))
    return cover.tocsr(), eye_array(m, format="csr")


COVERS: dict[str, Callable[[Topology, Vector], Cover]] = {
    "total": _total,
    "node_rate": _node_rate,
    "node_bandwidth": _node_bandwidth,
}
