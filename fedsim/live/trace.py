"""What every node did, in its own order: enough to play a live run again in one process, to the same bits."""

from __future__ import annotations

import io
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, RunError
from fedsim.live.moves import ACCEPT, ANSWER, APPLY, OFFER, READ, Moves
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.gradients import RowGradients
    from fedsim.engine.layout import Layout

FOLDER = "trace"


class Trace(NamedTuple):
    """Entries, each node's in its order: node number, kind, time (the node's own), edge, number of the offer."""

    node: NDArray[np.int32]
    kind: NDArray[np.int8]
    time: NDArray[np.float64]
    edge: NDArray[np.int32]
    number: NDArray[np.int64]


class Log:
    """Entries as they happen; the caller holds the lock under which they do."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int, float, int, int]] = []

    def add(self, node: int, kind: int, time: float, edge: int = -1, number: int = -1) -> None:
        """Remember one entry."""
        self._entries.append((node, kind, time, edge, number))

    def take(self) -> Trace:
        """Return the entries since the last time, and forget them."""
        node, kind, time, edge, number = list(zip(*self._entries, strict=True)) or [()] * 5
        self._entries = []
        integers = np.array(node, np.int32), np.array(kind, np.int8)
        return Trace(*integers, np.array(time, np.float64), np.array(edge, np.int32), np.array(number, np.int64))


def write(root: Path, part: int, mine: Trace, layout: Layout) -> None:
    """Write the entries of all ranks (which all call this) as one part; rank 0 writes."""
    buffer = io.BytesIO()
    np.savez(buffer, **mine._asdict())
    parts = layout.transport.all_gather(as_bytes(np.frombuffer(buffer.getvalue(), np.uint8)))
    if layout.rank > 0:
        return
    loaded = [_read(io.BytesIO(part.tobytes())) for part in parts]
    whole = Trace(*(np.concatenate(columns) for columns in zip(*loaded, strict=True)))
    (root / FOLDER).mkdir(exist_ok=True)
    place = root / FOLDER / f"{part:06d}.npz"
    with open(place.with_suffix(".tmp"), "wb") as file:
        np.savez(file, **whole._asdict())
    place.with_suffix(".tmp").rename(place)


def load(root: Path, parts: int) -> Trace:
    """Return a run's whole trace, of so many parts (others were written before an interruption, and again after it).

    Raises:
        InputError: it recorded none.
    """
    places = [root / FOLDER / f"{part:06d}.npz" for part in range(parts)]
    if not parts or not all(place.exists() for place in places):
        raise InputError(f"{root}: no whole trace; only finished live runs (schedule: {{kind: live}}) have one")
    return Trace(*(np.concatenate(columns) for columns in zip(*map(_read, places), strict=True)))


def _read(source: Path | io.BytesIO) -> Trace:
    with np.load(source, allow_pickle=False) as file:
        return Trace(*(file[name] for name in Trace._fields))


class Replay:
    """Plays a trace, every node in its own order: who accepts waits for the offer, who is answered for that."""

    def __init__(
        self, trace: Trace, moves: Moves, gradients: RowGradients, row: NDArray[np.int64], ends: NDArray
    ) -> None:
        self._moves, self._gradients, self._row, self._ends = moves, gradients, row, ends
        order = np.argsort(trace.node, kind="stable")
        cuts = np.flatnonzero(np.diff(trace.node[order])) + 1
        self._queues = {int(trace.node[part[0]]): deque(part.tolist()) for part in np.split(order, cuts) if len(part)}
        self._trace = trace
        self._points: dict[int, NDArray] = {}
        self._mail: dict[tuple[int, int, int], tuple[NDArray, int]] = {}
        self._waiting: dict[tuple[int, int, int], int] = {}
        self.exchanges = np.zeros(len(ends), np.int64)

    def play(self) -> None:
        """Play all of it.

        Raises:
            RunError: an entry waits for one that is not there, so that the trace is torn.
        """
        ready = list(self._queues)
        while ready:
            node = ready.pop()
            queue = self._queues[node]
            while queue:
                wanted = self._wanted(queue[0])
                if wanted is not None and wanted not in self._mail:
                    self._waiting[wanted] = node
                    break
                told = self._enter(node, queue.popleft(), wanted)
                if told in self._waiting:
                    ready.append(self._waiting.pop(told))
        left = sum(map(len, self._queues.values()))
        if left:
            raise RunError(f"the trace is torn: {left} entries wait for messages that no entry sends")

    def _wanted(self, entry: int) -> tuple[int, int, int] | None:
        kind = int(self._trace.kind[entry])
        if kind not in (ACCEPT, ANSWER):
            return None
        return OFFER if kind == ACCEPT else ACCEPT, int(self._trace.edge[entry]), int(self._trace.number[entry])

    def _enter(self, node: int, entry: int, wanted: tuple[int, int, int] | None) -> tuple[int, int, int] | None:
        """Play one entry; return the name of the message that it sends."""
        kind, t = int(self._trace.kind[entry]), float(self._trace.time[entry])
        edge, number, row = int(self._trace.edge[entry]), int(self._trace.number[entry]), int(self._row[node])
        if kind == READ:
            self._points[row] = self._moves.read(row, t)
            return None
        if kind == APPLY:
            self._moves.apply(row, t, gradient_of(self._gradients, row, self._points.pop(row), self._moves))
            return None
        told = None
        if kind in (OFFER, ACCEPT):
            m = self._moves.message(row)
            depth = self._moves.tell(row, t, m)
            told = (kind, edge, number)
            self._mail[told] = m.copy(), depth
        if wanted is not None:
            theirs, depth = self._mail.pop(wanted)
            first = bool(self._ends[edge, 0] == node)
            self._moves.end(row, t, edge, first, self._moves.message(row), theirs, depth)
            self.exchanges[edge] += first
        return told


def gradient_of(gradients: RowGradients, row: int, point: NDArray, moves: Moves) -> NDArray:
    """Return the gradient of one row at a point that was read before, drawn as the row's next one."""
    import torch

    draws = moves.state.gradients[row : row + 1]
    return gradients.primal(np.array([row]), torch.from_numpy(point[None]), draws)[0].numpy()
