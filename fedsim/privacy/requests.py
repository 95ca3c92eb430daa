"""What a private algorithm asks for: leave to release, secret draws, and releases themselves.

An algorithm first asks to `Spend`; only then does it touch data. The engine writes the ledger, refuses what would pass
the budget, adds the noise that the scenario's trust model asks for, and sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedsim.algorithms.requests import Request

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Charge:
    """One release that is about to happen.

    Attributes:
        name: its kind, as in the algorithm's plan. step: which of several in one round.
        rate: probability with which a unit is in it (Poisson sampling).
        worker: the only worker whose data it touches, or None: all.
    """

    name: str
    step: int = 0
    rate: float = 1.0
    worker: int | None = None


@dataclass(frozen=True, eq=False)
class PrivateRequest(Request):
    """Base of the requests that the guard of a run answers. `round`: the number of the round."""

    round: int


@dataclass(frozen=True, eq=False)
class Spend(PrivateRequest):
    """Leave to make these releases: they are in the ledger when the answer (None) is there, or the round ends."""

    charges: tuple[Charge, ...]


@dataclass(frozen=True, eq=False)
class Release(PrivateRequest):
    """`sum_p w_p v_p` + noise, `[1, dim]`: w_p the workers' shares in the objective, v_p means of clipped terms.

    Attributes:
        v: `[rows, dim]`. charge: what was spent for it. radius: norm that no unit's term exceeds.
        rows: who takes part, a mask `[n]` by node number; None: all.
    """

    v: torch.Tensor
    charge: Charge
    radius: float
    rows: NDArray[np.bool_] | None = None


@dataclass(frozen=True, eq=False)
class Perturb(PrivateRequest):
    """Rows with noise of their own, `[rows, dim]`: what one worker releases of its own data.

    Attributes:
        v: `[rows, dim]`, means over the worker's records. charge: what was spent for it, with its worker.
        radius: `[rows, 1]`, norm that no record's term exceeds; rows of other workers stay as they are.
    """

    v: torch.Tensor
    charge: Charge
    radius: torch.Tensor


@dataclass(frozen=True, eq=False)
class Subsample(PrivateRequest):
    """Secret Poisson draws with the charge's rate: weights `[rows, longest]` of records, or a mask `[n]` of workers.

    A record drawn weighs `1 / (rate * records of its worker)`: the size of the batch is secret, its expectation is not.
    """

    charge: Charge
    of: Literal["records", "workers"] = "records"
