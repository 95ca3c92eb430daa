"""Gossip on real clocks by ordered offers, in one thread that blocks and never spins.

Edges point from one end to the other by (colour of a greedy colouring, node number). The start end owns the edge's
clock: it flows, offers its message, and stays closed to gossip, not to gradients, until the answer. The other end
answers at once if it is free, else it lets the offer wait. Waits follow the direction, so they form no cycle.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.live import mesh
from fedsim.live.mesh import Frame, Mesh
from fedsim.live.moves import ACCEPT, ANSWER, OFFER, Moves
from fedsim.live.trace import Log

if TYPE_CHECKING:
    from fedsim.engine.clocks import Batch
    from fedsim.engine.layout import Layout

Ints = NDArray[np.int64]
LOOK = 0.25  # seconds that a rank sleeps at most, before it looks whether its other thread has failed


def starts(layout: Layout, ends: Ints) -> Ints:
    """Return which end of each edge owns its clock: 0 or 1, `[m]`."""
    import networkx as nx

    colours = nx.greedy_color(layout.topology.graph, strategy="largest_first")
    colour = np.array([colours[node] for node in range(layout.n)])
    first, second = ends[:, 0], ends[:, 1]
    ascending = (colour[first] < colour[second]) | ((colour[first] == colour[second]) & (first < second))
    return np.where(ascending, 0, 1)


class Gossip:
    """The exchanges of one rank's rows.

    A message lies in memory that both ends see, or else where its row keeps what it sent last: it is sent, or taken by
    the other end, before this thread, the only one that tells, lets the row tell anything else.

    Args:
        row: `[n]`, the row of each node number, negative elsewhere. ends: `[m, 2]` node numbers. side: from `starts`.
        lock: held while the state is touched; gradients take it too.
    """

    def __init__(
        self, layout: Layout, row: Ints, ends: Ints, side: Ints, moves: Moves, log: Log, connections: Mesh,
        lock: threading.Lock,
    ) -> None:  # fmt: skip
        self._row, self._ends, self._side, self._moves, self._log = row, ends, side, moves, log
        self._mesh, self._lock, self._nodes = connections, lock, layout.nodes
        self._owner = layout.owner(layout.topology.position[ends])
        self._closed = np.zeros(layout.rows, bool)
        self._offers: list[deque[Frame]] = [deque() for _ in range(layout.rows)]
        self._due: list[deque[int]] = [deque() for _ in range(layout.rows)]
        self._number = np.zeros(len(ends), np.int64)
        self.done, self.finite, self.given_up = np.zeros(len(ends), np.int64), True, False

    def serve(self, ticks: Batch, now: Callable[[], float], until: float, unit: float) -> None:
        """Play until the time is up, then until nobody waits for anybody; no longer than until it is `given_up`.

        Args:
            ticks: of the edges that start here, by time. now: this rank's clock, in units. unit: its seconds.
        """
        self._now, quiet, place, ended = now, set(), 0, False
        while not self.given_up:
            t = now()
            while place < len(ticks.time) and ticks.time[place] <= t < until:  # not those of meanwhile: others wait
                self._tick(int(ticks.edge[place]))
                place += 1
            t = now()
            if not ended and t >= until:
                for queue in self._due:
                    queue.clear()  # no new offers
                if not self._closed.any() and not any(self._offers):
                    ended = True
                    for rank in self._mesh.peers:
                        self._mesh.send(rank, Frame(mesh.QUIET, 0, 0, 0, np.empty(0)))
            if ended and quiet >= set(self._mesh.peers):
                return
            following = ticks.time[place] if place < len(ticks.time) and t < until else until
            wait = 0.05 if t >= until else (min(following, until) - t) * unit
            for rank, frame in self._mesh.arrived(min(wait, LOOK)):
                if frame.kind == mesh.QUIET:
                    quiet.add(rank)
                elif frame.kind == mesh.OFFER:
                    self._offered(frame)
                else:
                    self._answered(frame)

    def _tick(self, edge: int) -> None:
        row = int(self._row[self._ends[edge, self._side[edge]]])
        if self._closed[row]:
            self._due[row].append(edge)
        else:
            self._offer(row, edge)

    def _offer(self, row: int, edge: int) -> None:
        self._closed[row] = True
        number = int(self._number[edge])
        self._number[edge] += 1
        with self._lock:
            t = self._now()
            m = self._own(row, edge)
            depth = self._moves.tell(row, t, m)
            self._log.add(int(self._nodes[row]), OFFER, t, edge, number)
        frame = Frame(mesh.OFFER, edge, number, depth, m)
        if self._row[self._ends[edge, 1 - self._side[edge]]] >= 0:
            self._offered(frame)
        else:
            self._mesh.send(int(self._owner[edge, 1 - self._side[edge]]), frame)

    def _own(self, row: int, edge: int) -> NDArray:
        """Return where what a row tells over an edge lies."""
        slot = self._mesh.slots.get(edge)
        return self._moves.message(row) if slot is None else slot[0]

    def _offered(self, frame: Frame) -> None:
        row = int(self._row[self._ends[frame.edge, 1 - self._side[frame.edge]]])
        if self._closed[row]:
            self._offers[row].append(frame)
        else:
            self._accept(row, frame)

    def _accept(self, row: int, frame: Frame) -> None:
        edge, first = frame.edge, bool(self._side[frame.edge] == 1)  # whether this end is the edge's first
        with self._lock:
            t = self._now()
            m = self._own(row, edge)
            depth = self._moves.tell(row, t, m)
            self.finite &= self._moves.end(row, t, edge, first, m, frame.m, frame.depth)
            self._log.add(int(self._nodes[row]), ACCEPT, t, edge, frame.number)
        if first:
            self.done[edge] += 1
        answer = Frame(mesh.ANSWER, edge, frame.number, depth, m)
        if self._row[self._ends[edge, self._side[edge]]] >= 0:
            self._answered(answer)
        else:
            self._mesh.send(int(self._owner[edge, self._side[edge]]), answer)

    def _answered(self, frame: Frame) -> None:
        edge, first = frame.edge, bool(self._side[frame.edge] == 0)
        row = int(self._row[self._ends[edge, self._side[edge]]])
        with self._lock:
            t = self._now()
            self.finite &= self._moves.end(row, t, edge, first, self._own(row, edge), frame.m, frame.depth)
            self._log.add(int(self._nodes[row]), ANSWER, t, edge, frame.number)
        if first:
            self.done[edge] += 1
        self._closed[row] = False
        while self._offers[row] and not self._closed[row]:
            self._accept(row, self._offers[row].popleft())
        if self._due[row] and not self._closed[row]:
            self._offer(row, self._due[row].popleft())
