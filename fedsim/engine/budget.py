"""Counts that a run may not pass: gradients, samples, communications, messages, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedsim.engine.counts import Counts
from fedsim.errors import InputError
from fedsim.job import counts_of_all
from fedsim.transport.transport import as_bytes

if TYPE_CHECKING:
    from fedsim.engine.layout import Layout

Reals = NDArray[np.float64]
Ints = NDArray[np.int64]
NAMES = tuple(field.name for field in fields(Counts) if field.name != "queries")  # these are kept call by call


class Budget:
    """The bounds of a scenario's `stop`; every rank asks together and hears the same."""

    def __init__(self, bounds: Mapping[str, float], layout: Layout) -> None:
        self.bounds = {name: float(bound) for name, bound in bounds.items() if name in NAMES}
        self._layout = layout

    def __bool__(self) -> bool:
        return bool(self.bounds)

    def passed(self, counts: Counts) -> str | None:
        """Return the first count that is above its bound."""
        whole = counts_of_all(counts, self._layout)
        return next((name for name, bound in self.bounds.items() if whole[name] > bound), None)

    def refuse_start(self, counts: Counts) -> None:
        """Refuse bounds that the start alone passes.

        Raises:
            InputError: names the bound.
        """
        name = self.passed(counts) if self.bounds else None
        if name:
            raise InputError(f"stop.{name}: {self.bounds[name]:g} do not cover the start of this algorithm")

    def reached(self, counts: Counts) -> str | None:
        """Return the first count of which nothing is left."""
        if not self.bounds:
            return None
        whole = counts_of_all(counts, self._layout)
        return next((name for name, bound in self.bounds.items() if whole[name] >= bound), None)

    def last_allowed(self, counts: Counts, time: Reals, costs: Mapping[str, Ints]) -> tuple[float, str] | None:
        """Return when the last event happens that the budget allows, and the count that ends it; None: all may.

        Args:
            time: float64 `[events]` of this rank's events. costs: int64 `[events]` for every bounded count; of
                another rank's events nothing is counted here.
        """
        before = counts_of_all(counts, self._layout)
        own = np.stack([time, *(costs[name].astype(np.float64) for name in self.bounds)], axis=1)
        parts = [part.view(np.float64).reshape(-1, own.shape[1]) for part in self._gathered(own)]
        events = np.concatenate(parts)
        events = events[np.argsort(events[:, 0], kind="stable")]
        first: tuple[int, float, str] | None = None
        for column, (name, bound) in enumerate(self.bounds.items(), start=1):
            spent = before[name] + np.cumsum(events[:, column])
            full = np.flatnonzero(spent >= bound)
            if len(full) and (first is None or full[0] < first[0]):
                place = int(full[0])
                inside = place if spent[place] == bound else place - 1
                first = place, float(events[inside, 0]) if inside >= 0 else -np.inf, name
        return None if first is None else first[1:]

    def _gathered(self, own: Reals) -> list[NDArray[np.uint8]]:
        return [as_bytes(own)] if self._layout.size == 1 else self._layout.transport.all_gather(as_bytes(own))

    def near(self, counts: Counts, most: Mapping[str, int]) -> bool:
        """Return whether events that cost this rank at most `most` could bring a count to its bound."""
        possible = Counts()
        possible.restore({name: getattr(counts, name) + most[name] for name in self.bounds})
        return self.reached(possible) is not None
