#!/usr/bin/env bash
# Runs the benchmarks of speed on one GPU, in some nine minutes and without a network: `bash benchmarks/run_gpu.sh [RESULTS]`.
#
# The most important ones run first. Each appends its result to RESULTS, by default benchmarks/RESULTS.md, when it ends. If a
# benchmark fails, takes too long or misses a goal, the others still run; it is reported at the end, with status 1.
# Environment:
#   PYTHON       interpreter; python3 if unset
#   WHEELS       folder of wheels to install first, for a machine that lacks some of the packages
#   LIMIT_S      seconds for all of it, 570 if unset: a benchmark that would run longer is ended, or left out if less than
#                half of its time is left
#   SMALL=1      sizes for a CPU, to try this script without a GPU; LIMIT_S is then an hour if unset
set -u
if [[ ${SMALL:-} == 1 ]]; then limit_s=${LIMIT_S:-3600}; else limit_s=${LIMIT_S:-570}; fi
python=${PYTHON:-python3} results=$(realpath "${1:-"$(dirname "$0")/RESULTS.md"}") missed=()
if [[ -n ${WHEELS:-} ]]; then
  "$python" -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl || missed+=("wheels: pip ended with status $?")
fi
[[ $python != */* ]] || python=$(realpath -s "$python")
cd "$(dirname "$0")/.." || exit 2
work=$(mktemp -d)
agree=$work/agree
export JAX_COMPILATION_CACHE_DIR=$work/cache
mkdir "$JAX_COMPILATION_CACHE_DIR"
trap '[[ -z ${beside:-} ]] || kill "$beside" 2>/dev/null; rm -rf "$work"' EXIT

# start SECONDS BENCHMARK ARGUMENTS...; status 100 if less than half of SECONDS is left.
start() {
  local limit=$1 name=$2 left=$((limit_s - SECONDS))
  shift 2
  ((2 * left >= limit)) || return 100
  echo "== $name $*"
  timeout --kill-after=5 "$((left < limit ? left : limit))" "$python" -m "benchmarks.$name" "$@" --results "$results"
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

if [[ ${SMALL:-} == 1 ]]; then
  step=(--batch 2 --depth 2 --rounds 2)
  run 200 devices_agree --batch 2
  run 300 train_step "${step[@]}" --systems ours,eager,compiled --first_step_s 200
  run 200 train_step "${step[@]}" --systems ours,again --alone
  run 300 end_to_end --batch 2 --rounds 1 --clips 32 --num_threads 1
  run 100 input_pipeline --clips 64 --batch_size 16 --rounds 1 --seconds 1
  run 100 contrastive --batches 512,1024 --block_rows 256
  run 300 scaling --batches 1,2 --depth 2 --topologies ''
else
  # Batch sizes. Beside PyTorch the batch is small, since its two systems keep all activations: 256 clips would take some
  # 190 GiB in each. Alone, ours takes 99 GiB for 256. Cards of 80 GB get smaller batches.
  beside_torch=64 alone=256
  memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
  if [[ $memory =~ ^[0-9]+$ ]] && ((memory < 120000)); then
    beside_torch=24 alone=128
    echo "the GPU has $memory MiB: batches of $beside_torch and $alone instead of 64 and 256"
  fi
  paper=(--dtype bfloat16)
  # devices_agree takes a minute. It runs while PyTorch compiles: for these two minutes the GPU has nothing else to do.
  XLA_PYTHON_CLIENT_PREALLOCATE=false start 140 devices_agree > "$agree" 2>&1 &
  beside=$!
  turns=(--rounds 3 --steps 5 --systems)
  run 230 train_step --batch "$beside_torch" "${paper[@]}" "${turns[@]}" ours,eager,compiled --together --first_step_s 190
  wait "$beside"
  judge devices_agree $?
  unset beside
  cat "$agree"
  # This measures a cold first step, so the cache must hold nothing that has been compiled so far.
  mv "$JAX_COMPILATION_CACHE_DIR" "$work/earlier"
  mkdir "$JAX_COMPILATION_CACHE_DIR"
  run 190 train_step --batch "$alone" "${paper[@]}" "${turns[@]}" ours,again --alone --first_step_s 130
  # This step is in the cache by now. Together with reading it needs more of the GPU's memory than JAX takes by default.
  read=(--rounds 1 --clips 1024 --num_threads 4)
  XLA_PYTHON_CLIENT_MEM_FRACTION=0.94 run 150 end_to_end --batch "$alone" --depth 12 "${paper[@]}" "${read[@]}"
  # Four ways to read, each timed for a second after two seconds of warm-up, three times: 36 s. Making clips and starting
  # processes takes another 20 s.
  run 90 input_pipeline --rounds 3 --seconds 1
  run 90 contrastive --batches 16384,65536
  # Both steps were compiled before. Their results go back to the same path, because the path is part of the cache's key.
  cp -r "$work/earlier/." "$JAX_COMPILATION_CACHE_DIR"
  few=(--rounds 1 --steps 3 --topologies '')
  XLA_PYTHON_CLIENT_PREALLOCATE=false run 70 scaling --batches "$beside_torch,$alone" "${paper[@]}" "${few[@]}"
fi
printf '%s\n' "${missed[@]:-all goals are met}"
[[ ${#missed[@]} == 0 ]]
