#!/usr/bin/env bash
# Submits launch/skypilot.yaml as a managed job, which SkyPilot restarts when it is preempted.
#
#   IMAGE=us-docker.pkg.dev/MINE/mc3/gpu BUCKET=gs://MINE [GPUS=A100-80GB:8] \
#     launch/skypilot.sh [--dry_run] mc3_jax.train --config=configs/mc3_ego4d.py --workdir=/mnt/mc3/runs/mc3_ego4d
#
# IMAGE is the pushed result of `docker build --target gpu -f launch/Dockerfile .`. BUCKET is mounted at /mnt/mc3; the
# image links data/, weights/ and runs/ to its folders.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == *.* ]] || { echo "usage: $0 [--dry_run] MODULE ARGS..., e.g. mc3_jax.train --config=FILE" >&2; exit 2; }
for name in IMAGE BUCKET; do
  [[ ${!name:-} ]] || { echo "$0: set the environment variable $name" >&2; exit 2; }
done

printf -v command '%q ' "$@"
submit=(
  sky jobs launch "$(dirname "$0")/skypilot.yaml" --yes --gpus "${GPUS:-A100-80GB:8}"
  --image-id "docker:$IMAGE" --env "BUCKET=$BUCKET" --env "COMMAND=${command% }"
)
if [[ $dry_run ]]; then
  printf '%q ' "${submit[@]}"
  echo
  exit
fi
exec "${submit[@]}"
