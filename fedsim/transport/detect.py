"""Which launcher started this process, found from its environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from fedsim.errors import InputError
from fedsim.transport.local import LocalTransport
from fedsim.transport.transport import Transport

# What each launcher says about the number of processes that it started.
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
TORCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def found(environment: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return the launchers that this environment speaks of, with their numbers of processes.

    torchrun is the innermost one where both are present (mpirun that starts torchrun), so it comes first.
    """
    env = os.environ if environment is None else environment
    launchers = {}
    if all(name in env for name in TORCH):
        launchers["torch"] = int(env["WORLD_SIZE"])
    for name in MPI_SIZES:
        if name in env:
            launchers["mpi"] = int(env[name])
            break
    else:
        if "PMIX_RANK" in env or ("SLURM_PROCID" in env and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1):
            launchers["mpi"] = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    return launchers


def choose(wanted: str = "auto", environment: Mapping[str, str] | None = None) -> str:
    """Return the transport to use: the wanted one, or the launcher's.

    Raises:
        InputError: the wanted launcher did not start this process.
    """
    launchers = found(environment)
    if wanted == "auto":
        return next(iter(launchers), "local")
    if wanted != "local" and wanted not in launchers:
        starter = "torchrun --nproc-per-node N -m fedsim" if wanted == "torch" else "mpirun -n N fedsim"
        raise InputError(f"engine.transport: {wanted} given, but no such launcher started this process; use {starter}")
    return wanted


def _refuse_strangers(size: int, started: int) -> None:
    """Refuse processes that a launcher started together and MPI does not connect: each would be a whole job."""
    if started > 1 and size == 1:
        raise InputError(
            f"the launcher started {started} processes, and the MPI library that mpi4py loads connects none of them:"
            " they are of two MPIs (or, under srun, --mpi=pmix or pmi2 is missing); `fedsim doctor` names the fix"
        )


def connect(wanted: str = "auto", timeout: float = 120.0) -> Transport:
    """Return the transport of this process, connected; says which won when two launchers are present."""
    kind = choose(wanted)
    if kind == "torch":
        from fedsim.transport.torchrun import TorchTransport

        made: Transport = TorchTransport(timeout)
    elif kind == "mpi":
        from fedsim.transport.mpi import MpiTransport

        made = MpiTransport()
        _refuse_strangers(made.size, found()["mpi"])
    else:
        made = LocalTransport()
    if len(found()) > 1 and made.rank == 0:
        won = "torchrun" if kind == "torch" else "MPI" if kind == "mpi" else "neither"
        print(f"fedsim: both torchrun and MPI are present; {won} is used (engine.transport chooses)", file=sys.stderr)
    return made
