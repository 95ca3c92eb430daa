"""What becomes of a job when a rank fails: it ends in time, by name, with what was observed on disk, and resumes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import STARTED, launch, needs_mpi, start, with_horizon

import fedsim
from fedsim.results.recorder import read_metrics

OWN = """
import os
import time
from dataclasses import dataclass
from pathlib import Path

from fedsim import Mix, Rows, SyncAlgorithm


@dataclass
class State:
    x: Rows


@dataclass(frozen=True)
class Slow(SyncAlgorithm):
    nap: float = 0.01
    fails: int = -1
    hangs: int = -1

    async def start(self, x0, f, rng):
        rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("RANK", "0"))
        Path(f"rank-{rank}").write_text(str(os.getpid()))
        return State(x0)

    async def round(self, s, k, f, rng):
        time.sleep(self.nap)
        if k == self.fails and 2 in f.nodes:
            raise ValueError("boom")
        if k == self.hangs and 2 in f.nodes:
            time.sleep(100)
        return State(await Mix(s.x + 0.01 * rng.normal("noise", s.x.shape[1])))
"""
SLOW = {
    "name": "slow",
    "topology": {"kind": "ring", "n": 3, "order": "given"},
    "problem": {"kind": "quadratic", "dim": 4},
    "algorithm": {"kind": "own.py:Slow"},
    "schedule": {"horizon": 300},
    "record": {"every": 1, "metrics": ["consensus"]},
    "engine": {"timeout": 3, "block": 3},
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the scenario, in which jobs are started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "s.yaml").write_text(json.dumps(SLOW))
    return tmp_path


def under_way(folder: Path, rank: int, rows: int = 5) -> int:
    """Wait until some rounds are recorded; return the process of a rank."""
    observed(folder, rows)
    return int((folder.parent / f"rank-{rank}").read_text())


def observed(folder: Path, rows: int) -> None:
    """Wait until so many rows are on disk."""
    for _ in range(1200):
        if (folder / "metrics.arrows").exists() and len(read_metrics(folder)) >= rows:
            return
        time.sleep(0.05)
    raise AssertionError("the job never started")


@pytest.fixture(autouse=True)
def nothing_left():
    """End what a failed test left running."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
        process.communicate()
    STARTED.clear()


def ended(process: subprocess.Popen, folder: Path, within: float) -> str:
    """Return what the job said; it must end in time, with an error code, and leave no process."""
    clock = time.monotonic()
    _, said = process.communicate(timeout=within + 20)
    assert time.monotonic() - clock < within
    assert process.returncode != 0
    for rank in range(3):
        pid = int((folder.parent / f"rank-{rank}").read_text())
        for _ in range(100):
            if not alive(pid):
                break
            time.sleep(0.1)
        assert not alive(pid)
    assert len(fedsim.load(folder).metrics) >= 5
    return said


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


slow = pytest.mark.slow
kinds = pytest.mark.parametrize("kind", [pytest.param("mpi", marks=needs_mpi), pytest.param("torch", marks=slow)])


@kinds
def test_a_rank_that_raises_ends_the_job_by_name(here, kind):
    """The message names rank and error, the result says failed and why, what was observed is on disk."""
    done = launch(kind, 3, "run", "s.yaml", "algorithm.fails=20", "--folder", "out", "--json", cwd=here)
    assert done.returncode not in (0, 2)
    assert "rank 2 of 3: ValueError: boom" in done.stderr
    result = fedsim.load(here / "out")
    assert result.status == "failed"
    assert "boom" in result.facts["error"]
    assert len(result.metrics) >= 20


@kinds
def test_a_killed_rank_ends_the_job(here, kind):
    """SIGKILL: within seconds the whole job is gone, and nothing is half-written."""
    process = start(kind, 3, "run", "s.yaml", "schedule.horizon=100000", "--folder", "out", "--json", cwd=here)
    os.kill(under_way(here / "out", 1), signal.SIGKILL)
    ended(process, here / "out", 15)


@slow
@kinds
def test_a_killed_launcher_leaves_no_rank_behind(here, kind):
    """SIGKILL of mpirun or torchrun itself: its ranks do not play on."""
    process = start(kind, 3, "run", "s.yaml", "schedule.horizon=100000", "--folder", "out", "--json", cwd=here)
    under_way(here / "out", 1)
    process.kill()
    ended(process, here / "out", 20)


@kinds
def test_a_stopped_rank_ends_the_job_by_name(here, kind):
    """SIGSTOP: after engine.timeout the job ends with one line that names the rank."""
    process = start(kind, 3, "run", "s.yaml", "schedule.horizon=100000", "--folder", "out", "--json", cwd=here)
    os.kill(under_way(here / "out", 2), signal.SIGSTOP)
    said = ended(process, here / "out", 25)
    assert "rank 2 has not answered for 3 s" in said
    assert "rank 2" in fedsim.load(here / "out").facts["error"]


@needs_mpi
@slow
def test_a_rank_that_is_stuck_in_its_own_code_ends_the_job_by_name(here):
    """A rank that neither moves nor waits for others while they wait for it is named."""
    process = start("mpi", 3, "run", "s.yaml", "algorithm.hangs=30", "--folder", "out", "--json", cwd=here)
    said = ended(process, here / "out", 40)
    assert "rank 2 has neither moved nor waited for 3 s" in said


@needs_mpi
@slow
def test_a_rank_that_is_stopped_while_it_works_is_not_called_stuck(here):
    """Silence is called silence, also of a rank that last showed no progress: its code is not to blame."""
    process = start("mpi", 3, "run", "s.yaml", "algorithm.hangs=30", "--folder", "out", "--json", cwd=here)
    stopped = under_way(here / "out", 2, rows=30)
    time.sleep(1.5)  # some signs show no progress, too few to be given up for it
    os.kill(stopped, signal.SIGSTOP)
    said = ended(process, here / "out", 25)
    assert "rank 2 has not answered for 3 s" in said


def test_sigterm_checkpoints_and_the_run_goes_on_elsewhere_to_the_same_bits(here):
    """Preempted under torchrun (3 ranks), resumed in one process: the digest of an uninterrupted run."""
    whole = fedsim.run("s.yaml", overrides=["algorithm.nap=0"], folder="whole")
    process = start("torch", 3, "run", "s.yaml", "--folder", "out", "--json", cwd=here)
    under_way(here / "out", 0)
    process.send_signal(signal.SIGTERM)
    said = ended(process, here / "out", 25)
    assert "stopped after a checkpoint" in said
    result = fedsim.load(here / "out")
    assert result.status == "interrupted"
    assert len(result.metrics) < 301
    again = fedsim.resume(here / "out")
    assert again.status == "finished"
    columns = [c for c in whole.metrics if c != "wall_seconds"]
    assert again.metrics[columns].equals(whole.metrics[columns])


def test_ctrl_c_checkpoints_in_one_process(here):
    """The first Ctrl-C ends the run after a checkpoint between two observations; resume gives the same bits."""
    events = {**SLOW, "algorithm": {"kind": "dadao"}, "schedule": {"horizon": 400000}, "record": {"every": 100}}
    (here / "s.yaml").write_text(json.dumps(events))
    process = start("local", 1, "run", "s.yaml", "--folder", "out", "--json", cwd=here)
    observed(here / "out", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "stopped after a checkpoint" in said
    rows = len(fedsim.load(here / "out").metrics)
    end = 100 * (rows + 2)
    with_horizon(here / "out", 400000, end)  # not to wait for the whole of it
    again = fedsim.resume(here / "out")
    (here / "s.yaml").write_text(json.dumps({**events, "schedule": {"horizon": end}}))
    whole = fedsim.run("s.yaml", folder="whole")
    assert again.digest == whole.digest


@slow
def test_sigterm_ends_a_live_run_long_before_its_next_observation(here):
    """Within the half minute that schedulers grant, after a checkpoint from which it goes on."""
    live = {"kind": "live", "horizon": 2000, "unit": 0.1}
    (here / "s.yaml").write_text(json.dumps({**SLOW, "algorithm": {"kind": "dadao"}, "schedule": live}))
    process = start("local", 1, "run", "s.yaml", "record.every=1000", "--folder", "out", "--json", cwd=here)
    observed(here / "out", 1)
    clock = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=90)
    assert time.monotonic() - clock < 25
    assert "stopped after a checkpoint" in said
    assert fedsim.load(here / "out").status == "interrupted"
    assert (here / "out" / "trace" / "000000.npz").exists()
