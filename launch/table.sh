#!/usr/bin/env bash
# A table of runs: trains every config, then evaluates it, in RUNS/<name of the config>. RUNS is `runs` by default.
#
#   launch/table.sh [--dry_run] CONFIG... [-- FLAGS...]     # here, one after the other
#   HOW="sbatch launch/slurm_8gpu.sbatch" launch/table.sh CONFIG... [-- FLAGS...]     # all at once
#
# FLAGS go to every row, e.g. --config.data.dir=data/ego4d_clips. When started again, rows that are already trained
# are only evaluated again. A submitted evaluation waits for its training, even if that is preempted and queues again.
# SIGTERM or Ctrl-C to this script reaches the row that runs, which saves and ends. configs/tables/random.py has
# nothing to train: evaluate it by itself. `python -m benchmarks.tables` runs all rows on one machine and writes the
# tables.
set -euo pipefail

dry_run=
if [[ ${1:-} == --dry_run ]]; then dry_run=1 && shift; fi
configs=()
while (($#)) && [[ $1 != -- ]]; do configs+=("$1") && shift; done
(($# == 0)) || shift
((${#configs[@]})) || { echo "usage: $0 [--dry_run] CONFIG... [-- FLAGS...]" >&2; exit 2; }
for config in "${configs[@]}"; do  # all of them before the first row is trained, which takes long
  [[ -f ${config%%:*} ]] || { echo "error: no config file ${config%%:*}: name a .py file such as configs/mc3_ego4d.py" >&2; exit 2; }
done
how=("$(dirname "$0")/local.sh")
[[ ! ${HOW:-} ]] || read -ra how <<<"$HOW"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@" >&2
    echo >&2
    [[ $1 != sbatch ]] || echo JOB  # what --parsable prints
  else
    "$@"
  fi
}

child=
told=
signalled=
forward() {
  told=1
  signalled=1
  [[ ! $child ]] || kill -TERM "$child" 2>/dev/null || true
}
trap forward TERM INT

# here COMMAND...: runs a command, and ends this script if the command fails or a signal came
here() {
  local status
  [[ ! $told ]] || exit 75
  "$@" &
  child=$!
  [[ ! $told ]] || kill -TERM "$child"  # signalled meanwhile
  while true; do
    signalled=''
    status=0
    wait "$child" || status=$?
    [[ $signalled ]] || break  # otherwise the signal ended the wait, not the process
  done
  child=
  ((status == 0)) || exit "$status"
  [[ ! $told ]] || exit 75
}

for config in "${configs[@]}"; do
  name=$(basename "$config")
  name=${name/.py/}  # also in mc3.py:ego4d
  flags=("--config=$config" "--workdir=${RUNS:-runs}/${name/:/-}" "$@")
  if [[ ${how[0]} == sbatch ]]; then
    job=$(run sbatch --parsable "${how[@]:1}" mc3_jax.train "${flags[@]}")
    job=${job%%;*}  # in a federation, --parsable appends the cluster's name
    after=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
    then=$(run sbatch --parsable "${after[@]}" "${how[@]:1}" mc3_jax.evaluate "${flags[@]}")
    echo "$config: trained by job $job, evaluated by job ${then%%;*}"
  else
    for module in mc3_jax.train mc3_jax.evaluate; do
      if [[ $dry_run ]]; then run "${how[@]}" "$module" "${flags[@]}"; else here "${how[@]}" "$module" "${flags[@]}"; fi
    done
  fi
done
