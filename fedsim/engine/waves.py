"""Plays events in waves: answers that do not wait for each other are computed, or sent for, together.

A node plays its own events in order; an event waits for nothing but the previous event of its nodes. So a pass over
the events that are left, in order of time, plays every one whose nodes are free. A gradient of the problem's own code
is read now and computed in one batch with others; an exchange with a node of another rank leaves its message behind
(`fedsim.engine.crossings` carries it). A node whose answer is awaited, and whoever would meet it, waits for the next
pass. The bits are those of the plain loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.engine.clocks import FOREIGN, NOBODY
from fedsim.engine.kernel import Data, State, apply, begin, end, gossip, move, read, scratch, take, with_gradient
from fedsim.engine.kernel import table as arrays_of

if TYPE_CHECKING:
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.engine.clocks import Batch
    from fedsim.engine.counts import Counts
    from fedsim.engine.crossings import Inbox
    from fedsim.engine.flow import Flow
    from fedsim.engine.gradients import RowGradients

Ints = NDArray[np.int64]


class Wave(NamedTuple):
    """Answers that nodes wait for.

    Attributes:
        event, row: `[rows]`, of each awaited gradient; an exchange of dual gradients awaits two, one after the other.
        point: `[rows, dim]`, where each is taken. busy: `[rows]`, who must not be touched in this pass.
        begun: `[rows]`, exchanges with other ranks that this pass began. away: `[rows]`, who waits for such an answer.
        message: `[rows * dim]` (nothing with one rank), what these sent.
    """

    event: Ints
    row: Ints
    point: NDArray
    busy: NDArray[np.bool_]
    begun: Ints
    away: NDArray[np.bool_]
    message: NDArray


class Compiled(NamedTuple):
    """A gradient that passes call as they go, and what it needs."""

    gradient: Any
    data: Data


class Waves:
    """Plays a table of coefficients.

    Args:
        gradients: the problem's gradients, in batches of rows.
        counts: where gradients and samples of `compiled` are added.
        compiled: the problem's compiled gradient, played within passes; None: `gradients` are asked.
        crosses: True: some events have a node on another rank.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        flow: Flow,
        gradients: RowGradients,
        state: State,
        counts: Counts,
        compiled: Compiled | None = None,
        crosses: bool = False,
    ) -> None:
        rows, _, dim = state.v.shape
        self._dual, self._gradients, self._state, self._counts = dynamics.dual, gradients, state, counts
        self._inline = compiled
        flat = state._replace(v=state.v.reshape(-1))
        self._compiled = flat, arrays_of(dynamics, flow), scratch(state.v)
        self._begun = np.zeros(0, np.int64)
        self._wave = Wave(
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros((0 if compiled else rows, dim), state.v.dtype),
            np.zeros(rows, bool),
            np.zeros(rows, np.int64),
            np.zeros(rows, bool),
            np.zeros(rows * dim if crosses else 0, state.v.dtype),
        )

    def play(self, batch: Batch) -> int:
        """Play a batch of events; return the place of the first at which something was not finite, or -1."""
        left, bad = np.arange(len(batch.time)), len(batch.time)
        while len(left):
            left, worst = self.step(batch, left)
            if worst < bad:  # what happened before it is still worth knowing
                bad, left = worst, left[left < worst]
        return bad if bad < len(batch.time) else -1

    def step(self, batch: Batch, left: Ints) -> tuple[Ints, int]:
        """Play what can be played of the events `left`; return the rest and the first bad event (else their number)."""
        left, rest = left.copy(), (self._wave, self._dual)
        if self._inline:
            gradient, data = self._inline
            found = with_gradient(_pass, gradient, *self._compiled, data, batch, left, *rest)
        else:
            found = _pass_that_waits(None, *self._compiled, None, batch, left, *rest)
        kept, awaited, begun, taken, samples, worst = found
        self._counts.gradients += taken
        self._counts.samples += samples
        self._begun = self._wave.begun[:begun].copy()
        if awaited:
            worst = min(worst, self._answer(batch, awaited))
        return left[:kept], worst

    def sent(self, batch: Batch) -> tuple[Ints, NDArray, Ints]:
        """Return the exchanges with other ranks that the last step began: events, messages `[., dim]`, depths."""
        rows = np.maximum(batch.a[self._begun], batch.b[self._begun])
        messages = self._wave.message.reshape(-1, self._state.v.shape[2])
        return self._begun, messages[rows], self._state.depth[rows]

    def meet(self, batch: Batch, events: Ints, inbox: Inbox, slots: Ints) -> int:
        """End exchanges with what other ranks sent, at `slots` of the inbox; return the first bad event."""
        state, table, room = self._compiled
        return _meet(state, table, room, batch, events, self._wave, inbox.message.reshape(-1), inbox.depth, slots)

    def _answer(self, batch: Batch, awaited: int) -> int:
        """Compute what is awaited, let the events end with it, and return the first that is not finite."""
        rows = self._wave.row[:awaited]
        points = torch.from_numpy(self._wave.point[:awaited])
        meets = batch.b[self._wave.event[:awaited]] != NOBODY
        answers = np.empty_like(self._wave.point[:awaited])
        if not meets.all():
            chosen = rows[~meets]
            answers[~meets] = self._gradients.primal(
                chosen, points[torch.from_numpy(~meets)], self._state.gradients[chosen]
            )
        if meets.any():
            answers[meets] = self._gradients.dual(rows[meets], points[torch.from_numpy(meets)])
        begun, bad = _finish(*self._compiled, batch, self._wave, awaited, answers)
        if begun:
            self._begun = self._wave.begun[:begun].copy()
        return bad


def _pass(gradient, state, table, room, data, batch, left, wave, dual):  # pragma: no cover - compiled
    """Play what can be played; without `data`, gradients are waited for.

    Returns how many events are left, answers awaited, exchanges begun, gradients taken, their records, and the first
    bad event.
    """
    kept, awaited, begun, taken, samples, bad = 0, 0, 0, 0, 0, len(batch.time)
    wave.busy[:] = wave.away
    for place in range(len(left)):
        event = left[place]
        i, j, t = batch.a[event], batch.b[event], batch.time[event]
        good, waits = True, True
        if (i >= 0 and wave.busy[i]) or (j >= 0 and wave.busy[j]):
            left[kept] = event
            kept += 1
        elif j == NOBODY and data is not None:
            good, cost = take(gradient, state, table, data, room, i, t)
            taken, samples, waits = taken + 1, samples + cost, False
        elif (i == FOREIGN or j == FOREIGN) and not dual:
            begin(state, table, room, max(i, j), t, wave.message, max(i, j) * len(room.x))
            wave.away[max(i, j)] = True
            wave.begun[begun] = event
            begun += 1
        elif j != NOBODY and not dual:
            good, waits = gossip(state, table, room, i, j, batch.edge[event], t), False
        else:
            for row in (i, j):
                if row >= 0:
                    read(state, table, room, row, t)
                    wave.event[awaited], wave.row[awaited] = event, row
                    wave.point[awaited] = room.x
                    awaited += 1
        if waits and i >= 0:
            wave.busy[i] = True
        if waits and j >= 0:
            wave.busy[j] = True
        if not good:
            bad = min(bad, event)
    return kept, awaited, begun, taken, samples, bad


_pass_that_waits = njit(cache=True, error_model="numpy")(_pass)


@njit(cache=True, error_model="numpy")
def _finish(state, table, room, batch, wave, awaited, answers):  # pragma: no cover - compiled
    """End the events with their answers, or begin them with these; return how many began, and the first bad event."""
    begun, bad, place, dim = 0, len(batch.time), 0, len(room.x)
    while place < awaited:
        event, row, good = wave.event[place], wave.row[place], True
        if batch.b[event] == NOBODY:
            room.g[:] = answers[place]
            good = apply(state, table, room, row)
        elif batch.a[event] == FOREIGN or batch.b[event] == FOREIGN:
            wave.message[row * dim : (row + 1) * dim] = answers[place]
            wave.away[row] = True
            wave.begun[begun] = event
            begun += 1
        else:
            room.g[:] = answers[place]
            room.x[:] = answers[place + 1]
            good = move(state, table, room, row, wave.row[place + 1], batch.edge[event])
            place += 1
        place += 1
        if not good:
            bad = min(bad, event)
    return begun, bad


@njit(cache=True, error_model="numpy")
def _meet(state, table, room, batch, events, wave, inbox, depths, slots):  # pragma: no cover - compiled
    """End exchanges with other ranks; both ends take the first end's message minus the second's."""
    bad, dim = len(batch.time), len(room.x)
    for place in range(len(events)):
        event, slot = events[place], slots[place]
        first = batch.a[event] >= 0
        row = batch.a[event] if first else batch.b[event]
        wave.away[row] = False
        sign, edge, at = 1.0 if first else -1.0, batch.edge[event], slot * dim
        if not end(state, table, room, row, edge, sign, wave.message, row * dim, inbox, at, depths[slot]):
            bad = min(bad, event)
    return bad
