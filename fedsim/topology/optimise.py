"""Which solver computes the optimal gossip rates, and prune-and-resolve around it.

All solve the problem of `interior_point`: cvxpy is the check that everything else is held to; the interior
point serves sparse graphs of any size; the surrogate serves dense ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, did_you_mean
from fedsim.topology.schemes import SCHEMES
from fedsim.topology.sets import RateSet, rate_set
from fedsim.topology.topology import Topology

Vector = NDArray[np.float64]
Solver = Literal["auto", "cvxpy", "interior_point", "surrogate"]
CVXPY_NODES = 20  # up to here cvxpy answers within a second
SMALL = 600  # edges up to which the interior point answers within a second or two
PAIRS = 4000  # edges up to which its matrices over pairs of edges fit
DENSE = 8  # edges per node from which the surrogate is the faster one
SURE = 3e-4  # certified gap with which cvxpy's answer is taken
WORK = 2e11  # surrogate steps times n^3: a quarter of an hour or so on one core, where 300 steps would take hours
NODES = 2000  # nodes up to which the SDP is attempted at all


class Answer(NamedTuple):
    """Rates `[m]` inside the set, the certified lower bound of `sqrt(2 chi1 chi2)`, and who computed them."""

    rates: Vector
    bound: float
    solver: str


def check_solver(topology: Topology, solver: str) -> None:
    """Refuse an unknown solver and a graph too large for any."""
    names = get_args(Solver)
    if solver not in names:
        raise InputError(f"rates: unknown solver {solver!r}{did_you_mean(solver, names)}; known are {', '.join(names)}")
    if topology.n > NODES:
        raise InputError(
            f"rates of {topology.name!r}: the SDP needs dense {topology.n} x {topology.n} matrices; the limit is "
            f"{NODES} nodes. Use rates: {{kind: metropolis}}, or rates of your own with rates: {{file: ...}}"
        )
    if solver == "interior_point" and topology.m > 2 * PAIRS:
        raise InputError(
            f"rates of {topology.name!r}: the interior point needs dense {topology.m} x {topology.m} matrices; "
            f"the limit is {2 * PAIRS} edges. Use solver: surrogate"
        )


def optimise(topology: Topology, affordable: RateSet, solver: Solver = "auto", prune: bool = False) -> Answer:
    """Return the rates of least `sqrt(2 chi1 chi2)` over a set, with their certificate.

    `auto`: cvxpy to 20 nodes, followed by the interior point where it fails or certifies little (costs or caps of
    many orders of magnitude); else the interior point; the surrogate on graphs with many edges per node, followed by
    the interior point where its certified gap is not small and the matrices fit.
    """
    from threadpoolctl import threadpool_limits

    check_solver(topology, solver)
    with threadpool_limits(limits=1, user_api="blas"):  # the same digits whatever the number of cores
        answer = _best(topology, affordable, solver)
        return prune_and_resolve(topology, affordable, solver, answer) if prune else answer


def _best(topology: Topology, affordable: RateSet, solver: str) -> Answer:
    """The solver's rates, or a local rule's where that is as good (as on edge-transitive graphs)."""
    answer = _auto(topology, affordable) if solver == "auto" else _by(solver, topology, affordable)
    rules = {name: affordable.normalise(rule(topology)) for name, rule in SCHEMES.items()}
    name = min(rules, key=lambda rule: _required(topology, affordable, rules[rule]))
    if _required(topology, affordable, rules[name]) > _required(topology, affordable, answer.rates) * (1 + 1e-9):
        return answer
    return Answer(rules[name], answer.bound, f"{answer.solver}, equal to {name}")


def _auto(topology: Topology, affordable: RateSet) -> Answer:
    n, m = topology.n, topology.m
    if n <= CVXPY_NODES:
        try:
            first = _by("cvxpy", topology, affordable)
        except InputError:  # Clarabel failed
            return _by("interior_point", topology, affordable)
        return first if _gap(topology, affordable, first) < SURE else _second(topology, affordable, first)
    dense = m > max(SMALL, DENSE * n)
    if not dense and m <= PAIRS:
        return _by("interior_point", topology, affordable)
    first = _by("surrogate", topology, affordable)
    if m > PAIRS or _gap(topology, affordable, first) < 5e-3:
        return first
    return _second(topology, affordable, first)


def _gap(topology: Topology, affordable: RateSet, answer: Answer) -> float:
    return 1 - answer.bound / _required(topology, affordable, answer.rates)


def _second(topology: Topology, affordable: RateSet, first: Answer) -> Answer:
    """The better rates and the better bound of the first solver and the interior point."""
    second = _by("interior_point", topology, affordable)
    better = min((first, second), key=lambda a: _required(topology, affordable, a.rates))
    return better._replace(bound=max(first.bound, second.bound), solver=f"{first.solver}, then interior_point")


def _by(solver: str, topology: Topology, affordable: RateSet) -> Answer:
    if solver == "cvxpy":
        from fedsim.topology import semidefinite

        found = semidefinite.solve(topology, affordable)
        return Answer(found.rates, found.bound, solver)
    if solver == "interior_point":
        from fedsim.topology import interior_point

        found = interior_point.solve(topology, affordable, _tolerance(topology))
        return Answer(found.rates, found.bound, solver)
    from fedsim.topology import surrogate

    steps = max(20, min(300, int(WORK / topology.n**3)))
    smooth = surrogate.minimise(topology, affordable, steps=steps)
    return Answer(affordable.normalise(affordable.merge @ smooth.arcs), smooth.bound, solver)


def _tolerance(topology: Topology) -> float:
    """Certified gap at which to stop: the last digits cost most where a step takes a second."""
    if topology.m <= SMALL and topology.n <= 300:
        return 2e-5
    return 1e-3 if topology.m <= 1500 else 4e-3


def _required(topology: Topology, affordable: RateSet, rates: Vector) -> float:
    from fedsim.topology.interior_point import required

    return required(topology, affordable, rates)


def prune_and_resolve(
    topology: Topology, affordable: RateSet, solver: Solver, answer: Answer, share: float = 0.15
) -> Answer:
    """Drop the smallest `share` of the rates, solve again, keep what is better, else halve the share.

    Fewer edges can need fewer communications: the SDP bounds `chi2` over all edges of the graph, also those
    that hardly fire (a relaxation; Nabli & Oyallon, JMLR 2025, section 4), and an edge left out for good
    leaves that maximum. Equal rates go together and a maximum spanning tree stays. Returns rates `[m]`, 0 where
    dropped, and the certified lower bound for the edges that are left.
    """
    kept, rates = np.arange(topology.m), answer.rates
    value = _required(topology, affordable, rates)
    while share * len(kept) >= 1:
        fewer = _drop(topology, kept, rates[kept], share)
        smaller = _restrict(topology, fewer)
        its_set = rate_set(smaller, affordable.kind, affordable.caps)
        found = _best(smaller, its_set, solver) if len(fewer) < len(kept) else None
        new_value = np.inf if found is None else _required(smaller, its_set, found.rates)
        if found is None or new_value >= value * (1 - 1e-6):
            share /= 2
            continue
        kept, value = fewer, new_value
        rates = np.zeros(topology.m)
        rates[kept] = found.rates
        answer = Answer(rates, found.bound, found.solver)
    return answer


def _restrict(topology: Topology, kept: NDArray[np.int64]) -> Topology:
    costs = None if topology.costs is None else topology.costs[kept]
    name = f"{topology.name} ({len(kept)} edges)"
    return Topology(name, topology.n, topology.edges[kept], topology.order, costs=costs)


def _drop(topology: Topology, kept: NDArray[np.int64], rates: Vector, share: float) -> NDArray[np.int64]:
    """The edges left when the smallest are dropped; ties (to 1e-3) fall together."""
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
