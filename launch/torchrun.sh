#!/usr/bin/env bash
# N processes of this machine under torchrun.   launch/torchrun.sh N scenario.yaml [OPTIONS]
set -euo pipefail
processes=$1
shift
export OMP_NUM_THREADS=1
set -x
# After SIGTERM, processes have 60 seconds for a checkpoint (torchrun's own: 30).
exec torchrun --standalone --nproc-per-node "$processes" --shutdown-timeout 60 -m fedsim -- run "$@"
