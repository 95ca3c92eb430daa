"""Which nodes this process holds: a contiguous range of positions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError
from fedsim.topology.topology import Topology
from fedsim.transport.local import LocalTransport
from fedsim.transport.transport import Transport


class Layout:
    """Rows of one process: positions `lo..hi` of the topology's order, in that order.

    Attributes:
        topology: the whole graph. n: its number of nodes.
        rank, size: which of how many processes.
        ranges: int64 `[size + 1]`; rank r holds the positions `ranges[r]..ranges[r + 1]`.
        lo, hi: this rank's range. rows: `hi - lo`.
        nodes: int64 `[rows]`, the node number of each row.
    """

    def __init__(self, topology: Topology, rank: int = 0, size: int = 1, transport: Transport | None = None) -> None:
        """Give every rank the same number of rows, the first ones one more where it does not divide.

        Args:
            transport: connects the ranks, and says which one this is; None: `rank` of `size`, with nobody to talk to.

        Raises:
            InputError: there are more ranks than nodes.
        """
        self.transport: Transport = transport or LocalTransport()
        if transport is not None:
            rank, size = transport.rank, transport.size
        if size > topology.n:
            raise InputError(
                f"{size} processes for {topology.n} nodes: every process must hold at least one node; start at most "
                f"{topology.n} (nodes are the topology's, not the launcher's)"
            )
        self.topology, self.n, self.rank, self.size = topology, topology.n, rank, size
        share, rest = divmod(self.n, size)
        self.ranges: NDArray[np.int64] = np.cumsum([0] + [share + (r < rest) for r in range(size)]).astype(np.int64)
        self.lo, self.hi = int(self.ranges[rank]), int(self.ranges[rank + 1])
        self.rows = self.hi - self.lo
        self.nodes: NDArray[np.int64] = np.ascontiguousarray(topology.order[self.lo : self.hi])

    def owner(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rank that holds each position."""
        return np.searchsorted(self.ranges, positions, side="right") - 1
