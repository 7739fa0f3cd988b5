#!/usr/bin/env bash
# Proves launch/slurm_8gpu.sbatch, slurm_multinode.sbatch and table.sh on a real Slurm (`start_cluster.sh`): a small run
# of two processes on CPU, joined by JAX over jax.distributed, is trained and evaluated
#   1. undisturbed;
#   2. preempted twice, by `scontrol requeue` and by SIGTERM to its processes, while its evaluation waits for it;
#   3. with a process killed by SIGKILL and then the other one by SIGSEGV, while its evaluation waits for it.
# Every number of every step and of the evaluation must be the same. A run that fails must not be queued again, nor one
# that is cancelled, which must save first, nor one that loses a process before it has saved. One that loses a process at
# every start must be queued again three times.
#
#   PATH=$PWD/.venv/bin:$PATH tests/slurm/prove_training.sh [WORK]  # twenty minutes on two cores; WORK stays
#
# Exits with 1 and one line if anything else happens.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
export JAX_PLATFORMS=cpu
# As in tests/conftest.py: compiling takes half the time.
export XLA_FLAGS="--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# restarted JOB TIMES
restarted() {
  [[ $(field "$1" Restarts) == "$2" ]]
}

last_step() {
  tail -n 1 "$1/metrics.jsonl" 2>/dev/null | sed -n 's/^{"step": \([0-9]*\),.*/\1/p'
}

# beyond RUN STEP
beyond() {
  local step
  step=$(last_step "$1")
  ((${step:-0} > $2))
}

# saved RUN STEP; true if the run has a newer checkpoint than that of STEP
saved() {
  local path
  for path in "$1"/checkpoints/*; do
    path=${path##*/}
    [[ $path == *[!0-9]* ]] || ((path <= $2)) || return 0
  done
  return 1
}

# end_process JOB NUMBER SIGNAL; sends the signal to that process of the job's training
end_process() {
  local pid
  pid=$(scontrol listpids "$1" | awk -v number="$2" '$3 ~ /^[0-9]+$/ && $5 == number { print $1 }')
  [[ $pid ]] || fail "no process $2 of job $1"
  kill -s "$3" "$pid"
}

# submit HOW CONFIG; sets train and evaluate to the ids of the two jobs
submit() {
  local told
  told=$(HOW=$1 "$project/launch/table.sh" "$2")
  echo "$told"
  [[ $told =~ job\ ([0-9]+),.*job\ ([0-9]+)$ ]] || fail "no two jobs"
  train=${BASH_REMATCH[1]} evaluate=${BASH_REMATCH[2]}
}

# finishes_after_two_restarts RUN; awaits the jobs $train and $evaluate of that run
finishes_after_two_restarts() {
  local resumed
  state_is "$evaluate" PENDING || fail "the evaluation did not wait"
  await 900 "the $1 run" state_is "$train" COMPLETED
  restarted "$train" 2 || fail "the $1 run was restarted $(field "$train" Restarts) times"
  await 600 "its evaluation" state_is "$evaluate" COMPLETED
  resumed=$(grep --count "resuming after step" "slurm-$train.out" || true)
  [[ $resumed == 2 ]] || fail "the $1 run was resumed $resumed times, not 2"
  grep "resuming after step" "slurm-$train.out"
}

cd "$work"
[[ ! -e runs ]] || fail "$work holds an earlier proof: remove it or choose another folder"
python -m data_prep.soundworld --out world --videos 8 --video_seconds 30
python -m data_prep.ego4d --root world --out clips --short_side 72 --num_workers 1
python -m data_prep.vocabulary --clips clips --out vocabulary
for name in undisturbed preempted killed unsaved cancelled; do
  cat >"$name.py" <<END
import pathlib
from tests import world

def get_config():
    config = world.small_config(pathlib.Path("$work"))
    config.name = "small"
    config.data.num_threads = config.log.every_steps = 1
    # A preempted run must be resumed from what the preemption has saved.
    config.save.every_steps = 20 if "$name" == "killed" else 1000
    config.heartbeat_timeout_s = 20
    for phase in config.phases:
        phase.epochs = 40
    return config
END
done

eval "$("$project/tests/slurm/start_cluster.sh")"
trap '"$project/tests/slurm/start_cluster.sh" stop' EXIT
sbatch --version
small="--gres=none --ntasks-per-node=2 --cpus-per-task=1"
one_node="sbatch $small $project/launch/slurm_8gpu.sbatch"
many_nodes="sbatch --nodes=1 $small $project/launch/slurm_multinode.sbatch"

submit "$one_node" undisturbed.py
await 900 "the undisturbed run" state_is "$train" COMPLETED
await 600 "its evaluation" state_is "$evaluate" COMPLETED
num_steps=$(last_step runs/undisturbed)
echo "undisturbed: $num_steps steps"

submit "$many_nodes" preempted.py
await 600 "the first steps" beyond runs/preempted $((num_steps / 6))
scontrol requeue "$train"
await 300 "the first restart" restarted "$train" 1
await 600 "steps after it" beyond runs/preempted $((num_steps / 2))
scancel --signal=TERM "$train"
await 300 "the second restart" restarted "$train" 2
finishes_after_two_restarts preempted

submit "$one_node" killed.py
await 600 "the first checkpoint" saved runs/killed $((num_steps / 6))
end_process "$train" 1 KILL
await 300 "the restart after SIGKILL" restarted "$train" 1
await 600 "a checkpoint after it" saved runs/killed $((num_steps / 2))
end_process "$train" 0 SEGV
await 300 "the restart after SIGSEGV" restarted "$train" 2
finishes_after_two_restarts killed
for signal in Killed "Segmentation fault"; do
  grep "srun: error: .*: $signal" "slurm-$train.out" || fail "srun did not tell of a process that was ended: $signal"
done

python - <<'END'
import json, pathlib
from mc3_jax.metric_writer import TIMES

def rows(run):
    lines = pathlib.Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]

def results(run):
    return json.loads(pathlib.Path(f"runs/{run}/results.json").read_text())

assert [row["step"] for row in rows("undisturbed")] == list(range(1, len(rows("undisturbed")) + 1))
for run in ("preempted", "killed"):
    for one, other in zip(rows("undisturbed"), rows(run), strict=True):
        assert one == other, f"{one} undisturbed, {other} {run}"
    assert results("undisturbed") == results(run), f"the evaluations of undisturbed and {run} differ"
    print(f"{run}, equal to the last bit: {rows(run)[-1]}")
END

told=$($one_node mc3_jax.train --config=undisturbed.py --workdir=runs/failed --config.data.dir=nowhere)
job=${told##* }
await 300 "the end of a run without data" state_is "$job" FAILED
restarted "$job" 0 || fail "a run that failed was queued again"

told=$($one_node mc3_jax.train --config=unsaved.py --workdir=runs/unsaved)
job=${told##* }
await 600 "the first steps" beyond runs/unsaved 3
end_process "$job" 1 KILL
await 300 "the end of a run that lost a process before it had saved" state_is "$job" FAILED
restarted "$job" 0 || fail "a run that lost a process before it had saved was queued again"

mkdir lost
cat >lost/always.py <<'END'
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1].partition("=")[2]) / "checkpoints"
if os.environ["SLURM_PROCID"] == "0":
    (folder / str(len(list(folder.glob("*"))) + 1)).mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(76)
END
told=$($one_node lost.always --workdir=runs/lost)
job=${told##* }
await 300 "the end of a run that loses a process at every start" state_is "$job" FAILED
restarted "$job" 3 || fail "a run that loses a process at every start was restarted $(field "$job" Restarts) times, not 3"

told=$($one_node mc3_jax.train --config=cancelled.py --workdir=runs/cancelled)
job=${told##* }
await 600 "the first steps" beyond runs/cancelled 3
scancel "$job"
await 300 "the end of a cancelled run" state_is "$job" CANCELLED
restarted "$job" 0 || fail "a run that was cancelled was queued again"
compgen -G "runs/cancelled/checkpoints/[1-9]*" >/dev/null || fail "the cancelled run did not save"

echo "proven: two preemptions change nothing, nor do two killed processes; failed and cancelled runs are not queued again"
