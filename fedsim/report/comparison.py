"""The tables of `fedsim compare`, as a page shows them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedsim.errors import InputError
from fedsim.report.parts import Table, number
from fedsim.report.pictures import MAIN
from fedsim.results.compare import compare

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.results.result import Result, StudyResult

ENDS = ("bytes", "queries", "samples", "gradients", "communications", "round", "time")


def comparisons(result: Result | StudyResult) -> tuple[list[Table], list[str]]:
    """Return what it costs to get to a common value, and what each has for a common cost; and why one is missing."""
    tables, notes = [], []
    for question in (_to, _at):
        try:
            table = question(result)
            tables += [table] if table and table.caption not in [t.caption for t in tables] else []
        except InputError as error:
            notes.append(f"No table: {error}")
    return tables, notes


def _to(result: Result | StudyResult) -> Table | None:
    try:
        return _asked(result)
    except InputError:
        goal = _goal_of_finished(result)  # what diverged has no common goal with what did not
        if goal is None:
            raise
        return _asked(result, to=goal)


def _at(result: Result | StudyResult) -> Table | None:
    end = _common_end(result)
    return _asked(result, at=end) if end else None


def _asked(
    result: Result | StudyResult, to: tuple[str, float] | None = None, at: tuple[str, float] | None = None
) -> Table:
    with np.errstate(invalid="ignore"):  # quartiles of what diverged, or of an infinite epsilon
        return _table(compare([result.folder], to=to, at=at))


def _goal_of_finished(result: Result | StudyResult) -> tuple[str, float] | None:
    """Return the smallest power of ten that all runs that finished reach."""
    frames = [run.metrics for run in result.runs if run.status == "finished"]
    metric = next((m for m in MAIN if frames and all(m in frame for frame in frames)), None)
    worst = max(float(frame[metric].iloc[-1]) for frame in frames) if metric else math.nan
    return (metric, 10.0 ** math.ceil(math.log10(worst))) if metric and 0 < worst < math.inf else None


def _common_end(result: Result | StudyResult) -> tuple[str, float] | None:
    """Return the first cost by which every run that finished was observed, and how much all of them paid at least."""
    frames = [run.metrics for run in result.runs if run.status == "finished"]
    for cost in ENDS:
        if frames and all(cost in frame and frame[cost].iloc[-1] > 0 for frame in frames):
            end = float(min(frame[cost].iloc[-1] for frame in frames))
            if end >= max(float(frame[cost].iloc[0]) for frame in frames):
                return cost, end
    return None


def _table(frame: pd.DataFrame) -> Table:
    shown = [str(c) for c in frame.columns if not str(c).endswith(("_q1", "_q3")) and c != "reached"]
    rows = [[str(name), *(_cell(row, column) for column in shown)] for name, row in frame.iterrows()]
    question = str(frame.attrs.get("question", "comparison"))
    return Table(question[:1].upper() + question[1:], [str(frame.index.name or "variant"), *shown], rows)


def _cell(row: pd.Series, column: str) -> str:
    value = row[column]
    if not isinstance(value, int | float | np.integer | np.floating):
        return str(value)
    runs, reached = int(row.get("runs", 0)), row.get("reached")  # type: ignore[arg-type]
    if column == "runs":
        return str(runs)
    if reached is not None and int(reached) < runs and np.isnan(float(value)):
        return f"not reached ({runs - int(reached)} of {runs})"
    low, high = row.get(f"{column}_q1"), row.get(f"{column}_q3")
    if low is None or high is None or low == high or np.isnan(float(value)):
        return number(float(value))
    return f"{number(float(value))} [{number(float(low))}, {number(float(high))}]"
