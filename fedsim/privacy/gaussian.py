"""Exact accounting of Gaussian releases (Dong, Roth & Su, *Gaussian differential privacy*, JRSS B 84(1), 2022).

A release whose noise is z times its sensitivity is mu-GDP with mu = 1/z; a sequence is mu-GDP with the root of the sum
of squares, also where a release depends on earlier ones; and

    delta(eps) = Phi(-eps/mu + mu/2) - e^eps Phi(-eps/mu - mu/2).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, cast

RTOL: Any = 1e-14


def delta_of(epsilon: float, mu: float) -> float:
    """Return the delta at which a mu-GDP mechanism is (epsilon, delta)-DP."""
    from scipy.special import log_ndtr

    if mu == 0:
        return 0.0
    first = float(log_ndtr(-epsilon / mu + mu / 2))
    second = epsilon + float(log_ndtr(-epsilon / mu - mu / 2))
    return -math.exp(first) * math.expm1(second - first)


@lru_cache(maxsize=4096)
def epsilon_of(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a mu-GDP mechanism at this delta, to 1e-12 relative; `inf` for infinite mu."""
    from scipy.optimize import brentq

    if mu == 0 or delta_of(0.0, mu) <= delta:
        return 0.0
    if math.isinf(mu):
        return math.inf
    top = 1.0
    while delta_of(top, mu) > delta:
        top *= 2
    return cast(float, brentq(lambda e: delta_of(e, mu) - delta, 0.0, top, xtol=1e-300, rtol=RTOL, maxiter=500))


@lru_cache(maxsize=256)
def mu_of(epsilon: float, delta: float) -> float:
    """Return the largest mu whose mechanisms are (epsilon, delta)-DP, to 1e-12 relative."""
    from scipy.optimize import brentq

    low, high = 1e-12, 1.0
    while delta_of(epsilon, high) < delta:
        high *= 2
    return cast(float, brentq(lambda mu: delta_of(epsilon, mu) - delta, low, high, xtol=1e-300, rtol=RTOL, maxiter=500))
