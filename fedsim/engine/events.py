"""Plays an asynchronous algorithm: Poisson clocks or a recorded trace, by the fastest player that can."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import DynamicsAlgorithm, EventAlgorithm
from fedsim.engine import kernel, plain, sampling
from fedsim.engine.clocks import Batch, Clocks
from fedsim.engine.counts import Counts
from fedsim.engine.flow import Flow
from fedsim.engine.gradients import RowGradients
from fedsim.engine.sums import tree_sum
from fedsim.engine.waves import Waves
from fedsim.errors import Diverged, InputError

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Sampling, Setting
    from fedsim.engine.layout import Layout
    from fedsim.problems.problem import Problem

PlayerName = Literal["auto", "plain", "kernel", "waves"]
Reals = NDArray[np.float64]
Ints = NDArray[np.int64]


class Events:
    """A `Player` of events; see `fedsim.engine.player`. The unit of time is one gradient per node.

    Every player gives the same bits: `kernel` where the problem has compiled gradients, else `waves`, which takes
    gradients in batches; `plain`, one event at a time, is their oracle, and plays every `EventAlgorithm`.

    Args:
        algorithm: resolved. setting: what it was resolved against.
        rates: float64 `[m]`, exchanges per unit of time on each edge.
        x0: `[rows, dim]`, where the rows start.
        sampling: how a node draws the records of a gradient; None: it takes all of them.
        output: `flowed` (the answer at `now`) or `lazy` (as of each node's last event, as some papers' code plots).

    Raises:
        InputError: the chosen player cannot play this, or the batch asks for more records than a node has.
    """

    def __init__(
        self,
        algorithm: DynamicsAlgorithm | EventAlgorithm,
        setting: Setting,
        problem: Problem,
        layout: Layout,
        rates: Reals,
        x0: torch.Tensor,
        seed: int,
        sampling: Sampling | None = None,
        output: Literal["flowed", "lazy"] = "flowed",
        player: PlayerName = "auto",
    ) -> None:
        self.counts = Counts()
        self._algorithm, self._problem, self._layout, self._x0, self._seed = algorithm, problem, layout, x0, seed
        self._sampling, self._output, self._ends = sampling, output, setting.edges
        self._rates = np.asarray(rates, dtype=np.float64)
        self._table = algorithm.dynamics(setting) if isinstance(algorithm, DynamicsAlgorithm) else None
        self._flow = None if self._table is None else Flow.of(self._table.flow)
        self._row = np.full(layout.n, -1, np.int64)
        self._row[layout.nodes] = np.arange(layout.rows)
        self._choose(player)

    def _choose(self, wanted: PlayerName) -> None:
        """Settle who plays: this never depends on machine or layout."""
        sampling.check(self._sampling, self._problem.records, self._problem.kind)
        nodes, kind = self._layout.nodes, self._problem.kind
        dual = self._table is not None and self._table.dual
        compiles = not dual and self._problem.dtype == torch.float64
        self._compiled = self._problem.compiled(nodes) if compiles else None
        self._gradients = RowGradients(self._problem, nodes, self._sampling, self._seed, self.counts, self._compiled)
        best: PlayerName = "plain" if self._table is None else "kernel" if self._compiled is not None else "waves"
        self.player: PlayerName = best if wanted == "auto" else wanted
        if self._table is None and self.player != "plain":
            raise InputError(f"engine.player: {wanted!r} plays tables of coefficients; this algorithm needs 'plain'")
        if self.player == "kernel" and self._compiled is None:
            why = "dual gradients" if dual else f"problem {kind!r}, which has no compiled gradient"
            raise InputError(f"engine.player: 'kernel' cannot play {why}; use 'waves' or 'auto'")

    @property
    def now(self) -> float:
        """Virtual time reached."""
        return self._now

    @property
    def events(self) -> int:
        """Events played so far."""
        return self._events

    @property
    def row_names(self) -> frozenset[str]:
        """Which arrays of `save` and `final` hold one row per node of this rank."""
        return frozenset([*self.final(), *self.state._fields])

    def start(self) -> None:
        """Set clocks and variables to their start; the gradients and the mean that this takes are charged."""
        table, rows = self._table, self._layout.rows
        everything, ticks = np.arange(len(self._ends)), table is None or table.node_clocks
        self._clocks = Clocks(self._seed, self._layout.nodes, everything, self._ends, self._rates, self._row, ticks)
        self._now, self._events = 0.0, 0
        v = self._start_values()
        depth = np.full(rows, self.counts.exchanges, np.int64)
        self.state = kernel.State(v, np.zeros(rows), np.zeros(rows, np.int64), depth)
        self._player = self._make_player()

    def _start_values(self) -> NDArray:
        x0, table = self._x0, self._table
        gradient = torch.zeros_like(x0)
        mean = gradient[:1]
        if table is None or table.start[:, 1:].any():
            rows = np.arange(len(x0))
            gradient = self._gradients.exact(rows, x0)
        if table is None or table.start[:, 2].any():
            mean = self._mean(gradient)
        if table is None:
            assert isinstance(self._algorithm, EventAlgorithm)
            first = self._algorithm.start(x0, gradient, mean)
            return torch.stack([first[name].expand_as(x0) for name in self._algorithm.variables], dim=1).numpy()
        v = np.empty((len(x0), table.k, x0.shape[1]), x0.numpy().dtype)
        for a, weights in enumerate(table.start):
            v[:, a] = sum(w * term.numpy() for w, term in zip(weights, (x0, gradient, mean), strict=True) if w != 0.0)
        return v

    def _mean(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the mean over all nodes `[1, dim]`; charged as a sum: every node sends one row and receives one."""
        n, counts = self._layout.n, self.counts
        counts.communications += 2 * n
        counts.messages += 2 * n
        counts.bytes += 2 * n * gradient.shape[1] * gradient.element_size()
        counts.exchanges += 2
        return (tree_sum(gradient, self._layout.lo, n) / n)[None]

    def _make_player(self) -> Callable[[Batch], int]:
        """Return what plays a batch and says at which event something was not finite (-1: nowhere)."""
        if self._table is None or self._flow is None:
            assert isinstance(self._algorithm, EventAlgorithm)
            rules: plain.Rules = plain.FunctionRules(self._algorithm)
        elif self.player == "kernel":
            return self._kernel()
        elif self.player == "waves":
            return Waves(self._table, self._flow, self._gradients, self.state).play
        else:
            rules = plain.TableRules(self._table, self._flow, self._gradients)
        return lambda batch: plain.play(rules, self._gradients, self.state, batch)

    def _kernel(self) -> Callable[[Batch], int]:
        assert self._table is not None
        assert self._flow is not None
        assert self._compiled is not None
        table, objective = kernel.table(self._table, self._flow), self._compiled
        room = kernel.scratch(self.state.v)
        data = kernel.data(objective, self._problem.records, self._layout.nodes, self._sampling, self._seed)

        def play(batch: Batch) -> int:
            bad, samples = kernel.play(objective.gradient, self.state, table, data, room, batch)
            played = batch.b if bad < 0 else batch.b[: bad + 1]
            self.counts.gradients += int(np.count_nonzero(played < 0))
            self.counts.samples += samples
            return bad

        return play

    def advance(self, until: float) -> None:
        """Play every event not later than `until`.

        Raises:
            Diverged: a value is not finite; says at which event, time and node this was noticed.
        """
        while self._now < until:
            end = min(self._now + self._clocks.window, until)
            self._play(self._clocks.until(end))
            self._now = end

    def play(self, kind: Ints, a: Ints, b: Ints, time: Reals) -> None:
        """Play a recorded trace instead of the clocks: one entry per event, in order of time.

        Args:
            kind: 0 a gradient of node `a` (`b` is not looked at), 1 an exchange between nodes `a` and `b`.
            a, b: node numbers. time: ascending, from `now` on.

        Raises:
            InputError: an exchange between nodes without an edge, or a time that goes back.
            Diverged: as `advance`.
        """
        times = np.asarray(time, dtype=np.float64)
        if len(times) and np.diff(times, prepend=self._now).min() < 0.0:
            place = int(np.argmax(np.diff(times, prepend=self._now) < 0.0))
            raise InputError(f"trace: event {place} at time {times[place]:g} is earlier than what was played before it")
        self._play(self._batch(np.asarray(kind), np.asarray(a), np.asarray(b), times))
        self._now = float(times[-1]) if len(times) else self._now

    def _batch(self, kind: Ints, a: Ints, b: Ints, time: Reals) -> Batch:
        """Return a trace in rows and edge numbers."""
        number = {(int(u), int(v)): e for e, (u, v) in enumerate(self._ends)}
        edge = np.full(len(time), -1, np.int64)
        for event in np.flatnonzero(kind == 1):
            pair = int(min(a[event], b[event])), int(max(a[event], b[event]))
            if pair not in number:
                raise InputError(f"trace: event {event} is an exchange between {pair[0]} and {pair[1]}, not an edge")
            edge[event] = number[pair]
        return Batch(time, self._row[a], np.where(kind == 1, self._row[b], -1), edge)

    def _play(self, batch: Batch) -> None:
        bad = self._player(batch)
        played = batch.b if bad < 0 else batch.b[: bad + 1]
        exchanges, counts = int(np.count_nonzero(played >= 0)), self.counts
        counts.communications += exchanges
        counts.messages += 2 * exchanges
        counts.bytes += 2 * exchanges * self._problem.dim * self.state.v.itemsize
        counts.exchanges = int(self.state.depth.max())
        self._events += len(played)
        if bad >= 0:
            node = self._layout.topology.label(int(self._layout.nodes[batch.a[bad]]))
            raise Diverged(
                f"event {self._events - 1} at time {float(batch.time[bad]):g}, node {node!r}: a value is not finite."
                " Likely a step size too large for this problem's L, or gossip rates below what the algorithm's theory"
                " needs (`fedsim check` prints both)"
            )

    def outputs(self) -> torch.Tensor:
        """Return every node's answer `[rows, dim]` in position order; not charged, and the run goes on unchanged."""
        now = self._now if self._output == "flowed" else None
        if self._table is None or self._flow is None:
            return self._function_outputs(now)
        last = self.state.last
        state = self.state if now is not None else self.state._replace(last=np.zeros_like(last))
        x = torch.from_numpy(kernel.outputs(state, self._flow, self._table.output, now or 0.0)).to(self._x0.dtype)
        return self._problem.dual_gradient(x, self._layout.nodes) if self._table.dual else x

    def _function_outputs(self, now: float | None) -> torch.Tensor:
        assert isinstance(self._algorithm, EventAlgorithm)
        rows = plain.rows_by_name(self._algorithm.variables, self.state.v.copy())
        if now is not None:
            rows = self._algorithm.flow(rows, torch.from_numpy(now - self.state.last)[:, None])
        return self._algorithm.output(rows).clone()

    def save(self) -> dict[str, np.ndarray]:
        """Return state, clocks and counts: what a resume needs."""
        numbers = np.array([self._events, *self.counts.as_dict().values()], dtype=np.int64)
        return {
            **{name: np.array(array) for name, array in self.state._asdict().items()},
            "now": np.array(self._now),
            "numbers": numbers,
            **self._clocks.save(),
        }

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Go back to what `save` returned, on the same scenario, after `start`."""
        for name, array in self.state._asdict().items():
            array[:] = saved[name]
        self._now, self._events = float(saved["now"]), int(saved["numbers"][0])
        self.counts.restore(dict(zip(self.counts.as_dict(), saved["numbers"][1:].tolist(), strict=True)))
        self._clocks.load(saved)

    def final(self) -> dict[str, np.ndarray]:
        """Return every variable at its node's last event, that event's time, and the gradients taken; `[rows, ...]`."""
        variables = self._table.variables if self._table is not None else getattr(self._algorithm, "variables", ())
        named = {name: self.state.v[:, a] for a, name in enumerate(variables)}
        return {**named, "last event": self.state.last, "gradients": self.state.gradients}
