"""Sums over nodes by one fixed binary tree, so that no partition of the nodes changes a bit.

The tree is over positions: its nodes are the aligned intervals `[a 2^h, (a + 1) 2^h)`, cut at n; an interval's sum is
that of its left half plus that of its right half. A process that holds `lo..hi` reduces it to the sums of at most
`2 log2(rows)` whole intervals; any process can finish from these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.layout import Layout


@njit(cache=True)
def _one_level(source, target, count):  # pragma: no cover - compiled
    """Write the sums of neighbouring pairs of the first `count` rows to `target` (may be `source`); odd ones pass."""
    for row in range(count // 2):
        for c in range(source.shape[1]):
            target[row, c] = source[2 * row, c] + source[2 * row + 1, c]
    if count % 2:
        target[count // 2] = source[count - 1]
    return (count + 1) // 2


@njit(cache=True)
def _three_levels(source, target, count):  # pragma: no cover - compiled
    """Do what `_one_level` does three times, in one pass over the rows."""
    for row in range(count // 8):
        s = source[8 * row : 8 * row + 8]
        for c in range(source.shape[1]):
            left = (s[0, c] + s[1, c]) + (s[2, c] + s[3, c])
            target[row, c] = left + ((s[4, c] + s[5, c]) + (s[6, c] + s[7, c]))
    if count % 8:
        rest = source[count - count % 8 : count].copy()
        left = count % 8
        for _ in range(3):
            left = _one_level(rest, rest, left)
        target[count // 8] = rest[0]
    return (count + 7) // 8


def intervals(lo: int, hi: int, n: int) -> list[tuple[int, int]]:
    """Return the whole tree intervals, as (height, index), that tile positions `lo..hi` of n, left to right."""
    tiles: list[tuple[int, int]] = []
    lo, hi = int(lo), int(hi)
    while lo < hi:
        height = (lo & -lo).bit_length() - 1 if lo else (n - 1).bit_length()
        while height > 0 and min(lo + (1 << height), n) > hi:
            height -= 1
        tiles.append((height, lo >> height))
        lo = min(lo + (1 << height), n)
    return tiles


def partial_sums(values: NDArray, lo: int, n: int) -> tuple[list[tuple[int, int]], NDArray]:
    """Return the tiles of `lo..lo+rows` and their sums `[tiles, d]`; `values [rows, d]` at positions from lo."""
    tiles = intervals(lo, lo + len(values), n)
    sums = np.empty((len(tiles), values.shape[1]), values.dtype)
    for place, (height, index) in enumerate(tiles):
        begin, end = index << height, min((index + 1) << height, n)
        sums[place] = _interval(values[begin - lo : end - lo], height)
    return tiles, sums


def _interval(values: NDArray, height: int) -> NDArray:
    """Return the sum of one interval by its tree; it has `2^height` rows, or fewer where it is cut at n."""
    count, source = len(values), values
    target = np.empty(((count + 1) // 2, values.shape[1]), values.dtype)
    while count > 1:
        step, levels = (_three_levels, 3) if height >= 3 else (_one_level, 1)
        count = step(source, target, count)
        source, height = target, height - levels
    return source[0]


def finish(tiles: list[tuple[int, int]], sums: Any, n: int) -> Any:
    """Return the sum over all n positions `[d]` from tiles that cover them once; `sums [tiles, d]` array or tensor."""
    known = {tile: sums[i] for i, tile in enumerate(tiles)}
    return _resolve((n - 1).bit_length(), 0, known, n)


def _resolve(height: int, index: int, known: dict[tuple[int, int], Any], n: int) -> Any:
    if (height, index) in known:
        return known[(height, index)]
    left, right = 2 * index, 2 * index + 1
    total = _resolve(height - 1, left, known, n)
    return total if right << (height - 1) >= n else total + _resolve(height - 1, right, known, n)


def tree_sum(values: torch.Tensor, lo: int, n: int) -> torch.Tensor:
    """Return the sum over nodes `[d]` of `values [n, d]` held by one process (`lo` = 0), dtype kept.

    int64 is exact; floats have the error of pairwise summation.
    """
    array = values.detach().numpy()
    tiles, sums = partial_sums(np.ascontiguousarray(array), lo, n)
    return torch.from_numpy(finish(tiles, sums, n).copy())


def total(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return the sum over all nodes `[d]` of every rank's rows `[rows, d]`, the same bits on every rank and layout.

    A rank sends the sums of its tiles, at most `2 log2(rows)` of them.
    """
    if layout.size == 1:
        return tree_sum(values, layout.lo, layout.n)
    array = np.ascontiguousarray(values.detach().numpy())
    _, sums = partial_sums(array, layout.lo, layout.n)
    tiles, found = [], []
    for rank, part in enumerate(layout.transport.all_gather(as_bytes(sums))):
        own = intervals(int(layout.ranges[rank]), int(layout.ranges[rank + 1]), layout.n)
        tiles += own
        found.append(part.view(array.dtype).reshape(len(own), array.shape[1]))
    return torch.from_numpy(finish(tiles, np.concatenate(found), layout.n).copy())
