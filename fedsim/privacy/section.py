"""The `privacy` section of a scenario: what is promised, to whom, and how the noise is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from fedsim.errors import InputError

Relation = Literal["replace_one", "zero_out", "add_remove"]
Trust = Literal["central", "secagg", "local"]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Privacy:
    """Exactly one of `epsilon` and `multipliers` is given; the other follows from the exact accountant.

    Attributes:
        delta: of (epsilon, delta)-differential privacy.
        epsilon: what the whole schedule may spend.
        multipliers: standard deviation over sensitivity of each kind of release, by name.
        unit: what two neighbouring data sets differ in: one record of one worker, or one whole worker (`user`).
        relation: how: the unit is replaced by another, contributes zero (same sizes), or is there or not.
        trust: central (the server sees messages and adds the noise), secagg (workers add shares of it, the server
            sees sums only), local (every message is private by itself).
        honest: with secagg, how many workers are sure to add their share; default all.
        calibration: exact, or the closed form of the DIFF2 paper (for comparison; replace_one, central).
        secure_noise: secrets come from the operating system; the run is then not reproducible.
    """

    delta: Annotated[float, Field(gt=0, lt=1)]
    epsilon: Positive | None = None
    multipliers: dict[str, Positive] | None = None
    unit: Literal["record", "user"] = "record"
    relation: Relation = "replace_one"
    trust: Trust = "central"
    honest: Annotated[int, Field(ge=1)] | None = None
    calibration: Literal["exact", "paper"] = "exact"
    secure_noise: bool = False

    @property
    def factor(self) -> int:
        """How many clipping radii a unit moves a sum of clipped terms by at most: 2 if replaced, else 1."""
        return 2 if self.relation == "replace_one" else 1


def refuse_contradictions(p: Privacy, n: int) -> None:
    """Refuse a section whose keys contradict each other, or the number of workers.

    Raises:
        InputError: says which, and what is needed.
    """
    if (p.epsilon is None) == (p.multipliers is None):
        given = "neither is" if p.epsilon is None else "both are"
        raise InputError(f"privacy: exactly one of epsilon and multipliers is needed, {given} given")
    if p.honest is not None and (p.trust != "secagg" or p.honest > n):
        raise InputError(
            f"privacy.honest: {p.honest} given with trust {p.trust!r} and {n} workers; it counts the workers that are"
            " sure to add their share of the noise under secagg, at most all of them"
        )
    if p.calibration == "paper" and (p.epsilon is None or p.relation != "replace_one" or p.unit != "record"):
        raise InputError("privacy.calibration: paper is the closed form for a given epsilon, replace_one, records only")
