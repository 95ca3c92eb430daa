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
        begun: dict[str, float] = {}

        def draw(name: str, now: float, horizon: float, row: dict[str, Any]) -> None:
            if name not in tasks:
                tasks[name], begun[name] = bar.add_task(name, total=horizon, facts=""), time.perf_counter()
            bar.update(tasks[name], completed=now, facts=_facts(now, row, time.perf_counter() - begun[name]))

        yield draw


def _facts(now: float, row: dict[str, Any], seconds: float) -> str:
    events = row["gradients"] + row["dual_gradients"] + row["communications"]
    metric = next((f"{m} {row[m]:.2e}" for m in ("distance", "loss", "consensus") if m in row), "")
    return f"t={now:g}  {events / max(seconds, 1e-9):,.0f} events/s  {metric}"
