"""Plays events in waves: gradients that do not wait for each other are computed in one batch.

A node plays its own events in order; an event waits for nothing but the previous event of its nodes. So a pass over
the events that are left, in order of time, plays every gossip event whose nodes are free and reads the point of every
gradient whose node is free; a node whose answer is awaited, and whoever would meet it, waits for the next pass. The
bits are those of the plain loop.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

from fedsim.engine.kernel import State, apply, gossip, move, read, scratch
from fedsim.engine.kernel import table as arrays_of

if TYPE_CHECKING:
    from fedsim.algorithms.dynamics import Dynamics
    from fedsim.engine.clocks import Batch
    from fedsim.engine.flow import Flow
    from fedsim.engine.gradients import RowGradients

Ints = NDArray[np.int64]


class Wave(NamedTuple):
    """Answers that nodes wait for.

    Attributes:
        event, row: of each awaited answer; an exchange of dual gradients awaits two, one after the other.
        point: `[rows, dim]`, where each is taken. busy: `[rows]`, who must not be touched in this pass.
    """

    event: Ints
    row: Ints
    point: NDArray
    busy: NDArray[np.bool_]


class Waves:
    """Plays a table of coefficients over a problem whose gradients are taken in batches of rows."""

    def __init__(self, dynamics: Dynamics, flow: Flow, gradients: RowGradients, state: State) -> None:
        rows, _, dim = state.v.shape
        self._dual, self._gradients, self._state = dynamics.dual, gradients, state
        flat = state._replace(v=state.v.reshape(-1))
        self._compiled = flat, arrays_of(dynamics, flow), scratch(state.v)
        self._wave = Wave(
            np.zeros(rows, np.int64),
            np.zeros(rows, np.int64),
            np.zeros((rows, dim), state.v.dtype),
            np.zeros(rows, bool),
        )

    def play(self, batch: Batch) -> int:
        """Play a batch of events; return the place of the first at which something was not finite, or -1."""
        left, bad = np.arange(len(batch.time)), len(batch.time)
        while len(left):
            kept, awaited, worst = _pass(*self._compiled, batch, left, self._wave, self._dual)
            left = left[:kept]
            if awaited:
                worst = min(worst, self._answer(batch, awaited))
            if worst < bad:  # what happened before it is still worth knowing
                bad, left = worst, left[left < worst]
        return bad if bad < len(batch.time) else -1

    def _answer(self, batch: Batch, awaited: int) -> int:
        """Compute what is awaited, let the events end with it, and return the first that is not finite."""
        rows = self._wave.row[:awaited]
        points = torch.from_numpy(self._wave.point[:awaited])
        meets = batch.b[self._wave.event[:awaited]] >= 0
        answers = np.empty_like(self._wave.point[:awaited])
        if not meets.all():
            chosen = rows[~meets]
            answers[~meets] = self._gradients.primal(
                chosen, points[torch.from_numpy(~meets)], self._state.gradients[chosen]
            )
        if meets.any():
            answers[meets] = self._gradients.dual(rows[meets], points[torch.from_numpy(meets)])
        return _finish(*self._compiled, batch, self._wave.event[:awaited], rows, answers)


@njit(cache=True, error_model="numpy")
def _pass(state, table, room, batch, left, wave, dual):  # pragma: no cover - compiled
    """Play what can be played; return how many events are left, how many answers are awaited, the first bad event."""
    kept, awaited, bad = 0, 0, len(batch.time)
    wave.busy[:] = False
    for place in range(len(left)):
        event = left[place]
        i, j, t = batch.a[event], batch.b[event], batch.time[event]
        if wave.busy[i] or (j >= 0 and wave.busy[j]):
            left[kept] = event
            kept += 1
        elif j >= 0 and not dual:
            if not gossip(state, table, room, i, j, batch.edge[event], t):
                bad = min(bad, event)
            continue
        else:
            for row in (i, j):
                if row >= 0:
                    read(state, table, room, row, t)
                    wave.event[awaited], wave.row[awaited] = event, row
                    wave.point[awaited] = room.x
                    awaited += 1
        wave.busy[i] = True
        if j >= 0:
            wave.busy[j] = True
    return kept, awaited, bad


@njit(cache=True, error_model="numpy")
def _finish(state, table, room, batch, events, rows, answers):  # pragma: no cover - compiled
    """End the events with their answers; return the first that is not finite."""
    bad, place = len(batch.time), 0
    while place < len(events):
        event, row = events[place], rows[place]
        if batch.b[event] < 0:
            room.g[:] = answers[place]
            good = apply(state, table, room, row)
            place += 1
        else:
            room.g[:] = answers[place]
            room.x[:] = answers[place + 1]
            good = move(state, table, room, row, rows[place + 1], batch.edge[event])
            place += 2
        if not good:
            bad = min(bad, event)
    return bad
