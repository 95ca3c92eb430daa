"""One number for a whole run: equal digests mean equal final states and counts, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray


def digest(state: Mapping[str, NDArray], hashes: Mapping[str, NDArray[np.uint8]], counts: Mapping[str, int]) -> str:
    """Return the SHA-256 over names, types, shapes, per-row hashes in node order, shared values and counts.

    Args:
        state: arrays by name; of those named in `hashes` only type and shape of a row are looked at.
        hashes: uint8 `[n, 32]`, the hash of every node's row, by node number.
        counts: cumulative counts by name.
    """
    whole = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        whole.update(f"{name}|{array.dtype.str}|{array.shape[1:]}|".encode())
        whole.update(hashes[name].tobytes() if name in hashes else array.tobytes())
    whole.update(json.dumps(dict(sorted(counts.items()))).encode())
    return whole.hexdigest()


def row_hashes(array: NDArray) -> Iterator[bytes]:
    """Yield the SHA-256 of each row."""
    for row in np.ascontiguousarray(array):
        yield hashlib.sha256(row.tobytes()).digest()


def combined(digests: Iterable[str]) -> str:
    """Return the digest of a study: over those of its runs, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
