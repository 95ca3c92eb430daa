"""Events over several ranks: every rank plays its own rows; only exchanges across ranks travel.

Both ranks of a pair see the same exchanges between their nodes, in the same order, since clocks depend on nothing
but themselves. They play a window in passes: each plays what it can, then the two trade the messages of what that
began, all in one, until every exchange of the window has both. Nobody waits for a rank that it has nothing open with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.clocks import FOREIGN
from fedsim.errors import RunError
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.clocks import Batch
    from fedsim.engine.layout import Layout

Ints = NDArray[np.int64]
HEADER = 3  # int64 words in front: messages that the two have open, messages that follow, dim


class Inbox(NamedTuple):
    """What other ranks sent and nobody has used yet: `message [slots, dim]`, `depth [slots]`."""

    message: NDArray
    depth: Ints


class Hand(Protocol):
    """Plays the events of this rank's rows, one pass at a time."""

    def step(self, batch: Batch, left: Ints) -> tuple[Ints, int]:
        """Play what can be played; return what is left, and the first event that was not finite (else their number)."""
        ...

    def sent(self, batch: Batch) -> tuple[Ints, NDArray, Ints]:
        """Return what the last step began with other ranks: events, messages `[., dim]`, depths."""
        ...

    def meet(self, batch: Batch, events: Ints, inbox: Inbox, slots: Ints) -> int:
        """End exchanges with the messages at `slots` of the inbox; return the first bad event."""
        ...


class Crossings:
    """Plays batches over ranks.

    Args:
        hand: plays the own rows. ends: `[m, 2]` node numbers of all edges. dim, dtype: of a message.
    """

    def __init__(self, hand: Hand, layout: Layout, ends: Ints, dim: int, dtype: np.dtype) -> None:
        self._hand, self._layout, self._dim, self._dtype = hand, layout, dim, dtype
        self._owner = layout.owner(layout.topology.position[ends])
        self._inbox = Inbox(np.zeros((0, dim), dtype), np.zeros(0, np.int64))
        self._unused = np.zeros(0, np.int64)

    def play(self, batch: Batch) -> int:
        """Play a batch; return the place of the first event at which something was not finite, or -1."""
        left, bad = np.arange(len(batch.time)), len(batch.time)
        self._open(batch)
        while len(left) or self._peers:
            left, worst = self._hand.step(batch, left)
            events, messages, depths = self._hand.sent(batch)
            self._begun[events] = True
            self._trade(events, messages, depths)
            ready = self._events[self._begun[self._events] & (self._slot[self._events] >= 0)]
            if len(ready):
                slots = self._slot[ready]
                worst = min(worst, self._hand.meet(batch, ready, self._inbox, slots))
                self._unused = np.concatenate([self._unused, slots])
                self._events = self._events[~(self._begun[self._events] & (self._slot[self._events] >= 0))]
            bad = min(bad, worst)
        return bad if bad < len(batch.time) else -1

    def _open(self, batch: Batch) -> None:
        """Number the exchanges with every other rank, in the order that both ranks see."""
        crossing = (batch.a == FOREIGN) | (batch.b == FOREIGN)
        self._events: Ints = np.flatnonzero(crossing)
        owner = self._owner[batch.edge[self._events]]
        peer = np.where(batch.a[self._events] == FOREIGN, owner[:, 0], owner[:, 1])
        self._of = {int(r): self._events[peer == r] for r in np.unique(peer)}
        self._peer, self._order = np.full((2, len(batch.time)), -1, np.int64)
        self._peer[self._events] = peer
        for events in self._of.values():
            self._order[events] = np.arange(len(events))
        self._begun = np.zeros(len(batch.time), bool)
        self._slot = np.full(len(batch.time), -1, np.int64)
        self._peers = {r: [len(events), len(events)] for r, events in self._of.items()}  # still to send, to receive

    def _trade(self, events: Ints, messages: NDArray, depths: Ints) -> None:
        """Send what was begun to those who wait for it, and take what they began."""
        chosen = {r: np.flatnonzero(self._peer[events] == r) for r in self._peers}
        heads = {r: np.array([sum(self._peers[r]), len(chosen[r]), self._dim], np.int64) for r in self._peers}
        theirs = {r: np.empty(HEADER * 8, np.uint8) for r in self._peers}
        self._layout.transport.exchange({r: as_bytes(head) for r, head in heads.items()}, theirs)
        counts = {r: self._count(r, heads[r], theirs[r].view(np.int64)) for r in self._peers}
        sends = {r: self._pack(events[c], messages[c], depths[c]) for r, c in chosen.items() if len(c)}
        width = 16 + self._dim * self._dtype.itemsize
        receives = {r: np.empty(count * width, np.uint8) for r, count in counts.items() if count}
        self._layout.transport.exchange(sends, receives)
        for r, body in receives.items():
            self._unpack(r, body, counts[r])
        for r in list(self._peers):
            self._peers[r][0] -= len(chosen[r])
            self._peers[r][1] -= counts[r]
            if sum(self._peers[r]) == 0:
                del self._peers[r]

    def _count(self, peer: int, mine: Ints, theirs: Ints) -> int:
        if theirs[0] != mine[0] or theirs[2] != mine[2]:
            raise RunError(
                f"ranks disagree on the events between them: rank {self._layout.rank} has {mine[0]} messages of"
                f" {mine[2]} numbers open with rank {peer}, which has {theirs[0]} of {theirs[2]}; is the scenario the"
                " same on every host?"
            )
        return int(theirs[1])

    def _pack(self, events: Ints, messages: NDArray, depths: Ints) -> NDArray[np.uint8]:
        parts = self._order[events], depths, np.ascontiguousarray(messages)
        return np.concatenate([as_bytes(part) for part in parts])

    def _unpack(self, peer: int, body: NDArray[np.uint8], count: int) -> None:
        if len(self._unused) < count:
            self._grow(count)
        slots, self._unused = self._unused[:count], self._unused[count:]
        self._slot[self._of[peer][body[: 8 * count].view(np.int64)]] = slots
        self._inbox.depth[slots] = body[8 * count : 16 * count].view(np.int64)
        self._inbox.message[slots] = body[16 * count :].view(self._dtype).reshape(count, self._dim)

    def _grow(self, count: int) -> None:
        have = len(self._inbox.depth)
        more = max(count, have)
        message = np.concatenate([self._inbox.message, np.zeros((more, self._dim), self._dtype)])
        self._inbox = Inbox(message, np.concatenate([self._inbox.depth, np.zeros(more, np.int64)]))
        self._unused = np.concatenate([self._unused, np.arange(have, have + more)])


def everywhere(bad: float, node: int, earlier: Callable[[float], int], layout: Layout) -> tuple[float, int, int]:
    """Return time, node and number of the first bad event of any rank; a time of infinity: there is none.

    Args:
        bad: its time here. node: its node. earlier: how many events of this rank came before a time.
    """
    gather = layout.transport.all_gather
    found = [part.view(np.float64) for part in gather(as_bytes(np.array([bad, float(node)])))]
    time, first = min((float(t), int(i)) for t, i in found)
    if not np.isfinite(time):
        return time, first, 0
    before = [int(part.view(np.int64)[0]) for part in gather(as_bytes(np.array([earlier(time)], np.int64)))]
    return time, first, sum(before)
