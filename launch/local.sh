#!/usr/bin/env bash
# One process.   launch/local.sh scenario.yaml [OPTIONS]
set -euo pipefail
export OMP_NUM_THREADS=1 # one thread for each process; fedsim spreads the runs of a long study over the cores
set -x
exec fedsim run "$@"
