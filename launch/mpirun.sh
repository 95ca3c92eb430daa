#!/usr/bin/env bash
# N processes under MPI, on this machine or on those that mpirun is told of.   launch/mpirun.sh N scenario.yaml [OPTIONS]
# MPIRUN: another launcher; MPIRUN_FLAGS: its own options, such as "--hostfile hosts" or "--oversubscribe".
set -euo pipefail
processes=$1
shift
export OMP_NUM_THREADS=1 # one core for each process
# On SIGTERM, Open MPI kills a second after it has passed the signal on; a checkpoint may need longer.
export OMPI_MCA_odls_base_sigkill_timeout=30 PRTE_MCA_odls_base_sigkill_timeout=30 # Open MPI 4 and 5
set -x
exec ${MPIRUN:-mpirun} ${MPIRUN_FLAGS:-} -n "$processes" fedsim run "$@"
