#!/usr/bin/env bash
# Every benchmark of speed on one GPU, in under nine minutes and without a network: `bash benchmarks/run_gpu.sh [RESULTS]`.
#
# What they find is appended to RESULTS, or to benchmarks/RESULTS.md. A benchmark that fails or takes too long is said at the
# end and does not keep the others from running. Environment:
#   PYTHON       interpreter; python3 if unset
#   WHEELS       folder of wheels to install first, for a machine that lacks some of the packages
#   SMALL=1      sizes a CPU can do, to try this script where there is no GPU
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3} results=${1:-benchmarks/RESULTS.md} missed=()
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 2
fi
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT

# run SECONDS BENCHMARK ARGUMENTS...
run() {
  local limit=$1 name=$2 status=0
  shift 2
  echo "== $name $*"
  timeout "$limit" "$python" -m "benchmarks.$name" "$@" --results "$results" || status=$?
  case $status in
    0) ;;
    1) missed+=("$name: a goal is missed, or it failed: see above") ;;
    124) missed+=("$name: took more than $limit s") ;;
    *) missed+=("$name: ended with status $status") ;;
  esac
}

if [[ ${SMALL:-} == 1 ]]; then
  step=(--batch 2 --depth 2 --rounds 2)
  run 200 devices_agree --batch 2
  run 300 train_step "${step[@]}"
  run 200 train_step "${step[@]}" --systems ours
  run 100 input_pipeline --clips 64 --batch_size 16 --rounds 1 --seconds 1
  run 100 contrastive --batches 512,1024 --block_rows 256
  run 300 end_to_end --batch 2 --steps 6 --rounds 1 --clips 32
  run 300 scaling --batches 1,2 --depth 2 --topologies ''
else
  step=(--batch 256 --dtype bfloat16 --rounds 3 --steps 5 --alone)
  run 60 devices_agree
  run 170 train_step "${step[@]}"
  # The compiled step is in the cache by now.
  run 50 train_step "${step[@]}" --systems ours
  run 45 input_pipeline --rounds 3 --seconds 3
  run 60 contrastive --batches 4096,16384,65536
  run 100 end_to_end --batch 256 --depth 12 --dtype bfloat16 --steps 20 --rounds 1 --clips 2048 --num_threads 14
  run 50 scaling --batches 64,512 --dtype bfloat16 --steps 3 --topologies ''
fi
printf '%s\n' "${missed[@]:-all goals are met}"
