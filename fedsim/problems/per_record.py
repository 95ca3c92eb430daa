"""Gradients of single records: their norms and weighted sums, without ever writing them down where the model allows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.func import grad, vmap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CHUNK_BYTES = 1 << 26  # of per-record gradients written down at a time


class Signals(ABC):
    """The gradients of some records `[m]` (or differences of two such), in whatever form they are known."""

    @abstractmethod
    def squared_norms(self) -> torch.Tensor:
        """Return `[m, groups]`: the squared norm of every record's gradient, per tensor group (layer)."""

    @abstractmethod
    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return `sum_j weights[j, group] g_j` as `[dim]`; `weights [m, groups]`."""

    @abstractmethod
    def scaled(self, factors: torch.Tensor) -> Signals:
        """Return the gradients times `factors [m, groups]`."""

    @abstractmethod
    def minus(self, other: Any) -> Signals:
        """Return the differences to another set of the same records."""


class RecordGradients(Protocol):
    """What a problem knows of its single records.

    Attributes:
        chunk: how many records are handled at a time.
    """

    chunk: int

    def at(self, node: int, records: NDArray[np.int64], x: torch.Tensor) -> Signals:
        """Return the gradients at `x [dim]` of these records of a node, without terms that no record enters."""
        ...


class Explicit(Signals):
    """Gradients written down, `[m, dim]`, with the sizes of the groups that they fall into."""

    def __init__(self, gradients: torch.Tensor, sizes: list[int]) -> None:
        self.gradients, self._sizes = gradients, sizes

    def squared_norms(self) -> torch.Tensor:
        """Return `[m, groups]`, summed in double precision."""
        parts = self.gradients.double().square().split(self._sizes, dim=1)
        return torch.stack([part.sum(dim=1) for part in parts], dim=1)

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum."""
        parts = self.gradients.split(self._sizes, dim=1)
        return torch.cat([w @ part for w, part in zip(weights.to(self.gradients.dtype).T, parts, strict=True)])

    def scaled(self, factors: torch.Tensor) -> Explicit:
        """Return the scaled gradients."""
        wide = torch.repeat_interleave(factors.to(self.gradients.dtype), torch.tensor(self._sizes), dim=1)
        return Explicit(self.gradients * wide, self._sizes)

    def minus(self, other: Explicit) -> Explicit:
        """Return the differences."""
        return Explicit(self.gradients - other.gradients, self._sizes)


class ModuleRecords:
    """Per-record gradients of any `torch.nn.Module` by `vmap(grad)`, in chunks of bounded memory.

    Args:
        records: `(node, record numbers) -> (features [m, ...], labels [m, ...])`.
        loss: `(x [dim], one record, its label) -> number`. sizes: numbers of parameters of the layers.
    """

    def __init__(
        self,
        records: Callable[[int, NDArray[np.int64]], tuple[torch.Tensor, torch.Tensor]],
        loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        sizes: list[int],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._records, self._sizes = records, sizes
        self._gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")
        self.chunk = max(1, CHUNK_BYTES // (sum(sizes) * dtype.itemsize))

    def at(self, node: int, records: NDArray[np.int64], x: torch.Tensor) -> Explicit:
        """Return the gradients of these records."""
        return Explicit(self._gradients(x, *self._records(node, records)), self._sizes)
