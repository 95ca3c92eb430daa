"""How slow gradients are made on purpose, to show on one machine what heavy models and slow hosts would do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Gradients last at least `seconds` each, and `slowness` times what they would.

    Nothing but real time follows from it: bits and counts stay.
    """

    seconds: float = 0.0
    slowness: float = 1.0

    @contextmanager
    def stretched(self, count: int = 1) -> Iterator[None]:
        """Let the gradients of `count` nodes, computed inside, last as long as they should."""
        clock = time.perf_counter()
        yield
        took = time.perf_counter() - clock
        time.sleep(max(took, count * self.seconds) * self.slowness - took)


def of(engine: dict, rank: int) -> Pace | None:
    """Return the pace of a rank from the scenario's `engine` section; None: as fast as it can."""
    seconds = float(engine.get("gradient_seconds") or 0.0)
    slowness = float({int(k): v for k, v in (engine.get("slow") or {}).items()}.get(rank, 1.0))
    return None if seconds == 0.0 and slowness == 1.0 else Pace(seconds, slowness)
