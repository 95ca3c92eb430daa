"""Launch scripts, as far as this machine can run them; two hosts by network namespaces; jobs that do not fit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
from launching import BIN, MPIRUN, STARTED, needs_mpi

import fedsim

LAUNCH = Path(__file__).parents[2] / "launch"
SCENARIO = {
    "name": "launched",
    "topology": {"kind": "ring", "n": 6},
    "problem": {"kind": "quadratic", "dim": 4},
    "algorithm": {"kind": "adom_plus"},
    "schedule": {"horizon": 10},
}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "MPIRUN": str(MPIRUN),
    "MPIRUN_FLAGS": "--oversubscribe",
}
PORT = 20000 + os.getpid() % 20000
installed = pytest.mark.skipif(not (BIN / "fedsim").exists(), reason="the command fedsim is not installed here")


@pytest.fixture
def file(tmp_path):
    """A scenario's file, in the current folder of the jobs."""
    (tmp_path / "s.yaml").write_text(json.dumps(SCENARIO))
    return tmp_path / "s.yaml"


def script(name, *arguments, cwd):
    """Start a script of `launch/`."""
    return started([str(LAUNCH / name), *map(str, arguments)], cwd)


def started(line, cwd):
    """Start a command; what a failed test leaves of it is ended."""
    pipe = subprocess.PIPE
    STARTED.append(subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True))
    return STARTED[-1]


@pytest.fixture(autouse=True)
def nothing_left():
    """End what a failed test left running."""
    yield
    for process in STARTED:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)
    STARTED.clear()


def finished(job):
    """Wait for a job and return what it said; it must have ended well."""
    out, said = job.communicate(timeout=150)
    assert job.returncode == 0, said[-3000:]
    return out + said


def test_scripts_are_short_and_parse():
    """Each is under 25 lines and shows the command that it runs; bash finds nothing wrong in them."""
    scripts = sorted(LAUNCH.glob("*.sh"))
    assert len(scripts) == 7
    for path in scripts:
        text = path.read_text()
        assert len(text.splitlines()) < 25
        assert "set -x" in text
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)


@pytest.mark.slow
@installed
@needs_mpi
def test_every_script_of_one_machine_gives_one_digest(file, tmp_path):
    """local, mpirun, torchrun, and torchrun's several machines played by two launchers that meet at a port."""
    jobs = [("local.sh",), ("mpirun.sh", 2), ("torchrun.sh", 2)]
    for number, (name, *size) in enumerate(jobs):
        said = finished(script(name, *size, file, "--folder", f"out{number}", "--no-plot", cwd=tmp_path))
        assert "+ exec" in said
    meeting = (2, f"localhost:{PORT}", 1, file, "--folder", "out3", "--no-plot")
    for job in [script("torchrun-hosts.sh", *meeting, cwd=tmp_path) for _ in range(2)]:
        finished(job)
    assert len({fedsim.load(tmp_path / f"out{number}").digest for number in range(4)}) == 1


@pytest.mark.slow
@installed
@needs_mpi
@pytest.mark.parametrize(("name", "size"), [("local.sh", ()), ("mpirun.sh", (2,)), ("torchrun.sh", (2,))])
def test_scripts_leave_time_for_a_checkpoint(file, tmp_path, name, size):
    """SIGTERM to the script's process ends the job after a checkpoint, and the run resumes to its digest."""
    changes = ("schedule.horizon=40000", "record.every=200", "checkpoint.every=20000")
    job = script(name, *size, file, *changes, "--folder", "out", "--no-plot", cwd=tmp_path)
    for _ in range(1200):
        stream = tmp_path / "out" / "metrics.arrows"
        if stream.exists() and stream.stat().st_size > 4000:
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode != 0
    assert fedsim.load(tmp_path / "out").status == "interrupted"
    assert any((tmp_path / "out" / "checkpoint").iterdir())


@pytest.mark.parametrize(("gpus", "processes"), [({}, "16"), ({"SLURM_GPUS_ON_NODE": "4"}, "4")])
def test_torchrun_under_slurm_starts_a_process_per_gpu_or_core(tmp_path, gpus, processes):
    """Slurm's own commands are played: what would be started is read from the line."""
    for name, body in (("scontrol", "echo first; echo second"), ("srun", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "h[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "16"}
    environment = {**os.environ, **slurm, **gpus, "SLURM_JOB_ID": "41", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = [LAUNCH / "slurm-torchrun.sh", "s.yaml", "seed=3"]
    said = subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"--nnodes 2 --nproc-per-node {processes} " in said
    assert "--rdzv-endpoint first:20041 -m fedsim -- run s.yaml seed=3" in said


def test_slurm_scripts_say_what_slurm_needs_to_know():
    """There is no Slurm here to run them: their windows for a checkpoint and their ends after a failure are read."""
    if shutil.which("srun"):  # pragma: no cover - on a cluster
        pytest.skip("there is a Slurm: submit them by hand, as their second lines say")
    for name in ("slurm-srun.sh", "slurm-torchrun.sh"):
        text = (LAUNCH / name).read_text()
        assert "#SBATCH --signal=TERM@120" in text
        assert "--kill-on-bad-exit=1" in text


@needs_mpi
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schedule": {"horizon": 11}}, "schedule.horizon is 10.0 on rank 0 and 11.0 on rank 1"),
        ({"schedule": {"horzon": 11}}, "rank 1 of 2: InputError"),
    ],
)
def test_ranks_with_different_files_end_by_name(file, tmp_path, change, words):
    """Two scenario files in one job, or a mistake in one of them: a message that names rank and key, no hang."""
    (tmp_path / "other.yaml").write_text(json.dumps(SCENARIO | change))
    play = [sys.executable, "-m", "fedsim", "run"]
    line = [MPIRUN, "--oversubscribe", "-n", 1, *play, file, ":", "-n", 1, *play, tmp_path / "other.yaml"]
    done = subprocess.run(
        [str(part) for part in line], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode != 0
    assert words in done.stderr


TORN = """
from dataclasses import dataclass
from fedsim import Mix, Rows, Sum, SyncAlgorithm

@dataclass
class State:
    x: Rows

@dataclass(frozen=True)
class Torn(SyncAlgorithm):
    async def start(self, x0, f, rng):
        return State(x0)

    async def round(self, s, k, f, rng):
        if k == 5 and 0 in f.nodes:
            HERE
        return State(await Mix(s.x))
"""


@needs_mpi
@pytest.mark.parametrize(
    ("here", "words"),
    [
        ("await Sum(s.x)", "ranks disagree on the next request: rank 0 asks for"),
        pytest.param("return s", "wait for each other", marks=pytest.mark.slow),
    ],
)
def test_a_sum_against_a_mix_ends_by_name(tmp_path, here, words):
    """Requests that travel in different ways never meet; the watch compares what the ranks that wait ask for."""
    (tmp_path / "own.py").write_text(TORN.replace("HERE", here))
    torn = SCENARIO | {"algorithm": {"kind": "own.py:Torn"}, "engine": {"timeout": 4, "block": 6}}
    (tmp_path / "s.yaml").write_text(json.dumps(torn))
    line = [str(MPIRUN), "--oversubscribe", "-n", "2", sys.executable, "-m", "fedsim", "run", "s.yaml"]
    done = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert words in done.stderr


@pytest.fixture
def hosts():
    """Two network namespaces on a bridge, as two hosts: names of both; skipped where they cannot be made."""
    tag = uuid.uuid4().hex[:4]
    bridge, names = f"fb{tag}", [f"fh{tag}{i}" for i in range(2)]
    made = [["ip", "link", "add", bridge, "type", "bridge"], ["ip", "link", "set", bridge, "up"]]
    for i, name in enumerate(names):
        inside = ["ip", "-n", name]
        made += [
            ["ip", "netns", "add", name],
            ["ip", "link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name],
            ["ip", "link", "set", f"{name}v", "master", bridge, "up"],
            [*inside, "addr", "add", f"10.77.{int(tag[:2], 16)}.{i + 1}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
        ]
    try:
        for line in made:
            done = subprocess.run(line, capture_output=True, text=True, check=False) if shutil.which("ip") else None
            if done is None or done.returncode:
                why = "no command ip" if done is None else done.stderr.strip()
                pytest.skip(f"network namespaces cannot be made here: {why}")
        yield [(name, f"10.77.{int(tag[:2], 16)}.{i + 1}") for i, name in enumerate(names)]
    finally:
        for line in [*(["ip", "netns", "delete", name] for name in names), ["ip", "link", "delete", bridge]]:
            if shutil.which("ip"):
                subprocess.run(line, capture_output=True, check=False)


@pytest.mark.slow
@installed
def test_torchrun_over_two_hosts_gives_the_digest_of_one_process(hosts, file, tmp_path):
    """Two network namespaces with their own host names and addresses meet by rendezvous; TCP carries the rows."""
    meet = f"{hosts[0][1]}:{PORT + 1}"
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in hosts))
    play = f"{LAUNCH / 'torchrun-hosts.sh'} 2 {meet} 2 {file} --folder out --no-plot"
    jobs = []
    for name, _ in hosts:
        inside = f"mount --bind {names} /etc/hosts && hostname {name} && exec {play}"
        line = ["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "bash", "-c", inside]
        jobs.append(started(line, tmp_path))
    said = [finished(job) for job in jobs]
    assert "not watched" not in "".join(said)
    assert fedsim.load(tmp_path / "out").digest == fedsim.run(file, folder=tmp_path / "alone").digest


@pytest.mark.slow
@needs_mpi
def test_what_solvers_compute_travels_from_rank_0(tmp_path):
    """SDP rates and the fastest mixing matrix are solved once, and a refusal of rank 0's is everybody's."""
    rates = SCENARIO | {"algorithm": {"kind": "dadao"}, "rates": {"kind": "sdp"}}
    mixing = SCENARIO | {"mixing": {"kind": "fastest_mixing"}}
    wrong = rates | {"rates": {"kind": "sdp", "set": "node_rate", "caps": -1.0}}
    digests = []
    for number, content in enumerate((rates, mixing, wrong)):
        (tmp_path / "s.yaml").write_text(json.dumps(content))
        line = [MPIRUN, "--oversubscribe", "-n", 2, sys.executable, "-m", "fedsim", "run", "s.yaml"]
        done = subprocess.run(
            [str(part) for part in (*line, "--folder", tmp_path / f"out{number}", "--no-plot")],
            cwd=tmp_path,
            env=ENVIRONMENT | {"FEDSIM_CACHE": str(tmp_path / f"cache{number}")},
            capture_output=True,
            text=True,
            timeout=100,
        )
        if content is wrong:
            assert done.returncode == 2
            assert done.stderr.count("fedsim: ") == 1
            assert "caps" in done.stderr
        else:
            assert done.returncode == 0, done.stderr[-3000:]
            digests.append(fedsim.load(tmp_path / f"out{number}").digest)
            assert digests[-1] == fedsim.run(content, folder=tmp_path / f"alone{number}").digest
