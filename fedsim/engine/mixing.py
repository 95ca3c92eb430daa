"""Weighted sums over neighbours: `out_i = sum_j w_ij v_j`, left to right in ascending position."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.topology.topology import Topology

TILE = 512  # columns of one pass: the sum of a row stays in the first-level cache


@njit(cache=True, error_model="numpy", fastmath={"contract"})
def mix_rows(first, last, offsets, columns, weights, values, out):  # pragma: no cover - compiled
    """Write rows `first..last` of `W @ values` to `out`; four neighbours in a pass, added one after another.

    `offsets`, `columns`, `weights`: CSR rows of this process; `columns` index `values [rows + ghosts, dim]`.
    """
    dim = values.shape[1]
    for row in range(first, last):
        begin, end = offsets[row], offsets[row + 1]
        for start in range(0, dim, TILE):
            stop = min(start + TILE, dim)
            _mix_tile(begin, end, columns, weights, values, out[row - first], start, stop)


@njit(inline="always", error_model="numpy")
def _mix_tile(begin, end, columns, weights, values, out, start, stop):  # pragma: no cover - compiled
    for c in range(start, stop):
        out[c] = 0.0
    place = begin
    while place + 4 <= end:
        w0, w1, w2, w3 = weights[place], weights[place + 1], weights[place + 2], weights[place + 3]
        v0, v1 = values[columns[place]], values[columns[place + 1]]
        v2, v3 = values[columns[place + 2]], values[columns[place + 3]]
        for c in range(start, stop):
            out[c] = (((out[c] + w0 * v0[c]) + w1 * v1[c]) + w2 * v2[c]) + w3 * v3[c]
        place += 4
    while place < end:
        w, v = weights[place], values[columns[place]]
        for c in range(start, stop):
            out[c] = out[c] + w * v[c]
        place += 1


def by_position(matrix, topology: Topology) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return a sparse matrix over node numbers as CSR over positions, columns ascending."""
    from scipy.sparse import csr_array

    moved = csr_array(matrix)[topology.order][:, topology.order].tocsr()
    moved.sort_indices()
    return moved.indptr.astype(np.int64), moved.indices.astype(np.int64), moved.data.astype(np.float64)
