"""Where each algorithm comes from, how it differs from the paper, what it promises, and what was kept private."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.privacy.statement import MEANING as RELATIONS
from fedsim.report.parts import Table, number, text_of
from fedsim.report.runs import first_of_each

if TYPE_CHECKING:
    from fedsim.results.result import Result, StudyResult

DIFFERENCES = re.compile(r"\bDifferences( (from|to) [^:]+)?:.*")  # how docstrings of algorithms begin what differs
MEANING = {
    "paper": "written from the paper",
    "authors' code": "follows the authors' code",
    "reconstruction": "a reconstruction: paper and code leave parts of it open",
}


@dataclass(frozen=True)
class Source:
    """One algorithm of a study.

    Attributes:
        variants: which variants play it.
        differences: paragraphs of its documentation that say where it differs from paper or authors' code.
        text: its whole documentation.
        notes: what it said of these runs.
        guarantees: the bound of each variant, in words, with the hypotheses that are broken.
    """

    kind: str
    paper: str
    provenance: str
    variants: list[str]
    differences: list[str]
    text: str
    notes: list[str]
    guarantees: list[str]


def sources(result: Result | StudyResult) -> list[Source]:
    """Return the algorithms that were played, in the order of the study."""
    groups: dict[str, dict[str, Result]] = {}
    for name, run in first_of_each(result).items():
        if "algorithm" in run.facts:
            groups.setdefault(run.facts["algorithm"], {})[name] = run
    return [_source(kind, own) for kind, own in groups.items()]


def _source(kind: str, runs: dict[str, Result]) -> Source:
    facts = next(iter(runs.values())).facts
    text = _documentation(kind)
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    return Source(
        kind=kind,
        paper=facts["paper"],
        provenance=MEANING.get(facts["provenance"]) or str(facts["provenance"]),
        variants=list(runs),
        differences=[found[0] for p in paragraphs if (found := DIFFERENCES.search(p))],
        text=text,
        notes=_by_text({name: run.facts.get("notes", []) for name, run in runs.items()}),
        guarantees=_by_text({name: _bound(run.facts.get("guarantee")) for name, run in runs.items()}),
    )


def _documentation(kind: str) -> str:
    """Return the docstring of a shipped algorithm; a user's own file is not run for a report."""
    from fedsim import registry

    if kind not in registry.KINDS["algorithm"]:
        return ""
    return inspect.getdoc(registry.find("algorithm", kind, Path.cwd())) or ""


def _bound(g: dict[str, Any] | None) -> list[str]:
    if not g:
        return []
    formula = f"{g['metric']}(t) ≤ {g['prefactor']:.4g} · {g['metric']}(0) · exp(-{g['rate']:.6g} t), {g['source']}"
    if not g["broken"]:
        return [f"{formula}; all hypotheses hold"]
    return [f"{formula}; a slope only, since these hypotheses are broken: {'; '.join(g['broken'])}"]


def _by_text(lines: dict[str, list[str]]) -> list[str]:
    """Return each line once, with the variants that it is of where not all share it."""
    groups: dict[str, list[str]] = {}
    for name, own in lines.items():
        for line in own:
            groups.setdefault(line, []).append(name)
    every = len(lines)
    return [line if len(names) == every else f"{_few(names)}: {line}" for line, names in groups.items()]


def _few(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} more"


def privacy(result: Result | StudyResult) -> tuple[list[str], list[Table]]:
    """Return lines and tables on privacy; nothing where no run promises any."""
    private = {name: run for name, run in first_of_each(result).items() if run.facts.get("privacy")}
    if not private:
        return [], []
    lines = _together(result.facts.get("privacy") or {})
    unprotected = [name for name in first_of_each(result) if name not in private]
    if unprotected:
        lines.append(f"Without any protection: {_few(unprotected)}.")
    columns = [c for run in private.values() for c in run.facts.get("non_private", {}).get("columns", [])]
    if columns:
        lines.append(
            f"Outside of the guarantee, computed on the data themselves: {', '.join(dict.fromkeys(columns))}, and the"
            " table of the partition. Nor does it cover the choice of hyper-parameters."
        )
    return lines, [_promises(private)]


def _together(p: dict[str, Any]) -> list[str]:
    """Return what all runs of a study spend together, since they used the same data."""
    if "runs" not in p:
        return []
    pair = f"({p['epsilon_of_private_runs']:.4g}, {p['delta']:g})-DP"
    spent = f"{p['runs']} private runs on the same data spend together {pair}"
    unit = f"when one {p['unit']} {RELATIONS[p['relation']]}"
    other = p["unprotected_runs"]
    return [f"{spent}, {unit}." + (f" {other} more protect nothing, so all together do not either." if other else "")]


def _promises(private: dict[str, Result]) -> Table:
    shown = {
        "epsilon": "ε against who sees broadcasts",
        "epsilon_server": "ε against the server",
        "delta": "δ",
        "unit": "unit",
        "relation": "relation",
        "trust": "trust model",
        "budget": "budget",
        "releases": "releases",
        "multipliers": "noise multipliers",
        "accountant": "accountant",
        "calibration": "calibration",
        "noise": "noise",
        "refused": "refused",
    }
    facts = {name: run.facts["privacy"] for name, run in private.items()}
    rows = [[title, *(_cell(p.get(key)) for p in facts.values())] for key, title in shown.items()]
    notes = ["Of the first run of each variant. ∞: nothing is protected from this observer, which is trusted."]
    return Table("What is promised, and to whom", ["", *facts], [r for r in rows if set(r[1:]) != {"–"}], notes, True)


def _cell(value: Any) -> str:
    return number(value) if isinstance(value, float) else text_of(value)
