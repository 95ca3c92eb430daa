"""The tables of `fedsim compare`, as a page shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsim.errors import InputError
from fedsim.report.parts import Table
from fedsim.results.compare import compare
from fedsim.results.tables import tables

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.results.result import Result, StudyResult

ENDS = ("bytes", "queries", "samples", "gradients", "communications", "round", "time")


def comparisons(result: Result | StudyResult) -> tuple[list[Table], list[str]]:
    """Return what it costs to get to a common value, and what each has for a common cost; and what to know of them."""
    found: dict[str, Table] = {}
    notes: list[str] = []
    end = _common_end(result)
    for at in [None, *([end] if end else [])]:
        try:
            frame = compare([result.folder], at=at)
        except InputError as error:
            notes.append(f"No table: {error}")
            continue
        found |= {table.caption: table for table in _tables(frame)}
        notes += frame.attrs.get("notes", [])
    return list(found.values()), list(dict.fromkeys(notes))


def _common_end(result: Result | StudyResult) -> tuple[str, float] | None:
    """Return the first cost by which every run that finished was observed, and how much all of them paid at least."""
    frames = [run.metrics for run in result.runs if run.status == "finished"]
    for cost in ENDS:
        if frames and all(cost in frame and frame[cost].iloc[-1] > 0 for frame in frames):
            end = float(min(frame[cost].iloc[-1] for frame in frames))
            if end >= max(float(frame[cost].iloc[0]) for frame in frames):
                return cost, end
    return None


def _tables(frame: pd.DataFrame) -> list[Table]:
    question = str(frame.attrs["question"])
    question = question[:1].upper() + question[1:]
    return [Table(f"{question}: {title}" if title else question, head, rows) for title, head, rows in tables(frame)]
