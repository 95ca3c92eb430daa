"""One number for a whole run: equal digests mean equal final states and counts, bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray


def digest(state: Mapping[str, NDArray], rows: Mapping[str, NDArray[np.int64]], counts: Mapping[str, int]) -> str:
    """Return the SHA-256 over names, types, shapes, per-row hashes in node order, shared values and counts.

    Args:
        state: arrays by name; those named in `rows` hold one row per node.
        rows: for each array of rows, the node number of each row.
        counts: cumulative counts by name.
    """
    whole = hashlib.sha256()
    for name in sorted(state):
        array = np.ascontiguousarray(state[name])
        whole.update(f"{name}|{array.dtype.str}|{array.shape[1:]}|".encode())
        if name in rows:
            for part in row_hashes(array, rows[name]):
                whole.update(part)
        else:
            whole.update(array.tobytes())
    whole.update(json.dumps(dict(sorted(counts.items()))).encode())
    return whole.hexdigest()


def row_hashes(array: NDArray, nodes: NDArray[np.int64]) -> Iterable[bytes]:
    """Yield the hash of each row in ascending node number."""
    for place in np.argsort(nodes, kind="stable"):
        yield hashlib.sha256(array[place].tobytes()).digest()


def combined(digests: Iterable[str]) -> str:
    """Return the digest of a study: over those of its runs, in order."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()
