"""The exact balanced assignment: the largest total score under equal loads, with a proof by duality.

    max sum gamma_ik x_ik,  sum_k x_ik = K,  floor(L) <= sum_i x_ik <= ceil(L),  x in {0, 1},   L = K T / E

A dual point found by subgradient steps gives an assignment that is optimal for its own loads; shortest augmenting paths
in the graph of experts (an edge k -> k' costs the smallest loss of moving one token) then make the loads exact, each
path keeping the assignment optimal for its loads. The potentials of the last paths are dual prices whose bound is met.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import RunError
from fedsim.moe.selection import select

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Assignment(NamedTuple):
    """An optimum and its proof.

    Attributes:
        value: total score of the assignment. bound: the dual value at `prices`, an upper bound of every assignment.
        prices: `[E]`, zero mean: the optimal biases. chosen: bool `[T, E]`. loads: int64 `[E]`.
    """

    value: float
    bound: float
    prices: Floats
    chosen: NDArray[np.bool_]
    loads: Ints


def dual_value(biased: float, bias: Floats, tokens: int, top_k: int) -> float:
    """Return `D(p)` from `sum_i (K largest of gamma + p)`: an upper bound of the optimum for every p.

    Where E does not divide K T, loads are between floor and ceil of L, and the bound allows for it.
    """
    low, extra = divmod(tokens * top_k, len(bias))
    return float(biased - low * bias.sum() - np.sort(bias)[:extra].sum())


def exact_assignment(scores: NDArray, top_k: int, rounds: int = 200) -> Assignment:
    """Return the assignment of largest total score with balanced loads.

    Args:
        scores: `[T, E]`. rounds: subgradient steps before the paths; more steps, fewer paths.

    Raises:
        RunError: the bound is not met to 1e-9: rounding spoiled the proof.
    """
    gamma = np.ascontiguousarray(scores, dtype=np.float64)
    bias = _warm(gamma, top_k, rounds)
    low, extra = divmod(len(gamma) * top_k, gamma.shape[1])
    chosen = np.zeros(gamma.shape, np.bool_)
    np.put_along_axis(chosen, select(gamma, bias, top_k).experts, True, axis=1)
    pooled = np.zeros(gamma.shape[1], np.bool_)
    pooled[np.argsort(bias, kind="stable")[:extra]] = True
    prices = _paths(gamma, chosen, pooled, low)
    prices -= prices.mean()
    value = float(gamma[chosen].sum())
    bound = dual_value(select(gamma, prices, top_k).biased, prices, len(gamma), top_k)
    if not abs(bound - value) <= 1e-9 * max(1.0, abs(value)):
        raise RunError(f"exact assignment: value {value!r} and bound {bound!r} differ; this is a mistake of fedsim")
    return Assignment(value, bound, prices, chosen, chosen.sum(axis=0))


def _warm(gamma: Floats, top_k: int, rounds: int) -> Floats:
    """Return biases near the dual optimum: relative steps `spread / sqrt(n)`, the best point seen."""
    bias, best, least = np.zeros(gamma.shape[1]), np.zeros(gamma.shape[1]), np.inf
    target, step = len(gamma) * top_k / gamma.shape[1], 0.5 * float(gamma.std())
    for n in range(1, rounds + 1):
        found = select(gamma, bias, top_k)
        value = found.biased - target * bias.sum()
        if value < least:
            best, least = bias.copy(), value
        if (found.loads == target).all():
            break
        bias = bias + step / n**0.5 * (target - found.loads) / max(target, 1.0)
    return best


@njit(cache=True)
def _cheapest(gamma, chosen, k, cost, token):  # pragma: no cover - compiled
    """Write the smallest loss of moving one token from k to each other expert, and which token."""
    experts = gamma.shape[1]
    for other in range(experts):
        cost[k, other], token[k, other] = np.inf, -1
    for i in range(gamma.shape[0]):
        if chosen[i, k]:
            for other in range(experts):
                loss = gamma[i, k] - gamma[i, other]
                if loss < cost[k, other] and not chosen[i, other]:
                    cost[k, other], token[k, other] = loss, i


@njit(cache=True)
def _gained(gamma, chosen, i, k, cost, token):  # pragma: no cover - compiled
    """Account for a token that k has received: new moves out of k."""
    for other in range(gamma.shape[1]):
        loss = gamma[i, k] - gamma[i, other]
        if not chosen[i, other] and loss < cost[k, other]:
            cost[k, other], token[k, other] = loss, i


@njit(cache=True)
def _bellman(cost, pooled, sources, distance, before):  # pragma: no cover - compiled
    """Shortest distances from the sources; node E is the pool that lends one place beyond floor(L)."""
    experts = len(pooled)
    for k in range(experts + 1):
        distance[k], before[k] = (0.0 if sources[k] else np.inf), -1
    changed, sweeps = True, 0
    while changed and sweeps <= 2 * experts:
        changed, sweeps = False, sweeps + 1
        for k in range(experts + 1):
            if distance[k] == np.inf:
                continue
            for other in range(experts + 1):
                if k == other:
                    continue
                if k == experts:
                    step = 0.0 if pooled[other] else np.inf
                elif other == experts:
                    step = np.inf if pooled[k] else 0.0
                else:
                    step = cost[k, other]
                if distance[k] + step < distance[other] - 1e-15:
                    distance[other], before[other] = distance[k] + step, k
                    changed = True


@njit(cache=True)
def _paths(gamma, chosen, pooled, low):  # pragma: no cover - compiled
    """Move tokens along shortest paths until every load is `low`, or `low + 1` where pooled; return the prices."""
    experts = gamma.shape[1]
    cost, token = np.full((experts, experts), np.inf), np.full((experts, experts), -1)
    for k in range(experts):
        _cheapest(gamma, chosen, k, cost, token)
    loads = chosen.sum(axis=0)
    distance, before = np.empty(experts + 1), np.empty(experts + 1, np.int64)
    sources = np.zeros(experts + 1, np.bool_)
    while True:
        for k in range(experts):
            sources[k] = loads[k] - low - pooled[k] > 0
        if not sources.any():
            break
        _bellman(cost, pooled, sources, distance, before)
        end, least = -1, np.inf
        for k in range(experts):
            if loads[k] - low - pooled[k] < 0 and distance[k] < least:
                end, least = k, distance[k]
        node = end
        moves = 0
        path = np.empty((2 * experts + 2, 2), np.int64)
        while before[node] >= 0:
            path[moves, 0], path[moves, 1] = before[node], node
            node = before[node]
            moves += 1
        _shift(gamma, chosen, pooled, loads, path[:moves], cost, token)
    everything = np.ones(experts + 1, np.bool_)
    _bellman(cost, pooled, everything, distance, before)
    return distance[:experts].copy()


@njit(cache=True)
def _shift(gamma, chosen, pooled, loads, path, cost, token):  # pragma: no cover - compiled
    """Move one token along every edge of a path, then bring the cheapest moves up to date."""
    experts = gamma.shape[1]
    moved = np.full((len(path), 3), -1, np.int64)
    for m in range(len(path)):
        k, other = path[m]
        if other == experts:
            pooled[k] = True
        elif k == experts:
            pooled[other] = False
        else:
            moved[m, 0], moved[m, 1], moved[m, 2] = token[k, other], k, other
    for m in range(len(moved)):
        if moved[m, 0] >= 0:
            chosen[moved[m, 0], moved[m, 1]] = False
            chosen[moved[m, 0], moved[m, 2]] = True
            loads[moved[m, 1]] -= 1
            loads[moved[m, 2]] += 1
    stale = np.zeros(experts, np.bool_)
    for m in range(len(moved)):
        if moved[m, 0] >= 0:
            stale[moved[m, 1]] = True
            for k in range(experts):  # a move that used this token may be gone, a move to where it was may be new
                if chosen[moved[m, 0], k] and not stale[k]:
                    if token[k, moved[m, 2]] == moved[m, 0]:
                        stale[k] = True
                    else:
                        _gained(gamma, chosen, moved[m, 0], k, cost, token)
    for k in range(experts):
        if stale[k]:
            _cheapest(gamma, chosen, k, cost, token)
