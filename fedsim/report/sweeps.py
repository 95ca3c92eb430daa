"""What was swept and how cells were picked: axes, cells that failed, choices, optima at the edge of their grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.report.parts import Picture, Table, number, text_of
from fedsim.report.pictures import embedded
from fedsim.report.runs import state
from fedsim.results.curves import EDGE, MAIN, edge_notes, higher_is_better
from fedsim.results.result import STUDY, TUNING, Result, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def tuning_of(result: Result | StudyResult) -> StudyResult | None:
    """Return the study of the tuning runs, where there is one."""
    folder = result.folder / TUNING
    return StudyResult(folder) if (folder / STUDY).exists() else None


def axes(study: StudyResult) -> Table | None:
    """Return per variant the swept values, how many cells they span and how their runs ended."""
    swept = study.facts.get("sweep", {}).get("axes", {})
    if not swept:
        return None
    keys = list(dict.fromkeys(key for own in swept.values() for key in own))
    rows = []
    for variant, own in swept.items():
        runs = [run for run in study.runs if run.facts.get("of") in (variant, None)]
        states = [state(run) for run in runs]
        each = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states)) or "none"
        cells = math.prod(len(values) for values in own.values())
        rows.append([variant, *(text_of(own.get(key)) for key in keys), str(cells), each])
    return Table("The grid", ["variant", *keys, "cells", "runs"], rows)


def choices(study: StudyResult) -> tuple[Table | None, list[str]]:
    """Return which cell was picked for each variant, and in words on what, where, and what to doubt."""
    select = study.facts.get("select")
    if not select:
        return None, []
    picked = select.get("choices", [])
    seeds = ", ".join(map(str, select["seeds"]))
    lines = [
        f"Per variant the cell with the {select['best']} {select['metric']} {_when(select['at'])} (median over seeds)"
        f" was picked, on the tuning seeds {seeds} alone; the results above come from other seeds."
    ]
    counts = {choice["cells"] for choice in picked}
    if len(counts) > 1 or select.get("unequal"):
        lines.append(f"Variants had different numbers of cells. Why: {select.get('unequal') or 'not said'}")
    lines += edge_notes(study)
    if not picked:
        return None, [*lines, "Nothing has been picked yet: the tuning has not ended."]
    rows = [
        [
            c["variant"] + (EDGE if c["edges"] else ""),
            text_of(c["cell"]),
            text_of(float(c["value"])),
            str(c["cells"]),
            str(c["failed"]),
            "; ".join(c["edges"]) or "no",
        ]
        for c in picked
    ]
    columns = ["variant", "cell", f"{select['metric']} on tuning seeds", "cells", "failed runs", "at the edge"]
    return Table("What was picked", columns, rows), lines


def _when(at: Any) -> str:
    return "at the end" if at == "end" else " and ".join(f"at {text_of(amount)} {cost}" for cost, amount in at.items())


@dataclass(frozen=True)
class Question:
    """What is drawn of a cell: a metric, whether high is good, and `end` or what was spent by then."""

    metric: str
    highest: bool
    at: Any

    def value(self, run: Result) -> float:
        """Return the last value observed by then; NaN where there is none."""
        values = run.metrics[self.metric].to_numpy(float)
        for cost, amount in ({} if self.at == "end" else self.at).items():
            values = values[run.metrics[{"seconds": "wall_seconds"}.get(cost, cost)].to_numpy(float) <= amount]
        return float(values[-1]) if len(values) else math.nan


def sensitivity(study: StudyResult, metric: str | None, highest: bool | None = None, at: Any = "end") -> list[Picture]:
    """Return the metric against each swept number, one line per variant."""
    runs = [run for run in study.runs if run.facts.get("cell") and len(run.metrics)]
    metric = metric or next((m for m in MAIN if any(m in run.metrics for run in runs)), None)
    swept = study.facts.get("sweep", {}).get("axes", {})
    keys = dict.fromkeys(key for own in swept.values() for key, values in own.items() if _numbers(values))
    if metric is None:
        return []
    question = Question(metric, higher_is_better(metric) if highest is None else highest, at)
    found = [_against(swept, runs, key, question) for key in list(keys)[:4]]
    return [picture for picture in found if picture]


def _numbers(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _against(swept: dict[str, Any], runs: list[Result], key: str, question: Question) -> Picture | None:
    lines = {name: _line([r for r in runs if r.facts.get("of") in (name, None)], key, question) for name in swept}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    words = [
        f"{name}: {', '.join(f'{number(y)} at {text_of(x)}' for x, y in points)}" for name, points in lines.items()
    ]
    title = f"{question.metric} {_when(question.at)}"
    start = max(float(run.metrics[question.metric].iloc[0]) for run in runs if question.metric in run.metrics)
    top = None if question.highest or not start > 0 else 10 * start
    caption = f"{title} against {key}: median over seeds, best over the other axes. Cells that failed are left out"
    caption += f"; values above {number(top)} (ten times the start) lie off the top." if top else "."
    alt = f"{title} against {key}. {'; '.join(words)}."
    return embedded(lambda file: _draw(file, lines, (key, title), top), alt, caption)


def _line(runs: list[Result], key: str, question: Question) -> list[tuple[float, float]]:
    cells: dict[tuple[float, str], list[float]] = {}
    for run in runs:
        if key in run.facts["cell"] and run.status == "finished" and question.metric in run.metrics:
            place = float(run.facts["cell"][key]), repr(run.facts["cell"])
            cells.setdefault(place, []).append(question.value(run))
    values: dict[float, list[float]] = {}
    for (x, _), ends in cells.items():
        middle = float(np.median(ends))
        if math.isfinite(middle):
            values.setdefault(x, []).append(middle)
    return [(x, max(ys) if question.highest else min(ys)) for x, ys in sorted(values.items())]


def _draw(
    out: Path, lines: dict[str, list[tuple[float, float]]], titles: tuple[str, str], top: float | None
) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from fedsim.results.plots import _save

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedsim", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(3.9, 3.4), layout="constrained")
        _points(axis, lines, top)
        axis.set_xlabel(titles[0])
        axis.set_ylabel(titles[1])
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        files = _save(figure, out)
        plt.close(figure)
    return files


def _points(axis: Axes, lines: dict[str, list[tuple[float, float]]], top: float | None) -> None:
    from fedsim.results.plots import COLOURS, MARKERS

    for index, (name, points) in enumerate(lines.items()):
        colour, mark = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4, label=name)
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
        axis.set_xscale("log")
    if min(ys) > 0 and max(ys) >= 10 * min(ys):
        axis.set_yscale("log")
    if top is not None and min(ys) < top < max(ys):
        shown = [y for y in ys if y <= top]
        axis.set_ylim(min(shown) / 2 if min(shown) > 0 else min(shown), top)
    axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
