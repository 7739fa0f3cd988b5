#!/usr/bin/env bash
# Runs one of the project's commands on this machine and restarts it when it should go on. Status 75 (preempted, state saved):
# always. Status 76 (a process was lost or hangs): up to three times, as long as each time has left a newer checkpoint.
#
#   launch/local.sh [--dry_run] mc3_jax.train --config=configs/mc3_ego4d.py --workdir=runs/mc3_ego4d
#
# One process drives all devices of the machine and uses all its cores. SIGTERM or Ctrl-C to this script saves the run's state
# and ends it for good.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == *.* ]] || { echo "usage: $0 [--dry_run] MODULE ARGS..., e.g. mc3_jax.train --config=FILE" >&2; exit 2; }

# A collective that is stuck for ten minutes ends the process; by default XLA waits forever.
export XLA_FLAGS="--xla_gpu_nccl_termination_timeout_seconds=600 ${XLA_FLAGS:-}"
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Within a Slurm step JAX would look for the other tasks and take only one GPU per task: without this variable it does not.
command=(env -u SLURM_STEP_NODELIST python -m "$@")

if [[ $dry_run ]]; then
  printf 'XLA_FLAGS=%q NCCL_DEBUG=%q' "$XLA_FLAGS" "$NCCL_DEBUG"
  printf ' %q' "${command[@]}"
  echo
  exit
fi

workdir='' previous=''
for word in "$@"; do
  if [[ $previous =~ ^--?workdir$ ]]; then workdir=$word; fi
  if [[ $word =~ ^--?workdir= ]]; then workdir=${word#*=}; fi
  previous=$word
done

# Prints the step of the run's newest checkpoint, or 0 if there is none. Only complete checkpoints are named by a number.
newest_step() {
  { echo 0 && ls "$workdir/checkpoints" 2>/dev/null || true; } | grep -x '[0-9]*' | sort -n | tail -n 1
}

child=
told=
signalled=
lost=0
forward() {
  told=1
  signalled=1
  [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap forward TERM INT

while true; do
  before=$(newest_step)
  "${command[@]}" &
  child=$!
  [[ ! $told ]] || kill -TERM "$child"  # signalled between two starts
  while true; do
    signalled=''
    status=0
    wait "$child" || status=$?
    [[ $signalled ]] || break  # otherwise the signal ended the wait, not the process
  done
  if ((status == 76 && lost < 3 && $(newest_step) > before)); then
    ((lost += 1))
  elif ((status != 75)); then
    exit "$status"
  fi
  [[ ! $told ]] || exit "$status"
  echo "$0: status $status, starting again" >&2
done
