"""From (epsilon, delta) and a schedule of releases to noise multipliers (spent budget is the ledger's business)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from fedsim.errors import InputError, did_you_mean
from fedsim.privacy.gaussian import mu_of
from fedsim.privacy.sampled import Events, epsilon_of_events
from fedsim.privacy.section import Privacy


@dataclass(frozen=True)
class Planned:
    """One kind of release in a schedule.

    Attributes:
        name: refresh, difference, local, gradient or model.
        count: how many of them the most exposed unit is in. share: of the budget that they may spend.
        rate: probability with which a unit is in each (Poisson sampling).
    """

    name: str
    count: int
    share: float = 1.0
    rate: float = 1.0


def multipliers(privacy: Privacy, plan: Sequence[Planned]) -> dict[str, float]:
    """Return standard deviation over sensitivity of each kind in the plan.

    Raises:
        InputError: multipliers are given for other kinds than the plan has, or a combination has no accountant.
    """
    sampled = any(kind.rate < 1 for kind in plan)
    if sampled and privacy.relation == "replace_one":
        raise InputError(
            "privacy.relation: replace_one has no accountant for Poisson sampling mixed with other releases;"
            " use zero_out (sizes stay public) or add_remove"
        )
    if privacy.multipliers is not None:
        return _given(privacy.multipliers, [kind.name for kind in plan])
    assert privacy.epsilon is not None
    used = tuple(kind for kind in plan if kind.count)
    if privacy.calibration == "paper":
        return paper(privacy.epsilon, privacy.delta, used)
    return dict(_calibrated(privacy.epsilon, privacy.delta, privacy.relation, used))


def _given(values: dict[str, float], names: list[str]) -> dict[str, float]:
    for name in values:
        if name not in names:
            hint = did_you_mean(name, names)
            raise InputError(
                f"privacy.multipliers.{name}: no such release{hint}; this algorithm has {', '.join(names)}"
            )
    missing = [name for name in names if name not in values]
    if missing:
        raise InputError(f"privacy.multipliers: {', '.join(missing)} missing; every kind of release needs noise")
    return dict(values)


@lru_cache(maxsize=64)
def _calibrated(
    epsilon: float, delta: float, relation: str, plan: tuple[Planned, ...]
) -> tuple[tuple[str, float], ...]:
    """Return z by name: `sqrt(count / share) / mu*`, and with sampling the same first guess scaled to fit exactly."""
    mu = mu_of(epsilon, delta)
    whole = sum(kind.share for kind in plan)
    z = {kind.name: _first_guess(kind, kind.share / whole, mu) for kind in plan}
    if any(kind.rate < 1 for kind in plan):
        factor = _fitting(epsilon, delta, relation, plan, z)
        z = {name: factor * value for name, value in z.items()}
    return tuple(z.items())


def _first_guess(kind: Planned, share: float, mu: float) -> float:
    if kind.rate == 1:
        return math.sqrt(kind.count / share) / mu
    # mu^2 of `count` subsampled Gaussians in the central limit: count rate^2 (exp(z^-2) - 1)
    return math.log1p(share * mu**2 / (kind.rate**2 * kind.count)) ** -0.5


def _fitting(epsilon: float, delta: float, relation: str, plan: tuple[Planned, ...], z: dict[str, float]) -> float:
    """Return the one factor for all z at which the composition spends epsilon (never more)."""
    from scipy.optimize import brentq

    def excess(log_factor: float) -> float:
        events = tuple((math.exp(log_factor) * z[kind.name], kind.rate, kind.count) for kind in plan)
        return math.log(epsilon_of_events(events, delta, relation) / epsilon)

    low, high = -0.25, 0.25
    while excess(low) < 0:
        low -= 0.5
    while excess(high) > 0:
        high += 0.5
    root = cast(float, brentq(excess, low, high, xtol=1e-5))
    return math.exp(root + 1e-5 if excess(root) > 0 else root)


def promised(z: dict[str, float], plan: Sequence[Planned]) -> Events:
    """Return a calibrated plan as events of the most exposed unit: what does not sample as one Gaussian."""
    square = sum(kind.count / z[kind.name] ** 2 for kind in plan if kind.count and kind.rate == 1)
    sampled = [(z[kind.name], kind.rate, kind.count) for kind in plan if kind.count and kind.rate < 1]
    return (*([(square**-0.5 / (1 + 1e-12), 1.0, 1)] if square else []), *sampled)


def paper(epsilon: float, delta: float, plan: Sequence[Planned], u: float = 1.25) -> dict[str, float]:
    """Return the multipliers of the DIFF2 paper's closed form: Renyi DP at one order, 1/u of it for refreshes.

    Source: the constants of the published code; `sigma` there is twice z over (P n_min).
    """
    counts = {kind.name: kind.count for kind in plan}
    if not set(counts) <= {"refresh", "difference", "gradient"}:
        raise InputError("privacy.calibration: the paper's closed form knows refreshes and differences only")
    rounds = sum(counts.values())
    alpha = math.floor(1 + math.ceil(2 * math.log(1 / delta) / epsilon))
    first = next(name for name in counts if name != "difference")
    if not counts.get("difference"):
        return {first: math.sqrt(alpha * rounds / epsilon)}
    period = rounds / counts["refresh"]
    return {
        "refresh": math.sqrt(u * alpha * rounds / (period * epsilon)),
        "difference": math.sqrt(u / (u - 1) * alpha * rounds / epsilon),
    }
