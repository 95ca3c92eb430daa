"""Plays an asynchronous algorithm: Poisson clocks or a recorded trace, by the fastest player that can."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.algorithms.algorithm import DynamicsAlgorithm, EventAlgorithm
from fedsim.engine import kernel, plain, sampling
from fedsim.engine.budget import NAMES, Budget
from fedsim.engine.clocks import FOREIGN, NOBODY, Batch, Clocks
from fedsim.engine.counts import Counts
from fedsim.engine.crossings import Crossings, everywhere
from fedsim.engine.flow import Flow
from fedsim.engine.gradients import RowGradients
from fedsim.engine.sums import total
from fedsim.engine.waves import Compiled, Waves
from fedsim.errors import Diverged, InputError
from fedsim.job import counts_of_all
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Sampling, Setting
    from fedsim.engine.layout import Layout
    from fedsim.problems.problem import Problem

PlayerName = Literal["auto", "plain", "kernel", "waves"]
Reals = NDArray[np.float64]
Ints = NDArray[np.int64]

GRADIENTS = ("gradient", "mean_gradient")  # what a start may take after x0


class Events:
    """A `Player` of events; see `fedsim.engine.player`. The unit of time is one gradient per node.

    Every player gives the same bits: `kernel` where the problem has compiled gradients, else `waves`, which takes
    gradients in batches; `plain`, one event at a time, is their oracle, and plays every `EventAlgorithm`. Over several
    ranks, `waves` call compiled gradients as they go, and `plain` plays in passes too.

    Args:
        algorithm: resolved. setting: what it was resolved against.
        rates: float64 `[m]`, exchanges per unit of time on each edge.
        x0: `[rows, dim]`, where the rows start.
        sampling: how a node draws the records of a gradient; None: it takes all of them.
        output: `flowed` (the answer at `now`) or `lazy` (as of each node's last event, as some papers' code plots).
        stop: counts that no event may pass.

    Attributes:
        spent: the count whose bound ended the run: no further event is played.

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
        stop: Mapping[str, float] | None = None,
    ) -> None:
        self.counts = Counts()
        self.spent: str | None = None
        self._budget = Budget(stop or {}, layout)
        self._algorithm, self._problem, self._layout, self._x0, self._seed = algorithm, problem, layout, x0, seed
        self._sampling, self._output, self._ends = sampling, output, setting.edges
        self._rates = np.asarray(rates, dtype=np.float64)
        self._table = algorithm.dynamics(setting) if isinstance(algorithm, DynamicsAlgorithm) else None
        if self._table is not None and self._table.edge_scale is not None and len(self._table.edge_scale) != len(rates):
            raise InputError(
                f"Dynamics.edge_scale: {len(self._table.edge_scale)} given, one per edge, {len(rates)}, needed"
            )
        self._flow = None if self._table is None else Flow.of(self._table.flow)
        self._row = np.full(layout.n, FOREIGN, np.int64)
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
        """Events played so far by this rank (an exchange is its first end's)."""
        return self._events

    @property
    def row_names(self) -> frozenset[str]:
        """Which arrays of `save` and `final` hold one row per node of this rank."""
        return frozenset([*self.final(), *self.state._fields, "node_next", "node_count"])

    def start(self) -> None:
        """Set clocks and variables to their start; the gradients and the mean that this takes are charged."""
        table, rows = self._table, self._layout.rows
        ticks, here = table is None or table.node_clocks, np.flatnonzero((self._row[self._ends] >= 0).any(axis=1))
        self._clocks = Clocks(self._seed, self._layout.nodes, here, self._ends, self._rates, self._row, ticks)
        self._now, self._events = 0.0, 0
        v = self._start_values()
        depth = np.full(rows, self.counts.exchanges, np.int64)
        self.state = kernel.State(v, np.zeros(rows), np.zeros(rows, np.int64), depth)
        self._player = self._make_player()
        if self._budget.passed(self.counts):
            name = self._budget.passed(self.counts)
            raise InputError(
                f"stop.{name}: {self._budget.bounds[str(name)]:g} do not cover the start of this algorithm"
            )
        self.spent = self._budget.reached(self.counts)

    def _start_values(self) -> NDArray:
        x0, table, takes = self._x0, self._table, self._start_takes()
        gradient = torch.zeros_like(x0)
        mean = gradient[:1]
        if takes:
            gradient = self._gradients.exact(np.arange(len(x0)), x0)
        if "mean_gradient" in takes:
            mean = self._mean(gradient)
        if table is None:
            assert isinstance(self._algorithm, EventAlgorithm)
            given = {"gradient": gradient, "mean_gradient": mean}
            first = self._algorithm.start(x0, **{name: given[name] for name in takes})
            plain.refuse_missing(self._algorithm, "start", first)
            return torch.stack([first[name].expand_as(x0) for name in self._algorithm.variables], dim=1).numpy()
        v = np.empty((len(x0), table.k, x0.shape[1]), x0.numpy().dtype)
        for a, weights in enumerate(table.start):
            v[:, a] = sum(w * term.numpy() for w, term in zip(weights, (x0, gradient, mean), strict=True) if w != 0.0)
        return v

    def _start_takes(self) -> list[str]:
        """Return which gradients the start takes: only these are computed, and charged."""
        if self._table is not None:
            return [name for column, name in enumerate(GRADIENTS, start=1) if self._table.start[:, column].any()]
        assert isinstance(self._algorithm, EventAlgorithm)
        return gradients_taken(self._algorithm)

    def _mean(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the mean over all nodes `[1, dim]`; charged as a sum: every node sends one row and receives one."""
        rows = self._layout.rows
        self.counts.charge_sum(rows, rows, gradient.nbytes, gradient.nbytes)
        self.counts.exchanges += 2
        return (total(gradient, self._layout) / self._layout.n)[None]

    def _make_player(self) -> Callable[[Batch], int]:
        """Return what plays a batch and says at which event something was not finite (-1: nowhere)."""
        if self._layout.size > 1:
            hand = self._waves() if self.player in ("kernel", "waves") else plain.PlainHand(*self._rules())
            dim, dtype = self._problem.dim, self.state.v.dtype
            return Crossings(hand, self._layout, self._ends, dim, dtype).play
        if self.player == "kernel":
            return self._kernel()
        if self.player == "waves":
            return self._waves().play
        rules = self._rules()
        return lambda batch: plain.play(*rules, batch)

    def _rules(self) -> tuple[plain.Rules, RowGradients, kernel.State]:
        if self._table is None or self._flow is None:
            assert isinstance(self._algorithm, EventAlgorithm)
            return plain.FunctionRules(self._algorithm), self._gradients, self.state
        return plain.TableRules(self._table, self._flow, self._gradients), self._gradients, self.state

    def _waves(self) -> Waves:
        assert self._table is not None
        assert self._flow is not None
        compiled = Compiled(*self._compiled_data()) if self.player == "kernel" else None
        crosses = self._layout.size > 1
        return Waves(self._table, self._flow, self._gradients, self.state, self.counts, compiled, crosses)

    def _compiled_data(self) -> tuple[Any, kernel.Data]:
        assert self._compiled is not None
        records, nodes = self._problem.records, self._layout.nodes
        return self._compiled.gradient, kernel.data(self._compiled, records, nodes, self._sampling, self._seed)

    def _kernel(self) -> Callable[[Batch], int]:
        assert self._table is not None
        assert self._flow is not None
        table, room = kernel.table(self._table, self._flow), kernel.scratch(self.state.v)
        gradient, data = self._compiled_data()

        def play(batch: Batch) -> int:
            bad, samples = kernel.play(gradient, self.state, table, data, room, batch)
            played = batch.b if bad < 0 else batch.b[: bad + 1]
            self.counts.gradients += int(np.count_nonzero(played == NOBODY))
            self.counts.samples += samples
            return bad

        return play

    def advance(self, until: float) -> None:
        """Play every event not later than `until`.

        Raises:
            Diverged: a value is not finite; says at which event, time and node this was noticed.
        """
        while self._now < until and not self.spent:
            end = min(self._now + self._clocks.window, until)
            batch = self._clocks.until(end)
            if self._budget:
                batch, end = self._within_budget(batch, end)
            self._play(batch)
            self._now = end

    def _within_budget(self, batch: Batch, end: float) -> tuple[Batch, float]:
        """Return the events that may be played, and when they end: at the last one, where the budget does."""
        own = batch.counted_here()
        if not self._budget.near(self.counts, self._costs(own, bound=True)):
            return batch, end
        found = self._budget.last_allowed(self.counts, own.time, self._costs(own))
        if found is None:
            return batch, end
        last, self.spent = found
        return batch.part(0, int(np.searchsorted(batch.time, last, side="right"))), max(last, self._now)

    def _costs(self, own: Batch, bound: bool = False) -> dict[str, Any]:
        """Return what each event of this rank costs, or (`bound`) what all can cost at most, by the count's name."""
        steps, pairs = own.b == NOBODY, own.b != NOBODY
        dual = self._table is not None and self._table.dual
        message = self._problem.dim * self.state.v.itemsize
        costs = {name: np.zeros(len(own.time), np.int64) for name in NAMES}
        costs |= {"gradients": steps.astype(np.int64), "dual_gradients": 2 * dual * pairs}
        costs |= {"communications": pairs.astype(np.int64), "messages": 2 * pairs, "bytes": 2 * message * pairs}
        if "samples" in self._budget.bounds:
            rows = own.a[steps]
            sizes = self._gradients.most_samples(rows) if bound else self._gradients.samples(rows, self._drawn(rows))
            costs["samples"][steps] = sizes
        return {name: int(c.sum()) if bound else c for name, c in costs.items()}

    def _drawn(self, rows: Ints) -> Ints:
        """Return how many gradients each row has taken before, for a sequence of rows in order of their events."""
        drawn = np.empty(len(rows), np.int64)
        for row in np.unique(rows):
            places = np.flatnonzero(rows == row)
            drawn[places] = self.state.gradients[row] + np.arange(len(places))
        return drawn

    def play(self, kind: Ints, a: Ints, b: Ints, time: Reals) -> None:
        """Play a recorded trace instead of the clocks, which go on after it: one entry per event, in order of time.

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
        self._clocks.until(self._now)

    def _batch(self, kind: Ints, a: Ints, b: Ints, time: Reals) -> Batch:
        """Return a trace in rows and edge numbers."""
        number = {(int(u), int(v)): e for e, (u, v) in enumerate(self._ends)}
        edge = np.full(len(time), -1, np.int64)
        for event in np.flatnonzero(kind == 1):
            pair = int(min(a[event], b[event])), int(max(a[event], b[event]))
            if pair not in number:
                raise InputError(f"trace: event {event} is an exchange between {pair[0]} and {pair[1]}, not an edge")
            edge[event] = number[pair]
        first, second = self._row[a], np.where(kind == 1, self._row[b], NOBODY)
        here = (first >= 0) | (second >= 0)
        return Batch(time[here], first[here], second[here], edge[here])

    def _play(self, batch: Batch) -> None:
        bad = self._player(batch)
        own = batch.a >= 0 if bad < 0 else batch.a[: bad + 1] >= 0  # an exchange is counted where its first end is
        exchanges, counts = int(np.count_nonzero(own & (batch.b[: len(own)] != NOBODY))), self.counts
        counts.communications += exchanges
        counts.messages += 2 * exchanges
        counts.bytes += 2 * exchanges * self._problem.dim * self.state.v.itemsize
        counts.exchanges = int(self.state.depth.max())
        self._refuse_divergence(batch, bad)
        self._events += int(np.count_nonzero(own))

    def _refuse_divergence(self, batch: Batch, bad: int) -> None:
        """Raise, on every rank, if a value of any rank is not finite."""
        row = max(batch.a[bad], batch.b[bad]) if bad >= 0 else -1
        time = float(batch.time[bad]) if bad >= 0 else math.inf
        node = int(self._layout.nodes[row]) if bad >= 0 else -1
        number = self._events + bad
        if self._layout.size > 1:
            time, node, number = everywhere(time, node, lambda t: self._events + _earlier(batch, t), self._layout)
        if time < math.inf:
            raise Diverged(
                f"event {number} at time {time:g}, node {self._layout.topology.label(node)!r}: a value is not finite."
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

    def measures(self) -> dict[str, float]:
        """Return nothing: an event's state is what is observed."""
        return {}

    def facts(self) -> dict[str, Any]:
        """Return who plays."""
        return {"player": self.player}

    def _function_outputs(self, now: float | None) -> torch.Tensor:
        assert isinstance(self._algorithm, EventAlgorithm)
        rows = plain.rows_by_name(self._algorithm.variables, self.state.v.copy())
        if now is not None:
            rows = self._algorithm.flow(rows, torch.from_numpy(now - self.state.last)[:, None])
        return self._algorithm.output(rows).clone()

    def save(self) -> dict[str, np.ndarray]:
        """Return state, clocks and counts of all ranks (which all call this): what a resume needs."""
        counts = counts_of_all(self.counts, self._layout)
        return {
            **{name: np.array(array) for name, array in self.state._asdict().items()},
            "now": np.array(self._now),
            "numbers": np.array([*self._all_events(), *counts.values()], dtype=np.int64),
            **self._all_edges(self._clocks.save()),
        }

    def _all_events(self) -> list[int]:
        mine = np.array([self._events], np.int64)
        return [sum(int(part.view(np.int64)[0]) for part in self._layout.transport.all_gather(as_bytes(mine)))]

    def _all_edges(self, saved: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the clocks with the edges of all ranks; every rank sends those whose first end it holds."""
        own = self._own_edges()
        places = [part.view(np.int64) for part in self._layout.transport.all_gather(as_bytes(own))]
        for name in ("edge_next", "edge_count"):
            parts = self._layout.transport.all_gather(as_bytes(saved[name][own]))
            for place, part in zip(places, parts, strict=True):
                saved[name][place] = part.view(saved[name].dtype)
        return saved

    def _own_edges(self) -> Ints:
        """Return the edges whose clocks this rank saves: those whose first end it holds."""
        return np.flatnonzero(self._row[self._ends[:, 0]] >= 0)

    def load(self, saved: dict[str, np.ndarray]) -> None:
        """Go back to what `save` returned, on the same scenario, after `start`."""
        for name, array in self.state._asdict().items():
            array[:] = saved[name]
        self._now, lead = float(saved["now"]), self._layout.rank == 0  # events and counts are added up over ranks
        self._events = int(saved["numbers"][0]) if lead else 0
        counts = saved["numbers"][1:] if lead else np.zeros_like(saved["numbers"][1:])
        self.counts.restore(dict(zip(self.counts.as_dict(), counts.tolist(), strict=True)))
        self._clocks.load(saved)

    def final(self) -> dict[str, np.ndarray]:
        """Return every variable at its node's last event, that event's time, and the gradients taken; `[rows, ...]`."""
        variables = self._table.variables if self._table is not None else getattr(self._algorithm, "variables", ())
        named = {name: self.state.v[:, a] for a, name in enumerate(variables)}
        return {**named, "last event": self.state.last, "gradients": self.state.gradients}


def _earlier(batch: Batch, time: float) -> int:
    """Return how many events whose first end is here come before a time."""
    return int(np.count_nonzero((batch.a >= 0) & (batch.time < time)))


def gradients_taken(algorithm: EventAlgorithm) -> list[str]:
    """Return which gradients an own start takes: the parameters after `x0`; InputError where one is unknown."""
    taken = list(signature(algorithm.start).parameters)[1:]
    for name in taken:
        if name not in GRADIENTS:
            raise InputError(
                f"{type(algorithm).__name__}.start: parameter {name!r} is unknown; after x0 it may take "
                f"{', '.join(GRADIENTS)}"
            )
    return taken
