"""Runs of a study side by side: one process each, as many as there are free cores."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.results.folder import RunFolder
from fedsim.results.result import Result

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

LONG = 20.0
"""Seconds of work left from which starting processes (some seconds of imports each) pays."""


def free_cores() -> int:
    """Return how many processes may compute at once: `FEDSIM_CORES`, or the cores this process may use."""
    return int(os.environ.get("FEDSIM_CORES", 0)) or len(os.sched_getaffinity(0))


def worth_it(seconds: float, done: int, waiting: int) -> bool:
    """Return whether the waiting runs, judged by those done, would take long and can share the work."""
    return done > 0 and waiting > 1 and free_cores() > 1 and seconds / done * waiting > LONG


def play_all(runs: Sequence[Scenario], root: Path, progress: Callable[..., Any] | None) -> list[str]:
    """Play the runs, each into its folder in `root`; return a line for each that diverged or failed.

    A run is started as `fedsim resume FOLDER` on a folder that waits.
    """
    waiting, playing, failures = list(runs), {}, []
    try:
        while waiting or playing:
            while waiting and len(playing) < free_cores():
                scenario = waiting.pop(0)
                playing[scenario.folder] = _start(root / scenario.folder)
            time.sleep(0.05)
            for name in [name for name, process in playing.items() if process.poll() is not None]:
                failures += _ended(name, root / name, playing.pop(name), progress)
    finally:
        for process in playing.values():
            process.terminate()
        for process in playing.values():
            process.wait()
    return failures


def lay_out(scenario: Scenario, folder: Path) -> None:
    """Leave a folder that waits for its run, so that a study that is killed before it can be read and resumed."""
    files = RunFolder(folder)
    files.write_scenario(scenario.to_yaml())
    facts = {"status": "waiting", "variant": scenario.variant, "seed": scenario.seed, "base": str(scenario.base)}
    files.write_run({"name": scenario.name, **facts})


def _start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedsim", "resume", str(folder), "--json", "--no-progress"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _ended(name: str, folder: Path, process: subprocess.Popen[str], progress: Callable[..., Any] | None) -> list[str]:
    _, errors = process.communicate()
    if process.returncode == 0:
        if progress:
            row = Result(folder).summary()["last"]
            now = row.get("time", row.get("round", 0))
            progress(name, now, now, row)
        return []
    facts = json.loads((folder / "run.json").read_text())
    return [f"{name}: {facts.get('error') or errors.strip() or f'exit code {process.returncode}'}"]
