"""What was swept and how cells were picked: axes, cells that failed, choices, optima at the edge of their grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.report.parts import Picture, Table, number, text_of
from fedsim.report.pictures import MAIN, embedded
from fedsim.report.runs import state
from fedsim.results.result import STUDY, Result, StudyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TUNING = "tuning"


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
    at = select["at"] if select["at"] == "end" else "the end of " + text_of(select["at"])
    lines = [
        f"Per variant the cell with the {select['best']} {select['metric']} at {at} was picked, on the tuning seeds"
        f" {text_of(select['seeds'])} alone; the figures and tables of this page come from other seeds."
    ]
    counts = {choice["cells"] for choice in picked}
    if len(counts) > 1 or select.get("unequal"):
        lines.append(f"Variants had different numbers of cells. Why: {select.get('unequal') or 'not said'}")
    lines += [
        f"† {c['variant']}: the optimum lies at the edge of its grid ({'; '.join(c['edges'])}), so a better one may lie"
        " beyond."
        for c in picked
        if c["edges"]
    ]
    if not picked:
        return None, [*lines, "Nothing has been picked yet: the tuning has not ended."]
    rows = [
        [
            c["variant"] + (" †" if c["edges"] else ""),
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


def sensitivity(study: StudyResult, metric: str | None, highest: bool = False) -> list[Picture]:
    """Return the metric at the end of the runs against each swept number, one line per variant."""
    runs = [run for run in study.runs if run.facts.get("cell")]
    metric = metric or next((m for m in MAIN if any(m in run.metrics for run in runs)), None)
    swept = study.facts.get("sweep", {}).get("axes", {})
    keys = dict.fromkeys(key for own in swept.values() for key, values in own.items() if _numbers(values))
    if metric is None:
        return []
    found = [_against(swept, runs, key, metric, highest) for key in list(keys)[:4]]
    return [picture for picture in found if picture]


def _numbers(values: Sequence[Any]) -> bool:
    return len(values) > 1 and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)


def _against(swept: dict[str, Any], runs: list[Result], key: str, metric: str, highest: bool) -> Picture | None:
    lines = {
        name: _line([r for r in runs if r.facts.get("of") in (name, None)], key, metric, highest) for name in swept
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return None
    words = [
        f"{name}: {', '.join(f'{number(y)} at {text_of(x)}' for x, y in points)}" for name, points in lines.items()
    ]
    alt = f"{metric} at the end against {key}. {'; '.join(words)}."
    caption = (
        f"{metric} at the end against {key}: median over seeds, best over the other axes; failed cells are left out"
    )
    return embedded(lambda stem: _draw(stem, lines, key, metric), alt, caption)


def _line(runs: list[Result], key: str, metric: str, highest: bool) -> list[tuple[float, float]]:
    cells: dict[tuple[float, str], list[float]] = {}
    for run in runs:
        if key in run.facts["cell"] and run.status == "finished" and metric in run.metrics:
            place = float(run.facts["cell"][key]), repr(run.facts["cell"])
            cells.setdefault(place, []).append(float(run.metrics[metric].iloc[-1]))
    values: dict[float, list[float]] = {}
    for (x, _), ends in cells.items():
        values.setdefault(x, []).append(float(np.median(ends)))
    return [(x, max(ys) if highest else min(ys)) for x, ys in sorted(values.items())]


def _draw(stem: Path, lines: dict[str, list[tuple[float, float]]], key: str, metric: str) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fedsim", "font.size": 9}):
        figure, axis = plt.subplots(figsize=(3.9, 3.4), layout="constrained")
        _points(axis, lines)
        axis.set_xlabel(key)
        axis.set_ylabel(f"{metric} at the end")
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        file = stem.with_suffix(".svg")
        figure.savefig(file)
        plt.close(figure)
    return [file]


def _points(axis: Axes, lines: dict[str, list[tuple[float, float]]]) -> None:
    from fedsim.results.plots import COLOURS, MARKERS

    for index, (name, points) in enumerate(lines.items()):
        colour, mark = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axis.plot(*zip(*points, strict=True), color=colour, marker=mark, markersize=4, label=name)
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    if min(xs) > 0 and max(xs) >= 10 * min(xs):
        axis.set_xscale("log")
    if min(ys) > 0 and max(ys) >= 10 * min(ys):
        axis.set_yscale("log")
    axis.grid(True, which="major", alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
