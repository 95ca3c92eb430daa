"""The same scenario in one process, under mpirun and under torchrun: one digest, equal metrics, clean ends."""

import json

import pytest
from launching import launch, needs_mpi

import fedsim

QUADRATIC = {"kind": "quadratic", "dim": 8}
ROUNDS = {
    "name": "rounds",
    "topology": {"kind": "grid", "rows": 3, "columns": 5},
    "problem": {"kind": "ridge", "l2": 0.5, "data": {"kind": "diabetes", "normalise": "columns"}},
    "start": {"kind": "normal"},
    "algorithm": {"kind": "msda"},
    "schedule": {"horizon": 12},
    "record": {"every": 3},
    "checkpoint": {"every": 6},
    "variants": {
        "msda": {},
        "adom": {"algorithm": {"kind": "adom_plus"}},
        "multi consensus": {"algorithm": {"kind": "adom_plus", "multi_consensus": True}},
        "softmax": {
            "algorithm": {"kind": "adom_plus"},
            "problem": {"kind": "multinomial", "l2": 0.1, "data": {"kind": "iris", "normalise": "columns"}},
        },
        "blocks of two": {"engine.block": 2},
        "prox": {
            "problem": {**QUADRATIC, "composite": {"kind": "group_lasso", "weight": 0.2, "size": 2}},
            "algorithm": {"kind": "dproxsgt", "eta": 0.05, "final": "prox"},
        },
        "top": {
            "problem": {**QUADRATIC, "composite": {"kind": "l1", "weight": 0.2}},
            "algorithm": {"kind": "cdproxsgt", "eta": 0.05, "compress": {"kind": "top_k", "ratio": 0.4}},
        },
        "drawn": {
            "problem": QUADRATIC,
            "algorithm": {
                "kind": "cdproxsgt",
                "eta": 0.05,
                "compress": {"kind": "qsgd", "levels": 8, "block": 3},
                "compress_y": {"kind": "random_k", "ratio": 0.5},
            },
            "engine.block": 2,
        },
        "beer": {"problem": QUADRATIC, "algorithm": {"kind": "beer", "eta": 0.05, "compress": "natural"}},
        "choco": {"algorithm": {"kind": "choco_sgd", "eta": 0.05, "compress": "sign", "batch": {"size": 4}}},
        "deepstorm": {"algorithm": {"kind": "deepstorm", "eta": 0.05, "batch": {"size": 4, "kind": "epoch"}}},
        "server": {"topology": {"kind": "server", "n": 7}, "algorithm": {"kind": "allreduce_sgd", "eta": 0.05}},
    },
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The study in one process, and its file."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "s.yaml").write_text(json.dumps(ROUNDS))
    return fedsim.run(folder / "s.yaml", folder=folder / "out"), folder / "s.yaml"


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param("mpi", 2, marks=[needs_mpi, pytest.mark.slow]),
        pytest.param("mpi", 3, marks=needs_mpi),
        pytest.param("torch", 2, marks=pytest.mark.slow),
    ],
)
def test_every_launcher_gives_the_digests_of_one_process(alone, tmp_path, kind, size):
    """Each algorithm and problem has one digest and the same metrics, whoever holds the nodes."""
    here, file = alone
    done = launch(kind, size, "run", file, "--json", "--folder", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    there = fedsim.load(tmp_path / "out")
    assert [r.digest for r in there.runs] == [r.digest for r in here.runs]
    columns = [c for c in here.metrics if c != "wall_seconds"]
    assert there.metrics[columns].equals(here.metrics[columns])
    assert there.runs[0].facts["wire_bytes"] > 0


@needs_mpi
def test_a_run_resumes_on_another_number_of_processes(alone, tmp_path):
    """Stopped in one process after its checkpoint, resumed on three: the digest of an uninterrupted run."""
    here, file = alone

    def kill(name, now, horizon, row):
        if now == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedsim.run(file, folder=tmp_path / "out", progress=kill)
    first = tmp_path / "out" / "msda-seed0"
    done = launch("mpi", 3, "resume", first, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert fedsim.load(first).digest == here.runs[0].digest


@needs_mpi
def test_mistakes_are_printed_once_and_more_ranks_than_nodes_are_refused(alone, tmp_path):
    """Every rank finds a wrong input; one prints it, the job ends with 2. So do more processes than nodes."""
    _, file = alone
    wrong = launch("mpi", 2, "run", file, "schedule.horizon=0", cwd=tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr.count("schedule.horizon: input should be greater than 0") == 1
    few = launch("mpi", 3, "run", file, "topology={kind: path, n: 2}", cwd=tmp_path)
    assert few.returncode == 2
    assert "3 processes for 2 nodes" in few.stderr


@needs_mpi
def test_ranks_that_disagree_end_by_name(tmp_path):
    """A rank that asks for something else ends the job with a message that names both sides; nothing hangs."""
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom fedsim import Mix, Rows, SyncAlgorithm\n\n\n"
        "@dataclass\nclass State:\n    x: Rows\n\n\n"
        "@dataclass(frozen=True)\nclass Torn(SyncAlgorithm):\n"
        "    async def start(self, x0, f, rng):\n        return State(x0)\n\n"
        "    async def round(self, s, k, f, rng):\n"
        "        return State(await Mix(s.x, 'W' if 0 in f.nodes else 'laplacian'))\n"
    )
    scenario = {k: v for k, v in ROUNDS.items() if k != "variants"} | {
        "algorithm": {"kind": "mine.py:Torn"},
        "engine": {"block": 15},
    }
    (tmp_path / "s.yaml").write_text(json.dumps(scenario))
    done = launch("mpi", 2, "run", "s.yaml", cwd=tmp_path)
    assert done.returncode != 0
    assert "ranks disagree on the next request: rank" in done.stderr
    assert "Mix[" in done.stderr
