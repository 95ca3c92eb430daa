"""What a run writes while it is played: status, metrics, checkpoints. Rank 0 of a job keeps it."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.errors import InputError, RunError
from fedsim.locks import locked
from fedsim.results.folder import RunFolder
from fedsim.results.recorder import Recorder

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

FAR = 1e6


class Journal:
    """The files of one run; `again` keeps what an interrupted run left."""

    def __init__(self, root: Path, scenario: Scenario, again: bool) -> None:
        self._files, self._ended, self._writing = _made(root), False, threading.Lock()
        self._recorder: Recorder | None = None
        self._held = _held(root)
        if not again:  # from here on the folder is one that can be read and resumed, whenever the process dies
            self._files.write_scenario(scenario.to_yaml())
            self._files.write_run({"status": "waiting", **scenario.identity(), **scenario.marks()})
            self._files.clear()

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
        with self._told():
            self._recorder = Recorder(self._files.path, keep=rows)
            self._files.write_run(facts)

    def observe(self, row: dict[str, Any]) -> None:
        """Write one row of metrics."""
        assert self._recorder is not None
        with self._told():
            self._recorder.append(row)

    def checkpoint(self, arrays: dict[str, NDArray], wall: float) -> None:
        """Save the whole state together with the length of the metrics."""
        assert self._recorder is not None
        with self._told():
            self._files.save_checkpoint(arrays, {"rows": len(self._recorder), "wall_seconds": wall})

    def grown(self) -> list[str]:
        """Return a note where a run that came to its end has gone far away from where it began."""
        assert self._recorder is not None
        first, last = self._recorder.first, self._recorder.last
        for name in ("distance", "loss"):
            begin, end = first.get(name), last.get(name)
            if begin is not None and end is not None and end > FAR * abs(begin) > 0 and math.isfinite(end):
                return [f"{name} ends at {end:.3g} and began at {begin:.3g}: the run diverges"]
        return []

    def note(self, facts: dict[str, Any]) -> None:
        """Write what is known of a run that is about to be ended from outside, by whoever watches it.

        A run that is over by itself has said so already: its other processes leave, and are missed.
        """
        with self._writing:
            if not self._ended:
                self._files.write_run(facts)

    def end(self, facts: dict[str, Any]) -> None:
        """Close the metrics and write how the run ended."""
        with self._told():
            try:
                if self._recorder is not None:
                    self._recorder.close()
            finally:
                with self._writing:
                    self._ended = True
                    try:
                        self._files.write_run(facts)
                    finally:
                        os.close(self._held)  # from here on another process may play it

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{self._files.path}: results cannot be written: {error.strerror or error}") from error


def _made(root: Path) -> RunFolder:
    try:
        return RunFolder(root)
    except OSError as error:
        raise InputError(f"{root}: cannot be made: {error.strerror}; give another folder") from error


def _held(root: Path) -> int:
    """Hold the folder while it is written to; the system lets go where the process ends.

    Raises:
        InputError: another process plays it, so that a resume would write over what it writes.
    """
    held = os.open(root, os.O_RDONLY)
    if not locked(held, wait=False):
        os.close(held)
        raise InputError(f"{root}: another process is playing this run")
    return held
