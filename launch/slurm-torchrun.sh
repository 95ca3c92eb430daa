#!/usr/bin/env bash
# torchrun under Slurm.   sbatch --nodes 2 --cpus-per-task 16 launch/slurm-torchrun.sh scenario.yaml [OPTIONS]
#SBATCH --job-name=fedsim
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
# One torchrun on each node, which starts a process for every GPU (--gpus-per-node), else for every core; they meet on the
# first node.
set -euo pipefail
export OMP_NUM_THREADS=1
processes=${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_PER_TASK}
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
set -x
exec srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" \
    --shutdown-timeout 60 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "${hosts%%$'\n'*}:$((20000 + SLURM_JOB_ID % 20000))" -m fedsim -- run "$@"
