#!/usr/bin/env bash
# Prepares data on Dataflow, from buckets into a bucket.
#
#   PROJECT=MINE BUCKET=gs://MINE IMAGE=us-docker.pkg.dev/MINE/mc3/dataflow \
#     launch/dataflow_data_prep.sh [--dry_run] data_prep.ego4d --root gs://MINE/ego4d --out gs://MINE/ego4d_clips
#
# IMAGE is the pushed result of `docker build --target dataflow -f launch/Dockerfile .`. The machine that runs this
# script needs `pip install '.[prep,gcs]'` with the image's version of Beam. REGION is us-central1 by default. If it
# was interrupted, start it again and it continues.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == data_prep.* ]] || { echo "usage: $0 [--dry_run] data_prep.MODULE ARGS..." >&2; exit 2; }
for name in PROJECT BUCKET IMAGE; do
  [[ ${!name:-} ]] || { echo "$0: set the environment variable $name" >&2; exit 2; }
done

command=(
  python -m "$@" --runner=DataflowRunner "--project=$PROJECT" "--region=${REGION:-us-central1}"
  "--temp_location=$BUCKET/tmp" "--sdk_container_image=$IMAGE" --sdk_location=container
)
if [[ $dry_run ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi
exec "${command[@]}"
