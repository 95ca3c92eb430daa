"""Plays the trace of a live run again, in one process, and compares the bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedsim.errors import InputError


def replay(folder: Path) -> dict[str, Any]:
    """Return what `fedsim run --json` prints, of the replayed run, and whether its digest is the recorded one.

    Raises:
        InputError: the run is not a finished live one, or not on this machine's one process.
        RunError: the trace is torn.
    """
    from fedsim.engine.machine import prepare as prepare_machine
    from fedsim.job import connected, counts_of_all
    from fedsim.live.player import LiveEvents
    from fedsim.live.trace import load as load_trace
    from fedsim.prepare import prepare
    from fedsim.results.result import load
    from fedsim.run import final_digest, observer_of
    from fedsim.scenario import load_study

    prepare_machine()
    if connected().size > 1:
        raise InputError("replay plays in one process; start it without a launcher")
    recorded = load(folder).runs[0]
    live = recorded.facts.get("live")
    if live is None or recorded.digest is None:
        raise InputError(f"{folder}: not a finished live run (schedule: {{kind: live}})")
    scenario = load_study(folder / "scenario.yaml", base=Path(recorded.facts["base"])).runs[0]
    prepared = prepare(scenario)
    player = prepared.player()
    assert isinstance(player, LiveEvents)
    player.start()
    player.replay(load_trace(folder, int(live["parts"])), float(scenario.schedule["horizon"]))
    digest = final_digest(prepared, player)
    summary = recorded.summary()
    counts = counts_of_all(player.counts, prepared.layout)
    totals = {**counts, "wall_seconds": summary["totals"].get("wall_seconds", 0.0)}
    seen = {**observer_of(prepared)(player.outputs()), **player.measures(), **counts}
    return {
        "folder": str(folder),
        "status": "replayed",
        "digest": digest,
        "recorded_digest": recorded.digest,
        "same": digest == recorded.digest,
        "totals": {name: totals[name] for name in summary["totals"] if name in totals},
        "last": {name: seen.get(name, value) for name, value in summary["last"].items()},
    }
