"""What happens to a node in a live run and in its replay: the same compiled functions, hence the same bits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.engine.kernel import Scratch, State, Table, apply, begin, end, read, to_time

READ, APPLY, OFFER, ACCEPT, ANSWER = 0, 1, 2, 3, 4
"""Kinds of entries in a trace: a point is read, its gradient applied; an offer is made, accepted, answered."""


@dataclass(frozen=True, eq=False)
class Moves:
    """The moves of one process's rows.

    `state.v` is flat; `messages [rows * dim]` holds what each row sent last over edges that have no place of their own.
    """

    state: State
    table: Table
    room: Scratch
    messages: NDArray

    def read(self, row: int, t: float) -> NDArray:
        """Flow to t and return the point at which the gradient is to be taken, `[dim]`."""
        point = np.empty_like(self.room.x)
        _read(self.state, self.table, self.room._replace(x=point), row, t)
        return point

    def apply(self, row: int, t: float, gradient: NDArray) -> bool:
        """Flow to t and add the gradient; return whether it is finite."""
        own = np.require(gradient, self.state.v.dtype, ["C", "W"])
        if own is gradient and self.table.residual.any():
            own = gradient.copy()  # the residual is added to it
        return _apply(self.state, self.table, self.room._replace(g=own), row, t)

    def message(self, row: int) -> NDArray:
        """Return where a row's messages `[dim]` lie that nothing else has a place for."""
        dim = len(self.room.x)
        return self.messages[row * dim : (row + 1) * dim]

    def tell(self, row: int, t: float, m: NDArray) -> int:
        """Flow to t, write what the row sends to `m [dim]`, and return its depth."""
        _tell(self.state, self.table, self.room, row, t, m)
        return int(self.state.depth[row])

    def end(self, row: int, t: float, edge: int, first: bool, own: NDArray, theirs: NDArray, depth: int) -> bool:
        """Flow to t and take what the other end sent; return whether it is finite.

        Args:
            first: whether the row is the edge's first end. own, theirs: the messages `[dim]`. depth: the other end's
                when it sent.
        """
        return _end(self.state, self.table, self.room, row, t, edge, first, own, theirs, depth)


@njit(cache=True, error_model="numpy", nogil=True)
def _read(state, table, room, i, t):  # pragma: no cover - compiled
    read(state, table, room, i, t)


@njit(cache=True, error_model="numpy", nogil=True)
def _apply(state, table, room, i, t):  # pragma: no cover - compiled
    to_time(state, table, room, i, t)
    return apply(state, table, room, i)


@njit(cache=True, error_model="numpy", nogil=True)
def _tell(state, table, room, i, t, m):  # pragma: no cover - compiled
    begin(state, table, room, i, t, m, 0)


@njit(cache=True, error_model="numpy", nogil=True)
def _end(state, table, room, i, t, e, first, own, theirs, depth):  # pragma: no cover - compiled
    to_time(state, table, room, i, t)
    return end(state, table, room, i, e, 1.0 if first else -1.0, own, 0, theirs, 0, depth)
