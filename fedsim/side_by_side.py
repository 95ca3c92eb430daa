"""Runs side by side: a worker process per free core, which imports once and plays one run after another."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import Diverged, FedsimError, InputError, Stopped
from fedsim.locks import locked
from fedsim.results.folder import SCENARIO, RunFolder
from fedsim.stopping import stopped_on_sigterm

if TYPE_CHECKING:
    from fedsim.scenario import Scenario

LONG = 20.0
"""Seconds of work left from which starting processes (some seconds of imports each) pays."""
KEPT = 8  # problems, topologies and rates that a worker keeps for its next runs

Worker = subprocess.Popen[bytes]
Ended = Callable[[Path], None]


def free_cores() -> int:
    """Return how many processes may compute at once: `FEDSIM_CORES`, or the cores this process may use."""
    return int(os.environ.get("FEDSIM_CORES", 0)) or len(os.sched_getaffinity(0))


def worth_it(seconds: float, done: int, waiting: int) -> bool:
    """Return whether the waiting runs, judged by those done, would take long and can share the work."""
    return done > 0 and waiting > 1 and free_cores() > 1 and seconds / done * waiting > LONG


def lay_out(scenario: Scenario, folder: Path) -> None:
    """Leave a folder that waits for its run, so that a study that is killed before it can be read and resumed."""
    files = RunFolder(folder)
    files.write_scenario(scenario.to_yaml())
    files.write_run({"status": "waiting", **scenario.identity(), **scenario.marks()})


def laid_out(folder: Path) -> Scenario:
    """Return the scenario of a folder as `lay_out` (or a run) left it.

    Raises:
        InputError: objects from Python stood in for sections, or what the run depends on has changed since.
    """
    from fedsim.results.folder import from_json, to_json
    from fedsim.scenario import load_study

    facts = RunFolder(folder).read_run()
    if facts.get("objects"):
        given = ", ".join(facts["objects"])
        raise InputError(f"{folder}: {given} were objects from Python, which a folder does not hold; run it again")
    scenario = load_study(folder / SCENARIO, base=Path(facts["base"])).runs[0]
    for name, now in from_json(to_json(scenario.marks())).items():
        if facts.get(name, now) != now:
            old = facts[name]
            parts = [part for part in {**old, **now} if old.get(part) != now.get(part)] if name == "files" else []
            what = ", ".join(parts) or f"{SCENARIO} (its {'record section' if name == 'record' else 'content'})"
            raise InputError(
                f"{folder}: {what} changed since the run began, so it would not end as an uninterrupted one; put the"
                " old one back, or start a new run"
            )
    return replace(scenario, variant=facts["variant"], of=facts.get("of"), cell=facts.get("cell", {}))


def play_all(folders: Sequence[Path], ended: Ended | None = None) -> None:
    """Play the runs that wait in these folders; how each ended stands in its `run.json`.

    A worker that dies (killed for its memory, say) fails the run it was at; another takes its place. On SIGTERM and
    Ctrl-C all workers checkpoint and end before this does.

    Raises:
        Stopped: on SIGTERM.
    """
    waiting, free, busy = list(reversed(folders)), [], {}
    said = "stopped after a checkpoint of every run that was being played, as asked"
    with stopped_on_sigterm(said), ExitStack() as stack, _all_told(busy):
        for _ in range(min(free_cores(), len(folders))):
            free.append(stack.enter_context(_worker()))
        while waiting or busy:
            while waiting and free:
                worker, folder = free.pop(), waiting.pop()
                _send(worker, folder)
                busy[worker] = folder
            for worker in _done(list(busy)):
                folder = busy.pop(worker)
                if worker.returncode is not None:
                    _note_death(folder, worker)
                    worker = stack.enter_context(_worker())
                free.append(worker)
                if ended:
                    ended(folder)


@contextmanager
def _all_told(busy: Mapping[Worker, Path]) -> Iterator[None]:
    """Ask all workers to stop at once where this process stops: each then has the whole of what time is left."""
    try:
        yield
    except BaseException:
        for worker in busy:
            worker.terminate()
        raise


def play_folder(folder: Path, shared: dict[str, Any] | None = None, scenario: Scenario | None = None) -> None:
    """Play, or go on with, the run that a folder waits for; how it ends stands in its `run.json`.

    A run that fails is a result, so only a signal's `Stopped` is raised; of a job of several processes also what
    need not have happened on all of them. What has ended is left alone; what another job plays is waited for.
    """
    from fedsim.job import connected
    from fedsim.run import run_one

    expected = Exception if connected().size == 1 else (Diverged, InputError)
    with _taken(folder) as mine:
        if not mine:
            return
        try:
            run_one(scenario or laid_out(folder), folder, shared=shared, again=True)
        except Stopped:
            raise
        except expected as error:
            if connected().rank == 0:
                _note_failure(folder, error)


def has_ended(folder: Path) -> bool:
    """Return whether a run came to a result: playing it again would give the same. Lost processes are no result."""
    facts = RunFolder(folder).read_run()
    return facts["status"] == "finished" or bool(facts.get("diverged") or facts.get("refused"))


def main() -> None:
    """Be a worker: play the folder on each line of standard input, answer each with a line."""
    from fedsim.engine.machine import prepare

    prepare()
    shared: dict[str, Any] = {}
    for line in sys.stdin:
        if len(shared) > KEPT:
            shared.clear()
        try:
            play_folder(Path(json.loads(line)), shared)
        except Stopped:
            return
        print("ended", flush=True)


def _note_failure(folder: Path, error: Exception) -> None:
    """Write why a run failed before it began, and where an error came from that is not fedsim's own."""
    files = RunFolder(folder)
    facts = files.read_run()
    if facts["status"] != "failed":
        facts |= {"status": "failed", "error": str(error), "refused": isinstance(error, InputError)}
    if not isinstance(error, FedsimError):
        facts |= {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exception(error)}
    files.write_run(facts)


def _note_death(folder: Path, worker: Worker) -> None:
    files = RunFolder(folder)
    message = f"its process ended with code {worker.returncode}"
    files.write_run({**files.read_run(), "status": "failed", "error": message})


@contextmanager
def _worker() -> Iterator[Worker]:
    command = [sys.executable, "-m", "fedsim.side_by_side"]
    # A session of its own: Ctrl-C reaches this process alone, which then asks the workers to stop at a checkpoint.
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        yield worker
    finally:
        worker.terminate()
        worker.communicate()


def _send(worker: Worker, folder: Path) -> None:
    assert worker.stdin
    with suppress(BrokenPipeError):  # it died between two runs; `_done` sees this
        worker.stdin.write(json.dumps(str(folder)).encode() + b"\n")
        worker.stdin.flush()


def _done(busy: Sequence[Worker]) -> list[Worker]:
    """Wait for answers; return the workers that gave one, or died."""
    pipes = {worker.stdout: worker for worker in busy if worker.stdout}
    ready, _, _ = select.select(list(pipes), [], [])
    for pipe in ready:
        if not pipe.readline():
            pipes[pipe].wait()
    return [pipes[pipe] for pipe in ready]


@contextmanager
def _taken(folder: Path) -> Iterator[bool]:
    """Hold the folder, once no other job does, and say whether it is left to play; the lock goes with rank 0."""
    import numpy as np

    from fedsim.job import connected

    transport, left = connected(), False
    with ExitStack() as stack:
        if transport.rank == 0:
            locked(stack.enter_context((folder / SCENARIO).open()).fileno(), wait=True)
            _wait_for(folder)
            left = not has_ended(folder)
        yield bool(transport.broadcast(np.array([left], np.uint8))[0])


def _wait_for(folder: Path) -> None:
    """Return once no process plays the folder's run, such as a `fedsim resume` of this cell (see `Journal`)."""
    held = os.open(folder, os.O_RDONLY)
    locked(held, wait=True)
    os.close(held)


if __name__ == "__main__":
    main()
