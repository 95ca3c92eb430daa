"""Pictures of experts over time: loads as heat maps, biases as lines, the Lagrangian's terms, the regret's growth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.results.curves import variants
from fedsim.results.plots import _STYLE, COLOURS, TITLES, _save

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fedsim.results.result import Result, StudyResult

TERMS = {"gap": "D(p) - OPT", "benefit": "rise: switching benefits", "penalty": "fall: sum of eps (A - L)²"}


def draws(result: Result | StudyResult, metric: str) -> bool:
    """Return whether `metric` is a family of columns (`load.0.3`, ...) or the Lagrangian with its terms."""
    columns = result.runs[0].metrics.columns
    if metric in ("lagrangian", "regret"):
        return {"lagrangian": "benefit", "regret": "regret"}[metric] in columns
    return metric not in columns and any(c.startswith(f"{metric}.") for c in columns)


def draw(result: Result | StudyResult, metric: str, out: Path | None) -> list[Path]:
    """Draw the first run of every variant; return the files written, PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {name: runs[0] for name, runs in variants(result).items()}
    groups = {name: run for name, run in groups.items() if draws(run, metric)}
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    size = (3.3 * columns + 0.5, 2.4 * rows + 0.5)
    with plt.rc_context(rc=_STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True)
        shown = None
        for axis, (name, run) in zip(axes.flat, groups.items(), strict=False):
            axis.set_title(name, fontsize=9)
            if metric == "load":
                shown = _heat(axis, run.metrics)
            elif metric == "lagrangian":
                _terms(axis, run.metrics)
            elif metric == "regret":
                _regret(axis, [r for r in result.runs if r.variant == name])
            else:
                _lines(axis, run.metrics, metric)
        for axis in list(axes.flat)[len(groups) :]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("round")
        if shown is not None:
            figure.colorbar(shown, ax=axes, label="load / mean load", extend="max")
        if metric in ("lagrangian", "regret"):
            figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        files = _save(figure, out or result.folder / "plots" / metric)
        plt.close(figure)
    return files


def _family(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    return frame.loc[:, [str(c).startswith(f"{name}.") for c in frame]]


def _heat(axis: Axes, frame: pd.DataFrame) -> Any:
    """Loads over their mean: experts upwards, layer after layer, time to the right; white is the mean."""
    from matplotlib.colors import TwoSlopeNorm

    family = _family(frame, "load")
    layers = [c.split(".")[1] for c in family]
    values = family.to_numpy(float).T.copy()
    for layer in set(layers):
        own = np.array([name == layer for name in layers])
        values[own] /= np.maximum(values[own].mean(axis=0), 1e-12)
    time = frame["round"].to_numpy(float)
    norm = TwoSlopeNorm(1.0, 0.0, 3.0)
    shown = axis.pcolormesh(time, np.arange(len(values)), values, cmap="RdBu_r", norm=norm, rasterized=True)
    for place in np.flatnonzero(np.array(layers[1:]) != np.array(layers[:-1])):
        axis.axhline(place + 0.5, color="black", linewidth=0.8)
    axis.set_ylabel("expert" if len(set(layers)) == 1 else "experts of each layer")
    return shown


def _lines(axis: Axes, frame: pd.DataFrame, name: str) -> None:
    family = _family(frame, name)
    shades = np.linspace(0.15, 0.9, max(2, family.shape[1]))
    import matplotlib

    colours = matplotlib.colormaps["viridis"](shades)
    for place, column in enumerate(family):
        axis.plot(frame["round"], family[column], color=colours[place], linewidth=0.9)
    axis.set_ylabel(TITLES.get(name, name))
    axis.grid(True, alpha=0.25, linewidth=0.6)


def _regret(axis: Axes, runs: list[Result]) -> None:
    """Median and range over seeds, and the predicted growth from a tenth of the horizon on."""
    steps = runs[0].metrics["round"].to_numpy(float) + 1
    values = np.array([run.metrics["regret"].to_numpy(float) for run in runs])
    middle = np.median(values, axis=0)
    axis.plot(steps, middle, color=COLOURS[0], label="measured (median, range over seeds)")
    if len(runs) > 1:
        axis.fill_between(steps, values.min(axis=0), values.max(axis=0), color=COLOURS[0], alpha=0.18, linewidth=0)
    law = next((c for c in runs[0].constants if c["name"] == "regret"), None)
    if law:
        first = len(steps) // 10
        axis.plot(
            steps[first:], predicted(law, steps[first:], middle[first]), "--", color=COLOURS[1], label="predicted"
        )
    axis.set_ylabel("regret")
    axis.set_xscale("log")
    axis.grid(True, alpha=0.25, linewidth=0.6)


def predicted(law: dict[str, Any], steps: np.ndarray, start: float) -> np.ndarray:
    """Return the growth that `check` prints (`predicted growth per ln N`, ...), from `start` at the first step."""
    shape = law["formula"].removeprefix("predicted growth per ")
    if shape == "N^power":
        return start * (steps / steps[0]) ** law["value"]
    grown = {"ln N": np.log, "sqrt N": np.sqrt, "N": np.asarray}[shape](steps)
    return start + law["value"] * (grown - grown[0])


def _terms(axis: Axes, frame: pd.DataFrame) -> None:
    later = frame.iloc[1:]
    for place, (column, title) in enumerate(TERMS.items()):
        if column in later:
            seen = later[column].where(later[column] > 1e-9)  # balance leaves rounding errors
            axis.plot(later["round"], seen, color=COLOURS[place], label=title, linewidth=1.1)
    axis.set_yscale("log")
    axis.grid(True, alpha=0.25, linewidth=0.6)
