"""The tables of `fedsim compare`, as a page shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedsim.errors import InputError
from fedsim.report.parts import Table, number
from fedsim.results.compare import compare

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.results.result import Result, StudyResult

ENDS = ("bytes", "queries", "samples", "gradients", "communications", "round", "time")


def comparisons(result: Result | StudyResult) -> tuple[list[Table], list[str]]:
    """Return what it costs to get to a common value, and what each has for a common cost; and why one is missing."""
    tables, notes = [], []
    questions = [{}] + [{"at": end} for end in [_common_end(result)] if end]
    for question in questions:
        try:
            with np.errstate(invalid="ignore"):  # quartiles of what diverged, or of an infinite epsilon
                tables.append(_table(compare([result.folder], **question)))
        except InputError as error:
            notes.append(f"No table: {error}")
    unique = {table.caption: table for table in tables}
    return list(unique.values()), notes


def _common_end(result: Result | StudyResult) -> tuple[str, float] | None:
    """Return the first cost that every run paid, and how much of it all of them paid at least."""
    frames = [run.metrics for run in result.runs if len(run.metrics)]
    for cost in ENDS:
        if frames and all(cost in frame and frame[cost].iloc[-1] > 0 for frame in frames):
            return cost, float(min(frame[cost].iloc[-1] for frame in frames))
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
