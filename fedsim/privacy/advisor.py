"""Restart period, split of the budget and step of DIFF2 from what is known before anything is spent.

Our constants for the paper's theorem 4.3: inside a stage of T rounds the estimator's error grows with
`kappa T`, `kappa = d (eta s2)^2`, s2 the noise of a difference per unit of distance; beyond `kappa T = 1` the noise of
differences drives itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedsim.privacy.gaussian import mu_of
from fedsim.privacy.section import Privacy


@dataclass(frozen=True)
class Advice:
    """What the advisor says.

    Attributes:
        stable_period: T at which `kappa T = 1`.
        period, refresh_share: what `auto` takes. helps: whether stages of two rounds and more can be afforded.
        why: one sentence.
    """

    stable_period: float
    period: int
    refresh_share: float
    helps: bool
    why: str


def advise(
    privacy: Privacy,
    rounds: int,
    dim: int,
    unit_weight: float,
    clip_grad: float,
    clip_diff: float,
    eta: float,
    refresh_share: float | None = None,
    part: float = 1.0,
) -> Advice:
    """Return period and split for a schedule of `rounds` at (epsilon, delta).

    Args:
        unit_weight: largest weight of one record. refresh_share: where it is given; None: the split is advised, too.
        part: of the budget that is for refreshes and differences; local steps have the rest.
    """
    assert privacy.epsilon is not None
    mu = math.sqrt(part) * mu_of(privacy.epsilon, privacy.delta)
    step = eta * privacy.factor * clip_diff * unit_weight  # noise of a difference over z2 and the gradient's length

    def stable(share: float) -> float:
        return (1 - share) * mu**2 / (dim * rounds * step**2)

    share, period = refresh_share or 0.8, 1
    for _ in range(0 if refresh_share else 20):  # split and period depend on each other
        period = max(1, min(math.floor(stable(share) / 2), rounds // 10))
        share = _split(rounds, period, dim, mu, share, clip_grad, clip_diff, eta, privacy.factor * unit_weight)
    period = max(1, min(math.floor(stable(share) / 2), rounds // 10))
    limit = stable(share if period > 1 or refresh_share else 0.8)
    if limit < 2:
        why = (
            f"DIFF2 cannot help here: the noise of differences would drive itself after {limit:.3g} rounds; take T = 1"
            " (every round a refresh: DP-GD), or more records, fewer rounds or parameters, a smaller eta * clip_diff"
        )
        return Advice(limit, 1, 1.0, False, why)
    why = (
        f"T = {period}: half the stable period {limit:.3g}, at most a tenth of {rounds} rounds;"
        f" {share:.2f} of the budget for refreshes {'as given' if refresh_share else 'balances the errors of a stage'}"
    )
    return Advice(limit, period, share, period > 1, why)


def _split(
    rounds: int,
    period: int,
    dim: int,
    mu: float,
    share: float,
    clip_grad: float,
    clip_diff: float,
    eta: float,
    unit: float,
) -> float:
    """Return `sqrt(A) / (sqrt(A) + sqrt(B))` with steps as long as the noise of refreshes makes them."""
    refreshes = math.ceil(rounds / period)
    differences = rounds - refreshes
    if not differences:
        return 0.8
    noise = dim * refreshes / (share * mu**2) * (unit * clip_grad) ** 2
    a = refreshes * clip_grad**2
    b = period / 2 * differences * clip_diff**2 * eta**2 * noise
    return min(0.95, max(0.5, math.sqrt(a) / (math.sqrt(a) + math.sqrt(b))))
