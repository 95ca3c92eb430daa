"""Counter-based random numbers: a draw is a pure function of (seed, purpose, node, step, draw).

Philox4x32-10 (Salmon, Moraes, Dror & Shaw, *Parallel random numbers: as easy as 1, 2, 3*, SC 2011). The counter is
(draw, step, node, purpose), the key the seed: whoever holds a node, and in whatever order, draws the same numbers.
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch
from numba import njit, uint32, uint64
from numpy.typing import NDArray

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_TO_UNIT = 2.0**-53


def purpose(name: str) -> int:
    """Return the 32-bit number that stands for a purpose ("batch", "node clock", ...)."""
    return zlib.crc32(name.encode())


@njit(inline="always")
def philox(c0, c1, c2, c3, k0, k1):  # pragma: no cover - compiled
    """Return four uint32 for a counter of four and a key of two uint32."""
    c0, c1, c2, c3 = uint32(c0), uint32(c1), uint32(c2), uint32(c3)
    k0, k1 = uint32(k0), uint32(k1)
    for _ in range(10):
        p0, p1 = _M0 * uint64(c0), _M1 * uint64(c2)
        c0, c1, c2, c3 = (
            uint32(uint32(p1 >> _32) ^ c1 ^ k0),
            uint32(p1 & _LOW),
            uint32(uint32(p0 >> _32) ^ c3 ^ k1),
            uint32(p0 & _LOW),
        )
        k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
    return c0, c1, c2, c3


@njit(inline="always")
def pair(seed, what, node, step, draw):  # pragma: no cover - compiled
    """Return two independent uniforms in [0, 1) with 53 bits each for one counter."""
    a, b, c, d = philox(draw, step, node, what, uint64(seed) & _LOW, uint64(seed) >> _32)
    first = (uint64(a) << uint64(21)) ^ (uint64(b) >> uint64(11))
    second = (uint64(c) << uint64(21)) ^ (uint64(d) >> uint64(11))
    return float(first) * _TO_UNIT, float(second) * _TO_UNIT


@njit
def uniform(seed, what, node, step, draw):  # pragma: no cover - compiled
    """Return number `draw` of a stream: a uniform in [0, 1)."""
    first, second = pair(seed, what, node, step, draw >> 1)
    return second if draw & 1 else first


@njit(inline="always")
def normal_pair(seed, what, node, step, draw):  # pragma: no cover - compiled
    """Return two independent standard normals for one counter (Box and Muller)."""
    first, second = pair(seed, what, node, step, draw)
    radius, angle = math.sqrt(-2.0 * math.log(1.0 - first)), 2.0 * math.pi * second
    return radius * math.cos(angle), radius * math.sin(angle)


@njit
def normal(seed, what, node, step, draw):  # pragma: no cover - compiled
    """Return number `draw` of a stream: a standard normal."""
    first, second = normal_pair(seed, what, node, step, draw >> 1)
    return second if draw & 1 else first


@njit(cache=True)
def _fill_uniform(seed, what, nodes, step, out):  # pragma: no cover - compiled
    count = out.shape[1]
    for row in range(out.shape[0]):
        for draw in range((count + 1) // 2):
            first, second = pair(seed, what, nodes[row], step, draw)
            out[row, 2 * draw] = first
            if 2 * draw + 1 < count:
                out[row, 2 * draw + 1] = second


@njit(cache=True)
def _fill_normal(seed, what, nodes, step, out):  # pragma: no cover - compiled
    count = out.shape[1]
    for row in range(out.shape[0]):
        for draw in range((count + 1) // 2):
            first, second = normal_pair(seed, what, nodes[row], step, draw)
            out[row, 2 * draw] = first
            if 2 * draw + 1 < count:
                out[row, 2 * draw + 1] = second


class Streams:
    """All random numbers of a run with this seed (an integer in 0 .. 2^64 - 1)."""

    def __init__(self, seed: int) -> None:
        self.seed = np.uint64(seed)

    def uniform(self, what: str, nodes: NDArray[np.int64], step: int, count: int) -> NDArray[np.float64]:
        """Return `[rows, count]` in [0, 1)."""
        out = np.empty((len(nodes), count))
        _fill_uniform(self.seed, purpose(what), nodes, step, out)
        return out

    def normal(self, what: str, nodes: NDArray[np.int64], step: int, count: int) -> NDArray[np.float64]:
        """Return `[rows, count]`, standard normal."""
        out = np.empty((len(nodes), count))
        _fill_normal(self.seed, purpose(what), nodes, step, out)
        return out

    def integers(
        self, what: str, nodes: NDArray[np.int64], step: int, count: int, high: NDArray[np.int64] | int
    ) -> NDArray[np.int64]:
        """Return int64 `[rows, count]` in [0, high), `high` one number or one per row."""
        top = np.broadcast_to(np.asarray(high, dtype=np.int64), (len(nodes),))[:, None]
        return np.minimum((self.uniform(what, nodes, step, count) * top).astype(np.int64), top - 1)

    def shared(self, what: str, step: int) -> np.random.Generator:
        """Return a NumPy generator that is the same on every node."""
        key = np.array([self.seed, (np.uint64(purpose(what)) << _32) | np.uint64(step & 0xFFFFFFFF)], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class RoundDraws:
    """The draws of a block of nodes in one round; see `fedsim.algorithms.algorithm.Draws`."""

    def __init__(
        self, streams: Streams, nodes: NDArray[np.int64], step: int, device: torch.device | None = None
    ) -> None:
        self.streams, self.nodes, self.step, self._device = streams, nodes, step, device

    def uniform(self, purpose: str, count: int) -> torch.Tensor:
        """Return `[rows, count]` in [0, 1)."""
        return self._there(self.streams.uniform(purpose, self.nodes, self.step, count))

    def normal(self, purpose: str, count: int) -> torch.Tensor:
        """Return `[rows, count]`, standard normal."""
        return self._there(self.streams.normal(purpose, self.nodes, self.step, count))

    def integers(self, purpose: str, count: int, high: NDArray[np.int64] | int) -> torch.Tensor:
        """Return int64 `[rows, count]` in [0, high)."""
        return self._there(self.streams.integers(purpose, self.nodes, self.step, count, high))

    def shared(self, purpose: str) -> np.random.Generator:
        """Return a generator equal on every node in this round."""
        return self.streams.shared(purpose, self.step)

    def _there(self, drawn: NDArray) -> torch.Tensor:
        """Return numbers where the rows are: they are drawn on the CPU, so that no device changes them."""
        return torch.from_numpy(drawn).to(self._device)
