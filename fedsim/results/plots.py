"""Metric against cost: one line and band per variant, the theory's bound where its hypotheses hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedsim.errors import InputError, did_you_mean
from fedsim.results.curves import (
    EDGE,
    MAIN,
    at_edges,
    carried_forward,
    common_goal,
    cost_to_reach,
    diverged,
    edge_notes,
    higher_is_better,
    told_apart,
    variants,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsim.results.result import Result, StudyResult

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CLOCKS = ("time", "round")
TITLES = {
    "communications": "communications (edge activations)",
    "gradients": "gradients (calls of a node's oracle)",
    "bytes": "bytes sent",
    "queries": "queries (function values asked for)",
    "time": "time (one gradient per node and unit)",
    "distance": r"$\frac{1}{n}\sum_i \Vert x_i - x^\star\Vert^2$",
    "consensus": r"$\frac{1}{n}\sum_i \Vert x_i - \bar{x}\Vert^2$",
    "loss": "objective at the mean model",
    "maxvio": "MaxVio = largest load / mean load - 1",
    "bias": "bias p",
    "gap": "D(p) - OPT",
    "stationarity": "squared proximal gradient mapping at the mean",
}


def plot(
    result: Result | StudyResult | Sequence[Result | StudyResult],
    *,
    metric: str | Sequence[str] | None = None,
    against: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    goal: float | None = None,
    theory: bool = True,
    width: Width | None = None,
) -> list[Path]:
    """Draw metrics against costs, a row of panels per metric and a column per cost, as PNG, SVG and PDF.

    A line is the median over a variant's runs, the last observation carried forward; a band the quartiles (of two runs,
    both). A run that diverged is a thin line of its own that ends in a cross.

    Args:
        result: one, or several to draw together.
        metric: default `distance`, where it was recorded, else `loss`; logarithmic where it is positive.
        against: default `communications` and `gradients`.
        out: one file, `.png`, `.svg` or `.pdf`, or a name without suffix for all three; default `plots/METRIC` in the
            (first) result's folder.
        goal: a level of the metric; the text under the picture says what each variant paid to reach it.
            Default: the smallest power of ten that all variants reach.
        theory: draw the algorithm's guarantee against time or gradients.
        width: of the page it is for: `column` (3.25 in), `text` (6.75 in) or inches, with type of 8 points.

    Returns:
        The files written.

    Raises:
        InputError: a column that was not recorded, or nothing was observed.
    """
    from fedsim.results import experts

    given = list(result) if isinstance(result, Sequence) else [result]
    results = list({found.folder.resolve(): found for found in given}.values())
    if out is not None and Path(out).suffix.lower() in OTHER_FORMATS:
        raise InputError(f"plot: {out}: {', '.join(FORMATS)} are written; give one of these, or a name without suffix")
    drawn = _Drawn([run for found in results for run in found.runs if not run.metrics.empty], _lines(results))
    if not drawn.runs:
        raise InputError(f"plot: no run in {results[0].folder} has observed anything yet")
    metrics = [metric] if isinstance(metric, str) else list(metric or [_default_metric(drawn.runs)])
    if len(results) == 1 and experts.draws(results[0], metrics[0]):
        return experts.draw(results[0], metrics[0], Path(out) if out else None)
    costs = [against] if isinstance(against, str) else list(against or _default_costs(drawn.runs))
    for column in (*metrics, *costs):
        _refuse_missing(drawn.runs, column)
    notes = [*_bands(drawn), *(note for found in results for note in edge_notes(found))]
    saved = what_was_saved(results[0], metrics[0], costs[0], goal) if len(results) == 1 else ""
    where = Path(out) if out else results[0].folder / "plots" / "-".join(metrics)
    return _draw(drawn, metrics, costs, theory, width, [*([saved] if saved else []), *notes], where)


Width = Literal["column", "text"] | float
INCHES = {"column": 3.25, "text": 6.75}
NARROW = 1.9  # inches below which panels stand under each other


@dataclass(frozen=True)
class _Drawn:
    """What a figure shows: all runs, and those of each line by its label."""

    runs: list[Result]
    lines: dict[str, list[Result]]


def _lines(results: Sequence[Result | StudyResult]) -> dict[str, list[Result]]:
    lines: dict[str, list[Result]] = {}
    titles = told_apart([result.folder for result in results])
    for result in results:
        edges = at_edges(result)
        for name, runs in variants(result).items():
            whose = name if len(results) == 1 else f"{titles[result.folder]}: {name}"
            title = whose + (EDGE if name in edges else "")
            lines.setdefault(title, []).extend(run for run in runs if not run.metrics.empty)
    return lines


def _bands(drawn: _Drawn) -> list[str]:
    counts = {len(runs) for runs in drawn.lines.values()}
    if max(counts) < 2:
        return []
    return ["lines: medians over runs; bands: " + ("quartiles" if max(counts) > 2 else "both runs")]


def _draw(
    drawn: _Drawn, metrics: list[str], costs: list[str], theory: bool, width: Width | None, notes: list[str], out: Path
) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    inches = 3.5 * len(costs) + 0.4 if width is None else INCHES.get(str(width)) or _inches(width)
    stacked = inches / len(costs) < NARROW
    rows, columns = (len(metrics) * len(costs), 1) if stacked else (len(metrics), len(costs))
    across = min(4, max(1, int(inches / (0.5 + 0.075 * max(map(len, drawn.lines))))))
    around = 0.17 * (-(-len(drawn.lines) // across) + _wrapped(notes, inches).count("\n") + 2)  # legend and notes
    height = rows * min(3.0, 0.72 * inches / columns) + around
    with plt.rc_context(rc=_STYLE | ({} if width is None else _PAPER)):
        figure, axes = plt.subplots(rows, columns, figsize=(inches, height), squeeze=False)
        panels = [(metric, cost) for metric in metrics for cost in costs]
        for axis, (metric, cost) in zip(axes.flat, panels, strict=True):
            _panel(axis, drawn, metric, cost, theory)
            if stacked or cost == costs[0]:
                axis.set_ylabel(TITLES.get(metric, metric))
        handles, labels = _legend(list(axes.flat))
        figure.legend(handles, labels, loc="outside upper center", ncols=across, frameon=False)
        if notes:
            figure.supxlabel(_wrapped(notes, inches), fontsize=7.5)
        files = _save(figure, out, FORMATS)
        plt.close(figure)
    return files


def _inches(width: Width) -> float:
    try:
        inches = float(width)
    except ValueError:
        inches = 0.0
    if not 1.0 <= inches <= 40.0:
        raise InputError(f"plot: width {width!r} given; column, text, or 1 to 40 inches is needed")
    return inches


def _wrapped(notes: list[str], inches: float) -> str:
    import textwrap

    return "\n".join(line for note in notes for line in textwrap.wrap(note, max(30, int(inches * 17))))


def what_was_saved(result: Result | StudyResult, metric: str, cost: str, goal: float | None = None) -> str:
    """Return one line: what each variant paid (median over seeds) for the same precision, and the saving.

    Variants that do not reach the goal in every run are named as such, never given a number. Empty where runs are left
    to play.
    """
    groups = variants(result)
    if len(groups) < 2 or cost in CLOCKS or any(run.status not in ("finished", "failed") for run in result.runs):
        return ""
    level = goal if goal is not None else _default_goal(result, metric)
    if level is None:
        return ""
    paid = {
        name: [None if diverged(r) else cost_to_reach(r.metrics, cost, metric, level) for r in runs]
        for name, runs in groups.items()
    }
    medians = {
        name: float(np.median([p for p in all_paid if p is not None]))
        for name, all_paid in paid.items()
        if None not in all_paid
    }
    if len(medians) < 2:
        return ""
    worst, best = max(medians, key=lambda v: medians[v]), min(medians, key=lambda v: medians[v])
    if medians[best] == medians[worst]:
        return ""
    missed = [name for name in groups if name not in medians]
    fewer = f", {_saving(medians[best], medians[worst])} fewer than" if medians[worst] > 0 else "; not so"
    line = f"{metric} {level:.0e}: {best} needs {medians[best]:,.0f} {cost}{fewer} {worst} ({medians[worst]:,.0f})"
    return line + (f"; not reached by {', '.join(missed)}" if missed else "")


def _saving(less: float, more: float) -> str:
    """Return by how much `less` is less: a share, or how many times where the share would round to all."""
    share = 1 - less / more
    return f"{share:.0%}" if share < 0.995 or less == 0 else f"{more / less:,.0f} times"


def _panel(axis: Axes, drawn: _Drawn, metric: str, cost: str, theory: bool) -> None:
    for index, (name, runs) in enumerate(drawn.lines.items()):
        _line(axis, runs, metric, cost, name, index)
        if theory and runs and cost in (*CLOCKS, "gradients"):
            _guarantee(axis, runs, metric, cost, COLOURS[index % len(COLOURS)])
    _floor(axis, drawn.runs[0], metric, cost)
    if _positive(drawn.runs, metric):
        axis.set_yscale("log")
    _keep_in_view(axis, drawn.runs, metric)
    _shorten(axis, max(float(run.metrics[cost].iloc[-1]) for run in drawn.runs))
    axis.set_xlabel(TITLES.get(cost, cost))
    axis.grid(True, which="major", alpha=0.25, linewidth=0.6)


def _shorten(axis: Axes, last: float) -> None:
    """Write large costs with k, M, G: long numbers run into each other under narrow panels."""
    from matplotlib.ticker import EngFormatter

    if last >= MANY:
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def _keep_in_view(axis: Axes, runs: Sequence[Result], metric: str) -> None:
    """Do not let a run that blows up press all others to the ground."""
    values = np.concatenate([run.metrics[metric].to_numpy(float) for run in runs])
    first = max(abs(float(run.metrics[metric].iloc[0])) for run in runs)
    if first > 0 and np.nanmax(np.abs(values)) > BLOWN * first:
        axis.set_ylim(top=10.0 * first)


def _floor(axis: Axes, run: Result, metric: str, cost: str) -> None:
    """Draw the level that sampling alone leaves, where it was recorded beside the metric."""
    frame = run.metrics
    if f"{metric}_floor" in frame:
        axis.plot(frame[cost], frame[f"{metric}_floor"], color="grey", linestyle=":", linewidth=1.2, label="floor")


def _line(axis: Axes, runs: list[Result], metric: str, cost: str, name: str, index: int) -> None:
    look: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": STYLES[index // len(COLOURS) % len(STYLES)],
        "markersize": 4,
    }
    for run in filter(diverged, runs):
        _broken_off(axis, run, metric, cost, look)
    frames = [run.metrics for run in runs if not diverged(run)]
    if not frames:
        axis.plot([], [], label=f"{name} (diverged)", **look)
        return
    end = min(float(frame[cost].iloc[-1]) for frame in frames)
    grid = np.unique(np.concatenate([frame[cost].to_numpy(float) for frame in frames]))
    grid = grid[grid <= end]
    values = np.clip([carried_forward(frame, cost, metric, grid) for frame in frames], -HUGE, HUGE)
    axis.plot(grid, np.median(values, axis=0), markevery=max(1, len(grid) // 8), label=name, **look)
    if len(frames) > 1:
        low, high = np.quantile(values, [0.25, 0.75], axis=0) if len(frames) > 2 else (values.min(0), values.max(0))
        axis.fill_between(grid, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _broken_off(axis: Axes, run: Result, metric: str, cost: str, look: dict[str, Any]) -> None:
    """Draw a run that diverged, up to where it did, with a cross at its last place in view."""
    costs, values = run.metrics[cost].to_numpy(float), run.metrics[metric].to_numpy(float)
    seen = np.isfinite(values) & (np.abs(values) <= BLOWN * max(abs(values[0]), 1e-300))
    axis.plot(costs[seen], values[seen], color=look["color"], linestyle=look["linestyle"], linewidth=0.8, alpha=0.6)
    if seen.any():
        axis.plot(costs[seen][-1:], values[seen][-1:], marker="x", markersize=6, color=look["color"])


def _guarantee(axis: Axes, runs: Sequence[Result], metric: str, cost: str, colour: str) -> None:
    """Draw the bound dashed where its hypotheses hold; elsewhere its slope alone, dotted, and called so.

    Of runs on data of their own, whose bounds differ, the weakest: it holds for all of them.
    """
    bounds = [bound for run in runs if (bound := run.facts.get("guarantee")) and bound["metric"] == metric]
    if len(bounds) < len(runs):
        return
    frame = runs[0].metrics
    clock = next(c for c in CLOCKS if c in frame)
    time, costs = frame[clock].to_numpy(float), frame[cost].to_numpy(float)
    first = max(float(run.metrics[metric].iloc[0]) for run in runs)
    holds = not any(bound["broken"] for bound in bounds)
    prefactor, rate = max(bound["prefactor"] for bound in bounds), min(bound["rate"] for bound in bounds)
    axis.plot(
        costs,
        (prefactor if holds else 1.0) * first * np.exp(-rate * time),
        color=colour,
        linestyle="--" if holds else ":",
        linewidth=1.0,
        label="guarantee" if holds else "rate only",
    )


def _legend(axes: Sequence[Axes]) -> tuple[list[Any], list[str]]:
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def _save(figure: Any, out: Path, suffixes: Sequence[str] = (".png", ".svg")) -> list[Path]:
    """Write the figure as one file, where `out` names its format, else in all that are usual."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out] if out.suffix in FORMATS else [out.parent / (out.name + suffix) for suffix in suffixes]
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}  # the same results give the same files
    for file in files:
        figure.savefig(file, metadata=undated.get(file.suffix))
    return files


def _default_metric(runs: Sequence[Result]) -> str:
    columns = runs[0].metrics.columns
    return next((m for m in MAIN if m in columns), columns[-1])


def _default_costs(runs: Sequence[Result]) -> tuple[str, ...]:
    last = runs[0].metrics.iloc[-1]
    if _default_metric(runs) == "maxvio":
        return ("round",)
    if last.get("queries", 0) > 0:
        return ("queries", "bytes")
    moving = [c for c in ("communications", "gradients", "dual_gradients") if last.get(c, 0) > 0]
    return tuple(moving[:2]) or (next(c for c in CLOCKS if c in last),)


def _refuse_missing(runs: Sequence[Result], column: str) -> None:
    for run in runs:
        columns = list(run.metrics.columns)
        if column not in columns:
            hint = did_you_mean(column, columns)
            if column in FAMILIES:
                hint = f" (it is recorded where record.metrics names '{column}.*')"
            raise InputError(
                f"plot: column {column!r} was not recorded{hint}; {run.folder.name} has {', '.join(columns)}"
            )


def _positive(runs: Sequence[Result], metric: str) -> bool:
    if higher_is_better(metric):
        return False
    return all((run.metrics[metric] > 0).any() and (run.metrics[metric].dropna() >= 0).all() for run in runs)


def _default_goal(result: Result | StudyResult, metric: str) -> float | None:
    runs = [run for run in result.runs if not diverged(run)]
    return None if higher_is_better(metric) else common_goal(runs, metric)


FORMATS = (".png", ".svg", ".pdf")
OTHER_FORMATS = (".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".eps", ".ps")
FAMILIES = ("load", "bias")  # of experts: a column for each, recorded when asked for
MANY = 1e4  # from which a cost is a large one
BLOWN = 1e4  # how many times its start a metric may grow before it is out of view
HUGE = 1e100
_PAPER: Any = {"font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7, "ytick.labelsize": 7, "lines.linewidth": 1.2}
_STYLE: Any = {
    "figure.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedsim",
}
