"""Tables of runs: how they ended, what they cost, their constants, settings, versions and digests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fedsim.report.parts import Table, spread, text_of
from fedsim.results.curves import variants

if TYPE_CHECKING:
    from fedsim.results.result import Result, StudyResult

COLUMNS = 6  # of constants, beside name and formula, that a page can hold
SECTIONS_OF_EACH = ("name", "claim", "seed", "data_seed", "checkpoint", "engine")


def state(run: Result) -> str:
    """Return how a run ended, told apart where it diverged or was refused."""
    if run.facts.get("diverged"):
        return "diverged"
    return "refused" if run.facts.get("refused") else run.status


def standing(runs: list[Result]) -> tuple[str, bool]:
    """Return one sentence on how the runs ended, and whether all came to their end."""
    states = [state(run) for run in runs]
    if not states:
        return "No run has been played yet.", False
    if set(states) == {"finished"}:
        return ("The run finished." if len(runs) == 1 else f"{len(runs)} of {len(runs)} runs finished."), True
    if len(runs) == 1:
        return f"The run did not finish ({states[0]}). This page shows what was observed until then.", False
    each = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    return f"Not all of {len(runs)} runs finished: {each}. Of the others, this page shows what was observed.", False


def not_finished(runs: list[Result], caption: str = "Runs that did not finish") -> Table | None:
    """Return the runs that failed, diverged, were interrupted or wait, with what they said."""
    rows = [
        [run.variant, text_of(run.facts.get("seed")), state(run), run.facts.get("error") or _observed(run)]
        for run in runs
        if run.status != "finished"
    ]
    if not rows:
        return None
    return Table(caption, ["variant", "seed", "status", "message"], rows, prose=True)


def _observed(run: Result) -> str:
    count = len(run.metrics)
    return f"{count} observations until now" if count else "nothing observed yet"


def listed(runs: list[Result]) -> Table:
    """Return every run with its digests."""
    rows = [
        [
            run.variant,
            text_of(run.facts.get("seed")),
            state(run),
            run.facts.get("stopped_by", "–"),
            run.digest or "none: it did not finish",
            run.facts.get("scenario_digest", "–"),
        ]
        for run in runs
    ]
    columns = ["variant", "seed", "status", "ended by", "digest of the result", "digest of the scenario"]
    return Table("Runs and their digests", columns, rows, words=tuple(columns[3:]))


def costs(result: Result | StudyResult) -> Table | None:
    """Return what each variant spent in all: the median over its runs, and the quartiles."""
    groups = {name: [run for run in runs if _spent(run)] for name, runs in variants(result).items()}
    names = list(dict.fromkeys(c for runs in groups.values() for run in runs for c, v in _spent(run).items() if v))
    if not names:
        return None
    rows = []
    for name, runs in groups.items():
        paid = [spread([_spent(run).get(c, 0.0) for run in runs]) if runs else "–" for c in names]
        rows.append([name, str(len(runs)), *paid])
    notes = [
        "Totals over all nodes, median over runs [lower, upper quartile]. Bytes are the encoded messages between nodes;"
        " wire_bytes is what this job moved between its processes. Wall seconds are those of this machine, without"
        " compilation and observation."
    ]
    if any(run.status != "finished" for run in result.runs):
        notes.append("Of runs that did not finish, what they had spent by then.")
    return Table("Totals of each variant", ["variant", "runs", *names], rows, notes)


def _spent(run: Result) -> dict[str, float]:
    found = {name: float(v) for name, v in run.facts.get("totals", {}).items()}
    metrics = run.metrics
    if not metrics.empty:
        found |= {"wall_seconds": float(metrics["wall_seconds"].iloc[-1])} if "wall_seconds" in metrics else {}
        if "totals" not in run.facts:  # still running: what the last observation says
            found |= {c: float(metrics[c].iloc[-1]) for c in ("gradients", "communications", "bytes") if c in metrics}
    return found | ({"wire_bytes": float(run.facts["wire_bytes"])} if run.facts.get("wire_bytes") else {})


def first_of_each(result: Result | StudyResult) -> dict[str, Result]:
    """Return one run per variant: the first that got as far as having constants, else the first."""
    return {
        name: next((run for run in runs if "constants" in run.facts), runs[0])
        for name, runs in variants(result).items()
    }


def constants(result: Result | StudyResult) -> list[Table]:
    """Return resolved constants with their formulas; variants that share all of them share a column."""
    groups: dict[str, list[str]] = {}
    values: dict[str, list[dict[str, Any]]] = {}
    for name, run in first_of_each(result).items():
        if run.constants:
            groups.setdefault(repr(run.constants), []).append(name)
            values[repr(run.constants)] = run.constants
    keys, count = list(groups), len(first_of_each(result))
    return [
        _constants([(_together(groups[k], count), values[k]) for k in keys[i : i + COLUMNS]])
        for i in range(0, len(keys), COLUMNS)
    ]


def _constants(columns: list[tuple[str, list[dict[str, Any]]]]) -> Table:
    names = list(dict.fromkeys((c["name"], c["formula"]) for _, own in columns for c in own))
    found = [{(c["name"], c["formula"]): text_of(c["value"]) for c in own} for _, own in columns]
    rows = [[name, *(own.get((name, formula), "–") for own in found), formula] for name, formula in names]
    return Table(
        "Constants that the runs stand on", ["constant", *(t for t, _ in columns), "formula"], rows, words=("formula",)
    )


def _together(names: list[str], count: int) -> str:
    if len(names) == count:
        return "value" if count == 1 else "all variants"
    return "; ".join(names) if len(names) <= 4 else f"{'; '.join(names[:3])} and {len(names) - 3} more"


def settings(scenarios: dict[str, dict[str, Any]]) -> list[Table]:
    """Return what all variants share, section by section, and in what they differ, key by key."""
    flat = {name: _flat({k: v for k, v in s.items() if k not in SECTIONS_OF_EACH}) for name, s in scenarios.items()}
    keys = list(dict.fromkeys(key for own in flat.values() for key in own))
    same = [key for key in keys if len({repr(own.get(key)) for own in flat.values()}) == 1]
    first = next(iter(flat.values()), {})
    shared = [[key, text_of(first[key])] for key in same if first[key] is not None]
    found = [Table("Settings of all runs" if len(flat) > 1 else "Settings", ["key", "value"], shared, prose=True)]
    other = [key for key in keys if key not in same]
    if other:
        rows = [[name, *(text_of(own.get(key)) for key in other)] for name, own in flat.items()]
        found.append(Table("In what the variants differ", ["variant", *other], rows))
    return found


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        nested = isinstance(inner, dict) and inner
        found |= _flat(inner, f"{prefix}{key}.") if nested else {f"{prefix}{key}": inner}
    return found


def machine(runs: list[Result]) -> Table | None:
    """Return versions and machine; where runs differ, all that there are."""
    rows = []
    for section in ("versions", "machine"):
        facts = [run.facts[section] for run in runs if section in run.facts]
        for key in dict.fromkeys(key for own in facts for key in own):
            rows.append([key, " / ".join(_distinct(text_of(own.get(key)) for own in facts))])
    return Table("Versions and machine", ["what", "value"], rows, prose=True) if rows else None


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
