"""Lower bounds on epsilon from the outcomes of an attack."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def certified_epsilon(statistic: NDArray[np.float64], upper: NDArray[np.bool_], delta: float, error: float) -> float:
    """Return a lower bound on epsilon that fails with probability `error` at most.

    Args:
        statistic: `[N]`, larger where the attack believes in the upper data set. upper: `[N]`, which it was.

    The threshold is chosen on every second trial, and both error rates at it are bounded on the others (Clopper &
    Pearson, *Biometrika* 26, 1934): `eps >= log((true - delta) / false)`, either way round.
    """
    learn = np.arange(len(statistic)) % 2 == 0
    one, other = (statistic[learn], upper[learn]), (statistic[~learn], upper[~learn])
    best = 0.0
    for sign in (1.0, -1.0):
        s, u = sign * one[0], one[1] == (sign > 0)
        grid = np.quantile(s, np.linspace(0.02, 0.999, 200))
        guesses = [_epsilon(*_counts(s, u, t), delta, error / 4) for t in grid]
        threshold = grid[int(np.argmax(guesses))]
        s, u = sign * other[0], other[1] == (sign > 0)
        best = max(best, _epsilon(*_counts(s, u, threshold), delta, error / 4))
    return best


def _counts(s: NDArray[np.float64], u: NDArray[np.bool_], threshold: float) -> tuple[int, int, int, int]:
    said = s > threshold
    return int((said & u).sum()), int(u.sum()), int((said & ~u).sum()), int((~u).sum())


def _epsilon(true: int, positives: int, false: int, negatives: int, delta: float, error: float) -> float:
    from scipy.special import betaincinv

    if not true or not negatives:
        return 0.0
    low = float(betaincinv(true, positives - true + 1, error))
    high = 1.0 if false == negatives else float(betaincinv(false + 1, negatives - false, 1 - error))
    return math.log((low - delta) / high) if low > delta else 0.0


def separation(statistic: NDArray[np.float64], upper: NDArray[np.bool_]) -> float:
    """Return how many standard deviations the two cases lie apart: an estimate of mu, standard error 2/sqrt(N)."""
    a, b = statistic[upper], statistic[~upper]
    if min(len(a), len(b)) < 2:
        return math.nan
    pooled = math.sqrt((a.var(ddof=1) * (len(a) - 1) + b.var(ddof=1) * (len(b) - 1)) / (len(a) + len(b) - 2))
    return float((a.mean() - b.mean()) / pooled)
