"""Poisson events over several processes: one digest with one process, whatever plays them, and resumed anywhere."""

import json

import pytest
from launching import launch, needs_mpi, with_horizon

import fedsim

OWN = """
from dataclasses import dataclass

from fedsim import EventAlgorithm


@dataclass(frozen=True)
class Clipped(EventAlgorithm):
    kind = "clipped"
    variables = ("x",)

    def start(self, x0, gradient, mean_gradient):
        return {"x": x0 - 0.01 * mean_gradient}

    def gradient(self, v, g, count):
        return {"x": v["x"] - 0.05 * g.clamp(-1.0, 1.0) / (1.0 + 0.1 * count)}

    def message(self, v):
        return v["x"]

    def gossip(self, v, own, other):
        return {"x": v["x"] - 0.5 * (own - other)}
"""
RIDGE = {"kind": "ridge", "l2": 0.5, "data": {"kind": "diabetes", "normalise": "columns"}}
EVENTS = {
    "name": "events",
    "topology": {"kind": "random_geometric", "n": 13, "radius": 0.5, "seed": 3},
    "problem": RIDGE,
    "start": {"kind": "normal"},
    "algorithm": {"kind": "dadao"},
    "schedule": {"kind": "poisson", "horizon": 12},
    "record": {"every": 3},
    "checkpoint": {"every": 6},
    "variants": {
        "geometric": {},
        "star": {"topology": {"kind": "star", "n": 9}},
        "complete": {"topology": {"kind": "complete", "n": 8}},
        "momentum": {
            "topology": {"kind": "ring", "n": 11},
            "algorithm": {"kind": "a2cid2", "step": 0.02, "momentum": 0.5, "batch": {"size": 4, "kind": "epoch"}},
        },
        "sgd": {"algorithm": {"kind": "gossip_sgd", "step": 0.02, "batch": {"size": 3}}},
        "dual": {"algorithm": {"kind": "continuized"}},
        "averaging": {"problem": {"kind": "consensus", "dim": 5}, "algorithm": {"kind": "randomised_gossip"}},
        "waves": {"engine.player": "waves", "algorithm": {"kind": "gossip_sgd", "step": 0.02, "batch": {"size": 3}}},
        "functions": {"algorithm": {"kind": "own.py:Clipped"}},
        "budget": {"stop": {"gradients": 77}},
        "drawn": {
            "algorithm": {"kind": "gossip_sgd", "step": 0.02, "batch": {"size": 5, "kind": "poisson"}},
            "stop": {"samples": 300},
        },
    },
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process, and its file."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "own.py").write_text(OWN)
    (folder / "s.yaml").write_text(json.dumps(EVENTS))
    return fedsim.run(folder / "s.yaml", folder=folder / "out"), folder / "s.yaml"


@pytest.mark.parametrize(("kind", "size"), [pytest.param("mpi", 4, marks=[needs_mpi, pytest.mark.slow]), ("torch", 3)])
def test_events_over_ranks_have_the_digests_of_one_process(alone, tmp_path, kind, size):
    """Compiled, waved, dual and user-written events end in the same bits and counts on any number of processes."""
    here, file = alone
    done = launch(kind, size, "run", file, "--json", "--folder", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    there = fedsim.load(tmp_path / "out")
    assert {r.variant: r.digest for r in there.runs} == {r.variant: r.digest for r in here.runs}
    columns = [c for c in here.metrics if c != "wall_seconds"]
    assert there.metrics[columns].equals(here.metrics[columns])


@needs_mpi
@pytest.mark.slow
@pytest.mark.parametrize("name", ["geometric", "momentum"])
def test_events_resume_on_another_number_of_processes(alone, tmp_path, name):
    """Stopped on three processes, resumed in one, and the other way round: the digest of an uninterrupted run."""
    here, _ = alone
    expected = {r.variant: r.digest for r in here.runs}[name]
    (tmp_path / "own.py").write_text(OWN)
    one = {**EVENTS, "variants": {name: EVENTS["variants"][name]}}
    (tmp_path / "s.yaml").write_text(json.dumps(one))
    for number, (first, second) in enumerate([(3, 1), (1, 3)]):
        folder = tmp_path / f"out{number}"
        done = launch("mpi", first, "run", "s.yaml", "schedule.horizon=9", "--folder", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        with_horizon(folder, 9, 12)  # as if killed after the checkpoint at 6
        done = launch("mpi", second, "resume", folder, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert fedsim.load(folder).runs[0].digest == expected


@needs_mpi
@pytest.mark.slow
def test_divergence_is_found_at_the_same_event_by_every_number_of_processes(tmp_path):
    """A step size far too large ends the run with one message that names the event, wherever its node is."""
    wrong = {k: v for k, v in EVENTS.items() if k != "variants"} | {
        "algorithm": {"kind": "gossip_sgd", "step": 1e200},
        "record": {"every": 12},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(wrong))
    said = []
    for size in (1, 3):
        done = launch("mpi", size, "run", "s.yaml", "--folder", tmp_path / f"out{size}", cwd=tmp_path)
        assert done.returncode == 1
        said.append(next(line for line in done.stderr.splitlines() if "not finite" in line).partition("event ")[2])
        assert fedsim.load(tmp_path / f"out{size}").status == "failed"
    assert said[0].partition(":")[0] == said[1].partition(":")[0]
