"""`fedsim verify`: what it compares, what it refuses."""

import json
import subprocess
import sys

import pandas as pd
import pytest
from launching import needs_mpi
from typer.testing import CliRunner

from fedsim import verify
from fedsim.cli import app
from fedsim.errors import InputError

SMALL = {
    "name": "small",
    "topology": {"kind": "ring", "n": 5},
    "problem": {"kind": "quadratic", "dim": 3},
    "algorithm": {"kind": "dadao"},
    "schedule": {"kind": "poisson", "horizon": 4},
    "record": {"every": 2},
}


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(SMALL))
    return path


@needs_mpi
def test_one_scenario_by_three_launchers_is_found_the_same(scenario):
    """Each entry is a job of its own; equal digests and metrics end with exit code 0."""
    done = CliRunner().invoke(app, ["verify", str(scenario), "--on", "local,mpi:2,torch:2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["same"]
    assert [e["on"] for e in found["entries"]] == ["local", "mpi:2", "torch:2"]
    assert len({e["digests"]["run"] for e in found["entries"]}) == 1


@pytest.mark.slow
def test_a_job_that_fails_is_a_difference_with_its_own_words(scenario):
    """More ranks than nodes: the entry says what the job said, and the exit code is 1."""
    done = CliRunner().invoke(app, ["verify", str(scenario), "topology.n=3", "--on", "local,torch:4", "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert not found["same"]
    assert "4 processes for 3 nodes" in found["entries"][1]["difference"]


def test_the_first_row_that_differs_is_named():
    """Differences are told by the clock and both numbers; equal frames, with gaps alike, have none."""
    a = pd.DataFrame({"time": [0.0, 1.0, 2.0], "loss": [1.0, float("nan"), 0.25], "wall_seconds": [0.0, 1.0, 2.0]})
    b = a.assign(wall_seconds=0.0)
    assert verify._first_row(a, b) is None
    b.loc[2, "loss"] = 0.5
    assert verify._first_row(a, b) == "first difference at time 2: loss 0.25 against 0.5"
    assert "2 rows" in str(verify._first_row(a, b[:2]))


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("local,mpi", "'mpi' needs a number of processes"),
        ("locl,mpi:2", "'locl' given"),
        ("local", "at least two entries"),
        ("local:2,mpi:2", "'local:2' given"),
    ],
)
def test_wrong_lists_are_refused(on, message):
    """The entry that is wrong is named, and how entries look."""
    with pytest.raises(InputError, match=message):
        verify.parse(on)


def test_it_refuses_to_run_inside_a_launcher(scenario, monkeypatch):
    """Started by mpirun it would start jobs from every rank."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(InputError, match="start it without mpirun"):
        verify.verify(scenario, "local,mpi:2")


@pytest.mark.slow
def test_the_command_itself_ends_with_1(scenario):
    """A program that calls `fedsim verify` sees the difference in its exit code."""
    call = [sys.executable, "-m", "fedsim", "verify", scenario, "topology.n=3", "--on", "local,torch:4"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "4 processes for 3 nodes" in done.stdout
