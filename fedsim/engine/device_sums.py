"""Weighted sums of rows on an accelerator: by one kernel where Triton is at hand, else by torch's operations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from fedsim.engine.ghosts import Csr, Ints


@dataclass(frozen=True)
class Passes:
    """Some rows of a sparse matrix: pass p adds the p-th neighbour of all rows that have so many.

    Attributes:
        rows: which rows, most neighbours first. each: per pass, columns and weights of the first rows.
    """

    rows: torch.Tensor
    each: list[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def of(csr: Csr, rows: Ints, device: torch.device) -> Passes:
        """Return the passes of some rows of a CSR matrix."""
        offsets, columns, weights = csr
        rows = _most_first(offsets, rows)
        counts = offsets[rows + 1] - offsets[rows]
        each = []
        for p in range(int(counts.max(initial=0))):
            at = offsets[rows[: np.count_nonzero(counts > p)]] + p
            each.append((_there(columns[at], device), _there(weights[at], device)))
        return Passes(_there(rows, device), each)

    def write(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Write the rows' sums over `values [m, dim]` to `out [n, dim]`, left to right, in their type."""
        total = values.new_zeros(len(self.rows), values.shape[1])
        for columns, weights in self.each:
            total[: len(columns)] += weights.to(values.dtype)[:, None] * values[columns]
        out[self.rows] = total


@dataclass(frozen=True)
class Fused:
    """The same rows for one kernel, which adds up in float64 as the CPU does.

    Attributes:
        rows: which rows, most neighbours first. offsets, columns, weights: these rows in CSR form, in this order.
    """

    rows: torch.Tensor
    offsets: torch.Tensor
    columns: torch.Tensor
    weights: torch.Tensor

    @staticmethod
    def of(csr: Csr, rows: Ints, device: torch.device) -> Fused:
        """Return some rows of a CSR matrix."""
        offsets, columns, weights = csr
        rows = _most_first(offsets, rows)
        counts = offsets[rows + 1] - offsets[rows]
        own = np.r_[0, np.cumsum(counts)]
        at = np.arange(own[-1]) + np.repeat(offsets[rows] - own[:-1], counts)
        return Fused(*(_there(part, device) for part in (rows, own, columns[at], weights[at])))

    def write(self, out: torch.Tensor, values: torch.Tensor) -> None:
        """Write the rows' sums over `values [m, dim]` to `out [n, dim]`, left to right; both contiguous."""
        from fedsim.engine.triton_sums import write_sums

        if len(self.rows):
            write_sums(self.rows, self.offsets, self.columns, self.weights, values, out)


@cache
def can_fuse(device: torch.device) -> bool:
    """Return whether Triton is here and compiles for this device (it asks for a C compiler)."""
    if device.type != "cuda":
        return False
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    try:
        Fused.of((np.arange(2), np.zeros(1, np.int64), np.ones(1)), np.zeros(1, np.int64), device).write(one, one)
    except Exception as error:  # of the C compiler, of Triton, of a device that it does not know
        warnings.warn(
            f"mixing on {device} takes several passes over memory: Triton cannot be used ({error})", stacklevel=2
        )
        return False
    return True


def _most_first(offsets: Ints, rows: Ints) -> Ints:
    return rows[np.argsort(offsets[rows] - offsets[rows + 1], kind="stable")]


def _there(part: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(part).to(device)
