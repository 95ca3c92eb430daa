"""A progress bar, where a terminal is attached."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[str, float, float, dict[str, Any]], None]


@contextmanager
def shown(wanted: bool) -> Iterator[Progress | None]:
    """Give a callback that draws the run, its speed, virtual time and newest metrics; None without a terminal."""
    if not (wanted and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), TextColumn("{task.fields[facts]}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def draw(name: str, now: float, horizon: float, row: dict[str, Any]) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=horizon, facts="")
            bar.update(tasks[name], completed=now, total=horizon, facts=_facts(now, row))

        yield draw


@contextmanager
def cells_shown(wanted: bool) -> Iterator[Progress | None]:
    """Give a callback that draws how many cells ended, how many failed, and what is left; lines without a terminal."""
    if not wanted:
        yield None
    elif sys.stderr.isatty():
        with _cell_bar() as draw:
            yield draw
    else:
        yield _cell_lines()


@contextmanager
def _cell_bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[facts]}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("cells", facts="")

        def draw(name: str, now: float, total: float, row: dict[str, Any]) -> None:
            bar.update(task, completed=now, total=total, facts=f"{row['failed']} failed" if row["failed"] else "")

        yield draw


def _cell_lines(pause: float = 30.0) -> Progress:
    """Write a line at most every `pause` seconds, with an estimate: for the log of a batch job."""
    begun = last = time.perf_counter()
    first: float | None = None

    def draw(name: str, now: float, total: float, row: dict[str, Any]) -> None:
        nonlocal last, first
        first = now if first is None else first
        clock = time.perf_counter()
        if clock - last >= pause:
            left = (clock - begun) * (total - now) / max(now - first, 1)
            failed = f", {row['failed']} failed" if row["failed"] else ""
            print(f"{now:.0f} of {total:.0f} cells ended{failed}; about {left:.0f} s left", file=sys.stderr, flush=True)
            last = clock

    return draw


def _facts(now: float, row: dict[str, Any]) -> str:
    """Return time, speed (of playing alone: also of a run that another process played, or that goes on) and metrics."""
    if "failed" in row:
        return f"{row['failed']} failed"
    events = row["gradients"] + row["dual_gradients"] + row["communications"]
    speed = f"  {events / row['wall_seconds']:,.0f} events/s" if row["wall_seconds"] > 1e-3 else ""
    metrics = [f"{name} {value:.2e}" for name, value in row.items() if isinstance(value, float) and name not in _CLOCKS]
    return f"t={now:g}{speed}  {'  '.join(metrics[:MOST])}"


MOST = 4  # metrics that fit on a line
_CLOCKS = ("time", "wall_seconds")
