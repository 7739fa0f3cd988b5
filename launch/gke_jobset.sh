#!/usr/bin/env bash
# Submits launch/gke_jobset.yaml: a run on a TPU slice of GKE. JobSet 0.10 or later must be installed in the cluster.
#
#   IMAGE=us-docker.pkg.dev/MINE/mc3/tpu CLAIM=mc3 NAME=mc3-ego4d \
#   ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 HOSTS=4 CHIPS=4 \
#     launch/gke_jobset.sh [--dry_run] mc3_jax.train --config=configs/mc3_ego4d.py --workdir=/mnt/mc3/runs/mc3_ego4d \
#     --config.model.scan_layers=True
#
# IMAGE is the pushed result of `docker build --target tpu -f launch/Dockerfile .`. CLAIM is the claim of a
# ReadWriteMany volume (Filestore), which is mounted at /mnt/mc3; the image links data/, weights/ and runs/ to its
# folders. HOSTS times CHIPS (per host) must be the number of chips in TOPOLOGY.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
[[ ${1:-} == *.* ]] || { echo "usage: $0 [--dry_run] MODULE ARGS..., e.g. mc3_jax.train --config=FILE" >&2; exit 2; }
: "${NAME:=mc3}" "${ACCELERATOR:=tpu-v5-lite-podslice}" "${TOPOLOGY:=4x4}" "${HOSTS:=4}" "${CHIPS:=4}"
for name in IMAGE CLAIM; do
  [[ ${!name:-} ]] || { echo "$0: set the environment variable $name" >&2; exit 2; }
done
if ! [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+)+$ && $HOSTS$CHIPS =~ ^[0-9]+$ ]] || ((HOSTS * CHIPS != ${TOPOLOGY//x/*})); then
  echo "$0: HOSTS=$HOSTS times CHIPS=$CHIPS must be the number of chips of TOPOLOGY=$TOPOLOGY" >&2
  exit 2
fi

# The command as a JSON list, which is also YAML.
COMMAND='"python", "-m"'
for word in "$@"; do
  word=${word//\\/\\\\}
  COMMAND+=", \"${word//\"/\\\"}\""
done
COMMAND="[$COMMAND]"

jobset=$(<"$(dirname "$0")/gke_jobset.yaml")
for name in NAME ACCELERATOR TOPOLOGY HOSTS CHIPS IMAGE CLAIM COMMAND; do
  jobset=${jobset//"\${$name}"/"${!name}"}
done
if [[ $dry_run ]]; then
  echo "$jobset"
  exit
fi
kubectl create -f - <<<"$jobset"
