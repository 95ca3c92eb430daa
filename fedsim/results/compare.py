"""Which cost reaches a value, or which value a cost buys: a table over variants and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import InputError, did_you_mean
from fedsim.results.plots import carried_forward, cost_to_reach, variants
from fedsim.results.result import Result, load

if TYPE_CHECKING:
    import pandas as pd

COSTS = (
    "gradients",
    "dual_gradients",
    "samples",
    "communications",
    "messages",
    "bytes",
    "queries",
    "wall_seconds",
)


def compare(
    folders: Sequence[str | Path], *, to: tuple[str, float] | None = None, at: tuple[str, float] | None = None
) -> pd.DataFrame:
    """Compare runs and studies: one row per variant.

    Args:
        folders: what `fedsim run` left behind, one or several.
        to: (metric, value): the cost at which the metric is at or below the value for good.
        at: (cost, amount): the metrics by the time that much was spent.
        Without either, `to` is the smallest power of ten of the first metric that all runs reach, or `at` the
        last common round where loads of experts were recorded.

    Returns:
        A frame with `runs`, `reached` (with `to`) and the median of every cost or metric; the quartiles of
        costs stand beside it as `NAME_q1`, `NAME_q3`. Not reached is NaN, never a number.

    Raises:
        InputError: a column that was not recorded, or both `to` and `at`.
    """
    import pandas as pd

    if to and at:
        raise InputError("compare: give either --to (cost for a value) or --at (value for a cost), not both")
    groups = _groups(folders)
    at = at or (None if to else _default_end(groups))
    to = to or (None if at else _default_goal(groups))
    row = (lambda runs: _to(runs, *to)) if to else (lambda runs: _at(runs, *at))  # type: ignore[misc]
    table = [{"variant": name, "runs": len(runs), **row(runs)} for name, runs in groups.items()]
    frame = pd.DataFrame(table).set_index("variant")
    frame.attrs.update({"metric": to[0], "goal": to[1]} if to else {})
    frame.attrs["question"] = f"cost to {to[0]} <= {to[1]:g}" if to else f"value at {at[0]} = {at[1]:g}"  # type: ignore[index]
    return frame


def markdown(frame: pd.DataFrame) -> str:
    """Return the table as Markdown; a variant that did not reach the goal says so: `not reached (n of m)`."""
    columns = [c for c in frame.columns if not c.endswith(("_q1", "_q3")) and c != "reached"]
    lines = [
        f"**{frame.attrs['question']}**",
        "",
        "| variant | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for name, row in frame.iterrows():
        lines.append(f"| {name} | " + " | ".join(_cell(row, column) for column in columns) + " |")
    return "\n".join(lines)


def _cell(row: pd.Series, column: str) -> str:
    numbers = {str(name): float(v) for name, v in row.items()}
    value, runs = numbers[column], int(numbers["runs"])
    if column == "runs":
        return str(runs)
    if numbers.get("reached", runs) < runs:
        return f"not reached ({runs - int(numbers['reached'])} of {runs})"
    if np.isnan(value):
        return "-"
    low, high = numbers.get(f"{column}_q1"), numbers.get(f"{column}_q3")
    spread = "" if low is None or high is None or low == high else f" [{_short(low)}, {_short(high)}]"
    return _short(value) + spread


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def _groups(folders: Sequence[str | Path]) -> dict[str, list[Result]]:
    groups: dict[str, list[Result]] = {}
    for folder in folders:
        found = load(folder)
        for name, runs in variants(found).items():
            title = name if len(folders) == 1 else f"{Path(folder).name}: {name}"
            groups.setdefault(title, []).extend(runs)
    if not groups:
        raise InputError("compare: give at least one folder of a run or a study")
    return groups


def _to(runs: list[Result], metric: str, goal: float) -> dict[str, Any]:
    _refuse_missing(runs, metric)
    costs = [c for c in (*COSTS, "time", "round") if c in runs[0].metrics and runs[0].metrics[c].iloc[-1] > 0]
    reached = sum(cost_to_reach(run.metrics, costs[0], metric, goal) is not None for run in runs)
    row: dict[str, Any] = {"reached": reached}
    for cost in costs:
        paid = [cost_to_reach(run.metrics, cost, metric, goal) for run in runs]
        row.update(_quartiles(cost, [p for p in paid if p is not None] if reached == len(runs) else []))
    return row


def _at(runs: list[Result], cost: str, amount: float) -> dict[str, Any]:
    _refuse_missing(runs, cost)
    row: dict[str, Any] = {}
    for metric in [
        c
        for c in runs[0].metrics
        if c not in (*COSTS, "time", "round", "exchanges", "bytes_up", "bytes_down") and "." not in c
    ]:
        grid = np.array([amount])
        row.update(_quartiles(metric, [float(carried_forward(r.metrics, cost, metric, grid)[0]) for r in runs]))
    return row


def _quartiles(name: str, values: list[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if values else (np.nan, np.nan, np.nan)
    return {name: float(middle), f"{name}_q1": float(low), f"{name}_q3": float(high)}


def _refuse_missing(runs: list[Result], column: str) -> None:
    for run in runs:
        if column not in run.metrics:
            names = list(run.metrics.columns)
            raise InputError(
                f"compare: {run.folder} did not record {column!r}{did_you_mean(column, names)};"
                f" it has {', '.join(names)}"
            )


def _default_end(groups: dict[str, list[Result]]) -> tuple[str, float] | None:
    """Return the last common round for loads of experts: they oscillate, so no level is reached for good."""
    runs = [run for group in groups.values() for run in group]
    if not all("maxvio" in run.metrics for run in runs):
        return None
    return "round", min(float(run.metrics["round"].iloc[-1]) for run in runs)


def _default_goal(groups: dict[str, list[Result]]) -> tuple[str, float]:
    runs = [run for group in groups.values() for run in group]
    known = ("distance", "stationarity", "loss", "consensus")
    metric = next((m for m in known if all(m in run.metrics for run in runs)), None)
    worst = max(float(run.metrics[metric].iloc[-1]) for run in runs) if metric else np.nan
    if metric is None or not (np.isfinite(worst) and worst > 0):
        raise InputError("compare: no common metric to take a goal from; give --to METRIC=VALUE or --at COST=AMOUNT")
    return metric, float(10.0 ** np.ceil(np.log10(worst)))
