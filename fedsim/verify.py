"""The same scenario by several launchers: are digests and metrics the same, and if not, where do they part?"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import InputError
from fedsim.launchers import command, finished
from fedsim.stopping import stopped_on_sigterm
from fedsim.transport.detect import found as launchers_around

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("local", "mpi", "torch")
NOT_COMPARED = ("wall_seconds",)


@dataclass(frozen=True)
class Entry:
    """One way to start the scenario: `local`, `mpi:2`, `torch:4`."""

    kind: str
    size: int

    def __str__(self) -> str:
        return self.kind if self.kind == "local" else f"{self.kind}:{self.size}"


@dataclass(frozen=True)
class Outcome:
    """What became of an entry: the digests of its runs by name, and how it differs from the first entry (None: not)."""

    entry: Entry
    seconds: float
    digests: dict[str, str]
    difference: str | None


def parse(on: str) -> list[Entry]:
    """Return the entries of a list such as `local,mpi:2,torch:2`.

    Raises:
        InputError: says which entry is wrong, and how they look.
    """
    entries = []
    for text in on.split(","):
        kind, _, size = text.strip().partition(":")
        if kind not in KINDS or (size and not size.isdigit()) or (kind == "local" and size not in ("", "1")):
            raise InputError(f"--on: {text!r} given; entries are local, mpi:N and torch:N, such as local,mpi:2,torch:2")
        if kind != "local" and int(size or 0) < 1:
            raise InputError(f"--on: {text!r} needs a number of processes, such as {kind}:2")
        entries.append(Entry(kind, int(size or 1)))
    if len(entries) < 2:
        raise InputError(f"--on: {on!r} given; at least two entries are needed, such as local,mpi:2")
    return entries


def verify(
    scenario: Path,
    on: str,
    overrides: Sequence[str] = (),
    short: bool = False,
    progress: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Start one job per entry and compare each with the first.

    Args:
        progress: called with every outcome as it is known.

    Raises:
        InputError: a wrong list, a live schedule or a device other than the CPU, no fitting launcher, or this process
            is itself one of a job.
    """
    entries = parse(on)
    _refuse(scenario, overrides, short)
    arguments = [str(scenario), *overrides, *(["--short"] if short else [])]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="fedsim-verify-") as scratch:
        first = Path(scratch) / "0"
        for number, entry in enumerate(entries):
            folder = Path(scratch) / str(number)
            clock = time.perf_counter()
            failure = _start(entry, arguments, folder)
            seconds = time.perf_counter() - clock
            different = failure or (None if number == 0 else _difference(first, folder))
            outcomes.append(Outcome(entry, seconds, {} if failure else _digests(folder), different))
            if progress:
                progress(outcomes[-1])
            if number == 0 and failure:
                break  # there is nothing to compare the others with
    return outcomes


def as_json(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return the outcomes for programs."""
    return {
        "same": all(outcome.difference is None for outcome in outcomes),
        "entries": [
            {"on": str(o.entry), "seconds": o.seconds, "digests": o.digests, "difference": o.difference}
            for o in outcomes
        ],
    }


def _refuse(scenario: Path, overrides: Sequence[str], short: bool) -> None:
    from fedsim.scenario import load_study

    around = launchers_around()
    if around:
        raise InputError(
            f"verify starts jobs of its own; start it without {'torchrun' if 'torch' in around else 'mpirun'}"
        )
    for run in load_study(scenario, overrides=overrides, short=short).runs:
        if run.schedule.get("kind") == "live":
            raise InputError(
                "verify compares bits, and a live run has its own every time: compare it with `fedsim replay RUN`"
            )
        if run.engine["device"] != "cpu":
            raise InputError(
                f"verify compares bits, and engine.device: {run.engine['device']} promises none: say"
                " engine.device=cpu, or hold two runs side by side with `fedsim compare`"
            )


def _start(entry: Entry, arguments: Sequence[str], folder: Path) -> str | None:
    """Play the scenario into a folder; return why it failed, or None."""
    start = [*command(entry.kind, entry.size), "-m", "fedsim", "run", *arguments]
    with stopped_on_sigterm("stopped, as asked, and the job that was being played with it"):
        done = finished([*start, "--folder", str(folder), "--json"])
    if done.returncode == 0:
        return None
    said = re.findall(r"^\0?(fedsim: .*(?:\n  \S.*)*)", done.stderr, re.MULTILINE) or done.stderr.splitlines()[-3:]
    return f"the job ended with {done.returncode}: {' / '.join(' '.join(part.split()) for part in said)}"


def _digests(folder: Path) -> dict[str, str]:
    from fedsim.results.result import load

    return {run.folder.name if run.folder != folder else "run": str(run.digest) for run in load(folder).runs}


def _difference(first: Path, other: Path) -> str | None:
    """Return where two results part: the first run that differs, its first row and columns; None: they are equal."""
    from fedsim.results.result import load

    for mine, theirs in zip(load(first).runs, load(other).runs, strict=True):
        name = f"{mine.folder.name}: " if mine.folder != first else ""
        parted = _first_row(mine.metrics, theirs.metrics)
        if parted:
            return name + parted
        if mine.digest != theirs.digest:
            return f"{name}all metrics are equal, the digests are not: {mine.digest} and {theirs.digest}"
    return None


def _first_row(a: pd.DataFrame, b: pd.DataFrame) -> str | None:
    if list(a) != list(b) or len(a) != len(b):
        return f"{len(a)} rows of {', '.join(a)} against {len(b)} rows of {', '.join(b)}"
    columns = [c for c in a if c not in NOT_COMPARED]
    clock = next(c for c in ("time", "round") if c in a)
    mine, theirs = {c: a[c].tolist() for c in columns}, {c: b[c].tolist() for c in columns}
    for row in range(len(a)):
        different = [c for c in columns if repr(mine[c][row]) != repr(theirs[c][row])]  # NaN equals NaN here
        if different:
            parts = [f"{c} {mine[c][row]!r} against {theirs[c][row]!r}" for c in different]
            return f"first difference at {clock} {mine[clock][row]:g}: {'; '.join(parts)}"
    return None
