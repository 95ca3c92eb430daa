"""Which experts a token goes to: top-K of biased scores, in one compiled pass with the loads and both sums.

Ties go to the lower expert number. Scores and biases are compared in float64.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.errors import InputError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Selected(NamedTuple):
    """The selection of T tokens.

    Attributes:
        experts: int64 `[T, K]`, by descending biased score.
        loads: int64 `[E]`, tokens per expert.
        score: sum of the unbiased scores selected.
        biased: the same of the biased scores, `sum_i (sum of the K largest)`.
    """

    experts: Ints
    loads: Ints
    score: float
    biased: float


def select(
    scores: NDArray, bias: Floats, top_k: int, groups: int = 1, limited: int = 1, multiply: bool = False
) -> Selected:
    """Return the K experts of every token with the largest `scores + bias`.

    Args:
        scores: `[T, E]`, float32 or float64. bias: `[E]`.
        groups, limited: experts lie in `groups` equal groups; only the `limited` groups whose two best biased scores
            have the largest sum are open to a token (DeepSeek-V3).
        multiply: select by `scores * (1 + bias)` instead (the multiplicative variant of Wang et al.).
    """
    experts = np.empty((len(scores), top_k), np.int64)
    loads = np.zeros(scores.shape[1], np.int64)
    work = np.ascontiguousarray(scores)
    if groups > limited:
        score, biased = _in_groups(work, bias, groups, limited, multiply, experts, loads)
    else:
        score, biased = _plainly(work, bias, multiply, experts, loads)
    return Selected(experts, loads, float(score), float(biased))


def refuse_impossible(experts: int, top_k: int, groups: int = 1, limited: int = 1) -> None:
    """Refuse a selection that cannot be made.

    Raises:
        InputError: says which numbers do not fit.
    """
    if top_k > experts:
        raise InputError(f"moe_top_k: {top_k} given, at most moe_num_experts = {experts} possible")
    if experts % groups:
        raise InputError(f"num_expert_groups: {groups} given, which does not divide moe_num_experts = {experts}")
    if limited > groups:
        raise InputError(f"num_limited_groups: {limited} given, at most num_expert_groups = {groups} possible")
    if limited * (experts // groups) < top_k:
        raise InputError(
            f"num_limited_groups: {limited} groups of {experts // groups} experts hold fewer than moe_top_k = {top_k}"
        )


@njit(inline="always")
def _insert(value, expert, best, chosen, count, top_k):  # pragma: no cover - compiled
    """Put (value, expert) in its place among the `count` best, largest first; equal values keep their order."""
    place = min(count, top_k - 1)
    while place > 0 and best[place - 1] < value:
        best[place] = best[place - 1]
        chosen[place] = chosen[place - 1]
        place -= 1
    best[place] = value
    chosen[place] = expert


@njit(cache=True)
def _plainly(scores, bias, multiply, experts, loads):  # pragma: no cover - compiled
    top_k, score, biased = experts.shape[1], 0.0, 0.0
    best, row = np.empty(top_k), np.empty(scores.shape[1])
    for i in range(scores.shape[0]):
        for e in range(scores.shape[1]):
            row[e] = scores[i, e] * (1.0 + bias[e]) if multiply else scores[i, e] + bias[e]
        chosen = experts[i]
        for e in range(top_k):
            _insert(row[e], e, best, chosen, e, top_k)
        least = best[top_k - 1]
        for e in range(top_k, scores.shape[1]):
            if row[e] > least:
                _insert(row[e], e, best, chosen, top_k, top_k)
                least = best[top_k - 1]
        for slot in range(top_k):
            loads[chosen[slot]] += 1
            score += scores[i, chosen[slot]]
            biased += best[slot]
    return score, biased


@njit(cache=True)
def _in_groups(scores, bias, groups, limited, multiply, experts, loads):  # pragma: no cover - compiled
    top_k, score, biased = experts.shape[1], 0.0, 0.0
    width = scores.shape[1] // groups
    best, row = np.empty(top_k), np.empty(scores.shape[1])
    sums, open_groups = np.empty(limited), np.empty(limited, np.int64)
    for i in range(scores.shape[0]):
        for g in range(groups):
            first = second = -np.inf
            for e in range(g * width, (g + 1) * width):
                row[e] = scores[i, e] * (1.0 + bias[e]) if multiply else scores[i, e] + bias[e]
                if row[e] > first:
                    first, second = row[e], first
                elif row[e] > second:
                    second = row[e]
            total = first + second if width > 1 else first
            if g < limited or total > sums[limited - 1]:
                _insert(total, g, sums, open_groups, min(g, limited), limited)
        found, chosen = 0, experts[i]
        for g in np.sort(open_groups):
            for e in range(g * width, (g + 1) * width):
                if found < top_k or row[e] > best[top_k - 1]:
                    _insert(row[e], e, best, chosen, found, top_k)
                    found = min(found + 1, top_k)
        for slot in range(top_k):
            loads[chosen[slot]] += 1
            score += scores[i, chosen[slot]]
            biased += best[slot]
    return score, biased


def kept(experts: Ints, scores: NDArray, capacity: int, policy: str) -> NDArray[np.bool_]:
    """Return which selected slots `[T, K]` fit when every expert takes `capacity` tokens.

    Args:
        policy: `probs` keeps the highest scores (ties: the earlier token), `position` the first come.
    """
    tokens, top_k = experts.shape
    flat = experts.ravel()
    value = np.take_along_axis(scores, experts, axis=1).ravel() if policy == "probs" else np.zeros(len(flat))
    order = np.lexsort((np.arange(len(flat)), -value, flat))
    starts = np.searchsorted(flat[order], np.arange(scores.shape[1]))
    rank = np.arange(len(flat)) - starts[flat[order]]
    fits = np.empty(len(flat), bool)
    fits[order] = rank < capacity
    return fits.reshape(tokens, top_k)
