"""The commands that give a result again, and the scenarios that they play."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedsim.results.curves import variants
from fedsim.results.folder import SCENARIO
from fedsim.results.result import Result

if TYPE_CHECKING:
    from fedsim.results.result import StudyResult

EACH = 12  # runs whose commands are written out; more go by a loop of the shell
SHOWN = 24  # scenarios that are printed whole


@dataclass(frozen=True)
class Again:
    """How to get the result again.

    Attributes:
        commands: (what it does, the lines to type).
        notes: what a reader must know before.
        files: (name, content) of scenarios, so that the page alone is enough.
    """

    commands: list[tuple[str, list[str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)


def again(result: Result | StudyResult) -> Again:
    """Return commands, notes and scenarios for a folder of a run or a study."""
    runs, commands = result.runs, [] if isinstance(result, Result) else _whole(result)
    scenarios = {name: read_scenario(own[0].folder) for name, own in variants(result).items()}
    live = [run for run in runs if scenarios[run.variant].get("schedule", {}).get("kind") == "live"]
    virtual = [run for run in runs if run not in live]
    if virtual:
        commands += [
            ("Run by run, in one process", _lines(result, virtual, "fedsim run")),
            ("On four processes of MPI, to the same digests", _lines(result, virtual, "mpirun -n 4 fedsim run")),
        ]
    if live:
        replays = [f"fedsim replay {_quoted(run.folder)}" for run in live]
        commands.append(("Real clocks do not come again; the recorded traces do, to the same bits", replays))
    files = [(_name(result, run), run.scenario) for run in runs[:SHOWN] if (run.folder / SCENARIO).exists()]
    return Again(commands, _notes(runs, scenarios), [*_source(result), *files])


def _whole(study: StudyResult) -> list[tuple[str, list[str]]]:
    """Return the command for a sweep as a whole, whose `study.json` says what it was read from."""
    source = study.facts.get("source")
    if not source:
        return []
    words = ["fedsim", "sweep" if "sweep" in study.facts else "run", "study.yaml"]
    words += [f"{key}={_value(v)}" for key, v in _overrides(source)] + (["--short"] if source.get("short") else [])
    line = " ".join(shlex.quote(word) for word in [*words, "--folder", "again"])
    return [("The whole study, tuning included (study.yaml is printed below)", [line])]


def _overrides(source: dict[str, Any]) -> list[tuple[str, Any]]:
    given = source.get("overrides") or {}
    if isinstance(given, dict):
        return list(given.items())
    parts = [str(text).partition("=") for text in given]
    return [(key, value) for key, _, value in parts]


def _value(value: Any) -> str:
    return (
        value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=10**6).split("\n")[0]
    )


def _source(result: Result | StudyResult) -> list[tuple[str, str]]:
    source = {} if isinstance(result, Result) else result.facts.get("source") or {}
    content = source.get("source")
    return [("study.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))] if content else []


def _lines(result: Result | StudyResult, runs: list[Result], command: str) -> list[str]:
    if len(runs) > EACH:
        root = _quoted(result.folder)
        loop = f'for s in {root}/*/{SCENARIO}; do {command} "$s" --folder "again/$(basename "$(dirname "$s")")"; done'
        return [loop]
    return [
        f"{command} {_quoted(run.folder / SCENARIO)} --folder {_quoted(Path('again') / run.folder.name)}"
        for run in runs
    ]


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _name(result: Result | StudyResult, run: Result) -> str:
    inside = run.folder.relative_to(result.folder)
    return str(inside / SCENARIO)


def read_scenario(folder: Path) -> dict[str, Any]:
    """Return a run's resolved scenario as plain data; empty where none was written."""
    file = folder / SCENARIO
    return (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}


def _notes(runs: list[Result], scenarios: dict[str, dict[str, Any]]) -> list[str]:
    versions = " ".join(f"{k} {v}" for k, v in (runs[0].facts.get("versions", {}) if runs else {}).items())
    found = [
        "Digests are equal on the same instruction set and the same versions of libraries"
        + (f" ({versions})" if versions else "")
        + ", for any block size and number of processes. `--json` prints them."
    ]
    if len(runs) > SHOWN:
        found.append(f"The scenarios of the first {SHOWN} runs are printed below; all lie in the folders of the runs.")
    bases = dict.fromkeys(run.facts["base"] for run in runs if "base" in run.facts)
    named = sorted({name for s in scenarios.values() for base in bases for name in _own_files(s, Path(base))})
    if named:
        found.append(
            f"The scenarios name files beside them, which must lie beside the copies, too: {', '.join(named)}"
            f" (from {', '.join(bases)})."
        )
    if any((run.facts.get("privacy") or {}).get("noise", "").startswith("from the operating") for run in runs):
        found.append(
            "Private noise came from the operating system's entropy: those runs cannot be repeated to the bit."
        )
    return found


def _own_files(value: Any, base: Path) -> list[str]:
    """Return the files beside the original scenario that a section names."""
    if isinstance(value, dict):
        return [name for key, inner in value.items() if key != "claim" for name in _own_files(inner, base)]
    if not isinstance(value, str) or not 0 < len(value) < 200:
        return []
    name = value.rpartition(":")[0] if ".py:" in value else value
    return [name] if name and (base / name).is_file() else []
