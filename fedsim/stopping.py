"""Ends a run at a point that all ranks share: on SIGTERM (a scheduler's preemption) or Ctrl-C."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from fedsim.errors import Stopped
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.layout import Layout
    from fedsim.engine.player import Player

PIECE = 0.4  # seconds of play between two looks at what the ranks were told
LIVE = 10.0  # the same for live time, which stands still meanwhile; a scheduler that ends a job grants 30 s


class Stopping:
    """Plays in pieces, and knows whether the ranks were asked to stop.

    `seconds_left` is what the run's `stop.seconds` leaves: it ends at the next look after that (about half a second).
    The first signal asks; a second Ctrl-C ends this process at once. Rank 0's clock sets the pieces, so that all ranks
    make the same; they change no bit.
    """

    def __init__(self) -> None:
        self.asked, self.seconds_left = False, math.inf
        self._piece, self._since, self._clock = 0.0, 0.0, time.perf_counter()

    def ask(self, number: int, frame: object) -> None:
        """Remember the signal."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def advance(self, player: Player, until: float, layout: Layout, whole: bool) -> bool:
        """Play up to `until`; return True where the ranks were asked to stop on the way.

        Args:
            whole: pieces are whole rounds.
        """
        from fedsim.live.player import LiveEvents

        begun, live = time.perf_counter(), player if isinstance(player, LiveEvents) else None
        self._piece = self._piece or (1.0 if whole else (until - player.now) / 64)
        while player.now < until:
            if live:
                self._piece, self._since = LIVE / live.unit, 0.0
            before, room = player.now, self._piece - self._since
            player.advance(min(until, before + (max(1.0, math.floor(room)) if whole else room)))
            self._since += player.now - before
            if self._since >= self._piece * (1 - 1e-9) or (live and player.now >= until):
                asked, over = self._look(layout, whole, time.perf_counter() - begun >= self.seconds_left)
                if asked or over:
                    return asked
            if player.now <= before:  # nothing more can be played: a budget is spent
                break
        return False

    def _look(self, layout: Layout, whole: bool, over: bool = False) -> tuple[bool, bool]:
        """Begin a new piece of about `PIECE` seconds; return whether any rank was asked to stop; rank 0's `over`."""
        now = time.perf_counter()
        wanted = self._piece * min(max(PIECE / max(now - self._clock, 1e-6), 0.25), 16.0)
        self._clock, self._since = now, 0.0
        mine = np.array([self.asked, max(1.0, math.floor(wanted)) if whole else wanted, over])
        parts = [part.view(np.float64) for part in layout.transport.all_gather(as_bytes(mine))]
        self._piece = float(parts[0][1])
        return any(part[0] for part in parts), bool(parts[0][2])


@contextmanager
def listening() -> Iterator[Stopping]:
    """Take SIGTERM and Ctrl-C while a run is played (in the main thread; elsewhere they stay as they are)."""
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {number: signal.signal(number, stopping.ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def stopped_on_sigterm(message: str) -> Iterator[None]:
    """Raise `Stopped` at a scheduler's SIGTERM, once (in the main thread; elsewhere signals stay as they are)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one would leave processes behind
        raise Stopped(message)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
