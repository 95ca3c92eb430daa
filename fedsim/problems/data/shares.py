"""Whole numbers of records out of random shares: exact sums, no second tries."""

from __future__ import annotations

import heapq

import numpy as np
from numpy.typing import NDArray


def log_dirichlet(rng: np.random.Generator, alpha: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return logarithms of one Dirichlet draw per row of `alpha` `[rows, k]`; finite for every positive alpha.

    A draw is a normalised vector of Gamma variates; `Gamma(a) = Gamma(a + 1) U^(1/a)` (Marsaglia and Tsang 2000)
    is taken in logarithms, where nothing underflows.
    """
    alpha = np.clip(alpha, 1e-300, 1e15)  # beyond these a draw cannot be told from its limit
    uniform = 1.0 - rng.random(alpha.shape)
    log_gamma = np.log(rng.standard_gamma(alpha + 1.0)) + np.log(uniform) / alpha
    shifted = log_gamma - log_gamma.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def apportion(total: int, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return whole numbers `[k]` nearest to `total * shares` with sum `total` (largest remainders)."""
    exact = total * shares
    counts = np.floor(exact).astype(np.int64)
    first = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]
    counts[first] += 1
    return counts


def raise_to(counts: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """Return `counts` `[n, classes]` with every row sum at least `least`; column sums stay.

    Single records move from the row that has most at that moment, out of its largest class.
    """
    counts = counts.copy()
    sizes = counts.sum(axis=1)
    donors = [(-int(size), node) for node, size in enumerate(sizes) if size > least]
    heapq.heapify(donors)
    for node in np.flatnonzero(sizes < least):
        for _ in range(least - int(sizes[node])):
            size, donor = donors[0]
            label = int(np.argmax(counts[donor]))
            counts[donor, label] -= 1
            counts[node, label] += 1
            heapq.heapreplace(donors, (size + 1, donor))
    return counts


def draw_classes(
    rng: np.random.Generator, size: int, log_q: NDArray[np.float64], left: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return how many records of each class make up `size`, at most `left` each; every pass uses up a class."""
    counts = np.zeros_like(left)
    while counts.sum() < size:
        rest = left - counts
        log_weights = np.where(rest > 0, log_q, -np.inf)
        weights = rest / rest.sum() if log_weights.max() == -np.inf else np.exp(log_weights - log_weights.max())
        drawn = rng.multinomial(size - counts.sum(), weights / weights.sum())
        counts += np.minimum(drawn, rest)
    return counts


def balanced(sizes: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return the node of each group: groups by falling size, each to the smallest node so far."""
    owner = np.empty(len(sizes), dtype=np.int64)
    nodes = [(0, node) for node in range(n)]
    for group in np.argsort(-sizes, kind="stable"):
        load, node = nodes[0]
        owner[group] = node
        heapq.heapreplace(nodes, (load + int(sizes[group]), node))
    return owner
