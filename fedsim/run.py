"""The whole life of a run on one page."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from fedsim.agreement import refuse_disagreement
from fedsim.checks import Mistakes
from fedsim.digest import combined, digest, row_hashes
from fedsim.engine.counts import Counts
from fedsim.errors import Diverged, FedsimError, InputError, Stopped
from fedsim.job import (
    arrays_of_rank_0,
    connected,
    counts_of_all,
    gathered,
    made_by_rank_0,
    of_rank_0,
    own_part,
    rows_of_all,
    watched,
)
from fedsim.observe import Observer
from fedsim.prepare import Live, folder_for, prepare
from fedsim.results.folder import RUN, to_json, write_whole
from fedsim.results.journal import Journal
from fedsim.results.result import STUDY, Result, StudyResult, load
from fedsim.sections import HIGHER_IS_BETTER
from fedsim.stopping import Stopping, listening

if TYPE_CHECKING:
    from fedsim.algorithms.algorithm import Algorithm, Guarantee
    from fedsim.engine.layout import Layout
    from fedsim.engine.player import Player
    from fedsim.prepare import Prepared
    from fedsim.problems.problem import Problem
    from fedsim.scenario import Scenario, Study
    from fedsim.topology.topology import Topology

T = TypeVar("T")
Progress = Callable[[str, float, float, dict[str, Any]], None]  # run name, now, horizon, last row


def run(
    scenario: str | Path | dict[str, Any] | Study | None = None,
    *,
    overrides: Sequence[str] | dict[str, Any] = (),
    short: bool = False,
    folder: str | Path | None = None,
    topology: Topology | Any | None = None,
    problem: Problem | dict[str, Any] | None = None,
    algorithm: Algorithm | dict[str, Any] | None = None,
    progress: Progress | None = None,
    **sections: Any,
) -> Result | StudyResult:
    """Run a scenario, or live objects, and return what it left behind.

    Args:
        scenario: a file, a dictionary of its sections, or None when objects are given.
        overrides: `"algorithm.gamma=0.1"` strings or a dictionary of dotted keys.
        short: play the scenario's `short` form.
        folder: where the results go (default `runs/NAME`, numbered when it exists); it must not hold results.
        topology, problem, algorithm: live objects (a networkx graph is a topology), or sections as dictionaries.
        progress: called with (run, now, horizon, last metrics) after every observation.
        sections: further sections as keyword arguments (`schedule={"horizon": 50}`); beside a file they override its
            own.

    Raises:
        InputError: nothing has been run then.
        Diverged: a state that is no longer finite; the results up to there are in the folder (`error.folder`).
    """
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.scenario import Study, load_study, parsed

    prepare_machine()
    transport = connected()
    given = {"topology": topology, "problem": problem, "algorithm": algorithm}
    sections |= {name: value for name, value in given.items() if isinstance(value, dict)}
    live = _live({name: None if isinstance(value, dict) else value for name, value in given.items()})
    if isinstance(scenario, Study):
        if sections or overrides or short:
            raise InputError("run: a study is what it is; give sections, overrides and short to load_study")
        study = scenario
    elif isinstance(scenario, str | Path):
        study = load_study(scenario, overrides={**sections, **parsed(overrides)}, short=short, live=live)
    else:
        study = load_study({**(scenario or {}), **sections}, overrides=overrides, short=short, live=live)
    refuse_disagreement(study, transport)
    if study.is_sweep:
        from fedsim.sweeping import play_sweep

        return play_sweep(study, folder, live, progress)
    root = Path(made_by_rank_0(lambda: {"root": str(_usable(folder, study.name))}, transport)["root"])
    with belongs_to(root, own=not folder):
        if len(study.runs) == 1:
            return run_one(study.runs[0], root, live, progress=progress)
        return run_study(study, root, live, progress)


def resume(folder: str | Path, progress: Progress | None = None) -> Result | StudyResult:
    """Go on from the last checkpoint of a run (or of the unfinished runs of a study), to the same bits.

    Raises:
        InputError: it is no run; or what it depends on (its scenario, its own code, its data files) is no longer what
            it began with, so that the bits of an uninterrupted run cannot come out.
    """
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.side_by_side import has_ended, laid_out

    prepare_machine()
    connected()
    found = load(folder)
    if isinstance(found, StudyResult) and "source" in found.facts:
        from fedsim.sweeping import go_on

        return go_on(found, progress)
    with belongs_to(found.folder, own=False):
        if isinstance(found, Result):
            if found.status == "finished":
                return found
            return run_one(laid_out(found.folder), found.folder, progress=progress, again=True)
        failures, errors, waiting = list[str](), list[Exception](), []
        for result in found.runs:
            if not has_ended(result.folder):
                waiting.append((replace(laid_out(result.folder), folder=result.folder.name), result.folder))
            elif result.status == "failed":  # it would again: it ends the study as it did before, after the others
                failures.append(f"{result.folder.name}: {result.facts['error']}")
        for scenario, place in waiting:
            with _others_go_on(place.name, failures, errors):
                run_one(scenario, place, progress=progress, again=True)
        return _study_ended(found.folder, failures, errors)


@contextmanager
def _others_go_on(name: str, failures: list[str], errors: list[Exception]) -> Iterator[None]:
    """Note a run that failed, so that the study's others are played; where several processes share it, what diverged.

    Those meet an error of one's own code, or of one machine, not all alike.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if isinstance(error, Diverged):
            failures.append(f"{name}: {error}")
        elif connected().size > 1:
            raise
        else:
            errors.append(error)


def _study_ended(root: Path, failures: Sequence[str], errors: Sequence[Exception]) -> StudyResult:
    """Write what the study's runs are together.

    Raises:
        Diverged: names those that failed; but the first of other errors goes before it, as it was.
    """
    result = with_digest(StudyResult(root)) if connected().rank == 0 else StudyResult(root)
    if errors:
        raise errors[0]
    if failures:
        raise Diverged("; ".join(failures) + f" (the other runs are in {root})")
    return result


def run_study(study: Study, root: Path, live: Live, progress: Progress | None) -> StudyResult:
    """Play every run of a study into a folder each; runs share what their scenarios have in common.

    The first runs are timed. When the rest would take long and cores are free, they go side by side, each in a
    process of its own; the results are the same.
    """
    from fedsim.privacy.study import refuse_mixtures
    from fedsim.side_by_side import lay_out, play_all, worth_it

    shared: dict[str, Any] = {}
    of_each_variant(study, lambda p: None, live, shared)  # mistakes in any variant, before anything is played
    refuse_mixtures((run.variant or run.folder, run.privacy) for run in study.runs)
    if connected().rank == 0:
        root.mkdir(parents=True, exist_ok=True)
        names = [scenario.folder for scenario in study.runs]
        write_whole(root / STUDY, to_json({"name": study.name, "claim": study.claim, "runs": names}) + "\n")
        for scenario in study.runs:
            lay_out(scenario, root / scenario.folder)
    failures, errors, waiting, clock = list[str](), list[Exception](), list(study.runs), time.perf_counter()
    while waiting:
        done = len(study.runs) - len(waiting)
        if connected().size == 1 and live == Live() and worth_it(time.perf_counter() - clock, done, len(waiting)):
            folders = [root / scenario.folder for scenario in waiting]
            play_all(folders, lambda folder: _tell(folder, progress))
            failures += [f"{f.name}: {Result(f).facts['error']}" for f in folders if Result(f).status == "failed"]
            break
        scenario = waiting.pop(0)
        with _others_go_on(scenario.folder, failures, errors):
            run_one(scenario, root / scenario.folder, live, shared, progress)
    return _study_ended(root, failures, errors)


def of_each_variant(study: Study, make: Callable[[Prepared], T], live: Live | None, shared: dict[str, Any]) -> list[T]:
    """Return what `make` says of the first run of every variant, prepared as if it were to be played.

    Raises:
        InputError: the mistakes of all variants, in one report.
    """
    mistakes, found = Mistakes(), []
    for scenario in reversed({run.variant: run for run in reversed(study.runs)}.values()):
        with mistakes.kept():
            prepared = prepare(scenario, live, shared)
            observer_of(prepared)
            prepared.player()
            found.append(make(prepared))
    mistakes.refuse()
    return found


def _tell(folder: Path, progress: Progress | None) -> None:
    """Draw a run that another process played."""
    result = Result(folder)
    if progress and result.status == "finished":
        row = result.summary()["last"]
        now = row.get("time", row.get("round", 0))
        progress(folder.name, now, now, row)


def run_one(
    scenario: Scenario,
    root: Path,
    live: Live | None = None,
    shared: dict[str, Any] | None = None,
    progress: Progress | None = None,
    again: bool = False,
) -> Result:
    """Play one run into `root`; `again` goes on from its checkpoint. Rank 0 of a job writes, all play."""
    prepared = prepare(scenario, live, shared)
    observer, layout, player = observer_of(prepared), prepared.layout, prepared.player()
    player.start()
    facts = {**_facts(prepared), "status": "running"}
    journal = Journal(root, scenario, again) if layout.rank == 0 else None
    guard = getattr(player, "guard", None)

    def lost(message: str) -> None:
        if journal:
            journal.note({**facts, "status": "failed", "error": message, "totals": player.counts.as_dict()})

    try:
        saved = arrays_of_rank_0(lambda: journal.saved if journal else None, layout) if again else None
        done, wall = 0, 0.0
        if saved:
            done, wall = int(saved.pop("journal.rows")), float(saved.pop("journal.wall_seconds"))
            player.load(own_part(saved, player.row_names, layout))
        if guard is not None:
            guard.open(root, again, saved or {})
        facts |= player.facts() | observer.facts | _non_private(prepared, observer)
        if journal:
            journal.begin(facts, done)
        with watched(float(scenario.engine["timeout"]), lost):
            facts["stopped_by"] = _play(prepared, player, observer, journal, done, wall, progress, root)
        facts["totals"] = counts_of_all(player.counts, layout)
        facts |= _write_queries(root, player, facts["totals"]["queries"], layout)
        facts["digest"] = final_digest(prepared, player)
        facts.update(player.facts())
        facts["wire_bytes"] = layout.transport.moved
        facts["notes"] += journal.grown() if journal else []
        facts["status"] = "finished"
    except (KeyboardInterrupt, Stopped):
        facts["status"] = "interrupted"
        raise
    except BaseException as error:
        message = str(error) if isinstance(error, FedsimError) else f"{type(error).__name__}: {error}"
        facts.update(status="failed", error=message, diverged=isinstance(error, Diverged))
        raise
    finally:
        if guard is not None:
            facts.update(player.facts())
            guard.close()
        if facts["status"] != "finished" and layout.size == 1:  # values may have been dear; other ranks may be gone
            _write_queries(root, player, player.counts.queries, layout)
        if journal:
            journal.end({**facts, "totals": facts.get("totals", player.counts.as_dict())})
    return Result(root)


def _play(
    p: Prepared,
    player: Player,
    observer: Observer,
    journal: Journal | None,
    done: int,
    wall: float,
    progress: Progress | None,
    root: Path,
) -> str:
    """Play, observe and checkpoint to the end; return what ended the run. All ranks take the same decisions."""
    with listening() as stopping:
        return _play_on(p, player, observer, journal, done, wall, progress, stopping, root)


def _play_on(
    p: Prepared,
    player: Player,
    observer: Observer,
    journal: Journal | None,
    done: int,
    wall: float,
    progress: Progress | None,
    stopping: Stopping,
    root: Path,
) -> str:
    from fedsim.algorithms.algorithm import SyncAlgorithm
    from fedsim.live.player import LiveEvents

    s, layout, rounds = p.scenario, p.layout, isinstance(p.algorithm, SyncAlgorithm)
    horizon = float(s.schedule["horizon"])
    every = float(s.checkpoint["every"]) if s.checkpoint else math.inf
    saving = _next(every, player.now)
    for target in _targets(float(s.record.get("every", 1.0)), horizon, done):
        leg = -math.inf
        while leg < target and player.now >= leg:  # to every checkpoint on the way; less far where a budget ends
            leg, clock = min(target, saving), time.perf_counter()
            stopping.seconds_left = float((s.stop or {}).get("seconds", math.inf)) - wall
            stopped = stopping.advance(player, leg, layout, whole=rounds)
            wall = of_rank_0(wall + time.perf_counter() - clock, layout)
            if isinstance(player, LiveEvents):
                player.write_trace(root)
            if stopped or (leg < target and player.now >= leg):
                _checkpoint(player, journal, wall, layout)
                saving = _next(every, leg)
            if stopped:
                raise Stopped("stopped after a checkpoint, as asked")
        row = {
            **_clock(p, min(target, player.now)),
            **observer(player.outputs()),
            **player.measures(),
            **counts_of_all(player.counts, layout),
            "wall_seconds": wall,
        }
        if journal:
            journal.observe(row)
        _refuse_divergence(row, p.problem.has_composite)
        if progress and layout.rank == 0:
            progress(s.folder, target, horizon, row)
        guard = getattr(player, "guard", None)
        reason = _stop(s.stop, row) or (guard.refusal if guard else None) or _spent(s.stop, player)
        if reason:
            return reason
        if target >= saving:
            _checkpoint(player, journal, wall, layout)
            saving = _next(every, target)
    return "horizon"


def _next(every: float, now: float) -> float:
    """Return the first multiple of `every` after `now`; the quotient may be rounded to either side of a multiple."""
    if every == math.inf:
        return math.inf
    count = math.floor(now / every) + 1
    return count * every if count * every > now else (count + 1) * every


def _checkpoint(player: Player, journal: Journal | None, wall: float, layout: Layout) -> None:
    whole = gathered(player.save(), player.row_names, layout)
    if journal and whole is not None:
        journal.checkpoint(whole, wall)


def _write_queries(root: Path, player: Player, asked: int, layout: Layout) -> dict[str, Any]:
    """Leave the log of all function values that were asked for, where there are any; return who asked how many."""
    from fedsim.engine.rounds import Rounds
    from fedsim.results.query_log import write_queries

    if not asked or not isinstance(player, Rounds):
        return {}
    log = player.query_log()
    if log is None:
        return {}
    write_queries(root, log, layout)
    return {"queries_per_client": player.asked.tolist()}


def _targets(every: float, horizon: float, done: int) -> Iterator[float]:
    """Yield 0, every, 2 every, ... up to and including the horizon, without the first `done`."""
    count = math.ceil(horizon / every - 1e-9)
    for k in range(done, count + 1):
        yield min(k * every, horizon)


def _clock(p: Prepared, target: float) -> dict[str, float | int]:
    from fedsim.algorithms.algorithm import SyncAlgorithm

    if isinstance(p.algorithm, SyncAlgorithm):
        return {"round": round(target)}
    return {"time": float(target)}


def _stop(conditions: dict[str, float] | None, row: dict[str, Any]) -> str | None:
    """Return the condition that holds: a count at its bound, a metric at least as good as its own."""
    for name, bound in (conditions or {}).items():
        if name == "epsilon":
            continue  # kept by the guard, which refuses the release that would pass it
        key = {"seconds": "wall_seconds"}.get(name, name)
        at_least = key in _COUNTS or key in HIGHER_IS_BETTER
        if row[key] is None:
            continue  # a metric without a value yet
        if row[key] >= bound if at_least else row[key] <= bound:
            return f"{name} {'>=' if at_least else '<='} {bound:g}"
    return None


def _spent(conditions: dict[str, float] | None, player: Player) -> str | None:
    """Return the bound that the next round or event would pass."""
    name = getattr(player, "spent", None)
    return f"{name}: more would pass {(conditions or {})[name]:g}" if name else None


_COUNTS = frozenset({"wall_seconds", *(field.name for field in fields(Counts))})


ENORMOUS = 1e100
"""What no metric of a run that converges comes near."""


def _refuse_divergence(row: dict[str, Any], constrained: bool) -> None:
    """Raise Diverged where a number is none; the loss of a mean that a composite term forbids is infinite, rightly."""
    numbers = {name: v for name, v in row.items() if isinstance(v, float) and not name.startswith("epsilon")}
    if constrained and numbers.get("loss") == math.inf:
        del numbers["loss"]
    bad = [name for name, value in numbers.items() if not abs(value) < ENORMOUS]
    if bad:
        when = f"after round {row['round']}" if "round" in row else f"at time {row['time']:g}"
        taken = row["gradients"] + row["dual_gradients"]
        raise Diverged(
            f"{bad[0]} is {row[bad[0]]:.3g} {when} ({taken:,} gradients, {row['communications']:,} communications): the"
            " run diverges. Likely a step size too large for this problem's L, or gossip rates below what the"
            " algorithm's theory needs (`fedsim check` prints both)"
        )


def observer_of(p: Prepared) -> Observer:
    """Return what observes the run, after checking that it records every condition of `stop`."""
    from fedsim.algorithms.algorithm import SyncAlgorithm

    record = p.scenario.record
    own = p.algorithm.metrics(p.setting) if isinstance(p.algorithm, SyncAlgorithm) else None
    with p.scenario.origin.told("record"):
        observer = Observer(p.problem, p.layout, record.get("metrics"), record.get("step"), own)
    recorded = (*observer.names, *sorted(_COUNTS), "seconds", *(("epsilon",) if p.setting.privacy else ()))
    for name in p.scenario.stop or {}:
        if name not in recorded:
            with p.scenario.origin.told("stop"):
                raise InputError(f"stop.{name}: not among what this run records ({', '.join(recorded)})")
    return observer


def _facts(p: Prepared) -> dict[str, Any]:
    from importlib.metadata import version

    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.prepare import provenance

    names = ("fedsim", "torch", "numpy", "scipy", "numba", "networkx")
    guarantee = guarantee_of(p)
    return {
        **p.scenario.identity(),
        **p.scenario.marks(),
        "versions": {**{name: version(name) for name in names}, "python": platform.python_version()},
        "machine": {
            "host": platform.node(),
            "platform": platform.platform(),
            **prepare_machine(),
            "device": p.device.name,
        },
        "topology": {"name": p.topology.name, "n": p.topology.n, "edges": p.topology.m},
        "problem": {"kind": p.problem.kind, "dim": p.problem.dim, **p.problem.facts()},
        "constants": [asdict(c) for c in p.algorithm.constants(p.setting)],
        "notes": notes(p),
        "guarantee": None if guarantee is None else asdict(guarantee),
        **provenance(p.algorithm),
    }


def guarantee_of(p: Prepared) -> Guarantee | None:
    """Return the algorithm's bound for this run, with the hypotheses that the way of playing breaks."""
    found = p.algorithm.guarantee(p.setting)
    if found is None:
        return None
    broken = list(found.broken)
    if p.scenario.schedule.get("kind") == "live":
        broken.append("real clocks are no Poisson clocks (schedule: live)")
    if p.scenario.record.get("output") == "lazy":
        broken.append("nodes are observed as of their last events (record.output: lazy)")
    return replace(found, broken=tuple(broken))


def notes(p: Prepared) -> list[str]:
    """Return what a reader must know: what the algorithm says of this run, and whether its bits hold on any layout."""
    from fedsim.testing.bits import broken_bits

    broken = broken_bits(p)
    return [*p.algorithm.notes(p.setting), *([broken] if broken else [])]


def _non_private(p: Prepared, observer: Observer) -> dict[str, Any]:
    """Return which columns of a private run, and which of its reasons to stop, the guarantee does not cover."""
    from fedsim.algorithms.private import PrivateAlgorithm

    if p.setting.privacy is None or not isinstance(p.algorithm, PrivateAlgorithm):
        return {}
    secret = p.algorithm.secret_counts(p.setting)
    note = "computed on the data, outside of the guarantee, as is problem.partition"
    if secret:
        note += f"; {', '.join(secret)} count what was drawn, and sampling protects only while that is secret"
    stop = [name for name in p.scenario.stop or {} if name in (*observer.names, *secret)]
    return {"non_private": {"columns": [*observer.names, *secret], "stop": stop, "note": note}}


def final_digest(p: Prepared, player: Player) -> str | None:
    """Return the run's digest on rank 0: rows travel as their hashes."""
    final, layout, names = player.final(), p.layout, player.row_names
    rows = {
        name: np.frombuffer(b"".join(row_hashes(a)), np.uint8).reshape(-1, 32)
        for name, a in final.items()
        if name in names
    }
    hashes = {name: rows_of_all(h, layout) for name, h in rows.items()}
    counts = counts_of_all(player.counts, layout)
    if layout.rank > 0:
        return None
    place = layout.topology.position
    by_node = {name: h[place] for name, h in hashes.items() if h is not None}
    return digest(final, by_node, counts)


def _usable(folder: str | Path | None, name: str) -> Path:
    """Return where results go.

    Raises:
        InputError: results are there already, or it cannot be written to.
    """
    try:
        root = Path(folder) if folder else folder_for(name, Path("runs"))
        if any((root / file).exists() for file in (RUN, STUDY, "ledger.jsonl")):
            raise InputError(f"{root}: holds the results of an earlier run; give another folder, or remove this one")
        place = next(path for path in (root, *root.absolute().parents) if path.exists())
    except OSError as error:
        raise InputError(f"{folder or 'runs'}: cannot be used: {error.strerror}; give another folder") from error
    if not place.is_dir():
        raise InputError(f"{root}: {place} is no folder; results need one")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"{root}: {place} cannot be written to; give another folder")
    return root


@contextmanager
def belongs_to(root: Path, own: bool) -> Iterator[None]:
    """Have every exception know the folder of what was run; leave none behind that a mistake left empty."""
    try:
        yield
    except BaseException as error:
        error.folder = root  # type: ignore[attr-defined]
        if own and isinstance(error, InputError) and connected().rank == 0:
            with suppress(OSError):
                root.rmdir()
        raise


def with_digest(study: StudyResult, tuning: Sequence[Path] = ()) -> StudyResult:
    """Write the study's digest, and what its private runs (those that tuned it, too) spent together."""
    from fedsim.privacy.study import composed

    privacy = composed([*tuning, *(run.folder for run in study.runs)])
    if privacy is not None:
        write_whole(study.folder / STUDY, to_json({**study.facts, "privacy": privacy}) + "\n")
        study = StudyResult(study.folder)
    digests = [run.digest for run in study.runs if (run.folder / "run.json").exists()]
    if len(digests) == len(study.runs) and all(digests):
        write_whole(study.folder / STUDY, to_json({**study.facts, "digest": combined(d for d in digests if d)}) + "\n")
    return StudyResult(study.folder)


def _live(given: dict[str, Any]) -> Live:
    """Return objects in place of sections, after looking at what they are."""
    from fedsim.algorithms.algorithm import Algorithm
    from fedsim.problems.problem import Problem

    for name, kind in (("problem", Problem), ("algorithm", Algorithm)):
        value = given[name]
        if value is not None and not isinstance(value, kind):
            what = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
            raise InputError(f"{name}: {what} given; a section (a dictionary) or a {kind.__name__} object is needed")
    return Live(_as_topology(given["topology"]), given["problem"], given["algorithm"])


def _as_topology(given: Any) -> Topology | None:
    from fedsim.topology.topology import Topology

    if given is None or isinstance(given, Topology):
        return given
    if hasattr(given, "edges") and hasattr(given, "nodes"):
        return Topology.from_networkx(given)
    raise InputError(f"topology: {type(given).__name__} given; a networkx graph or a fedsim Topology is needed")


__all__ = ["FedsimError", "Result", "StudyResult", "resume", "run", "run_one", "run_study"]
