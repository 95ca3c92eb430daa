"""Secret random numbers: reproducible streams for research, or the operating system's entropy, drawn on one rank."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.streams import Streams
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.layout import Layout

COMMON = np.zeros(1, np.int64)


class Noise:
    """Normals and uniforms for the rows of a rank, or common to all.

    Args:
        seed: of the reproducible streams (Philox, purposes of their own); None: the operating system's entropy.
    """

    def __init__(self, layout: Layout, seed: int | None) -> None:
        self._layout, self._seed = layout, seed
        self._streams = None if seed is None else Streams(seed)

    def common_normal(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return `[1, count]` standard normals, the same on every rank."""
        if self._streams is not None:
            return self._streams.normal(f"privacy {purpose}", COMMON, step, count)
        return self._from_rank_0(1, count, normal=True)

    def normal(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return `[rows, count]` standard normals, a stream per worker."""
        if self._streams is not None:
            return self._streams.normal(f"privacy {purpose} of workers", self._layout.nodes, step, count)
        return self._from_rank_0(self._layout.n, count, normal=True)[self._layout.lo : self._layout.hi]

    def uniform(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return `[rows, count]` uniforms in [0, 1), a stream per worker."""
        if self._streams is not None:
            return self._streams.uniform(f"privacy {purpose}", self._layout.nodes, step, count)
        return self._from_rank_0(self._layout.n, count, normal=False)[self._layout.lo : self._layout.hi]

    def common_uniform(self, purpose: str, step: int, count: int) -> NDArray[np.float64]:
        """Return `[count]` uniforms in [0, 1), the same on every rank."""
        if self._streams is not None:
            return self._streams.uniform(f"privacy {purpose}", COMMON, step, count)[0]
        return self._from_rank_0(1, count, normal=False)[0]

    def _from_rank_0(self, rows: int, count: int, normal: bool) -> NDArray[np.float64]:
        drawn = None
        if self._layout.rank == 0:
            drawn = (system_normal if normal else system_uniform)(rows * count)
        if self._layout.size > 1:
            drawn = self._layout.transport.broadcast(None if drawn is None else as_bytes(drawn)).view(np.float64)
        assert drawn is not None
        return drawn.reshape(rows, count)


def system_uniform(count: int) -> NDArray[np.float64]:
    """Return uniforms in [0, 1) with 53 bits each from the operating system."""
    words = np.frombuffer(os.urandom(8 * count), np.uint64)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def system_normal(count: int) -> NDArray[np.float64]:
    """Return standard normals from the operating system's entropy (Box and Muller)."""
    half = (count + 1) // 2
    first, second = system_uniform(half), system_uniform(half)
    radius, angle = np.sqrt(-2 * np.log1p(-first)), 2 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
