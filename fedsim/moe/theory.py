"""What theory says of a routing problem: metrics of loads, the sampling floor, the curvature of the dual, regret.

The curvature is the Laplacian of tie densities h: `Hessian F = T Lap(h)`, h_kk' the density at 0 of the difference of
biased scores of experts k, k' on the event that they are the K-th and (K+1)-th. Growth laws of the regret follow from
its eigenvalues; they are asymptotic and derived in our notes, not quoted from a paper.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.moe.oracle import exact_assignment
from fedsim.moe.selection import select

Floats = NDArray[np.float64]


def load_metrics(loads: Floats, hosts: int) -> dict[str, float]:
    """Return the metrics of loads `[layers, E]`, each the mean over layers (`dead` is the total).

    `maxvio = (max A - L) / L`; `host_maxvio` the same of loads summed per host, which decides the time of a step.
    """
    target = loads.mean(axis=1, keepdims=True)
    if not (target > 0).all():
        return {"maxvio": 0.0, "min_load": 0.0, "overload": 0.0, "load_cv": 0.0, "host_maxvio": 0.0, "dead": 0.0}
    relative = loads / target
    per_host = np.add.reduceat(relative, starts(loads.shape[1], hosts), axis=1)
    sizes = np.diff([*starts(loads.shape[1], hosts), loads.shape[1]])
    return {
        "maxvio": float((relative.max(axis=1) - 1).mean()),
        "min_load": float(relative.min(axis=1).mean()),
        "overload": float((np.maximum(relative - 1, 0).sum(axis=1) / loads.shape[1]).mean()),
        "load_cv": float(relative.std(axis=1).mean()),
        "host_maxvio": float(((per_host / sizes).max(axis=1) - 1).mean()),
        "dead": float((loads == 0).sum()),
    }


def starts(experts: int, hosts: int) -> list[int]:
    """Return the first expert of every host that has one: host h holds experts `h E // hosts` and on."""
    found = [h * experts // hosts for h in range(hosts)]
    return [a for a, b in zip(found, [*found[1:], experts], strict=True) if b > a]


@cache
def largest_normal(count: int) -> float:
    """Return the expected maximum of `count` independent standard normals."""
    from scipy.integrate import quad
    from scipy.stats import norm

    return float(quad(lambda x: x * count * norm.pdf(x) * norm.cdf(x) ** (count - 1), -12, 12)[0])


def sampling_floor(tokens: int, experts: int, top_k: int) -> float:
    """Return the mean MaxVio of one batch at the best fixed bias, i.i.d. tokens: no rule of past loads goes below."""
    if experts == 1 or top_k == experts:
        return 0.0
    share = top_k / experts
    return largest_normal(experts) * math.sqrt((1 - share) / (tokens * share) * experts / (experts - 1))


class Curvature(NamedTuple):
    """Of the dual per token at a bias.

    Attributes:
        smallest, largest: nonzero eigenvalues `lambda_2`, `lambda_E` of Lap(h).
        eigenvalues: all nonzero ones, `[E - 1]`. variances: of the selection along their eigenvectors.
        laplacian: `[E, E]`.
    """

    smallest: float
    largest: float
    eigenvalues: Floats
    variances: Floats
    laplacian: Floats


def curvature(scores: NDArray, bias: Floats, top_k: int, width: float | None = None) -> Curvature:
    """Estimate the tie-density Laplacian from tokens `[T, E]` whose K-th and (K+1)-th biased scores are close.

    Args:
        width: gaps below it count. Default: a quantile of the gaps, 5 %, or more (at most 30 %) where that would leave
            fewer than 20 for every expert: wide windows blur the densities, few gaps scatter them.
    """
    values = scores + bias
    order = np.argsort(-values, axis=1, kind="stable")[:, : top_k + 1]
    last, next_ = order[:, top_k - 1], order[:, top_k]
    rows = np.arange(len(values))
    gap = values[rows, last] - values[rows, next_]
    apart = gap[gap > 1e-12]  # exact prices make some tokens tie exactly: these say nothing of the density
    share = min(0.3, max(0.05, 20 * values.shape[1] / len(values)))
    delta = width if width is not None else float(np.quantile(apart, share)) if len(apart) else 1.0
    close = (gap > 1e-12) & (gap <= delta)
    density = np.zeros((values.shape[1], values.shape[1]))
    np.add.at(density, (last[close], next_[close]), 1.0)
    density = (density + density.T) / (2 * len(values) * delta)
    laplacian = np.diag(density.sum(axis=1)) - density
    eigenvalues, vectors = np.linalg.eigh(laplacian)
    chosen = np.zeros(values.shape)
    np.put_along_axis(chosen, order[:, :top_k], 1.0, axis=1)
    variances = (chosen @ vectors).var(axis=0)
    return Curvature(float(eigenvalues[1]), float(eigenvalues[-1]), eigenvalues[1:], variances[1:], laplacian)


def best_fixed(scores: NDArray, top_k: int, first: int = 32768, rounds: int = 8) -> Floats:
    """Return the bias that balances many tokens `[T, E]` on average: Newton steps from the exact prices of the first.

    The regret against it is off by about `E / (2 T)` times the tokens played, so T must exceed those by far.
    """
    bias = exact_assignment(scores[:first], top_k).prices
    inverse = np.linalg.pinv(curvature(scores[:first], bias, top_k).laplacian, rcond=1e-6)
    best, least = bias, math.inf
    for _ in range(rounds):
        excess = select(scores, bias, top_k).loads / len(scores) - top_k / scores.shape[1]
        if np.abs(excess).max() < least:
            best, least = bias, float(np.abs(excess).max())
        bias = bias - inverse @ excess
    return best - best.mean()


class Growth(NamedTuple):
    """How the regret grows: `rate * (ln N, sqrt N, N or N^power)`; law names which."""

    law: str
    rate: float | None
    power: float | None = None


def predicted_regret(
    rule: str, schedule: str, rate: float, unit: str, tokens: int, top_k: int, found: Curvature
) -> Growth | None:
    """Return the growth law of the regret for i.i.d. batches, where one is known.

    None for constant `prop` steps so large that the bias swings (`c lambda_E >= 2`): nothing settles then.
    """
    experts = len(found.eigenvalues) + 1
    share, noise = top_k / experts, top_k * (1 - top_k / experts)
    lam, var = found.eigenvalues, found.variances
    if rule == "prop":
        c = rate * {"relative": 1 / share, "fraction": 1.0, "tokens": tokens}[unit]
        if schedule == "const":
            return Growth("N", float((c * var / 4 / (1 - c * lam / 2)).sum())) if c * found.largest < 2 else None
        if schedule == "inv_sqrt":
            return Growth("sqrt N", c * noise / 2)
        if c * found.smallest <= 0.5:
            return Growth("N^power", None, 1 - 2 * c * found.smallest)
        return Growth("ln N", float((lam * var * c**2 / (2 * (2 * c * lam - 1))).sum()))
    if rule == "sign":
        angle = 1 + (2 / math.pi) * math.asin(1 / (experts - 1))
        spread = math.sqrt(share * (1 - share))
        base = rate * math.sqrt(tokens) * (experts - 1) * spread * math.sqrt(math.pi / 2) / 4 * angle
        c = rate * math.sqrt(2 / math.pi * tokens) / spread  # of the mean sign near p*, as a step c / n
        if schedule == "inv_n" and c * found.smallest <= 0.5:
            return Growth("N^power", None, 1 - 2 * c * found.smallest)
        return {"const": Growth("N", base), "inv_sqrt": Growth("sqrt N", 2 * base), "inv_n": Growth("ln N", base)}[
            schedule
        ]
    return None
