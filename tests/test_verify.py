"""`fedsim verify`: what it compares, what it refuses."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from launching import needs_mpi
from private_cases import scenario as private_run
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


def test_it_refuses_what_promises_no_bits(scenario):
    """Results on a device agree to rounding: a difference of bits there is no mistake."""
    with pytest.raises(InputError, match=r"device: cuda promises none: say engine\.device=cpu"):
        verify.verify(scenario, "local,torch:2", ["engine.device=cuda"])


@pytest.mark.slow
def test_the_command_itself_ends_with_1(scenario):
    """A program that calls `fedsim verify` sees the difference in its exit code."""
    call = [sys.executable, "-m", "fedsim", "verify", scenario, "topology.n=3", "--on", "local,torch:4"]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "4 processes for 3 nodes" in done.stdout


def test_a_job_that_fails_says_why(scenario):
    """What a job finds wrong is told with the line of the scenario, not as the number of mistakes alone."""
    sampled = {"kind": "dp_fedavg", "eta": 0.2, "clip_model": 0.5, "client_rate": 0.5}
    private = {"epsilon": 4.0, "delta": 1e-5, "unit": "user"}
    scenario.write_text(json.dumps({**private_run(sampled, privacy=private), "seeds": 2}))
    found = verify.verify(scenario, "local,torch:2")
    assert len(found) == 1
    assert "replace_one has no accountant" in str(found[0].difference)


@pytest.mark.parametrize("kind", [pytest.param("mpi", marks=needs_mpi), pytest.param("torch", marks=pytest.mark.slow)])
def test_what_ends_verify_ends_the_job_that_it_started(scenario, tmp_path, kind):
    """SIGTERM (a batch system's, or of `timeout`): no process of the job plays on."""
    call = [sys.executable, "-m", "fedsim", "verify", "s.yaml", f"schedule.horizon={10**9}", "--on", f"{kind}:2,local"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(call, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        for _ in range(900):
            if list(tmp_path.glob("fedsim-verify-*/0/metrics.arrows")):
                break
            time.sleep(0.1)
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "stopped, as asked" in said
    assert not playing(str(tmp_path))


def playing(place: str) -> list[str]:
    """Return the command lines of the processes that name a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if place in line and "fedsim run" in line]
