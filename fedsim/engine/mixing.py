"""Weighted sums over neighbours: `out_i = sum_j w_ij v_j`, left to right in ascending position.

Rows are named by their addresses, so that they may lie in several blocks, or where they were received.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fedsim.topology.topology import Topology


def _second_level_cache() -> int:
    """Return how many bytes of all rows a core's second-level cache can hold; 1 MB where the system does not say.

    Below 1 MB none: long pieces of rows are then read faster than the few columns that it would hold.
    """
    for place in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError):
            if (place / "level").read_text().strip() == "2":
                size = int((place / "size").read_text().strip().removesuffix("K")) << 10
                return 3 * size // 4 if size >= 1 << 20 else 0
    return 3 << 18


TILE = 1024  # columns of one pass: the sum of a row stays in the first-level cache
CACHE = _second_level_cache()
STREAMED = 512  # columns of a pass whose sums go past the caches
LARGE = 1 << 24  # bytes that no cache keeps for long
NARROW = 64  # columns below which passes over all rows cost more than they save
CLAIMED = 384, 1280  # bytes of rows that are asked for two rows before they are written; of others that costs time


@intrinsic
def _pointer(_context: Any, _address: Any, like: Any = None) -> Any:
    """Return a pointer to numbers of the type of `like` at an address."""
    target = types.CPointer(like.dtype)

    def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(target))

    return target(types.int64, like), code


def _prefetch(write: int) -> Any:
    """Make the instruction that asks for the line of memory at an address, to read or to write, and does not wait."""

    @intrinsic
    def fetch(_context: Any, _address: Any = None) -> Any:
        from llvmlite import ir

        def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            place, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [place, number, number, number])
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place], kind)
            builder.call(prefetch, [builder.inttoptr(args[0], place), number(write), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(types.int64), code

    return fetch


_fetch, _claim = _prefetch(0), _prefetch(1)


@intrinsic
def _stream(_context: Any, _to: Any, _source: Any = None) -> Any:
    """Move the line of memory at an address to another one past all caches; the latter is a multiple of 64."""
    from llvmlite import ir

    def code(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8).as_pointer()
        to, source = (builder.inttoptr(address, line) for address in args)
        stored = builder.store(builder.load(source, align=1), to, align=64)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def _settle(_context: Any = None) -> Any:
    """Let what was moved past the caches be seen before whatever is written next."""

    def code(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), code


# Rows are bare pointers, in one function: counting references to arrays would cost more than the sum of a short row.


@njit(cache=True, error_model="numpy", nogil=True)
def mix_rows(first, offsets, columns, weights, base, addresses, out):  # pragma: no cover - compiled
    """Write rows `first..first + len(out)` of `W v` to `out [count, dim]`.

    `offsets`, `columns`, `weights`: CSR rows of this process; `addresses [rows + ghosts]`: where row j of v begins,
    counted from `base`.
    Large values are taken by columns, as many as a large second-level cache holds of all rows: each number is then
    fetched from memory once, not once per neighbour. Otherwise by pieces of rows, whose sums go to memory past the
    caches, as large copies do. Five neighbours are taken at once where there are as many (a torus, a 4-regular graph),
    then four, then one.
    """
    dim, size, written = out.shape[1], out.itemsize, out.ctypes.data
    tile = CACHE // (len(addresses) * size) // 32 * 32
    ahead = tile >= NARROW and len(addresses) * dim * size > LARGE  # fetch the next columns while these are summed
    streams = not ahead and dim >= STREAMED and out.shape[0] * dim * size > LARGE
    tile = tile if ahead else STREAMED if streams else TILE
    piece = np.empty(STREAMED if streams else 1, out.dtype)  # of a sum on its way past the caches
    claimed = dim * size if CLAIMED[0] <= dim * size <= CLAIMED[1] else 0
    for start in range(0, dim, tile):
        n, shift = min(tile, dim - start), start * size
        begin = base + shift
        following = min(tile, dim - start - n) * size if ahead else 0
        for row in range(out.shape[0]):
            for line in range(0, following, 64):
                _fetch(begin + addresses[first + row] + n * size + line)
            for line in range(0, claimed, 64):
                _claim(written + (row + 2) * dim * size + line)
            p, end = offsets[first + row], offsets[first + row + 1]
            target = written + row * dim * size + shift
            total = _pointer(piece.ctypes.data if streams else target, out)
            if p + 5 <= end:
                a, b = _pointer(begin + addresses[columns[p]], out), _pointer(begin + addresses[columns[p + 1]], out)
                c, d = (
                    _pointer(begin + addresses[columns[p + 2]], out),
                    _pointer(begin + addresses[columns[p + 3]], out),
                )
                e = _pointer(begin + addresses[columns[p + 4]], out)
                _first_five(
                    n, total, a, b, c, d, e, weights[p], weights[p + 1], weights[p + 2], weights[p + 3], weights[p + 4]
                )
                p += 5
            else:
                _clear(n, total)
            while p + 4 <= end:
                a, b = _pointer(begin + addresses[columns[p]], out), _pointer(begin + addresses[columns[p + 1]], out)
                c, d = (
                    _pointer(begin + addresses[columns[p + 2]], out),
                    _pointer(begin + addresses[columns[p + 3]], out),
                )
                _add_four(n, total, a, b, c, d, weights[p], weights[p + 1], weights[p + 2], weights[p + 3])
                p += 4
            while p < end:
                _add(n, total, _pointer(begin + addresses[columns[p]], out), weights[p])
                p += 1
            if streams:
                _release(piece, n, target)
    if streams:
        _settle()


@njit(error_model="numpy")
def _release(piece, count, target):  # pragma: no cover - compiled
    """Write a sum of so many numbers to its place, whole lines of memory past the caches."""
    size, source, total = piece.itemsize, piece.ctypes.data, _pointer(target, piece)
    first = min(count, -target % 64 // size)
    last = first + (count - first) * size // 64 * 64 // size
    for i in range(first):
        total[i] = piece[i]
    for line in range(first * size, last * size, 64):
        _stream(target + line, source + line)
    for i in range(last, count):
        total[i] = piece[i]


@njit(error_model="numpy")
def _clear(count, total):  # pragma: no cover - compiled
    for i in range(count):
        total[i] = 0.0


@njit(error_model="numpy")
def _first_five(count, total, a, b, c, d, e, wa, wb, wc, wd, we):  # pragma: no cover - compiled
    for i in range(count):
        total[i] = ((((0.0 + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]) + we * e[i]


@njit(error_model="numpy")
def _add_four(count, total, a, b, c, d, wa, wb, wc, wd):  # pragma: no cover - compiled
    for i in range(count):
        total[i] = (((total[i] + wa * a[i]) + wb * b[i]) + wc * c[i]) + wd * d[i]


@njit(error_model="numpy")
def _add(count, total, a, wa):  # pragma: no cover - compiled
    for i in range(count):
        total[i] = total[i] + wa * a[i]


def by_position(matrix: Any, topology: Topology) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Return a sparse matrix over node numbers as CSR over positions, columns ascending."""
    from scipy.sparse import csr_array

    moved = csr_array(matrix)[topology.order][:, topology.order].tocsr()
    moved.sort_indices()
    return moved.indptr.astype(np.int64), moved.indices.astype(np.int64), moved.data.astype(np.float64)
