"""Writes the report of a run or a study: one HTML file that needs nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.report import comparison, pictures, reproduce, runs, sources, sweeps
from fedsim.results.folder import write_whole
from fedsim.results.result import load

if TYPE_CHECKING:
    from fedsim.results.result import Result, StudyResult

FILE = "report.html"


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of what `fedsim run` or `fedsim sweep` left in a folder, finished or not.

    Args:
        out: the file (default `report.html` in the folder).

    Returns:
        The file.

    Raises:
        InputError: the folder is neither a run nor a study.
    """
    result = load(folder)
    file = Path(out) if out else result.folder / FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, html(result))
    return file


def html(result: Result | StudyResult) -> str:
    """Return the page. Equal folders give equal pages: nothing of the day or the machine that draws is in it."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("fedsim.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html").render(**contents(result)) + "\n"


def contents(result: Result | StudyResult) -> dict[str, Any]:
    """Return everything that the page shows."""
    tuning = sweeps.tuning_of(result)
    first = runs.first_of_each(result)
    scenarios = {name: reproduce.read_scenario(run.folder) for name, run in first.items()}
    everything = [*result.runs, *(tuning.runs if tuning else [])]
    sentence, fine = runs.standing(result.runs)
    compared, why_not = comparison.comparisons(result) if result.runs else ([], [])
    figures, undrawn = pictures.curves(result)
    graphs, no_graphs = pictures.topologies(scenarios, first)
    private, promises = sources.privacy(result)
    return {
        "name": result.facts.get("name") or result.folder.name,
        "claim": _claim(result, scenarios),
        "sentence": f"{sentence} Tuning: {runs.standing(tuning.runs)[0]}" if tuning else sentence,
        "fine": fine,
        "unfinished": runs.not_finished(result.runs),
        "figures": figures,
        "figure_notes": undrawn,
        "compared": compared,
        "compared_notes": why_not,
        "costs": runs.costs(result),
        "sweep": _sweep(result, tuning),
        "settings": runs.settings(scenarios),
        "graphs": graphs,
        "graph_notes": no_graphs,
        "partitions": pictures.partitions(first),
        "constants": runs.constants(result),
        "sources": sources.sources(result),
        "privacy": private,
        "promises": promises,
        "machine": runs.machine(everything),
        "listed": runs.listed(everything),
        "digest": result.digest,
        "tuning_digest": tuning.digest if tuning else None,
        "is_study": len(everything) > 1,
        "again": reproduce.again(result),
    }


def _claim(result: Result | StudyResult, scenarios: dict[str, dict[str, Any]]) -> str:
    return result.facts.get("claim") or next((s["claim"] for s in scenarios.values() if s.get("claim")), "")


def _sweep(result: Result | StudyResult, tuning: StudyResult | None) -> dict[str, Any] | None:
    """Return what is said of sweep and tuning; None where nothing was swept."""
    from fedsim.results.result import Result

    swept = tuning or result
    if isinstance(result, Result) or isinstance(swept, Result) or not swept.facts.get("sweep"):
        return None
    table, lines = sweeps.choices(result)
    select = result.facts.get("select") or {}
    at = select.get("at", "end")
    highest = select["best"] == "highest" if select else None
    drawn = sweeps.sensitivity(swept, select.get("metric"), highest, at)
    return {
        "axes": sweeps.axes(swept),
        "choices": table,
        "lines": lines,
        "figures": drawn,
        "tuned": tuning is not None,
        "unfinished": runs.not_finished(tuning.runs, "Tuning runs that did not finish") if tuning else None,
    }
