"""Poisson clocks: which event happens when, generated as it is played.

Every node (rate 1) and every edge (its rate) has a stream of its own, drawn by counter from (seed, node numbers,
number of the tick). So a tick depends on nothing but its own clock: changing the gossip rates does not move a
gradient, and any subset of clocks ticks as it would among all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from fedsim.engine.streams import pair, purpose

Ints = NDArray[np.int64]
Reals = NDArray[np.float64]

NODE_CLOCK, EDGE_CLOCK = purpose("node clock"), purpose("edge clock")
NOBODY, FOREIGN = -1, -2
"""In place of an event's second row: it is a gradient. In place of either row: the node lies on another rank."""
LEAST_WINDOW = 65_536
"""Events drawn at a time, at least (where there are that many): enough to make the pass over all clocks cheap."""


class Batch(NamedTuple):
    """Events in the order in which they happen.

    Attributes:
        time: float64 `[events]`.
        a: int64, the row of the gradient, or of the edge's first end. b: the row of its second end, `NOBODY` for a
            gradient. One of them may be `FOREIGN`.
        edge: int64, the edge's number, -1 for a gradient.
    """

    time: Reals
    a: Ints
    b: Ints
    edge: Ints

    def part(self, lo: int, hi: int) -> Batch:
        """Return the events `lo..hi`."""
        return Batch(self.time[lo:hi], self.a[lo:hi], self.b[lo:hi], self.edge[lo:hi])

    def counted_here(self) -> Batch:
        """Return the events of this process: its rows' gradients, and exchanges whose first end it holds."""
        own = self.a >= 0
        return Batch(self.time[own], self.a[own], self.b[own], self.edge[own])


class Clocks:
    """The clocks of some nodes and edges; their ticks in order of (time, nodes before edges, number).

    State is O(1) per clock: the time of the next tick and how many there were.
    """

    def __init__(
        self, seed: int, nodes: Ints, edges: Ints, ends: Ints, rates: Reals, row: Ints, node_clocks: bool = True
    ) -> None:
        """Set the clocks at time 0.

        Args:
            nodes: numbers of the nodes that have gradient clocks here.
            edges: numbers of the edges that tick here.
            ends: `[m, 2]` node numbers of all edges. rates: `[m]` ticks per unit of time of all edges.
            row: `[n]`, the row of each node number, `FOREIGN` where another rank holds it.
            node_clocks: False: only edges tick.
        """
        nodes = np.sort(nodes) if node_clocks else np.empty(0, np.int64)
        edges = np.sort(edges[rates[edges] > 0.0])
        self._seed = np.uint64(seed)
        self._nodes = len(nodes)
        self._u = np.concatenate([nodes, ends[edges, 0]])
        self._v = np.concatenate([np.zeros(len(nodes), np.int64), ends[edges, 1]])
        self._mean = np.concatenate([np.ones(len(nodes)), 1.0 / rates[edges]])
        self._edge, self._edges = edges, len(rates)
        self._row = row
        self._total = float(len(nodes) + rates[edges].sum())
        everybody = len(row) if node_clocks else 0
        self._window = max(LEAST_WINDOW, everybody + np.count_nonzero(rates > 0.0)), everybody + float(rates.sum())
        self.count = np.zeros(len(self._u), np.int64)
        self.next = np.zeros(len(self._u))
        self.now = 0.0
        _first_ticks(self._seed, self._nodes, self._u, self._v, self._mean, self.next)

    @property
    def window(self) -> float:
        """Length of time in which about as many events happen as one pass over all clocks is worth.

        It follows from the whole graph, so that every rank takes the same.
        """
        events, total = self._window
        return events / total if total > 0.0 else math.inf

    def until(self, end: float) -> Batch:
        """Return the events after the last call's end and not later than `end`; the clocks go on from there."""
        expected = self._total * max(end - self.now, 0.0)
        capacity = int(expected + 6.0 * math.sqrt(expected)) + 64
        while True:
            saved = self.next.copy(), self.count.copy()
            time, clock = np.empty(capacity), np.empty(capacity, np.int64)
            used = _ticks(
                self._seed, self._nodes, self._u, self._v, self._mean, self.next, self.count, end, time, clock
            )
            if used >= 0:
                break
            (self.next, self.count), capacity = saved, 2 * capacity  # one window in 10^9 is that crowded
        time, clock = time[:used], clock[:used]
        _sort(time, clock, self.now, end)
        self.now = max(self.now, end)
        return self._events(time, clock)

    def save(self) -> dict[str, np.ndarray]:
        """Return the time and the number of every clock's next tick.

        `node_next`, `node_count`: `[rows]`. `edge_next`, `edge_count`: `[m]`, 0 where an edge does not tick here.
        """
        nodes, edges = slice(None, self._nodes), slice(self._nodes, None)
        saved = {"clock_now": np.array(self.now)}
        for name, values in (("next", self.next), ("count", self.count)):
            saved[f"node_{name}"] = np.zeros(int((self._row >= 0).sum()), values.dtype)
            saved[f"node_{name}"][self._row[self._u[nodes]]] = values[nodes]
            saved[f"edge_{name}"] = np.zeros(self._edges, values.dtype)
            saved[f"edge_{name}"][self._edge] = values[edges]
        return saved

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Go back to what `save` returned."""
        nodes, edges = slice(None, self._nodes), slice(self._nodes, None)
        for name, values in (("next", self.next), ("count", self.count)):
            values[nodes] = saved[f"node_{name}"][self._row[self._u[nodes]]]
            values[edges] = saved[f"edge_{name}"][self._edge]
        self.now = float(saved["clock_now"])

    def _events(self, time: Reals, clock: Ints) -> Batch:
        a, b, edge = np.empty_like(clock), np.empty_like(clock), np.empty_like(clock)
        _name(clock, self._nodes, self._u, self._v, self._edge, self._row, a, b, edge)
        return Batch(time, a, b, edge)


@njit(inline="always")
def _gap(seed, nodes, u, v, mean, clock, tick):  # pragma: no cover - compiled
    """Return the time between two ticks: exponential, with this mean."""
    what = NODE_CLOCK if clock < nodes else EDGE_CLOCK
    first, _ = pair(seed, what, u[clock], v[clock], tick)
    return -math.log(1.0 - first) * mean[clock]


@njit(cache=True)
def _first_ticks(seed, nodes, u, v, mean, following) -> None:  # pragma: no cover - compiled
    for clock in range(len(u)):
        following[clock] = _gap(seed, nodes, u, v, mean, clock, 0)


@njit(cache=True)
def _ticks(seed, nodes, u, v, mean, following, count, end, time, clock_of):  # pragma: no cover - compiled
    """Write all ticks up to `end`, clock by clock; return their number, or -1 where there is no room."""
    used = 0
    for clock in range(len(u)):
        while following[clock] <= end:
            if used == len(time):
                return -1
            time[used], clock_of[used] = following[clock], clock
            used += 1
            count[clock] += 1
            following[clock] += _gap(seed, nodes, u, v, mean, clock, count[clock])
    return used


@njit(cache=True)
def _sort(time, clock, start, end) -> None:  # pragma: no cover - compiled
    """Sort by (time, clock) in place: buckets of about one event, then insertion."""
    n = len(time)
    if n < 2:
        return
    scale = n / (end - start) if end > start else 0.0
    offset = np.zeros(n + 1, np.int64)
    for i in range(n):
        offset[min(int((time[i] - start) * scale), n - 1) + 1] += 1
    for i in range(n):
        offset[i + 1] += offset[i]
    times, clocks = time.copy(), clock.copy()
    for i in range(n):
        bucket = min(int((times[i] - start) * scale), n - 1)
        place = offset[bucket]
        offset[bucket] += 1
        time[place], clock[place] = times[i], clocks[i]
    for i in range(1, n):
        t, c, j = time[i], clock[i], i - 1
        while j >= 0 and (time[j] > t or (time[j] == t and clock[j] > c)):
            time[j + 1], clock[j + 1] = time[j], clock[j]
            j -= 1
        time[j + 1], clock[j + 1] = t, c


@njit(cache=True)
def _name(clock, nodes, u, v, edges, row, a, b, edge) -> None:  # pragma: no cover - compiled
    """Say for each tick which rows and which edge it concerns."""
    for i in range(len(clock)):
        c = clock[i]
        a[i] = row[u[c]]
        b[i] = row[v[c]] if c >= nodes else NOBODY
        edge[i] = edges[c - nodes] if c >= nodes else -1
