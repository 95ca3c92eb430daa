"""Rows by where they lie in memory: in several blocks, or where they were received."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray


def addresses_of(array: NDArray) -> NDArray[np.int64]:
    """Return the address of each row of a C-contiguous array `[rows, ...]`."""
    return array.ctypes.data + np.arange(len(array), dtype=np.int64) * array.strides[0]


@intrinsic
def _copy(_context: Any, _to: Any, _from: Any, _count: Any = None) -> Any:
    """Copy bytes between addresses."""

    def code(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        target, source = (builder.inttoptr(place, byte) for place in args[:2])
        cgutils.raw_memcpy(builder, target, source, args[2], 1)
        return _context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@njit(cache=True, nogil=True)
def copy_rows(places, width, target):  # pragma: no cover - compiled
    """Copy the rows of `width` bytes at `places [rows]` to address `target`, one after the other.

    Rows that lie one after the other are copied together.
    """
    i = 0
    while i < len(places):
        j = i + 1
        while j < len(places) and places[j] == places[j - 1] + width:
            j += 1
        _copy(target + i * width, places[i], (j - i) * width)
        i = j
