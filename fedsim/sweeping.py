"""Plays a sweep: what has ended is kept, the rest goes side by side; tuned variants report on other seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsim.errors import InputError
from fedsim.job import connected, made_by_rank_0
from fedsim.prepare import Live, prepare
from fedsim.results.folder import RUN, from_json, to_json, write_whole
from fedsim.results.result import STUDY, TUNING, Result, StudyResult
from fedsim.side_by_side import has_ended, lay_out, play_all, play_folder
from fedsim.tuning import Choice, as_facts, choose

if TYPE_CHECKING:
    from fedsim.scenario import Scenario, Study

Progress = Callable[[str, float, float, dict[str, Any]], None]


def sweep(
    scenario: str | Path | dict[str, Any],
    *,
    overrides: Sequence[str] | dict[str, Any] = (),
    short: bool = False,
    folder: str | Path | None = None,
    cell: int | None = None,
    progress: Progress | None = None,
) -> StudyResult:
    """Play every cell of a scenario's `sweep` (and then, with `select`, what it picks, on the reporting seeds).

    Args:
        overrides: as for `run`; the axes may stand here, too: `{"sweep.algorithm.eta": [0.1, 1]}`.
        folder: where results go, and where those of an earlier call are found (default `runs/NAME`).
        cell: play this one alone, by its number (see `numbered`).
        progress: called with ("cells", ended, all, {"failed": ...}) after every cell.

    Raises:
        InputError: nothing has been run then.
    """
    from fedsim.agreement import refuse_disagreement
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.scenario import load_study

    prepare_machine()
    study = load_study(scenario, overrides=overrides, short=short)
    refuse_disagreement(study, connected())
    if not study.is_sweep:
        raise InputError("nothing to sweep: give KEY=a,b,c (or a sweep section in the scenario), or use `fedsim run`")
    return play_sweep(study, folder, progress=progress, cell=cell)


def play_sweep(
    study: Study,
    folder: str | Path | None,
    live: Live | None = None,
    progress: Progress | None = None,
    cell: int | None = None,
) -> StudyResult:
    """Play a study that has cells; see `sweep`."""
    if live not in (None, Live()):
        raise InputError("sweep: cells are played by processes of their own; name sections in place of objects")
    from fedsim.run import belongs_to

    root = Path(folder or Path("runs") / study.name)
    _refuse_foreign(root)
    _refuse_hopeless(study)
    with belongs_to(root, own=not folder):
        _begin(study, root)
        first, second = _stages(study, root)
        if cell is not None:
            _play_cell(study, cell, first, second)
        else:
            told = _Told(progress, len(first) + (_reports(study) if study.select else 0))
            _play(first, told)
            if study.select:
                _play(second(), told)
        return _finish(study, root)


def go_on(found: StudyResult, progress: Progress | None) -> StudyResult:
    """Go on with an interrupted sweep, from what its `study.json` says."""
    from fedsim.scenario import load_study

    return play_sweep(load_study(**found.facts["source"]), found.folder, progress=progress)


def numbered(study: Study) -> dict[str, tuple[int, int]]:
    """Return the numbers (first, last) of the cells of each stage: `cells`, or `tuning` and then `reporting`."""
    if not study.select:
        return {"cells": (0, len(study.runs) - 1)}
    count = len(study.tuning)
    return {"tuning": (0, count - 1), "reporting": (count, count + _reports(study) - 1)}


def counts(study: StudyResult) -> str:
    """Return one line: how many cells there are and how they ended."""
    tuning = study.folder / TUNING
    runs = [*(StudyResult(tuning).runs if (tuning / STUDY).exists() else []), *study.runs]
    states = [_state(run) for run in runs]
    each = [f"{states.count(state)} {state}" for state in dict.fromkeys(states)]
    return f"{len(runs)} cells: {', '.join(each)}"


def cell_facts(study: StudyResult, number: int) -> dict[str, Any]:
    """Return what became of one cell."""
    tuning = study.folder / TUNING
    runs = [*(StudyResult(tuning).runs if (tuning / STUDY).exists() else []), *study.runs]
    run = runs[number]
    facts = {key: run.facts.get(key) for key in ("variant", "of", "cell", "seed", "error", "digest")}
    return {"number": number, "folder": str(run.folder), "status": _state(run), **facts}


def cell_line(study: StudyResult, number: int) -> str:
    """Return the same as one line."""
    facts = cell_facts(study, number)
    error = f": {facts['error']}" if facts["error"] else ""
    return (
        f"cell {number} ({facts['variant']}, seed {facts['seed']}) {facts['status']}{error}\nresults  {facts['folder']}"
    )


Cells = list[tuple["Scenario", Path]]


def _stages(study: Study, root: Path) -> tuple[Cells, Callable[[], Cells]]:
    """Return the cells to play first, and what gives those that report: it needs the first to have ended."""
    if not study.select:
        return [(run, root / run.folder) for run in study.runs], list
    tuning = [(run, root / TUNING / run.folder) for run in study.tuning]
    return tuning, lambda: [(run, root / run.folder) for run in _reporting(study, root)]


def _play_cell(study: Study, number: int, first: Cells, second: Callable[[], Cells]) -> None:
    last = max(end for _, end in numbered(study).values())
    if not 0 <= number <= last:
        raise InputError(f"--cell {number}: there are cells 0 to {last}")
    scenario, folder = first[number] if number < len(first) else second()[number - len(first)]
    play_folder(folder, scenario=scenario)


def _play(cells: Cells, told: _Told) -> None:
    """Play what has not ended: side by side, or one after another where several processes share the job."""
    told.begin([folder for _, folder in cells])
    if connected().size == 1:
        play_all([folder for _, folder in cells if not has_ended(folder)], told.ended)
        return
    shared: dict[str, Any] = {}
    for scenario, folder in cells:
        if len(shared) > 8:
            shared.clear()
        play_folder(folder, shared, scenario)
        told.ended(folder)


class _Told:
    """Counts cells that ended, for whoever watches."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done, self._failed = progress, total, 0, 0

    def begin(self, folders: Sequence[Path]) -> None:
        """Count what has ended before."""
        if connected().size == 1:
            for folder in filter(has_ended, folders):
                self.ended(folder)

    def ended(self, folder: Path) -> None:
        """Count one more."""
        if connected().rank > 0:
            return
        self._done += 1
        self._failed += Result(folder).status == "failed"
        if self._progress:
            self._progress("cells", self._done, self._total, {"failed": self._failed})


def _reports(study: Study) -> int:
    """Return how many runs report: for each variant one cell, on every seed."""
    return sum(len({run.seed for run in study.runs if run.of == variant}) for variant in study.axes)


def _reporting(study: Study, root: Path) -> list[Scenario]:
    """Return the runs of the cells that were picked, and write down what was, and why.

    Raises:
        InputError: a tuning cell has not ended.
    """

    def pick() -> dict[str, Any]:
        choices = _choices(study, root)
        cells = {choice.variant: choice.cell for choice in choices}
        numbers = [k for k, run in enumerate(study.runs) if run.cell == cells[run.of or study.name]]
        runs = [study.runs[k] for k in numbers]
        _write_study(study, root, runs, choices)
        _lay_out([(run, root / run.folder) for run in runs])
        return {"numbers": numbers}

    return [study.runs[k] for k in made_by_rank_0(pick, connected())["numbers"]]


def _choices(study: Study, root: Path) -> list[Choice]:
    assert study.select
    runs = [(run, Result(root / TUNING / run.folder)) for run in study.tuning]
    open_cells = [str(k) for k, (_, result) in enumerate(runs) if result.status not in ("finished", "failed")]
    if open_cells:
        raise InputError(f"select: of the tuning, cells {', '.join(open_cells)} have not ended; play them first")
    groups: dict[str, list[tuple[dict[str, Any], Result]]] = {}
    for run, result in runs:
        groups.setdefault(run.of or study.name, []).append((dict(run.cell), result))
    return choose(study.select, groups, _axes(study))


def _axes(study: Study) -> dict[str, Any]:
    return {variant or study.name: axes for variant, axes in study.axes.items()}


def _begin(study: Study, root: Path) -> None:
    """Write the study down, and a folder for every cell that is not there yet."""
    if connected().rank > 0:
        return
    root.mkdir(parents=True, exist_ok=True)
    if study.select:
        tuning = root / TUNING
        tuning.mkdir(exist_ok=True)
        facts = {"name": f"{study.name}, tuning", "claim": "", "runs": [run.folder for run in study.tuning]}
        write_whole(tuning / STUDY, to_json({**facts, "sweep": {"axes": _axes(study)}}) + "\n")
        if not (root / STUDY).exists() or not _same_source(study, root):
            _write_study(study, root, [], None)
        _lay_out([(run, tuning / run.folder) for run in study.tuning])
    else:
        _write_study(study, root, study.runs, None)
        _lay_out([(run, root / run.folder) for run in study.runs])


def _same_source(study: Study, root: Path) -> bool:
    return StudyResult(root).facts.get("source") == from_json(to_json(study.source))


def _lay_out(cells: Iterable[tuple[Scenario, Path]]) -> None:
    for run, folder in cells:
        if not (folder / RUN).exists():
            lay_out(run, folder)


def _write_study(study: Study, root: Path, runs: Sequence[Scenario], choices: list[Choice] | None) -> None:
    facts = {"name": study.name, "claim": study.claim, "runs": [run.folder for run in runs]}
    facts |= {"sweep": {"axes": _axes(study)}, "source": dict(study.source)}
    if study.select:
        seeds = sorted({run.seed for run in study.tuning})
        facts["select"] = as_facts(study.select, seeds, choices or [])
    write_whole(root / STUDY, to_json(facts) + "\n")


def _finish(study: Study, root: Path) -> StudyResult:
    from fedsim.run import with_digest

    if connected().rank == 0:
        if study.select:
            with_digest(StudyResult(root / TUNING))
        with_digest(StudyResult(root), [root / TUNING / run.folder for run in study.tuning])
    return StudyResult(root)


def _refuse_foreign(root: Path) -> None:
    """Refuse a folder with results of something else; those of a sweep are gone on with."""
    other = (root / STUDY).exists() and "sweep" not in StudyResult(root).facts
    taken = connected().rank == 0 and (other or (root / RUN).exists())
    if connected().broadcast(np.array([taken], np.uint8))[0]:
        raise InputError(f"{root}: holds the results of something that is no sweep; give another folder, or remove it")


def _refuse_hopeless(study: Study) -> None:
    """Refuse, before anything is played, a variant that has no cell that can be; single cells may fail.

    Raises:
        InputError: what is wrong with the variant's first cell; or that runs promise different privacy.
    """
    from fedsim.privacy.study import refuse_mixtures
    from fedsim.run import observer_of

    runs = study.tuning or study.runs
    refuse_mixtures((run.variant or run.folder, run.privacy) for run in (*study.tuning, *study.runs))
    shared: dict[str, Any] = {}
    for variant in study.axes:
        first = None
        for run in {repr(run.cell): run for run in runs if run.of == variant}.values():
            try:
                observer_of(prepare(run, None, shared))
                break
            except InputError as error:
                first = first or error
        else:
            assert first
            raise first


def _state(run: Result) -> str:
    return "diverged" if run.facts.get("diverged") else run.status
