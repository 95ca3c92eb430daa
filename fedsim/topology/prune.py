"""Prune-and-resolve: fewer edges can need fewer communications.

The SDP bounds `chi2` over all edges of the graph, also over those that hardly fire (a relaxation: section 4
of Nabli & Oyallon, JMLR 2025). Leaving edges out for good removes their resistances from the maximum.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fedsim.topology.interior_point import required
from fedsim.topology.sets import RateSet, rate_set
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Solve = Callable[[Topology, RateSet], tuple[Vector, float]]


def prune_and_resolve(
    topology: Topology, affordable: RateSet, solve: Solve, rates: Vector, bound: float, share: float = 0.15
) -> tuple[Vector, float]:
    """Drop the smallest `share` of the rates, solve again, keep what is better, else halve the share.

    Equal rates go together, and a maximum spanning tree stays. Returns rates `[m]` (0 where dropped) and the
    certified lower bound for the edges that are left.
    """
    kept = np.arange(topology.m)
    value = required(topology, affordable, rates)
    while share * len(kept) >= 1:
        fewer = _drop(topology, kept, rates[kept], share)
        if len(fewer) == len(kept):
            share /= 2
            continue
        smaller = _restrict(topology, fewer)
        its_set = rate_set(smaller, affordable.kind, affordable.caps)
        new_rates, new_bound = solve(smaller, its_set)
        new_value = required(smaller, its_set, new_rates)
        if new_value >= value * (1 - 1e-6):
            share /= 2
            continue
        kept, value, bound = fewer, new_value, new_bound
        rates = np.zeros(topology.m)
        rates[kept] = new_rates
    return rates, bound


def _restrict(topology: Topology, kept: NDArray[np.int64]) -> Topology:
    costs = None if topology.costs is None else topology.costs[kept]
    name = f"{topology.name} ({len(kept)} edges)"
    return Topology(name, topology.n, topology.edges[kept], topology.order, costs=costs)


def _drop(topology: Topology, kept: NDArray[np.int64], rates: Vector, share: float) -> NDArray[np.int64]:
    """The edges left when the smallest are dropped; ties (to 1e-3) fall together, whole or not at all."""
    protected = _spanning_tree(topology, kept, rates)
    loose = np.sort(rates[~protected])
    count = int(share * len(kept))
    if count < 1 or not len(loose):
        return kept
    limit = loose[min(count, len(loose)) - 1] * (1 + 1e-3)
    return kept[protected | (rates > limit)]


def _spanning_tree(topology: Topology, kept: NDArray[np.int64], rates: Vector) -> NDArray[np.bool_]:
    """Which of the kept edges are in a maximum spanning tree by rate."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    u, v = topology.edges[kept].T
    place = np.empty(len(kept))
    place[np.argsort(-rates, kind="stable")] = np.arange(1, len(kept) + 1)
    tree = minimum_spanning_tree(coo_array((place, (u, v)), shape=(topology.n, topology.n)).tocsr())
    return np.isin(place, tree.data)
