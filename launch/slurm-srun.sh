#!/usr/bin/env bash
# MPI under Slurm.   sbatch --nodes 2 --ntasks-per-node 16 launch/slurm-srun.sh scenario.yaml [OPTIONS]
#SBATCH --job-name=fedsim
#SBATCH --cpus-per-task=1
#SBATCH --signal=TERM@120
# The last line: SIGTERM to all processes 120 s before the end, in time for a checkpoint; `fedsim resume` goes on.
set -euo pipefail
export OMP_NUM_THREADS=1
set -x
# pmix or pmi2: what `srun --mpi=list` has and the MPI of `fedsim doctor` speaks. A failed rank ends all of them.
exec srun --mpi="${SLURM_MPI:-pmix}" --kill-on-bad-exit=1 fedsim run "$@"
