#!/usr/bin/env bash
# Runs the benchmarks of speed on one GPU, in under nine minutes, without a network: `bash benchmarks/run_gpu.sh [RESULTS]`.
#
# The most important ones run first. Each appends its result to RESULTS, by default benchmarks/RESULTS.md, when it ends. If a
# benchmark fails, takes too long or misses a goal, the others still run; it is reported at the end, with status 1.
# Environment:
#   PYTHON       interpreter; python3 if unset
#   WHEELS       folder of wheels to install first, for a machine that lacks some of the packages
#   LIMIT_S      seconds for all of it, 530 if unset: a benchmark that would run longer is ended, or left out if less than
#                three quarters of its time are left
#   SMALL=1      sizes for a CPU, to try this script without a GPU; LIMIT_S is then an hour if unset
set -u
if [[ ${SMALL:-} == 1 ]]; then limit_s=${LIMIT_S:-3600}; else limit_s=${LIMIT_S:-530}; fi
grace_s=15 # for a benchmark that is ended to write what it has measured
python=${PYTHON:-python3} results=$(realpath "${1:-"$(dirname "$0")/RESULTS.md"}") missed=()
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || missed+=("wheels: pip ended with status $?")
fi
[[ $python != */* ]] || python=$(realpath -s "$python")
cd "$(dirname "$0")/.." || exit 2
work=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR=$work/cache
mkdir "$JAX_COMPILATION_CACHE_DIR"
trap '[[ -z ${beside:-} ]] || kill "$beside" 2>/dev/null; rm -rf "$work"' EXIT

# start SECONDS BENCHMARK ARGUMENTS...; status 100 if less than three quarters of SECONDS are left.
start() {
  local limit=$1 name=$2 left=$((limit_s - grace_s - SECONDS))
  shift 2
  ((4 * left >= 3 * limit)) || return 100
  echo "== $name $*"
  timeout --kill-after="$grace_s" "$((left < limit ? left : limit))" \
    "$python" -m "benchmarks.$name" "$@" --results "$results"
}

# judge BENCHMARK STATUS
judge() {
  case $2 in
    0) ;;
    1) missed+=("$1: a goal is missed, or it failed: see above") ;;
    100) missed+=("$1: left out, of $limit_s s too few are left") ;;
    124) missed+=("$1: took too long and was ended") ;;
    137) missed+=("$1: was killed: it did not end in time, or memory ran out") ;;
    *) missed+=("$1: ended with status $2") ;;
  esac
}

run() {
  start "$@"
  judge "$2" $?
}

# Runs what fits beside the compilation of PyTorch; then lets the rounds of `train_step` begin.
run_beside() {
  local status
  export XLA_PYTHON_CLIENT_PREALLOCATE=false
  start 100 devices_agree
  status=$?
  echo "devices_agree $status" >> "$work/ended"
  start 70 contrastive --batches 16384,65536
  status=$?
  echo "contrastive $status" >> "$work/ended"
  touch "$work/quiet"
}

if [[ ${SMALL:-} == 1 ]]; then
  step=(--batch 2 --depth 2 --rounds 2)
  read=(--batch 2 --rounds 1 --clips 32 --steps 8)
  run 200 devices_agree --batch 2
  run 600 train_step "${step[@]}" --systems ours,eager,compiled --first_step_s 400
  run 200 train_step "${step[@]}" --systems ours,again --alone
  run 300 end_to_end "${read[@]}" --num_threads 1
  run 300 end_to_end "${read[@]}" --num_workers 1
  run 100 contrastive --batches 512,1024 --block_rows 256
  run 100 input_pipeline --clips 64 --batch_size 16 --rounds 1 --seconds 1
  run 300 scaling --batches 1 --depth 2 --topologies ''
else
  # Batch sizes. Beside PyTorch the batch is small, since its two systems keep all activations: 256 clips would take some
  # 190 GiB in each. Alone, ours takes 99 GiB for 256. Cards of 80 GB get smaller batches.
  beside_torch=64 alone=256 between=128
  memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
  if [[ $memory =~ ^[0-9]+$ ]] && ((memory < 120000)); then
    beside_torch=24 alone=128 between=64
    echo "the GPU has $memory MiB: batches of $beside_torch and $alone instead of 64 and 256"
  fi
  paper=(--dtype bfloat16)
  # Numbers in brackets are seconds on an H200, estimated from the times in RESULTS.md. Without the last benchmark they add up
  # to 505. If PyTorch needs all of its limit, the one before it is left out as well.
  #
  # For two minutes PyTorch compiles, and the GPU has nothing else to do. Meanwhile devices_agree and contrastive run
  # [75 + 55], and the rounds wait for them. [160]
  run_beside > "$work/beside" 2>&1 &
  beside=$!
  together=(--systems "ours,eager,compiled" --together --first_step_s 190 --begin_after "$work/quiet")
  run 225 train_step --batch "$beside_torch" "${paper[@]}" --rounds 3 --steps 5 "${together[@]}"
  wait "$beside"
  unset beside
  cat "$work/beside"
  while read -r name status; do
    judge "$name" "$status"
  done < "$work/ended"
  # This measures a cold first step, so the cache must hold nothing that has been compiled so far. [135]
  rm -r "$JAX_COMPILATION_CACHE_DIR"
  mkdir "$JAX_COMPILATION_CACHE_DIR"
  run 165 train_step --batch "$alone" "${paper[@]}" --rounds 2 --steps 5 --systems ours,again --alone --first_step_s 130
  # This step is in the cache by now. Together with reading it needs more of the GPU's memory than JAX takes by default.
  # [70 + 80]
  read=(--batch "$alone" --depth 12 "${paper[@]}" --rounds 1 --clips 1024)
  export XLA_PYTHON_CLIENT_MEM_FRACTION=0.94
  run 100 end_to_end "${read[@]}" --num_threads 4
  run 105 end_to_end "${read[@]}" --num_workers 4
  unset XLA_PYTHON_CLIENT_MEM_FRACTION
  # Four ways to read, each timed for a second after two seconds of warm-up, twice: 24 s. Making clips and starting processes
  # takes another 30 s. [60]
  run 70 input_pipeline --rounds 2 --seconds 1
  # The steps at the other two batches are measured by now. One between them has to be compiled first, which is worth the time
  # only if some is left. [80]
  start 105 scaling --batches "$between" "${paper[@]}" --rounds 1 --steps 3 --topologies ''
  status=$?
  if ((status == 100)); then
    echo "scaling: left out, too few seconds are left"
  else
    judge scaling "$status"
  fi
fi
printf '%s\n' "${missed[@]:-no benchmark failed or missed a goal}"
[[ ${#missed[@]} == 0 ]]
