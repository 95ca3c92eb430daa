#!/usr/bin/env bash
# A sweep as Slurm array jobs, one cell per task.   launch/slurm-array.sh scenario.yaml [KEY=a,b,c ...] [--folder DIR]
# Submits the tuning cells (where the scenario has `select`), the cells that report after these, and a last job that
# puts the study together. Started again it plays only what has not ended. TASKS=50 bounds how many run at once.
set -euo pipefail
if [[ "${1:-}" == --task ]]; then # inside of an array: first number of the stage, then the arguments of `fedsim sweep`
  export OMP_NUM_THREADS=1
  first=$2
  shift 2
  set -x
  exec fedsim sweep "$@" --cell "$((first + SLURM_ARRAY_TASK_ID))"
fi
after=()
while read -r stage range; do
  first=${range%-*} last=${range#*-}
  # SIGTERM 120 s before the end of a task, in time for a checkpoint that the next start goes on from.
  job=$(sbatch --parsable --job-name="fedsim-$stage" --signal=TERM@120 --array="0-$((last - first))%${TASKS:-100}" \
    "${after[@]}" "$0" --task "$first" "$@")
  echo "$stage: job ${job%%;*}, cells $range"
  after=(--dependency="afterany:${job%%;*}")
done < <(fedsim sweep "$@" --cells)
sbatch --job-name=fedsim-finish "${after[@]}" --wrap "fedsim sweep $(printf '%q ' "$@") --no-progress"
