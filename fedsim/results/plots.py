"""Metric against cost: one line and band per variant, the theory's bound where its hypotheses hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import InputError, did_you_mean
from fedsim.results.curves import carried_forward, cost_to_reach, variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fedsim.results.result import Result, StudyResult

# Okabe and Ito's colours, told apart with any colour vision; markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
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
    result: Result | StudyResult,
    *,
    metric: str | None = None,
    against: str | Sequence[str] | None = None,
    out: str | Path | None = None,
    goal: float | None = None,
    theory: bool = True,
) -> list[Path]:
    """Draw `metric` (log scale) against each cost column in `against`, a panel each, as PNG and SVG.

    Args:
        metric: default `distance`, where it was recorded, else `loss`.
        against: default `communications` and `gradients`.
        out: file without suffix; default `plots/METRIC` in the result's folder.
        goal: a level of the metric; the text under the picture says what each variant paid to reach it.
            Default: the smallest power of ten that all variants reach.
        theory: draw the algorithm's guarantee against time or gradients.

    Returns:
        The files written.

    Raises:
        InputError: a column that was not recorded.
    """
    from fedsim.results import experts

    metric = metric or _default_metric(result)
    if experts.draws(result, metric):
        return experts.draw(result, metric, Path(out) if out else None)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    costs = [against] if isinstance(against, str) else list(against or _default_costs(result))
    for column in (metric, *costs):
        _refuse_missing(result, column)
    with plt.rc_context(rc=_STYLE):
        figure, axes = plt.subplots(1, len(costs), figsize=(3.5 * len(costs) + 0.4, 3.4), sharey=True, squeeze=False)
        for axis, cost in zip(axes[0], costs, strict=True):
            _panel(axis, result, metric, cost, theory)
        axes[0][0].set_ylabel(TITLES.get(metric, metric))
        handles, labels = _legend(axes[0])
        wide = int(figure.get_figwidth() / (0.5 + 0.075 * max(map(len, labels))))
        figure.legend(handles, labels, loc="outside upper center", ncols=min(3, max(1, wide)), frameon=False)
        saved = what_was_saved(result, metric, costs[0], goal)
        if saved:
            figure.supxlabel(saved, fontsize=8.5)
        files = _save(figure, Path(out) if out else result.folder / "plots" / metric)
        plt.close(figure)
    return files


def what_was_saved(result: Result | StudyResult, metric: str, cost: str, goal: float | None = None) -> str:
    """Return one line: what each variant paid (median over seeds) for the same precision, and the saving.

    Variants that do not reach the goal in every run are named as such, never given a number.
    """
    groups = variants(result)
    if len(groups) < 2 or cost in CLOCKS:
        return ""
    level = goal if goal is not None else _common_goal(result, metric)
    if level is None:
        return ""
    paid = {name: [cost_to_reach(r.metrics, cost, metric, level) for r in runs] for name, runs in groups.items()}
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
    line = f"{metric} {level:.0e}: {best} needs {medians[best]:,.0f} {cost}, {worst} {medians[worst]:,.0f}"
    if medians[worst] > 0:
        line += f" ({1 - medians[best] / medians[worst]:.0%} fewer)"
    return line + (f"; not reached by {', '.join(missed)}" if missed else "")


def _panel(axis: Axes, result: Result | StudyResult, metric: str, cost: str, theory: bool) -> None:
    for index, (name, runs) in enumerate(variants(result).items()):
        _line(axis, runs, metric, cost, name, index)
        if theory and cost in (*CLOCKS, "gradients"):
            _guarantee(axis, runs[0], metric, cost, COLOURS[index % len(COLOURS)])
    _floor(axis, result, metric, cost)
    if _positive(result, metric):
        axis.set_yscale("log")
    axis.set_xlabel(TITLES.get(cost, cost))
    axis.grid(True, which="major", alpha=0.25, linewidth=0.6)


def _floor(axis: Axes, result: Result | StudyResult, metric: str, cost: str) -> None:
    """Draw the level that sampling alone leaves, where it was recorded beside the metric."""
    frame = result.runs[0].metrics
    if f"{metric}_floor" in frame:
        axis.plot(frame[cost], frame[f"{metric}_floor"], color="grey", linestyle=":", linewidth=1.2, label="floor")


def _line(axis: Axes, runs: list[Result], metric: str, cost: str, name: str, index: int) -> None:
    frames = [run.metrics for run in runs]
    end = min(float(frame[cost].iloc[-1]) for frame in frames)
    grid = np.unique(np.concatenate([frame[cost].to_numpy(float) for frame in frames]))
    grid = grid[grid <= end]
    values = np.array([carried_forward(frame, cost, metric, grid) for frame in frames])
    colour, mark = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    axis.plot(
        grid,
        np.median(values, axis=0),
        color=colour,
        marker=mark,
        markevery=max(1, len(grid) // 8),
        markersize=4,
        label=name,
    )
    if len(runs) > 1:
        axis.fill_between(grid, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)


def _guarantee(axis: Axes, run: Result, metric: str, cost: str, colour: str) -> None:
    """Draw the bound dashed where its hypotheses hold; elsewhere its slope alone, dotted, and called so."""
    bound = run.facts.get("guarantee")
    if not bound or bound["metric"] != metric or run.metrics.empty:
        return
    frame = run.metrics
    clock = next(c for c in CLOCKS if c in frame)
    time, costs, first = (
        frame[clock].to_numpy(float),
        frame[cost].to_numpy(float),
        float(frame[metric].iloc[0]),
    )
    holds = not bound["broken"]
    curve = (bound["prefactor"] if holds else 1.0) * first * np.exp(-bound["rate"] * time)
    axis.plot(
        costs,
        curve,
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


def _save(figure: Any, stem: Path) -> list[Path]:
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.parent / (stem.name + suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file)
    return files


def _default_metric(result: Result | StudyResult) -> str:
    columns = result.runs[0].metrics.columns
    return next((m for m in ("distance", "stationarity", "loss", "consensus", "maxvio") if m in columns), columns[-1])


def _default_costs(result: Result | StudyResult) -> tuple[str, ...]:
    last = result.runs[0].metrics.iloc[-1]
    if _default_metric(result) == "maxvio":
        return ("round",)
    if last.get("queries", 0) > 0:
        return ("queries", "bytes")
    moving = [c for c in ("communications", "gradients", "dual_gradients") if last.get(c, 0) > 0]
    return tuple(moving[:2]) or (next(c for c in CLOCKS if c in last),)


def _refuse_missing(result: Result | StudyResult, column: str) -> None:
    columns = list(result.runs[0].metrics.columns)
    if column not in columns:
        raise InputError(
            f"plot: column {column!r} was not recorded{did_you_mean(column, columns)}; there are {', '.join(columns)}"
        )


def _positive(result: Result | StudyResult, metric: str) -> bool:
    return all((run.metrics[metric] > 0).any() and (run.metrics[metric].dropna() >= 0).all() for run in result.runs)


def _common_goal(result: Result | StudyResult, metric: str) -> float | None:
    """Return the smallest power of ten that every run reaches for good, or None."""
    worst = max(float(run.metrics[metric].iloc[-1]) for run in result.runs)
    start = min(float(run.metrics[metric].iloc[0]) for run in result.runs)
    if not (np.isfinite(worst) and 0 < worst < start):
        return None
    level = 10.0 ** np.ceil(np.log10(worst))
    return float(level) if level < start else None


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
