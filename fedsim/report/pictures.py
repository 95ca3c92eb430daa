"""Pictures of a report, drawn into a folder that goes away and carried inside the page."""

from __future__ import annotations

import base64
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import FedsimError
from fedsim.report.parts import Picture, number
from fedsim.results.compare import COSTS
from fedsim.results.curves import MAIN, higher_is_better, variants
from fedsim.results.plots import what_was_saved
from fedsim.results.result import Result, StudyResult

if TYPE_CHECKING:
    from fedsim.topology.topology import Topology

CLOCKS = ("time", "round")
AXES = ("queries", "communications", "gradients", "dual_gradients", "bytes", "samples", *CLOCKS, "wall_seconds")
NODES = 400  # above which a drawn graph shows nothing any more
BARS = 1000
LINES = 6  # variants that one picture can tell apart
PANELS = 6
METADATA = re.compile(r"<metadata>.*?</metadata>", re.S)  # holds the day it was drawn: a page would never be the same


@dataclass(frozen=True)
class Drawn(StudyResult):
    """The runs that a picture shows, read like the study that they are of."""

    chosen: tuple[Result, ...] = ()
    whole: Result | StudyResult | None = None

    @property
    def facts(self) -> dict[str, Any]:  # type: ignore[override]
        """Those of the whole."""
        return {} if self.whole is None else self.whole.facts

    @property
    def runs(self) -> list[Result]:  # type: ignore[override]
        """The chosen ones."""
        return list(self.chosen)


def embedded(draw: Callable[[Path], Sequence[Path]], alt: str, caption: str, wide: bool = False) -> Picture | None:
    """Draw by `draw(file)`, which returns the files it wrote, and carry the SVG inside the page."""
    with tempfile.TemporaryDirectory() as folder:
        files = draw(Path(folder) / "picture.svg")
        if not files:
            return None
        text = METADATA.sub("", files[0].read_text(), count=1)
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode()}", alt, caption, wide)


def curves(result: Result | StudyResult) -> tuple[list[Picture], list[str]]:
    """Return the main metric against every cost that was paid, the other metrics against the first, and notes."""
    runs = [run for run in result.runs if len(run.metrics) > 1]
    gone = len(result.runs) - len(runs)
    notes = (
        [f"Not drawn: {gone} of {len(result.runs)} runs, which ended, or are, before their second observation."]
        if gone
        else []
    )
    if not runs:
        return [], [*notes, "There is nothing to draw yet."]
    columns = [c for c in runs[0].metrics if all(c in run.metrics for run in runs)]
    metrics = [m for m in _metrics(columns) if any(run.metrics[m].nunique() > 1 for run in runs)]
    costs = [c for c in AXES if c in columns and any(_moves(run, c) for run in runs)]
    if not metrics or not costs:
        return [], [*notes, "No metric or no cost is common to all runs, so nothing is drawn."]
    shown, more = _few(result, runs, metrics[0])
    pairs = [(metrics[0], c) for c in costs[:PANELS]] + [(m, costs[0]) for m in metrics[1:PANELS]]
    return [p for m, c in pairs if (p := _curve(shown, m, c))] + _families(shown), notes + more


def _metrics(columns: list[str]) -> list[str]:
    aside = {*COSTS, *CLOCKS, "exchanges", "bytes_up", "bytes_down"}
    plain = [c for c in columns if c not in aside and "." not in c and not c.endswith("_floor")]
    plain = [c for c in plain if not c.startswith("epsilon")]
    return sorted(plain, key=lambda c: MAIN.index(c) if c in MAIN else len(MAIN))


def _moves(run: Result, cost: str) -> bool:
    return float(run.metrics[cost].iloc[-1]) > float(run.metrics[cost].iloc[0])


def _few(result: Result | StudyResult, runs: list[Result], metric: str) -> tuple[Drawn, list[str]]:
    """Return what is drawn: everything, or of many cells those that end lowest."""
    everything = Drawn(result.folder, tuple(runs), result)
    groups = variants(everything)
    if len(groups) <= LINES:
        return everything, []
    ends = {name: float(np.median([run.metrics[metric].iloc[-1] for run in own])) for name, own in groups.items()}
    sign, word = (-1.0, "highest") if higher_is_better(metric) else (1.0, "lowest")
    best = sorted(ends, key=lambda name: (not np.isfinite(ends[name]), sign * ends[name]))[:LINES]
    note = (
        f"Drawn are {LINES} of {len(groups)}: those with the {word} {metric} at the end, judged on these same runs."
        " That is a view, not a selection on seeds of its own."
    )
    return replace(everything, chosen=tuple(run for name in groups if name in best for run in groups[name])), [note]


def _curve(shown: Drawn, metric: str, cost: str) -> Picture | None:
    words = [f"{name} ends at {_end(own, metric)}" for name, own in variants(shown).items()]
    alt = f"Line plot of {metric} against {cost}. {'; '.join(words)}."
    saved = "" if cost == "wall_seconds" else what_was_saved(shown, metric, cost)
    caption = f"{metric} against {cost}" + (f". At {saved}" if saved else "")
    # A goal that nobody reaches keeps the same line out of the picture, which is too narrow for it.
    draw = lambda file: shown.plot(metric=metric, against=cost, out=file, goal=-math.inf)  # noqa: E731
    return embedded(draw, alt, caption)


def _end(runs: list[Result], metric: str) -> str:
    """Return the median over runs of the last value; enormous or infinite where they diverged."""
    return number(float(np.median([float(run.metrics[metric].iloc[-1]) for run in runs])))


def _families(shown: Drawn) -> list[Picture]:
    """Return pictures of loads and biases of experts, where they were recorded."""
    from fedsim.results import experts

    names = dict.fromkeys(c.partition(".")[0] for c in shown.runs[0].metrics.columns if "." in c)
    found = []
    for name in [name for name in names if experts.draws(shown, name)][:3]:
        alt = f"{name} of every expert over the rounds, one panel per variant."
        found.append(embedded(lambda file, n=name: shown.plot(metric=n, out=file), alt, f"{name} over rounds", True))
    return [picture for picture in found if picture]


def partitions(runs: dict[str, Result]) -> list[Picture]:
    """Return how records lie on nodes, once for each way that there is; at most four."""
    tables: dict[str, dict[str, Any]] = {}
    for run in runs.values():
        facts = run.facts.get("problem", {}).get("partition")
        if facts and len(facts["counts"]) <= BARS:
            tables.setdefault(repr(facts), facts)
    return [picture for facts in list(tables.values())[:4] if (picture := _partition(facts))]


def _partition(facts: dict[str, Any]) -> Picture | None:
    from fedsim.results.draw import draw_partition

    table, classes = np.array(facts["counts"], dtype=np.int64), facts["header"][2:]
    shown, labels = (table[:, 2:], [str(c) for c in classes]) if classes else (table[:, 1:2], ["records"])
    low, middle, high = (number(float(v)) for v in np.quantile(table[:, 1], [0, 0.5, 1]))
    words = f"{len(table)} nodes hold {table[:, 1].sum():,} records: from {low} to {high} each, {middle} in the middle"
    words += f"; {len(classes)} classes" if classes else ""
    alt = f"Stacked bars, one per node, by class. {words}."
    return embedded(lambda file: draw_partition(shown, labels, file), alt, words, wide=True)


def topologies(scenarios: dict[str, dict[str, Any]], runs: dict[str, Result]) -> tuple[list[Picture], list[str]]:
    """Return each graph, with gossip rates as widths of its edges where there are; and why one is not drawn."""
    found: list[Picture] = []
    notes: list[str] = []
    seen: set[str] = set()
    for name, scenario in scenarios.items():
        rates = scenario.get("rates") or ({"kind": "uniform"} if _asynchronous(runs[name]) else None)
        key = repr((scenario.get("topology"), rates))
        if key in seen or len(found) >= 4:
            continue
        seen.add(key)
        try:
            picture, note = _topology(scenario, rates, runs[name])
        except (FedsimError, OSError, ValueError, KeyError) as error:
            picture, note = None, f"The graph of {name} is not drawn: {error}"
        found += [picture] if picture else []
        notes += [note] if note and note not in notes else []
    return found, notes


def _asynchronous(run: Result) -> bool:
    return "time" in run.metrics


def _topology(scenario: dict[str, Any], rates: dict[str, Any] | None, run: Result) -> tuple[Picture | None, str | None]:
    from fedsim.topology.build import build

    base = Path(run.facts["base"])
    topology = build(scenario["topology"], base, seed=scenario.get("data_seed", 0))
    if topology.is_server:
        return None, f"{topology.n} nodes meet only at a server, so there is no graph to draw."
    words = _words(topology)
    if topology.n > NODES:
        return None, f"{words}: too many nodes to draw."
    kind = (rates or {}).get("kind")
    shown = {topology.name: np.ones(topology.m)} if rates is None else {f"{kind} rates": _rates(rates, topology, base)}
    caption = words if rates is None else f"{words}; widths of edges are {kind} gossip rates"
    from fedsim.results.draw import draw_rates

    return embedded(lambda file: draw_rates(topology, shown, file), f"Drawing of the graph. {caption}.", caption), None


def _rates(section: dict[str, Any], topology: Topology, base: Path) -> np.ndarray:
    from fedsim.topology.rates import build_rates

    return build_rates({k: v for k, v in section.items() if k != "scale"}, topology, base).rates


def _words(topology: Topology) -> str:
    degrees = np.bincount(topology.edges.ravel(), minlength=topology.n)
    low, high = degrees.min(), degrees.max()
    each = f"every node has {low} neighbours" if low == high else f"nodes have {low} to {high} neighbours"
    return f"{topology.name}: {topology.n} nodes, {topology.m} edges; {each}"
