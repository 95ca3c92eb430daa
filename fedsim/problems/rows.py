"""Sums along rows in one fixed order: library kernels may change theirs with the number of rows."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray


@njit(cache=True)
def sums(values):  # pragma: no cover - compiled
    """Return the sum of each row of `[rows, dim]`, in four lanes, in double precision."""
    out = np.empty(values.shape[0], np.float64)
    for row in range(values.shape[0]):
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        k = 0
        while k + 4 <= values.shape[1]:
            a += values[row, k]
            b += values[row, k + 1]
            c += values[row, k + 2]
            d += values[row, k + 3]
            k += 4
        while k < values.shape[1]:
            a += values[row, k]
            k += 1
        out[row] = (a + b) + (c + d)
    return out


def squared_norms(values: NDArray) -> NDArray[np.float64]:
    """Return `||v_i||^2` of each row."""
    wide = np.ascontiguousarray(values, dtype=np.float64)
    return sums(wide * wide)


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row `[rows]`, float64, by `sums`; on an accelerator as it sums."""
    if values.device.type != "cpu":
        return values.double().sum(dim=1)
    return torch.from_numpy(sums(values.contiguous().numpy(force=True)))
