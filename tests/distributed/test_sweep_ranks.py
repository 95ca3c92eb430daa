"""A sweep under a launcher: one cell after another, each on all ranks."""

import json

import pytest
from launching import launch, needs_mpi

import fedsim

SWEPT = {
    "name": "swept",
    "topology": {"kind": "ring", "n": 6},
    "problem": {"kind": "quadratic", "dim": 3, "condition": 5},
    "algorithm": {"kind": "dpsgd", "eta": 0.1},
    "schedule": {"horizon": 20},
    "sweep": {"algorithm.eta": [0.01, 0.1, 100.0]},
    "select": {"metric": "loss", "at": "end", "seeds": [100, 101]},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("mpi", marks=needs_mpi), "torch"])
def test_a_sweep_on_two_ranks_is_that_of_one_process(tmp_path, kind):
    """The cells, the pick and the digest of a sweep do not depend on the launcher; called again it plays nothing."""
    here = fedsim.sweep(SWEPT, folder=tmp_path / "one")
    (tmp_path / "s.yaml").write_text(json.dumps(SWEPT))
    for _ in range(2):
        done = launch(kind, 2, "sweep", tmp_path / "s.yaml", "--folder", tmp_path / "two", cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        there = fedsim.load(tmp_path / "two")
        assert there.facts["digest"] == here.facts["digest"]
        assert there.facts["select"]["choices"] == here.facts["select"]["choices"]
        states = [run.facts.get("totals", {}).get("gradients") for run in there.runs]
        assert states == [run.facts["totals"]["gradients"] for run in here.runs]
