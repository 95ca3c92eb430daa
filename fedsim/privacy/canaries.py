"""Records that give themselves away: each has a coordinate of its own and a gradient that saturates every radius."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.problems.per_record import Signals
from fedsim.problems.problem import Minibatch, Nodes, Problem

HUGE, OFFSET = 1e12, 1e6


class Canaries(Problem):
    """`m` canaries in one run of a mechanism, with the workers, sizes and weights of the audited run.

    Canary i is a record of its worker (or a whole worker) whose gradient is `side_i HUGE (OFFSET + x_i) e_i`: in a
    refresh it saturates with sign side_i, in a difference with sign side_i sign(x_i - x'_i), which observers know.
    Since every record is clipped by itself, canaries in different coordinates are independent attacks on one
    mechanism. All other records have no gradient.

    Args:
        records, shares: of the audited problem. side: `[m]`, +1, -1 or 0 (the record is left out).
        owners: `[m]`, the worker of each canary. at_end: canaries are their worker's last records, not its first.

    Attributes:
        sign: `[m]`, which way the last clipped term points of canaries on side +1; observers know it, too.
    """

    kind = "canaries"

    def __init__(
        self,
        records: NDArray[np.int64],
        shares: NDArray[np.float64],
        side: NDArray[np.float64],
        owners: NDArray[np.int64],
        at_end: bool = False,
    ) -> None:
        self.n, self.dim, self.records = len(records), len(side), records
        self.scale = shares * self.n
        self.side, self.owners, self.at_end = torch.from_numpy(side), owners, at_end
        self.sign = torch.ones(self.dim, dtype=torch.float64)

    def raw(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the canaries' gradients are before their sides, `[..., m]`."""
        return HUGE * (OFFSET + x)

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return whole workers' gradients as canaries, `[rows, m]`: constant, so that local steps keep the sign."""
        mine = torch.from_numpy(self.owners[None] == np.asarray(nodes)[:, None])
        return mine * self.side * HUGE

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return 0: nobody looks."""
        return x.new_zeros(len(nodes))

    def per_record(self) -> CanaryRecords:
        """Return the canaries' gradients as single records."""
        return CanaryRecords(self)


class CanaryRecords:
    """Per-record gradients of `Canaries`."""

    chunk = 200  # the published code's, so that short last chunks are met

    def __init__(self, problem: Canaries) -> None:
        self._problem = problem
        self._coordinates = [np.flatnonzero(problem.owners == node) for node in range(problem.n)]

    def at(self, node: int, records: NDArray[np.int64], x: torch.Tensor) -> OneCoordinateEach:
        """Return the gradients of these records; those beyond the worker's canaries are 0."""
        own = self._coordinates[node]
        number = records - (int(self._problem.records[node]) - len(own) if self._problem.at_end else 0)
        inside = (number >= 0) & (number < len(own))
        places = np.full(len(records), -1)
        places[inside] = own[number[inside]]
        there = torch.from_numpy(places >= 0)
        chosen = torch.from_numpy(np.maximum(places, 0))
        values = torch.where(there, (self._problem.side * self._problem.raw(x))[chosen], 0.0)
        self._problem.sign = torch.ones_like(x)
        return OneCoordinateEach(values, chosen, self._problem, x)


class OneCoordinateEach(Signals):
    """Gradients with one entry each: `values [m]` at `places [m]`, taken at the point `x [dim]`."""

    def __init__(self, values: torch.Tensor, places: torch.Tensor, problem: Canaries, x: torch.Tensor) -> None:
        self._values, self._places, self._problem, self._x = values, places, problem, x

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, 1]`."""
        return self._values.square()[:, None]

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum `[dim]`."""
        found = torch.zeros(self._problem.dim, dtype=torch.float64)
        return found.index_add_(0, self._places, weights[:, 0] * self._values)

    def scaled(self, factors: torch.Tensor) -> OneCoordinateEach:
        """Return the scaled gradients."""
        return OneCoordinateEach(self._values * factors[:, 0], self._places, self._problem, self._x)

    def minus(self, other: Any) -> OneCoordinateEach:
        """Return the differences."""
        self._problem.sign = torch.sign(self._x - other._x)
        return OneCoordinateEach(self._values - other._values, self._places, self._problem, self._x)
