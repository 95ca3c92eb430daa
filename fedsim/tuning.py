"""Picks one cell per variant by its value on tuning seeds; reporting seeds are never looked at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedsim.errors import InputError, RunError
from fedsim.grid import Axes, Cell, edges
from fedsim.sections import COSTS, HIGHER_IS_BETTER

if TYPE_CHECKING:
    from fedsim.results.result import Result


@dataclass(frozen=True)
class Select:
    """How the cell of each variant is picked.

    Attributes:
        metric: what is compared, the median over the tuning seeds.
        best: lowest or highest; default: highest for accuracies and rates of success, else lowest.
        at: `end`, or what was spent by then, such as `{bytes: 1.0e8}`: the last value observed at or before it.
        seeds: the tuning seeds, none of them a reporting seed; a number asks for so many beyond these.
        unequal: why variants have different numbers of cells, for the report.
    """

    metric: str
    seeds: Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]]
    best: Literal["lowest", "highest"] | None = None
    at: Literal["end"] | dict[str, Annotated[float, Field(gt=0)]] = "end"
    unequal: str | None = None

    @property
    def highest(self) -> bool:
        """Whether large values are good."""
        return self.best == "highest" if self.best else self.metric in HIGHER_IS_BETTER


@dataclass(frozen=True)
class Choice:
    """What was picked for a variant: the cell, its value, how many cells there were and how many of their runs failed.

    `edges` says on which axes the cell lies at an end of its grid.
    """

    variant: str
    cell: Cell
    value: float
    cells: int
    failed: int
    edges: list[str]


def tuning_seeds(select: Select, reporting: Sequence[int]) -> list[int]:
    """Return the seeds to tune on.

    Raises:
        InputError: one of them is a reporting seed too, or given twice.
    """
    if isinstance(select.seeds, int):
        first = max(reporting) + 1
        return list(range(first, first + select.seeds))
    both = sorted(set(select.seeds) & set(reporting))
    if both:
        raise InputError(f"{both} are reporting seeds too; what is picked on a seed must be reported on others")
    if not select.seeds or len(set(select.seeds)) < len(select.seeds):
        raise InputError(f"{select.seeds} given; at least one seed, and each once, is needed")
    return select.seeds


def refuse_unequal(select: Select, cells: Mapping[str | None, int]) -> None:
    """Refuse to give one variant more tries than another without a word.

    Raises:
        InputError: says how many cells each has.
    """
    if len(set(cells.values())) > 1 and not select.unequal:
        each = ", ".join(f"{name}: {count}" for name, count in cells.items())
        raise InputError(
            f"the variants have different numbers of cells ({each}); give each as many, or say why in select.unequal"
        )


def refuse_cost(select: Select) -> None:
    """Refuse an `at` that is not one cost.

    Raises:
        InputError: says which there are.
    """
    if select.at != "end" and (len(select.at) != 1 or next(iter(select.at)) not in (*COSTS, "round", "time")):
        raise InputError(
            f"at: {select.at} given; end, or one of round, time, {', '.join(COSTS)} with a number is needed"
        )


def choose(select: Select, runs: Mapping[str, Sequence[tuple[Cell, Result]]], axes: Mapping) -> list[Choice]:
    """Return the best cell of each variant; the first of those that tie.

    Args:
        runs: per variant its tuning runs, each with its cell, all ended. axes: per variant its axes.

    Raises:
        InputError: the metric or the cost was not recorded.
        RunError: no cell of a variant has a finite value.
    """
    return [_choice(select, variant, own, axes[variant]) for variant, own in runs.items()]


def _choice(select: Select, variant: str, runs: Sequence[tuple[Cell, Result]], axes: Axes) -> Choice:
    values: dict[str, list[float]] = {}
    cells: dict[str, Cell] = {}
    for cell, run in runs:
        cells.setdefault(repr(cell), cell)
        values.setdefault(repr(cell), []).append(_value(select, run))
    sign = -1.0 if select.highest else 1.0
    medians = {name: float(np.median([sign * v for v in own])) for name, own in values.items()}
    best = min(medians, key=lambda name: medians[name])
    if not math.isfinite(medians[best]):
        raise RunError(f"select: no cell of {variant} reached a finite {select.metric}; widen its grid")
    failed = sum(run.status == "failed" for _, run in runs)
    return Choice(variant, cells[best], sign * medians[best], len(cells), failed, edges(cells[best], axes))


def _value(select: Select, run: Result) -> float:
    """Return a run's value; the worst there is where it failed."""
    worst = -math.inf if select.highest else math.inf
    if run.status == "failed":
        return worst
    cost, amount = ("", math.inf) if select.at == "end" else next(iter(select.at.items()))
    cost = {"seconds": "wall_seconds"}.get(cost, cost)
    for column in (select.metric, cost):
        if column and column not in run.metrics:
            raise InputError(f"select: {run.folder} did not record {column!r}; it has {', '.join(run.metrics)}")
    values = run.metrics[select.metric].to_numpy(float)
    if cost:
        values = values[run.metrics[cost].to_numpy(float) <= amount]
    return float(values[-1]) if len(values) and math.isfinite(values[-1]) else worst


def as_facts(select: Select, seeds: Sequence[int], choices: Sequence[Choice]) -> dict[str, Any]:
    """Return what `study.json` says of the tuning."""
    facts = {**asdict(select), "best": "highest" if select.highest else "lowest", "seeds": list(seeds)}
    return {**facts, "choices": [asdict(choice) for choice in choices]}
