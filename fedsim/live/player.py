"""Plays an asynchronous algorithm on real clocks, one rank of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.engine import kernel
from fedsim.engine.clocks import Clocks
from fedsim.engine.events import Events
from fedsim.engine.pace import Pace
from fedsim.errors import Diverged, Unsupported
from fedsim.live.gossip import LOOK, Gossip, starts
from fedsim.live.mesh import Mesh
from fedsim.live.moves import APPLY, READ, Moves
from fedsim.live.trace import Log, Replay, Trace, gradient_of, write
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


BUSY = 0.5  # the share of a rank's time that gossip may take; where it would take more, the unit of time stretches
ENOUGH = 200  # exchanges from which on their number says something
SUSTAINED = 0.9  # of the wanted exchanges; below that the unit stretches for what follows


class LiveEvents(Events):
    """A `Player` whose clocks are real: `advance` lasts as long as it says.

    Between two calls of `advance` everything is drained, so that an observation or a checkpoint sees one state; the
    clocks stand still meanwhile.

    Args:
        unit: seconds of one unit of time; None: the time that this job's ranks take, on average, for one gradient of
            each of their nodes, or longer where the measured transport could not keep the gossip rates.
        pace: seconds that a gradient is stretched to, and this rank's slowness.
    """

    def __init__(self, *arguments: Any, unit: float | None, pace: Pace, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self._table is None or self._table.dual:
            raise Unsupported("schedule.kind: live plays tables of coefficients with primal gradients")
        self._unit, self._given, self._pace, self.stretched = unit or 0.0, unit is not None, pace, 1.0
        self._lock, self._log, self._mesh = threading.Lock(), Log(), None
        self._part, self._done = 0, np.zeros(len(self._ends), np.int64)

    def start(self) -> None:
        """Set the state, connect to the neighbours' ranks, and settle the unit of time."""
        super().start()
        assert self._table is not None
        assert self._flow is not None
        layout = self._layout
        self._side = starts(layout, self._ends)
        own = self._own_edges()
        self._clocks = Clocks(self._seed, layout.nodes, own, self._ends, self._rates, self._row, node_clocks=False)
        flat = self.state._replace(v=self.state.v.reshape(-1))
        messages = np.zeros(layout.rows * self._problem.dim, self.state.v.dtype)
        table, room = kernel.table(self._table, self._flow), kernel.scratch(self.state.v)
        self.moves = Moves(flat, table, room, messages)
        self._connect()
        self._settle()

    def _own_edges(self) -> NDArray[np.int64]:
        return np.flatnonzero(self._row[self._ends[np.arange(len(self._ends)), self._side]] >= 0)

    def _connect(self) -> None:
        layout = self._layout
        if self._mesh is None:
            owner = layout.owner(layout.topology.position[self._ends])
            crossing = np.flatnonzero((owner == layout.rank).any(axis=1) & (owner[:, 0] != owner[:, 1]))
            far = owner[crossing].sum(axis=1) - layout.rank
            edges = {int(rank): crossing[far == rank].tolist() for rank in np.unique(far)}
            self._mesh = Mesh(layout.transport, list(edges), self._problem.dim, self.state.v.dtype)
            self._mesh.share(layout.transport, edges)
        self._gossip = Gossip(layout, self._row, self._ends, self._side, self.moves, self._log, self._mesh, self._lock)

    def _settle(self) -> None:
        """Measure a gradient and an exchange, on scratch copies, and choose the unit of time."""
        assert self._table is not None
        gradient = self._gradient_seconds() if self._table.node_clocks else 0.0
        exchange = self._exchange_seconds()
        touching = self._rates[(self._row[self._ends] >= 0).any(axis=1)].sum()
        mine = np.array([gradient * self._layout.rows, exchange * touching])
        cycles = [part.view(np.float64) for part in self._layout.transport.all_gather(as_bytes(mine))]
        wanted = float(np.mean([cycle[0] for cycle in cycles])) or 1e-3
        least = max(float(cycle[1]) for cycle in cycles) / BUSY
        if not self._given:
            self._unit = max(wanted, least)
        self.stretched = self._unit / wanted

    def _gradient_seconds(self) -> float:
        """Return what one gradient takes on this rank, without its injected slowness."""
        before, best = self.counts.as_dict(), float("inf")
        for row in [0, 0, min(1, self._layout.rows - 1)]:
            clock = time.perf_counter()
            gradient_of(self._gradients, row, self._x0[row].numpy().copy(), self.moves)
            best = min(best, time.perf_counter() - clock)
        self.counts.restore(before)
        return max(best, self._pace.seconds)

    def _exchange_seconds(self) -> float:
        """Return what an exchange costs here: two moves of a copy of the state, and its way through the transport."""
        v, last, gradients, depth = self.moves.state
        state = kernel.State(v.copy(), last.copy(), gradients.copy(), depth.copy())
        copy = Moves(state, self.moves.table, kernel.scratch(self.state.v), self.moves.messages.copy())
        theirs, transport = np.zeros(self._problem.dim, self.state.v.dtype), self._layout.transport
        copy.read(0, 0.0)  # compiled now, not while the clock runs
        copy.apply(0, 0.0, theirs)
        moves, ways = [], []
        assert self._mesh is not None
        body = as_bytes(theirs)[: 1 if self._mesh.slots else None]  # what lies in shared memory has no way to go
        for _ in range(6):
            clock = time.perf_counter()
            copy.tell(0, 0.0, copy.message(0))
            copy.end(0, 0.0, 0, True, copy.message(0), theirs, 0)
            moves.append(time.perf_counter() - clock)
            transport.all_gather(np.zeros(1, np.uint8))
            clock = time.perf_counter()
            transport.all_gather(body)
            ways.append(time.perf_counter() - clock)
        return min(moves) + (min(ways) if transport.size > 1 else 0.0)

    @property
    def unit(self) -> float:
        """Seconds of one unit of time."""
        return self._unit

    def advance(self, until: float) -> None:
        """Live until `until`, then until nobody waits for anybody.

        Raises:
            Diverged: a value is not finite.
        """
        if until <= self._now:
            return
        ticks, begin = self._clocks.until(until), self._now
        self._layout.transport.all_gather(np.zeros(1, np.uint8))  # all begin together
        origin = time.perf_counter()

        def now() -> float:
            return min(begin + (time.perf_counter() - origin) / self._unit, until)

        failures: list[BaseException] = []
        thread = threading.Thread(target=self._serve, args=(ticks, now, until, failures), name="fedsim gossip")
        thread.start()
        try:
            self._compute(now, until, failures)
            self._layout.transport.waiting = True
            thread.join()
            self._layout.transport.waiting = False
        except BaseException:
            self._gossip.given_up = True
            thread.join()
            raise
        if failures:
            raise failures[0]
        self._end(until)

    def _serve(self, ticks: Any, now: Callable[[], float], until: float, failures: list[BaseException]) -> None:
        try:
            self._gossip.serve(ticks, now, until, self._unit)
        except BaseException as error:
            failures.append(error)

    def _compute(self, now: Callable[[], float], until: float, failures: list[BaseException]) -> None:
        """Take gradients of the own rows, one after another, until the time is up; the watch counts them as calls."""
        assert self._table is not None
        transport = self._layout.transport
        while (t := now()) < until and not failures:
            transport.calls += 1
            if not self._table.node_clocks:
                time.sleep(min((until - t) * self._unit, LOOK))
                continue
            row = int(np.argmin(self.state.gradients))
            with self._lock:
                t = now()
                point = self.moves.read(row, t)
                self._log.add(int(self._layout.nodes[row]), READ, t)
            with self._pace.stretched():
                gradient = gradient_of(self._gradients, row, point, self.moves)
            with self._lock:
                t = now()
                self._gossip.finite &= self.moves.apply(row, t, gradient)
                self._log.add(int(self._layout.nodes[row]), APPLY, t)

    def _end(self, until: float) -> None:
        """Count, look whether all is finite, and stretch the unit where the rates were not kept."""
        elapsed, self._now = until - self._now, until
        done, self._gossip.done = self._gossip.done, np.zeros_like(self._gossip.done)
        self._charge(done)
        transport = self._layout.transport
        parts = [
            p.view(np.float64) for p in transport.all_gather(as_bytes(np.array([done.sum(), self._gossip.finite])))
        ]
        wanted, got = self._rates.sum() * elapsed, sum(part[0] for part in parts)
        if not all(part[1] for part in parts):
            raise Diverged(
                f"by time {until:g} a value is not finite. Likely a step size too large for this problem's L, or gossip"
                " rates below what the algorithm's theory needs (run.json tells achieved and wanted ones)"
            )
        if not self._given and wanted > ENOUGH and got < SUSTAINED * wanted:
            factor = min(wanted / max(got, 1.0), 4.0)
            self._unit, self.stretched = self._unit * factor, self.stretched * factor

    def _charge(self, done: NDArray[np.int64]) -> None:
        exchanges, counts = int(done.sum()), self.counts
        counts.communications += exchanges
        counts.messages += 2 * exchanges
        counts.bytes += 2 * exchanges * self._problem.dim * self.state.v.itemsize
        counts.exchanges = int(self.state.depth.max())
        self._done = self._done + done
        self._events += exchanges

    def write_trace(self, root: Path) -> None:
        """Write what happened since the last time into a run's folder; all ranks call this, rank 0 writes."""
        write(root, self._part, self._log.take(), self._layout)
        self._part += 1

    def save(self) -> dict[str, np.ndarray]:
        """Return what a resume needs; the trace's parts are counted."""
        return {**super().save(), "trace_parts": np.array(self._part)}

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Go back to what `save` returned; what the trace says beyond is forgotten as it is written anew."""
        super().load(saved)
        self._part = int(saved["trace_parts"])

    def facts(self) -> dict[str, Any]:
        """Return unit and achieved rates; all ranks call this."""
        assert self._mesh is not None
        mine = np.append(self._done, len(self._mesh.slots))
        parts = self._layout.transport.all_gather(as_bytes(mine))
        total = np.sum([part.view(np.int64) for part in parts], axis=0)
        done, ends = total[:-1], total[-1]
        used = self._rates > 0
        achieved = done[used] / np.maximum(self._rates[used] * max(self._now, 1e-9), 1e-300)
        return {
            "player": "live",
            "live": {
                "unit_seconds": self._unit,
                "stretched": self.stretched,
                "ranks": self._layout.size,
                "parts": self._part,
                "shared_edges": int(ends) // 2,
                "achieved": float(done[used].sum() / (self._rates[used].sum() * max(self._now, 1e-9))),
                "worst_edge": float(achieved.min(initial=1.0)),
                "edges": [
                    [*map(int, self._ends[e]), float(self._rates[e]), int(done[e])] for e in np.flatnonzero(used)
                ][:1000],
            },
        }

    def replay(self, trace: Trace, now: float) -> None:
        """Play a recorded trace in this one process instead of the clocks, and charge it."""
        for name in ("node", "edge"):
            largest = int(getattr(trace, name).max(initial=-1))
            if largest >= (self._layout.n if name == "node" else len(self._ends)):
                raise Unsupported(f"the trace speaks of {name} {largest}, which this scenario does not have")
        again = Replay(trace, self.moves, self._gradients, self._row, self._ends)
        again.play()
        self._now = now
        self._charge(again.exchanges)
