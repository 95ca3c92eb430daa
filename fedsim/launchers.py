"""Command lines that start jobs of several processes on this machine, by the launcher that matches the loaded MPI."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from fedsim.errors import InputError

NAMES = ("mpirun", "mpiexec", "mpirun.openmpi", "mpiexec.mpich", "mpiexec.hydra")
GRACE = 40.0  # seconds that a launcher has to end its processes: torchrun gives them 30
PROBE = "from mpi4py import MPI; c = MPI.COMM_WORLD; print('processes', c.Get_size() if c.Get_rank() == 0 else '')"


def command(kind: str, size: int) -> list[str]:
    """Return what to put before a Python program's arguments (`-m fedsim run ...`) to start it on `size` processes.

    Args:
        kind: `local` (size 1), `mpi` or `torch`.

    Raises:
        InputError: no launcher of this machine starts processes that the loaded MPI connects; says what was tried.
    """
    if kind == "local":
        return [sys.executable]
    if kind == "torch":
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    return [*_mpi(), "-n", str(size), sys.executable]


def candidates() -> list[str]:
    """Return the MPI launchers at hand: those of this Python's environment first, then those on the path."""
    beside = [str(path) for name in NAMES if (path := Path(sys.executable).parent / name).exists()]
    return list(dict.fromkeys([*beside, *(path for name in NAMES if (path := shutil.which(name)))]))


@cache
def _mpi() -> tuple[str, ...]:
    tried = []
    for path in candidates():
        start = (path, *flags(path))
        found = probe(start)
        if found == 2:
            return start
        tried.append(f"{path} started {'nothing' if found is None else f'2 processes that see {found}'}")
    why = "; ".join(tried) or "none was found"
    raise InputError(
        f"no MPI launcher here matches the MPI that mpi4py loads ({why}); pip install 'fedsim[mpi]' brings one, or"
        " install the launcher of the library that `fedsim doctor` names"
    )


def probe(start: tuple[str, ...], settings: Mapping[str, str] | None = None) -> int | None:
    """Return how many processes two that this launcher starts see; None: it fails. A mismatched one sees 1."""
    environment = {**os.environ, **(settings or {})}
    try:
        done = finished([*start, "-n", "2", sys.executable, "-c", PROBE], 60, environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    said = re.search(r"processes (\d+)", done.stdout)  # launchers may mix what two processes say within a line
    return int(said[1]) if done.returncode == 0 and said else None


def finished(
    line: Sequence[str], timeout: float | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a launcher to its end. Whatever ends the wait for it ends it, too, in a way that takes its processes along.

    Raises:
        subprocess.TimeoutExpired: it took longer.
        OSError: it cannot be started.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True, env=environment) as launcher:
        try:
            out, err = launcher.communicate(timeout=timeout)
        except BaseException:
            launcher.terminate()
            try:
                launcher.communicate(timeout=GRACE)
            except subprocess.TimeoutExpired:
                launcher.kill()
            raise
        return subprocess.CompletedProcess(list(line), launcher.returncode, out, err)


def flags(path: str) -> list[str]:
    """Return what Open MPI asks for to start more processes than cores, and to be started by root."""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    if "Open MPI" not in text and "OpenRTE" not in text:
        return []
    return ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
