#!/usr/bin/env bash
# A run on a Cloud TPU slice of spot VMs: creates the slice, runs on all its workers, and starts again after
# preemption.
#
#   TPU=mc3 ZONE=us-west4-a TYPE=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite IMAGE=us-docker.pkg.dev/MINE/mc3/tpu \
#   MOUNT=/mnt/mc3 SETUP="sudo mkdir -p /mnt/mc3; mountpoint -q /mnt/mc3 || sudo mount 10.0.0.2:/mc3 /mnt/mc3" \
#     launch/tpu_vm.sh [--dry_run] mc3_jax.train --config=configs/mc3_ego4d.py --workdir=/mnt/mc3/runs/mc3_ego4d \
#     --config.model.scan_layers=True
#
# One process per worker (host) drives its chips. IMAGE is the pushed result of `docker build --target tpu -f
# launch/Dockerfile .`. MOUNT is a file system that all workers share and that outlives them (Filestore). If it is
# /mnt/mc3, the image links data/, weights/ and runs/ to its folders. SETUP is a command that mounts it; it runs on
# every worker first. The slice is not deleted when the run is over: the last line says how to delete it.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == *.* ]] || { echo "usage: $0 [--dry_run] MODULE ARGS..., e.g. mc3_jax.train --config=FILE" >&2; exit 2; }
for name in TPU ZONE TYPE RUNTIME IMAGE MOUNT; do
  [[ ${!name:-} ]] || { echo "$0: set the environment variable $name" >&2; exit 2; }
done
poll_s=${POLL_S:-30}

slices=(gcloud compute tpus queued-resources)
create=(
  "${slices[@]}" create "$TPU" "--node-id=$TPU" "--zone=$ZONE" --spot
  "--accelerator-type=$TYPE" "--runtime-version=$RUNTIME"
)
describe=("${slices[@]}" describe "$TPU" "--zone=$ZONE" "--format=value(state.state)")
delete=("${slices[@]}" delete "$TPU" "--zone=$ZONE" --force --quiet)

# No XLA flags: libtpu's own defaults apply. If an earlier connection has left a container running, it is stopped
# first, and its process saves. When a worker is preempted or its container is stopped, the process has a minute to
# save.
printf -v program ' %q' python -m "$@"
printf -v volume '%q' "$MOUNT:$MOUNT"
printf -v setup '%q' "${SETUP:-true}"
remote="eval $setup && sudo gcloud auth configure-docker ${IMAGE%%/*} --quiet \
&& { { sudo docker stop -t 60 mc3; sudo docker rm --force mc3; } >/dev/null 2>&1; true; } \
&& sudo docker run --name mc3 --rm --init --stop-timeout 60 --privileged --net host \
--volume $volume $IMAGE$program"
run=(gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" --worker=all "--command=$remote")

if [[ $dry_run ]]; then
  for line in create describe run delete; do
    declare -n words=$line
    printf '%q ' "${words[@]}"
    echo
  done
  exit
fi

# Prints the slice's state, or NONE if there is no slice; fails if gcloud has failed ten times.
state() {
  local text
  for ((i = 0; i < 10; i++)); do
    if text=$("${describe[@]}" 2>&1); then
      echo "${text##*$'\n'}" && return
    elif [[ $text == *NOT_FOUND* ]]; then
      echo NONE && return
    fi
    sleep "$poll_s"
  done
  echo "$0: $text" >&2
  return 1
}

while true; do
  now=$(state)
  while [[ $now != ACTIVE ]]; do
    case $now in
      NONE) "${create[@]}" ;;
      SUSPENDED) "${delete[@]}" ;;
      FAILED) echo "$0: the slice can't be created; to see why: ${describe[*]:0:7}" >&2 && exit 1 ;;
    esac
    sleep "$poll_s"
    now=$(state)
  done
  status=0
  "${run[@]}" || status=$?
  # When a machine is taken away, its ssh ends with 255 and the other processes with 76, minutes before the slice's
  # state shows it.
  for ((i = 0; i < 10; i++)); do
    now=$(state)
    if [[ $now != ACTIVE ]] || ((status != 76 && status <= 128)); then break; fi
    sleep "$poll_s"
  done
  if ((status == 0)) || { ((status != 75)) && [[ $now == ACTIVE ]]; }; then break; fi
  echo "$0: status $status, the slice is $now: starting again" >&2
done
printf '%s: status %d; to delete the slice: ' "$0" "$status" >&2
printf '%q ' "${delete[@]}" >&2
echo >&2
exit "$status"
