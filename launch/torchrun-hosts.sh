#!/usr/bin/env bash
# N processes on each of several machines under torchrun. Start this on every machine, with the same arguments:
#   launch/torchrun-hosts.sh MACHINES FIRST:PORT N scenario.yaml [OPTIONS]
# FIRST is the name of one of them, PORT a free port there. GLOO_SOCKET_IFNAME chooses the network card where
# a machine's name leads to another one.
set -euo pipefail
machines=$1 meet=$2 processes=$3
shift 3
export OMP_NUM_THREADS=1
set -x
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --shutdown-timeout 60 \
    --rdzv-backend c10d --rdzv-endpoint "$meet" --rdzv-id "${JOB:-fedsim}" -m fedsim -- run "$@"
