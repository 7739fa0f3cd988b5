#!/usr/bin/env bash
# Every benchmark of speed on one GPU, in some nine minutes and without a network: `bash benchmarks/run_gpu.sh [RESULTS]`.
#
# What they find is appended to RESULTS, or to benchmarks/RESULTS.md. A benchmark that fails, takes too long or misses a goal is
# told at the end, with status 1, and does not keep the others from running. Environment:
#   PYTHON       interpreter; python3 if unset
#   WHEELS       folder of wheels to install first, for a machine that lacks some of the packages
#   SMALL=1      sizes a CPU can do, to try this script where there is no GPU
set -u
python=${PYTHON:-python3} results=$(realpath "${1:-"$(dirname "$0")/RESULTS.md"}") missed=()
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || exit 2
fi
[[ $python != */* ]] || python=$(realpath -s "$python")
cd "$(dirname "$0")/.." || exit 2
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR
agree=$(mktemp)
trap '[[ -z ${beside:-} ]] || kill "$beside" 2>/dev/null; rm -rf "$JAX_COMPILATION_CACHE_DIR" "$agree"' EXIT

# start SECONDS BENCHMARK ARGUMENTS...
start() {
  local limit=$1 name=$2
  shift 2
  echo "== $name $*"
  timeout "$limit" "$python" -m "benchmarks.$name" "$@" --results "$results"
}

# judge BENCHMARK STATUS SECONDS
judge() {
  case $2 in
    0) ;;
    1) missed+=("$1: a goal is missed, or it failed: see above") ;;
    124) missed+=("$1: took more than $3 s") ;;
    *) missed+=("$1: ended with status $2") ;;
  esac
}

run() {
  start "$@"
  judge "$2" $? "$1"
}

if [[ ${SMALL:-} == 1 ]]; then
  step=(--batch 2 --depth 2 --rounds 2)
  run 200 devices_agree --batch 2
  run 300 train_step "${step[@]}" --systems ours,eager,compiled
  run 200 train_step "${step[@]}" --systems ours,again --alone
  run 100 input_pipeline --clips 64 --batch_size 16 --rounds 1 --seconds 1
  run 100 contrastive --batches 512,1024 --block_rows 256
  run 300 end_to_end --batch 2 --rounds 1 --clips 32 --num_threads 1
  run 300 scaling --batches 1,2 --depth 2 --topologies ''
else
  paper=(--dtype bfloat16)
  # What is computed is looked at while PyTorch compiles, two minutes in which the GPU has nothing to do; it takes one.
  XLA_PYTHON_CLIENT_PREALLOCATE=false start 140 devices_agree > "$agree" 2>&1 &
  beside=$!
  # PyTorch keeps all of a batch's activations: of 256 clips they would take some 190 GiB.
  run 210 train_step --batch 64 "${paper[@]}" --rounds 3 --steps 5 --systems ours,eager,compiled --together
  wait "$beside"
  judge devices_agree $? 140
  cat "$agree"
  run 150 train_step --batch 256 "${paper[@]}" --rounds 3 --steps 5 --systems ours,again --alone
  run 50 input_pipeline --rounds 3 --seconds 2
  run 60 contrastive --batches 16384,65536
  # This step and those of the last line are in the compilation cache by now. 256 clips take 99 GiB.
  read=(--rounds 1 --clips 1024 --num_threads 4)
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.94 run 140 end_to_end --batch 256 --depth 12 "${paper[@]}" "${read[@]}"
  XLA_PYTHON_CLIENT_PREALLOCATE=false run 70 scaling --batches 64,256 "${paper[@]}" --rounds 1 --steps 3 --topologies ''
fi
printf '%s\n' "${missed[@]:-all goals are met}"
[[ ${#missed[@]} == 0 ]]
