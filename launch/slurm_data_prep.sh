#!/usr/bin/env bash
# Prepares data on Slurm. An array of TASKS jobs with CPUS cores each writes the shards; then one more job makes the data set
# from all of them.
#
#   launch/slurm_data_prep.sh [--dry_run] data_prep.ego4d --root ego4d --out data/ego4d_clips
#   TASKS=64 CPUS=16 launch/slurm_data_prep.sh data_prep.epic_sounds ...
#
# Takes any module of data_prep that has --part. --out must be on a file system that all nodes share. SBATCH_PARTITION,
# SBATCH_ACCOUNT and similar variables choose the partition. A task that is preempted queues again and continues. If a task
# fails, the last job is cancelled. Limits of the shell that submits, such as `ulimit -t` on a login node, do not hold for the
# jobs.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == data_prep.* ]] || { echo "usage: $0 [--dry_run] data_prep.MODULE ARGS..." >&2; exit 2; }
tasks=${TASKS:-32}
cpus=${CPUS:-8}

# --wrap takes a whole script as one string.
printf -v convert '%q ' exec python -m "$@" --num_workers "$cpus"
# shellcheck disable=SC2016  # only the task's own shell knows the number
part='--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"'

submit() {
  if [[ $dry_run ]]; then
    printf '%q ' sbatch "$@" >&2
    echo >&2
    [[ $1 != --parsable ]] || echo JOB
  else
    sbatch "$@"
  fi
}

options=(--requeue --propagate=NONE --cpus-per-task="$cpus")
parts=$(submit --parsable "${options[@]}" --array="0-$((tasks - 1))" --wrap="$convert$part")
after=(--dependency="afterok:${parts%%;*}" --kill-on-invalid-dep=yes)
submit "${options[@]}" "${after[@]}" --wrap="${convert% }"
