"""Can this installation start jobs of several processes? Each launcher is tried; what does not fit gets its fix."""

from __future__ import annotations

import ctypes.util
import glob
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsim.errors import InputError
from fedsim.launchers import candidates, command, finished, flags, probe

LIBRARY = "from mpi4py import MPI; print(MPI.Get_library_version().strip().splitlines()[0][:80])"
SYSTEM = ("/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib64/mpich/lib")
INSTALL = "pip install 'fedsim[mpi]' (brings mpi4py and an MPI), or the system's MPI and pip install mpi4py"


@dataclass(frozen=True)
class Launcher:
    """An MPI launcher: its first words about itself, how many of two processes see each other, and the fix if not 2."""

    path: str
    version: str
    sees: int | None
    fix: str | None


def examine_jobs() -> dict[str, Any]:
    """Return the MPI library, every launcher tried, exchanges measured on MPI and torch, and problems with fixes."""
    facts: dict[str, Any] = {"library": _library(), "mpi": None, "torch": None, "launchers": [], "problems": []}
    if facts["library"] is None:
        facts["problems"].append(f"mpi4py finds no MPI, so mpirun cannot be used (torchrun can): {INSTALL}")
    else:
        tried = [_try(path) for path in candidates()]
        facts["launchers"] = [asdict(one) for one in tried]
        facts["problems"] += _verdict(tried, facts["library"])
        if any(one.sees == 2 for one in tried):
            facts["mpi"] = _measured("mpi", facts["problems"])
    facts["torch"] = _measured("torch", facts["problems"])
    return facts


def report_jobs(facts: dict[str, Any]) -> list[str]:
    """Return the facts as lines."""
    lines = [f"  MPI        {facts['library'] or 'none that mpi4py finds'}"]
    for one in facts["launchers"]:
        fits = (
            "fits"
            if one["sees"] == 2
            else "does not fit this MPI" + (f"; to use it: {one['fix']}" if one["fix"] else "")
        )
        lines.append(f"             {one['path']} ({one['version']}): {fits}")
    for kind, name in (("mpi", "mpirun"), ("torch", "torchrun")):
        if facts[kind]:
            m = facts[kind]
            lines.append(
                f"  {name:<10} 2 processes: 64 B each way in {m['small'] * 1e6:.0f} us, 8 MiB in"
                f" {m['large'] * 1e3:.1f} ms, all-to-all of 256 KiB parts in {m['all_to_all'] * 1e3:.2f} ms"
            )
    return lines


def _library() -> str | None:
    """Return what the MPI that mpi4py loads says it is; asked in a process of its own, since a wrong one may abort."""
    done = _quietly([sys.executable, "-c", LIBRARY])
    return done.stdout.strip() if done is not None and done.returncode == 0 and done.stdout.strip() else None


def _try(path: str) -> Launcher:
    done = _quietly([path, "--version"])
    said = "" if done is None else done.stdout
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    words = next((line for line in lines if "Version" in line or "MPI" in line), lines[0] if lines else "unknown")
    start = (path, *flags(path))
    sees = probe(start)
    return Launcher(path, " ".join(words.split()), sees, None if sees == 2 else _fix(start, said))


def _fix(start: tuple[str, ...], said: str) -> str | None:
    """Return settings under which mpi4py loads this launcher's own MPI, tried; None: its library was not found."""
    family = "openmpi" if "Open MPI" in said or "OpenRTE" in said else "mpich"
    for library in _libraries(family):
        settings = {"MPI4PY_MPIABI": family, "MPI4PY_LIBMPI": library}
        if probe(start, settings) == 2:
            return "export " + " ".join(f"{k}={v}" for k, v in settings.items())
    return _renamed(start) if family == "mpich" else None


def _renamed(start: tuple[str, ...]) -> str | None:
    """Return how Debian's MPICH is used, tried: its library is called libmpich.so.12, mpi4py asks for libmpi.so.12."""
    for library in sorted(found for folder in SYSTEM for found in glob.glob(f"{folder}/libmpich.so.12")):
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "libmpi.so.12").symlink_to(library)
            if probe(start, {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": place}) == 2:
                return (
                    f"mkdir -p ~/.local/lib/mpich; ln -s {library} ~/.local/lib/mpich/libmpi.so.12;"
                    " export MPI4PY_MPIABI=mpich LD_LIBRARY_PATH=~/.local/lib/mpich"
                )
    return None


def _libraries(family: str) -> list[str]:
    """Return libraries that may be a family's: this environment's, then the system's."""
    own = [str(p) for p in sorted((Path(sys.prefix) / "lib").glob("libmpi*.so*"))]
    names = ("mpi",) if family == "openmpi" else ("mpich", "mpi")
    return [*own, *(found for name in names if (found := ctypes.util.find_library(name)))]


def _verdict(tried: list[Launcher], library: str) -> list[str]:
    good = [one.path for one in tried if one.sees == 2]
    if not good:
        fixes = [f"{one.fix} (then {one.path} fits)" for one in tried if one.fix]
        return [f"no launcher here fits the MPI that mpi4py loads ({library}): {' or '.join(fixes) or INSTALL}"]
    wrong = [one for one in tried if one.sees != 2 and Path(one.path).name in ("mpirun", "mpiexec")]
    first = [one for one in wrong if tried.index(one) < min(tried.index(t) for t in tried if t.sees == 2)]
    return [
        f"{one.path} does not fit the MPI that mpi4py loads ({library}): start jobs with {good[0]}" for one in first
    ]


def _measured(kind: str, problems: list[str]) -> dict[str, float] | None:
    try:
        start = command(kind, 2)
    except InputError as error:
        problems.append(str(error))
        return None
    done = _quietly([*start, "-m", "fedsim.measure"])
    lines = [] if done is None else [line for line in done.stdout.splitlines() if line.startswith('{"processes"')]
    if lines and json.loads(lines[0])["processes"] == 2:
        return json.loads(lines[0])
    why = "it did not end within a minute" if done is None else " / ".join(done.stderr.splitlines()[-2:])
    problems.append(f"two processes under {start[0]} ({kind}) cannot exchange bytes: {why}")
    return None


def _quietly(line: list[str]) -> subprocess.CompletedProcess[str] | None:
    try:
        return finished(line, 60)
    except (OSError, subprocess.TimeoutExpired):
        return None
