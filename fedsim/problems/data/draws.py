"""Random numbers for data and partitions: one counter-based stream per (seed, purpose, node)."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, purpose: str, node: int = 0) -> np.random.Generator:
    """Return a fresh Philox generator that depends on its arguments only.

    The node number is the highest word of the counter, so streams of different nodes never meet and a node's
    data do not depend on how many nodes there are.

    Args:
        seed: 0 <= seed < 2**64. purpose: a name, such as "partition". node: node number.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, 0, 0, node], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
