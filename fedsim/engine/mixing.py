"""Weighted sums over neighbours: `out_i = sum_j w_ij v_j`, left to right in ascending position.

Rows are named by their addresses, so that they may lie in several blocks, or where they were received.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedsim.topology.topology import Topology

TILE = 1024  # columns of one pass: the sum of a row stays in the first-level cache


@intrinsic
def _pointer(_context: Any, _address: Any, like: Any = None) -> Any:
    """Return a pointer to numbers of the type of `like` at an address."""
    target = types.CPointer(like.dtype)

    def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.int64, like), code


@njit(cache=True, error_model="numpy", nogil=True)
def mix_rows(first, offsets, columns, weights, addresses, out):  # pragma: no cover - compiled
    """Write rows `first..first + len(out)` of `W v` to `out [count, dim]`.

    `offsets`, `columns`, `weights`: CSR rows of this process; `addresses [rows + ghosts]`: where row j of v begins.
    """
    dim = out.shape[1]
    for row in range(out.shape[0]):
        begin, end = offsets[first + row], offsets[first + row + 1]
        for start in range(0, dim, TILE):
            _mix_tile(begin, end, columns, weights, addresses, out[row], start, min(start + TILE, dim))


@njit(error_model="numpy")
def _mix_tile(begin, end, columns, weights, addresses, out, start, stop):  # pragma: no cover - compiled
    count, place = stop - start, begin
    size = out.itemsize
    total = out[start:stop]
    total[:] = 0.0
    while place + 4 <= end:
        a = carray(_pointer(addresses[columns[place]] + start * size, out), count)
        b = carray(_pointer(addresses[columns[place + 1]] + start * size, out), count)
        c = carray(_pointer(addresses[columns[place + 2]] + start * size, out), count)
        d = carray(_pointer(addresses[columns[place + 3]] + start * size, out), count)
        _add_four(total, a, b, c, d, weights[place], weights[place + 1], weights[place + 2], weights[place + 3])
        place += 4
    while place < end:
        _add_one(total, carray(_pointer(addresses[columns[place]] + start * size, out), count), weights[place])
        place += 1


@njit(error_model="numpy")
def _add_four(total, a, b, c, d, wa, wb, wc, wd):  # pragma: no cover - compiled
    for i in range(len(total)):
        total[i] = (((total[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@njit(error_model="numpy")
def _add_one(total, a, wa):  # pragma: no cover - compiled
    for i in range(len(total)):
        total[i] = total[i] + wa * a[i]


def addresses_of(array: NDArray) -> NDArray[np.int64]:
    """Return the address of each row of a C-contiguous `[rows, dim]` array."""
    return array.ctypes.data + np.arange(len(array), dtype=np.int64) * array.strides[0]


def by_position(matrix: Any, topology: Topology) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return a sparse matrix over node numbers as CSR over positions, columns ascending."""
    from scipy.sparse import csr_array

    moved = csr_array(matrix)[topology.order][:, topology.order].tocsr()
    moved.sort_indices()
    return moved.indptr.astype(np.int64), moved.indices.astype(np.int64), moved.data.astype(np.float64)
