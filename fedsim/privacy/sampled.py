"""Accounting of compositions with Poisson sampling, by privacy loss distributions.

The only place that imports dp-accounting (an extra). It has two meanings of replace-one: its RDP takes z as standard
deviation over the relation's sensitivity, its PLD over the clipping norm. Here z is always over the sensitivity, and
only its add-or-remove-one and replace-special (zero-out) are used.
"""

from __future__ import annotations

from functools import lru_cache

from fedsim.errors import InputError

Events = tuple[tuple[float, float, int], ...]
"""(multiplier z, sampling rate, how many), one entry per kind."""
GRID = 1e-3


@lru_cache(maxsize=512)
def epsilon_of_events(events: Events, delta: float, relation: str, grid: float = GRID) -> float:
    """Return an upper bound, tight to the grid, of the epsilon of a sequence of Gaussian releases at `delta`.

    Raises:
        InputError: dp-accounting is not installed.
    """
    try:
        from dp_accounting import dp_event
        from dp_accounting.pld import PLDAccountant
        from dp_accounting.privacy_accountant import NeighboringRelation
    except ModuleNotFoundError:
        raise InputError("Poisson sampling is accounted for by dp-accounting: pip install 'fedsim[dp]'") from None
    meaning = {
        "add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "zero_out": NeighboringRelation.REPLACE_SPECIAL,
    }[relation]
    accountant = PLDAccountant(meaning, value_discretization_interval=grid)
    for z, rate, count in events:
        event: dp_event.DpEvent = dp_event.GaussianDpEvent(z)
        if rate < 1:
            event = dp_event.PoissonSampledDpEvent(rate, event)
        if count:
            accountant.compose(event, count)
    return float(accountant.get_epsilon(delta))
