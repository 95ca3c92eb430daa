"""What a run writes while it is played: status, metrics, checkpoints. Rank 0 of a job keeps it."""

from __future__ import annotations

import threading
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.results.folder import RunFolder
from fedsim.results.recorder import Recorder

if TYPE_CHECKING:
    from fedsim.scenario import Scenario


class Journal:
    """The files of one run; `again` keeps what an interrupted run left."""

    def __init__(self, root: Path, scenario: Scenario, again: bool) -> None:
        self._files, self._ended, self._writing = RunFolder(root), False, threading.Lock()
        if not again:
            self._files.clear()
            self._files.write_scenario(scenario.to_yaml())

    @cached_property
    def saved(self) -> dict[str, NDArray] | None:
        """The arrays of the last whole checkpoint, with `journal.rows` and `journal.wall_seconds`, or None."""
        found = self._files.load_checkpoint()
        if found is None:
            return None
        arrays, facts = found
        own = {"journal.rows": np.array(facts["rows"]), "journal.wall_seconds": np.array(facts["wall_seconds"])}
        return {**arrays, **own}

    def begin(self, facts: dict[str, Any], rows: int) -> None:
        """Say that the run is going on, and keep the first `rows` of its metrics."""
        self._recorder = Recorder(self._files.path, keep=rows)
        self._files.write_run(facts)

    def observe(self, row: dict[str, Any]) -> None:
        """Write one row of metrics."""
        self._recorder.append(row)

    def checkpoint(self, arrays: dict[str, NDArray], wall: float) -> None:
        """Save the whole state together with the length of the metrics."""
        self._files.save_checkpoint(arrays, {"rows": len(self._recorder), "wall_seconds": wall})

    def note(self, facts: dict[str, Any]) -> None:
        """Write what is known of a run that is about to be ended from outside, by whoever watches it.

        A run that is over by itself has said so already: its other processes leave, and are missed.
        """
        with self._writing:
            if not self._ended:
                self._files.write_run(facts)

    def end(self, facts: dict[str, Any]) -> None:
        """Close the metrics and write how the run ended."""
        self._recorder.close()
        with self._writing:
            self._ended = True
            self._files.write_run(facts)
