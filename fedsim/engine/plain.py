"""The plain loop over events in time order, one at a time: the meaning of an event, and the oracle of faster players.

It plays any `Dynamics` (in NumPy, in the order of operations that the compiled players keep to the bit) and any
`EventAlgorithm` (in torch, as functions of one row).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedsim.engine.clocks import FOREIGN, NOBODY
from fedsim.engine.flow import Flow
from fedsim.engine.kernel import decayed
from fedsim.errors import RunError

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import EventAlgorithm
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.engine.clocks import Batch
    from fedsim.engine.crossings import Inbox
    from fedsim.engine.gradients import RowGradients
    from fedsim.engine.kernel import State

Reals = NDArray[np.float64]
Ints = NDArray[np.int64]


class Rules(Protocol):
    """What events do to the state of one node, `v [k, dim]`, in place."""

    def flow(self, v: Reals, elapsed: float) -> None:
        """Let `elapsed` units of time pass."""
        ...

    def point(self, v: Reals) -> Reals:
        """Return where the gradient is taken, `[dim]`."""
        ...

    def gradient(self, v: Reals, g: Reals, count: int) -> Reals:
        """Take a gradient event with gradient g, the node's number `count`; return what must be finite."""
        ...

    def message(self, v: Reals, row: int) -> Reals:
        """Return what is sent, `[dim]`."""
        ...

    def gossip(self, v: Reals, own: Reals, other: Reals, edge: int) -> None:
        """Take a gossip event: `own` was sent over this edge, `other` received."""
        ...


def play(rules: Rules, gradients: RowGradients, state: State, batch: Batch) -> int:
    """Play a batch of events; return the place of the first at which something was not finite, or -1."""
    with np.errstate(all="ignore"):
        for event, (t, i, j, edge) in enumerate(zip(*batch, strict=True)):
            if j < 0:
                good = _gradient(rules, gradients, state, int(i), t)
            else:
                good = _gossip(rules, state, int(i), int(j), int(edge), t)
            if not good:
                return event
    return -1


class PlainHand:
    """Plays the events of one rank's rows in passes; see `fedsim.engine.crossings.Hand`."""

    def __init__(self, rules: Rules, gradients: RowGradients, state: State) -> None:
        self._rules, self._gradients, self._state = rules, gradients, state
        self._away = np.zeros(len(state.v), bool)
        self._sent: dict[int, Reals] = {}
        self._begun: list[int] = []

    def step(self, batch: Batch, left: Ints) -> tuple[Ints, int]:
        """Play what can be played; return what is left, and the first event that was not finite (else their number)."""
        rest, busy, bad = [], self._away.copy(), len(batch.time)
        self._begun = []
        for event in left.tolist():
            here = [row for row in (int(batch.a[event]), int(batch.b[event])) if row >= 0]
            if busy[here].any():
                busy[here] = True
                rest.append(event)
            elif batch.a[event] == FOREIGN or batch.b[event] == FOREIGN:
                self._begin(event, here[0], float(batch.time[event]))
                busy[here] = True
            elif not self._play(batch, event):
                bad = min(bad, event)
        return np.array(rest, np.int64), bad

    def _play(self, batch: Batch, event: int) -> bool:
        i, j, t = int(batch.a[event]), int(batch.b[event]), float(batch.time[event])
        with np.errstate(all="ignore"):
            if j == NOBODY:
                return _gradient(self._rules, self._gradients, self._state, i, t)
            return _gossip(self._rules, self._state, i, j, int(batch.edge[event]), t)

    def _begin(self, event: int, row: int, t: float) -> None:
        _elapse(self._rules, self._state, row, t)
        self._sent[row] = self._rules.message(self._state.v[row], row)
        self._away[row] = True
        self._begun.append(event)

    def sent(self, batch: Batch) -> tuple[Ints, NDArray, Ints]:
        """Return what the last step began with other ranks: events, messages `[., dim]`, depths."""
        events = np.array(self._begun, np.int64)
        rows = np.maximum(batch.a[events], batch.b[events])
        messages = np.stack([self._sent[row] for row in rows.tolist()]) if len(rows) else np.empty((0, 0))
        return events, messages, self._state.depth[rows]

    def meet(self, batch: Batch, events: Ints, inbox: Inbox, slots: Ints) -> int:
        """End exchanges with the messages at `slots` of the inbox; return the first bad event."""
        bad = len(batch.time)
        for event, slot in zip(events.tolist(), slots.tolist(), strict=True):
            row = max(int(batch.a[event]), int(batch.b[event]))
            own, other = self._sent.pop(row), inbox.message[slot].copy()
            with np.errstate(all="ignore"):
                self._rules.gossip(self._state.v[row], own, other, int(batch.edge[event]))
            self._state.depth[row] = max(self._state.depth[row], inbox.depth[slot]) + 1
            self._away[row] = False
            if not np.isfinite(own - other).all():
                bad = min(bad, event)
        return bad


def _elapse(rules: Rules, state: State, i: int, t: float) -> None:
    rules.flow(state.v[i], t - state.last[i])
    state.last[i] = t


def _gradient(rules: Rules, gradients: RowGradients, state: State, i: int, t: float) -> bool:
    _elapse(rules, state, i, t)
    x = torch.from_numpy(rules.point(state.v[i])[None])
    g = gradients.primal(np.array([i]), x, state.gradients[i : i + 1])[0].numpy()
    e = rules.gradient(state.v[i], g, int(state.gradients[i]))
    state.gradients[i] += 1
    return bool(np.isfinite(e).all())


def _gossip(rules: Rules, state: State, i: int, j: int, edge: int, t: float) -> bool:
    for node in (i, j):
        _elapse(rules, state, node, t)
    m_i, m_j = rules.message(state.v[i], i), rules.message(state.v[j], j)
    rules.gossip(state.v[i], m_i, m_j, edge)
    rules.gossip(state.v[j], m_j, m_i, edge)
    state.depth[i] = state.depth[j] = max(state.depth[i], state.depth[j]) + 1
    return bool(np.isfinite(m_i - m_j).all())


class TableRules:
    """The rules of a table of coefficients; every result is rounded to the type of the state as it is stored."""

    def __init__(self, table: Dynamics, flow: Flow, gradients: RowGradients) -> None:
        self._t, self._flow, self._gradients = table, flow, gradients
        self._decay = np.array(table.decay if table.decay is not None else (0.0, 0.0))

    def flow(self, v: Reals, elapsed: float) -> None:
        """`v <- exp(A elapsed) v`."""
        if elapsed != 0.0 and not self._flow.still:
            v[:] = _times(self._flow.at(elapsed), self._flow.pattern, v)

    def point(self, v: Reals) -> Reals:
        """`point . v`."""
        return _weighted(self._t.point, v)

    def gradient(self, v: Reals, g: Reals, count: int) -> Reals:
        """`e = g + residual . v`; `v <- gradient_map v + decay * gradient_jump (x) e`."""
        e = g.copy()
        _add(e, self._t.residual, v)
        if self._t.gradient_map is not None:
            v[:] = _times(self._t.gradient_map, np.ones((len(v), len(v)), bool), v)
        _jump(v, decayed(count, self._decay) * self._t.gradient_jump, e)
        return e

    def message(self, v: Reals, row: int) -> Reals:
        """`message . v`, or `grad f_i^*(point . v)` for dual methods."""
        if not self._t.dual:
            return _weighted(self._t.message, v)
        s = torch.from_numpy(_weighted(self._t.point, v)[None])
        return self._gradients.dual(np.array([row]), s)[0].numpy()

    def gossip(self, v: Reals, own: Reals, other: Reals, edge: int) -> None:
        """`v += (gossip_jump + edge_scale edge_jump) (x) (own - other)`."""
        jump = self._t.gossip_jump
        if self._t.edge_jump is not None and self._t.edge_scale is not None:
            jump = jump + self._t.edge_scale[edge] * self._t.edge_jump
        _jump(v, jump, own - other)


def _times(matrix: Reals, used: NDArray[np.bool_], v: Reals) -> Reals:
    """Return `matrix v`, every sum over ascending columns, without the entries that are not used."""
    out = np.empty(v.shape)
    for a, row in enumerate(matrix):
        first, *others = np.flatnonzero(used[a])
        out[a] = row[first] * v[first]
        for b in others:
            out[a] += row[b] * v[b]
    return out


def _add(out: Reals, weights: Reals, v: Reals) -> None:
    for weight, row in zip(weights, v, strict=True):
        if weight != 0.0:
            out += weight * row


def _weighted(weights: Reals, v: Reals) -> Reals:
    used = np.flatnonzero(weights)
    if len(used) == 0:
        return np.zeros(v.shape[1], v.dtype)
    out = (weights[used[0]] * v[used[0]]).astype(v.dtype)
    _add(out, weights[used[1:]], v[used[1:]])
    return out


def _jump(v: Reals, jump: Reals, d: Reals) -> None:
    for a, factor in enumerate(jump):
        if factor != 0.0:
            v[a] += factor * d


class FunctionRules:
    """The rules of an algorithm that is written as functions of rows."""

    def __init__(self, algorithm: EventAlgorithm) -> None:
        self._algorithm = algorithm

    def flow(self, v: Reals, elapsed: float) -> None:
        """The algorithm's own flow."""
        if elapsed != 0.0:
            self._set(v, "flow", self._algorithm.flow(self._rows(v), torch.full((1, 1), elapsed, dtype=torch.float64)))

    def point(self, v: Reals) -> Reals:
        """The algorithm's own point."""
        return self._algorithm.point(self._rows(v))[0].numpy()

    def gradient(self, v: Reals, g: Reals, count: int) -> Reals:
        """The algorithm's own gradient event."""
        number = torch.full((1, 1), count, dtype=torch.int64)
        self._set(v, "gradient", self._algorithm.gradient(self._rows(v), torch.from_numpy(g[None]), number))
        return v

    def message(self, v: Reals, row: int) -> Reals:
        """The algorithm's own message; RunError where it is not what is charged for."""
        sent = self._algorithm.message(self._rows(v))
        if tuple(sent.shape) != (1, v.shape[1]):
            who = type(self._algorithm).__name__
            raise RunError(f"{who}.message of one node: shape {tuple(sent.shape)}, (1, {v.shape[1]}) needed")
        return sent[0].numpy().copy()

    def gossip(self, v: Reals, own: Reals, other: Reals, edge: int) -> None:
        """The algorithm's own gossip event."""
        sent, received = torch.from_numpy(own[None]), torch.from_numpy(other[None])
        self._set(v, "gossip", self._algorithm.gossip(self._rows(v), sent, received))

    def _rows(self, v: Reals) -> dict[str, torch.Tensor]:
        return rows_by_name(self._algorithm.variables, v[None])

    def _set(self, v: Reals, function: str, new: dict[str, torch.Tensor]) -> None:
        refuse_missing(self._algorithm, function, new)
        values = [new[name][0].numpy().copy() for name in self._algorithm.variables]
        for a, value in enumerate(values):
            v[a] = value


def refuse_missing(algorithm: EventAlgorithm, function: str, new: dict[str, torch.Tensor]) -> None:
    """Refuse what an own function returned without a value for every variable; RunError names those that lack one."""
    lacking = [name for name in algorithm.variables if name not in new]
    if lacking:
        raise RunError(
            f"{type(algorithm).__name__}.{function} returned {', '.join(new) or 'nothing'} without "
            f"{', '.join(lacking)}: every variable is needed, those left as they were too"
        )


def rows_by_name(variables: tuple[str, ...], v: Reals) -> dict[str, torch.Tensor]:
    """Return views of `v [rows, k, dim]` by variable, each `[rows, dim]`."""
    return {name: torch.from_numpy(v[:, a]) for a, name in enumerate(variables)}
