"""What an installation has: versions, threads, caches, solvers, MPI."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fedsim.topology.cache import folder

PACKAGES = ("fedsim", "torch", "numpy", "scipy", "numba", "networkx", "cvxpy", "pandas", "pyarrow", "mpi4py")


def examine() -> dict[str, Any]:
    """Return versions, machine, solvers, launchers, and a list of problems with the fix for each."""
    from fedsim.doctor_jobs import examine_jobs
    from fedsim.engine.machine import prepare
    from fedsim.topology.semidefinite import installed_solvers

    versions = {name: _version(name) for name in PACKAGES}
    problems = [
        f"{name} is missing: pip install {name}" for name, v in versions.items() if v is None and name != "mpi4py"
    ]
    cache = folder()
    if not _writable(cache):
        problems.append(f"the cache {cache} is not writable: set FEDSIM_CACHE to a folder that is")
    if not _writable(Path(os.environ.get("NUMBA_CACHE_DIR", Path(__file__).parent))):
        problems.append("compiled kernels cannot be kept: set NUMBA_CACHE_DIR to a writable folder")
    jobs = examine_jobs()
    problems += jobs.pop("problems")
    try:
        solvers = installed_solvers()
    except ImportError as error:  # cvxpy, or what it needs
        solvers = []
        problems.append(
            f"cvxpy cannot be loaded ({error}): rates of kind sdp need it; pip install --force-reinstall cvxpy"
        )
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "versions": versions,
        "machine": prepare(),
        "cuda": _cuda(),
        "solvers": solvers,
        "cache": str(cache),
        "launchers": {name: shutil.which(name) for name in ("mpirun", "mpiexec", "torchrun", "srun")},
        "jobs": jobs,
        "problems": problems,
    }


def report(facts: dict[str, Any]) -> str:
    """Return the facts as lines."""
    from fedsim.doctor_jobs import report_jobs

    lines = [f"python {facts['python']} on {facts['platform']}, {facts['cores']} cores"]
    lines += [f"  {name:<10} {v or 'missing'}" for name, v in facts["versions"].items()]
    lines.append(f"  settings   {', '.join(f'{k} = {v}' for k, v in facts['machine'].items())}")
    lines.append(f"  cuda       {', '.join(facts['cuda']) or 'no device; engine.device: cpu is what there is'}")
    lines.append(f"  solvers    {', '.join(facts['solvers']) or 'none'}")
    lines.append(f"  cache      {facts['cache']}")
    lines += [f"  {name:<10} {path or 'not found'}" for name, path in facts["launchers"].items()]
    lines += report_jobs(facts["jobs"])
    lines += [f"problem: {text}" for text in facts["problems"]] or ["no problems found"]
    return "\n".join(lines)


def _cuda() -> list[str]:
    """Return the CUDA devices that torch sees, with NCCL's version beside the first."""
    import torch
    from torch.cuda import nccl

    if not torch.cuda.is_available():
        return []
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    release = ".".join(str(part) for part in nccl.version())
    return [f"{names[0]} (NCCL {release})", *names[1:]]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
