"""Which cost reaches a value, or which value a cost buys: a table over variants and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    improved,
    told_apart,
    variants,
)
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
NO_METRICS = (*COSTS, "time", "round", "exchanges", "bytes_up", "bytes_down")


@dataclass
class _Groups:
    """Runs by their title in the table, and what stands below it."""

    runs: dict[str, list[Result]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare(
    folders: Sequence[str | Path],
    *,
    to: tuple[str, float] | None = None,
    at: tuple[str, float] | None = None,
    reference: str | None = None,
) -> pd.DataFrame:
    """Compare runs and studies: one row per variant.

    Args:
        folders: what `fedsim run` left behind, one or several.
        to: (metric, value): the cost at which the metric is as good as the value for good: at most it, or at least
            where more is better (accuracies, rates of success).
        at: (cost, amount): the metrics by the time that much was spent, the last ones observed.
        reference: the variant that the others are paired with (default the first).
        Without either, `to` is the smallest power of ten of the first metric that gets better that all finished runs
        reach (a number of two digits where one starts there), or `at` the last common round: where none does, and
        where loads of experts were recorded.

    Returns:
        A frame by variant. `runs`; with `to` how many `reached` the value; how many `diverged`; with `at` how many
        `ended` before the amount (their last value counts). The median of every cost or metric NAME, its quartiles
        `NAME_q1`, `NAME_q3`. Against the reference on common draws (equal seeds): `NAME_vs` the median over pairs of
        the ratio of costs or the difference of metrics, its quartiles `NAME_vs_q1`, `NAME_vs_q3`, in how many
        `pairs`. A variant some of whose runs did not reach the value, or diverged before the amount, has NaN there,
        never a number. `attrs["notes"]` are what a reader must know.

    Raises:
        InputError: a column that was not recorded, both `to` and `at`, or a reference that is not there.
    """
    import pandas as pd

    if to and at:
        raise InputError("compare: give either --to (cost for a value) or --at (value for a cost), not both")
    groups = _groups(folders)
    observed = {name: [run for run in runs if not run.metrics.empty] for name, runs in groups.runs.items()}
    if not to and not at:
        to, at = _default(observed)
    values = {name: _to(runs, *to) if to else _at(runs, *at) for name, runs in observed.items()}  # type: ignore[misc]
    first = _reference(reference, groups.runs)
    table = [
        {"variant": name, **_row(runs, values[name]), **_paired(values[name], values[first], bool(to), name == first)}
        for name, runs in groups.runs.items()
    ]
    frame = pd.DataFrame(table).set_index("variant")
    sign = ">=" if to and higher_is_better(to[0]) else "<="
    frame.attrs.update({"metric": to[0], "goal": to[1]} if to else {})
    frame.attrs["question"] = f"cost to {to[0]} {sign} {to[1]:g}" if to else f"value at {at[0]} = {at[1]:g}"  # type: ignore[index]
    frame.attrs |= {"reference": first, "paired": "ratio" if to else "difference"}
    frame.attrs["notes"] = [*groups.notes, *_remarks(frame, at)]
    return frame


@dataclass
class _Values:
    """What each seed gives: one number per column, or None where there is none to give."""

    columns: list[str]
    by_run: list[tuple[int, dict[str, float] | None]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


def _to(runs: list[Result], metric: str, goal: float) -> _Values:
    _refuse_missing(runs, metric)
    frames = [run.metrics for run in runs]
    costs = [c for c in (*COSTS, "time", "round") if any(c in f and f[c].iloc[-1] > 0 for f in frames)]
    found = _Values(costs, counts={"reached": 0})
    for run in runs:
        paid = {c: None if diverged(run) else cost_to_reach(run.metrics, c, metric, goal) for c in costs}
        reached = all(value is not None for value in paid.values()) and bool(paid)
        found.counts["reached"] += reached
        found.by_run.append((run.seed, {c: float(v) for c, v in paid.items() if v is not None} if reached else None))
    return found


def _at(runs: list[Result], cost: str, amount: float) -> _Values:
    _refuse_missing(runs, cost)
    columns = [c for c in (runs[0].metrics if runs else ()) if c not in NO_METRICS and "." not in c]
    found, grid = _Values(columns, counts={"ended": 0}), np.array([amount])
    for run in runs:
        before = float(run.metrics[cost].iloc[-1]) < amount
        found.counts["ended"] += before and not diverged(run)
        values = {c: float(carried_forward(run.metrics, cost, c, grid)[0]) for c in columns}
        found.by_run.append((run.seed, None if before and diverged(run) else values))
    return found


def _row(runs: list[Result], found: _Values) -> dict[str, Any]:
    row: dict[str, Any] = {"runs": len(runs), **found.counts, "diverged": sum(map(diverged, runs))}
    whole = len(found.by_run) == len(runs) and all(values is not None for _, values in found.by_run)
    for column in found.columns:
        row |= _quartiles(column, [v[column] for _, v in found.by_run if v is not None] if whole else [])
    return row


def _paired(own: _Values, reference: _Values, ratio: bool, same: bool) -> dict[str, float]:
    """Return medians and quartiles over common draws of what this variant has against the reference."""
    there = {draw: values for draw, values in reference.by_run if values is not None}
    pairs = [(v, there[draw]) for draw, v in own.by_run if v is not None and draw in there and not same]
    row: dict[str, float] = {"pairs": len(pairs)}
    for column in own.columns:
        both = [(a[column], b[column]) for a, b in pairs if column in b]
        gone = any(b == 0 for _, b in both) and ratio
        against = [a / b if ratio else a - b for a, b in both] if not gone else []
        row |= _quartiles(f"{column}_vs", against)
    return row


def _quartiles(name: str, values: list[float]) -> dict[str, float]:
    with np.errstate(invalid="ignore"):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75]) if values else (np.nan, np.nan, np.nan)
    return {name: float(middle), f"{name}_q1": float(low), f"{name}_q3": float(high)}


def _remarks(frame: pd.DataFrame, at: tuple[str, float] | None) -> list[str]:
    """Say of which rows a reader could take something for what it is not."""
    notes = []
    for name, row in frame.to_dict("index").items():
        if at and row["ended"]:
            count = f"{row['ended']} of {row['runs']} runs"
            notes.append(f"{name}: {count} ended before {at[0]} = {at[1]:g}; what they had then counts")
    return notes


def _groups(folders: Sequence[str | Path]) -> _Groups:
    groups, titles = _Groups(), told_apart([Path(folder) for folder in folders])
    for folder, whose in titles.items():
        found = load(folder)
        edges = at_edges(found)
        for name, runs in variants(found).items():
            title = (name if len(titles) == 1 else f"{whose}: {name}") + (EDGE if name in edges else "")
            groups.runs.setdefault(title, []).extend(runs)
        groups.notes += edge_notes(found)
        states = [run.status for run in found.runs]
        for state in ("running", "interrupted", "waiting"):
            if state in states:
                groups.notes.append(f"{folder}: {states.count(state)} of {len(states)} runs are {state}")
        other = sum(run.status == "failed" and run.facts.get("diverged") is False for run in found.runs)
        if other:
            groups.notes.append(f"{folder}: {other} of {len(states)} runs failed by an error; they count as diverged")
    if not groups.runs:
        raise InputError("compare: give at least one folder of a run or a study")
    return groups


def _reference(wanted: str | None, groups: dict[str, list[Result]]) -> str:
    names = {name.removesuffix(EDGE): name for name in groups}
    if wanted is None:
        return next(iter(groups))
    if wanted not in names:
        raise InputError(
            f"compare: no variant {wanted!r} to compare with{did_you_mean(wanted, names)}; there are {', '.join(names)}"
        )
    return names[wanted]


def _refuse_missing(runs: list[Result], column: str) -> None:
    for run in runs:
        if column not in run.metrics:
            names = list(run.metrics.columns)
            raise InputError(
                f"compare: {run.folder} did not record {column!r}{did_you_mean(column, names)};"
                f" it has {', '.join(names)}"
            )


def _default(groups: dict[str, list[Result]]) -> tuple[tuple[str, float] | None, tuple[str, float] | None]:
    """Return a goal for the first metric that has one, or else the last common round (or time)."""
    runs = [run for group in groups.values() for run in group]
    ended = [run for run in runs if not diverged(run)]
    level = bool(ended) and not all("maxvio" in run.metrics for run in runs)  # loads oscillate: no level is kept
    for metric in MAIN if level else ():
        goal = _default_goal(ended, metric) if all(metric in run.metrics for run in ended) else None
        if goal is not None:
            return (metric, goal), None
    clock = next((c for c in ("round", "time") if runs and all(c in run.metrics for run in runs)), None)
    if clock is None:
        raise InputError("compare: no common metric to take a goal from; give --to METRIC=VALUE or --at COST=AMOUNT")
    return None, (clock, min(float(run.metrics[clock].iloc[-1]) for run in ended or runs))


def _default_goal(runs: list[Result], metric: str) -> float | None:
    """Return what all runs reach that get better at all; None: nobody does, or not to a positive number."""
    worst = max((last for _, last in improved(runs, metric)), default=np.nan)
    if not (np.isfinite(worst) and worst > 0):
        return None
    goal = common_goal(runs, metric)
    if goal is not None:
        return goal
    digit = 10.0 ** (np.floor(np.log10(worst)) - 1)  # where runs start: two digits tell them apart
    return float(f"{np.ceil(worst / digit) * digit:.1e}")
