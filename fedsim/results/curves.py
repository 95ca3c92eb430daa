"""Curves of runs: the last observation carried forward, the cost from which a level is kept, runs by variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedsim.sections import HIGHER_IS_BETTER

if TYPE_CHECKING:
    import pandas as pd

    from fedsim.results.result import Result, StudyResult

EDGE = "\N{DAGGER}"
MAIN = ("distance", "stationarity", "loss", "test_loss", "consensus", "maxvio")  # what is shown first where it is known


def variants(result: Result | StudyResult) -> dict[str, list[Result]]:
    """Return the runs of each variant, in the scenario's order."""
    groups: dict[str, list[Result]] = {}
    for run in result.runs:
        groups.setdefault(run.variant, []).append(run)
    return groups


def higher_is_better(metric: str) -> bool:
    """Return whether large values of a metric are good."""
    return metric in HIGHER_IS_BETTER


def carried_forward(frame: pd.DataFrame, cost: str, metric: str, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the last observed `metric` at or before each cost on `grid` (NaN before the first); never interpolated."""
    costs, values = frame[cost].to_numpy(float), frame[metric].to_numpy(float)
    place = np.searchsorted(costs, grid, side="right") - 1
    return np.where(place >= 0, values[np.maximum(place, 0)], np.nan)


def cost_to_reach(frame: pd.DataFrame, cost: str, metric: str, goal: float) -> float | None:
    """Return the recorded cost from which `metric` stays as good as `goal`, or None where it never does."""
    values = frame[metric].to_numpy(float)
    bad = np.flatnonzero(~(values >= goal if higher_is_better(metric) else values <= goal))
    first = 0 if len(bad) == 0 else int(bad[-1]) + 1
    return None if first >= len(frame) else float(frame[cost].iloc[first])


def diverged(run: Result) -> bool:
    """Return whether a run failed: nothing that it observed holds beyond its end."""
    return run.status == "failed"


def at_edges(result: Result | StudyResult) -> dict[str, list[str]]:
    """Return, for variants that were tuned, at which ends of their grids they were picked; empty where at none."""
    choices: list[dict[str, Any]] = getattr(result, "facts", {}).get("select", {}).get("choices", [])
    return {choice["variant"]: choice["edges"] for choice in choices if choice["edges"]}


def edge_notes(result: Result | StudyResult) -> list[str]:
    """Return a line for every variant at an end of its grid, as it stands below tables and figures."""
    found = at_edges(result).items()
    return [f"{EDGE} {name}: {', '.join(edges)} of its grid; the best may lie beyond" for name, edges in found]


def common_goal(runs: Sequence[Result], metric: str) -> float | None:
    """Return the smallest power of ten that every run ends at or below, or None where a run starts there already.

    Runs that end no better than they began (and those that observed nothing) have no say: they do not reach it.
    """
    ends = improved(runs, metric)
    worst, start = max((last for _, last in ends), default=0.0), min((first for first, _ in ends), default=0.0)
    if not 0 < worst < start:
        return None
    level = 10.0 ** np.ceil(np.log10(worst))
    return float(level) if level < start else None


def improved(runs: Sequence[Result], metric: str) -> list[tuple[float, float]]:
    """Return the first and the last value of each run that ends below where it began."""
    curves = [run.metrics[metric].dropna().to_numpy(float) for run in runs]  # it may have no value at the start
    return [(float(v[0]), float(v[-1])) for v in curves if len(v) and v[-1] < v[0]]


def told_apart(folders: Sequence[Path]) -> dict[Path, str]:
    """Return a title for each folder, once: its name, with as many of the folders above as tell it from the others."""
    paths, titles = dict[Path, Path](), dict[Path, str]()
    for folder in folders:
        paths.setdefault(folder.resolve(), folder)
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        titles = {folder: "/".join(path.parts[-depth:]) for path, folder in paths.items()}
        if len(set(titles.values())) == len(titles):
            break
    return titles
