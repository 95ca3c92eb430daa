"""A nonconvex problem whose records share one curvature: what gradient differences are made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from fedsim.errors import InputError
from fedsim.problems.per_record import Explicit, Signals
from fedsim.problems.problem import Minibatch, Nodes, Problem


@dataclass(frozen=True)
class SharedCurvatureParameters:
    """`l(w, b) = sum_j lam_j (w_j^2/2 - 1.5 cos w_j) - b'w`, lam log-spaced from 0.4 down to 0.004: L = 1, nonconvex.

    Records differ in b only (norm at most 1, mean of norm about 0.5), so the Hessian of every record is that of the
    objective, and gradient differences of single records are as short as can be.

    Attributes:
        records: of all nodes; record i belongs to node i mod n. dim: length of w.
        seed: of the records.
    """

    needs_data: ClassVar[bool] = False
    records: Annotated[int, Field(ge=1)] = 20_000
    dim: Annotated[int, Field(ge=2)] = 50
    seed: Annotated[int, Field(ge=0)] = 7

    def problem(self, n: int, seed: int, base: Path) -> SharedCurvature:
        """Return the problem for n nodes.

        Raises:
            InputError: a node would have no record.
        """
        if self.records < n:
            raise InputError(f"problem.records: {self.records} for {n} nodes; at least one each is needed")
        return SharedCurvature(n, self.records, self.dim, self.seed)


class SharedCurvature(Problem):
    """See `SharedCurvatureParameters`."""

    kind = "shared_curvature"

    def __init__(self, n: int, records: int, dim: int, seed: int) -> None:
        self.n, self.dim = n, dim
        rng = np.random.default_rng(seed)
        lam = np.logspace(0, -2, dim) / 2.5
        mean = rng.normal(size=dim) * np.sqrt(lam)
        mean *= 0.5 / np.linalg.norm(mean)
        b = mean + 0.4 * rng.normal(size=(records, dim)) / np.sqrt(dim)
        b /= np.maximum(np.linalg.norm(b, axis=1, keepdims=True), 1.0)
        self.parts = [torch.from_numpy(np.ascontiguousarray(b[node::n])) for node in range(n)]
        self.records = np.array([len(part) for part in self.parts], dtype=np.int64)
        self.L = np.ones(n)
        self._lam = torch.from_numpy(lam)
        self._means = torch.stack([part.mean(dim=0) for part in self.parts])

    def slope(self, w: torch.Tensor) -> torch.Tensor:
        """Return the gradient of what all records share, `[..., dim]`."""
        return self._lam * (w + 1.5 * torch.sin(w))

    def gradient(self, x: torch.Tensor, nodes: Nodes, batch: Minibatch | None = None) -> torch.Tensor:
        """Return `grad f_i(x_i)` `[rows, dim]`."""
        if batch is None:
            return self.slope(x) - self._means[nodes]
        rows = []
        for row, node in enumerate(nodes.tolist()):
            weight = torch.from_numpy(batch.weights[row])
            drawn = self.parts[node][torch.from_numpy(batch.indices[row])]
            rows.append(weight.sum() * self.slope(x[row]) - (weight[:, None] * drawn).sum(dim=0))
        return torch.stack(rows)

    def loss(self, x: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """Return `f_i(x_i)` `[rows]`."""
        x = x.expand(len(nodes), -1)
        shared = (self._lam * (x * x / 2 - 1.5 * torch.cos(x))).sum(dim=1)
        return shared - (self._means[nodes] * x).sum(dim=1)

    def per_record(self) -> SharedCurvatureRecords:
        """Return gradients of single records."""
        return SharedCurvatureRecords(self)

    def facts(self) -> dict[str, Any]:
        """Return the number of records."""
        return {"records": int(self.records.sum())}


class SharedCurvatureRecords:
    """Per-record gradients `slope(w) - b`; their differences are all the same."""

    chunk = 1 << 20

    def __init__(self, problem: SharedCurvature) -> None:
        self._problem = problem

    def at(self, node: int, records: NDArray[np.int64], x: torch.Tensor) -> ShiftedRecords:
        """Return the gradients of these records."""
        part = self._problem.parts[node]
        chosen = part if len(records) == len(part) else part[torch.from_numpy(records)]
        return ShiftedRecords(self._problem.slope(x), chosen)


class ShiftedRecords(Signals):
    """`shared - b_j` for records b `[m, dim]`."""

    def __init__(self, shared: torch.Tensor, b: torch.Tensor) -> None:
        self.shared, self.b = shared, b

    def _explicit(self) -> Explicit:
        return Explicit(self.shared - self.b, [self.b.shape[1]])

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, 1]`."""
        return self._explicit().squared_norms()

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum `[dim]`."""
        return weights.sum() * self.shared - weights[:, 0] @ self.b

    def scaled(self, factors: torch.Tensor) -> Explicit:
        """Return the scaled gradients, written down."""
        return self._explicit().scaled(factors)

    def minus(self, other: ShiftedRecords) -> Same:
        """Return the differences: one and the same for every record."""
        return Same(self.shared - other.shared, len(self.b))


class Same(Signals):
    """One vector for each of m records."""

    def __init__(self, vector: torch.Tensor, count: int) -> None:
        self._vector, self._count = vector, count

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, 1]`."""
        return self._vector.square().sum().expand(self._count, 1)

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum `[dim]`."""
        return weights.sum() * self._vector

    def scaled(self, factors: torch.Tensor) -> Signals:
        """Differences are clipped as they are."""
        raise NotImplementedError

    def minus(self, other: object) -> Signals:
        """Differences of differences are never asked for."""
        raise NotImplementedError
