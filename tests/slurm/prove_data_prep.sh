#!/usr/bin/env bash
# Proves launch/slurm_data_prep.sh on a real Slurm (`start_cluster.sh`): one array task is requeued in the middle of its work,
# as by a preemption; the job after the array makes the data set. Every file must equal that of a local, uninterrupted run.
#
#   PATH=$PWD/.venv/bin:$PATH tests/slurm/prove_data_prep.sh [WORK]     # two minutes on two cores; WORK is kept
#
# Exits with 1 and one line if anything else happens.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "$0")/common.sh"
folder=$work/data/ego4d_clips
num_tasks=4

num_shards() {
  find "$1/reports" -name '[!.]*.json' 2>/dev/null | wc -l
}

has_shard() {
  (($(num_shards "$folder") > 0))
}

cd "$work"
[[ ! -e data && ! -e ego4d ]] || fail "$work holds an earlier proof: remove it or choose another folder"
python -m data_prep.soundworld --out ego4d --videos 8 --seed 0
python -m data_prep.ego4d --root ego4d --out local --num_workers 1

eval "$("$project/tests/slurm/start_cluster.sh")"
trap '"$project/tests/slurm/start_cluster.sh" stop' EXIT
sbatch --version
told=$(TASKS=$num_tasks CPUS=1 "$project/launch/slurm_data_prep.sh" data_prep.ego4d --root ego4d --out data/ego4d_clips)
finish=$(grep -o '[0-9]*$' <<<"$told")
parts=$(field "$finish" Dependency | grep -o '[0-9]*' | head -n 1)

await 100 "the first shard" has_shard
state_is "${parts}_0" RUNNING || fail "the first task was over before it could be requeued"
scontrol requeue "${parts}_0"
echo "requeued with $(num_shards "$folder") of $(num_shards local) shards there"
(($(num_shards "$folder") < $(num_shards local))) || fail "all shards were there already"

await 300 "the job that makes the data set" state_is "$finish" COMPLETED
for ((i = 0; i < num_tasks; i++)); do
  state_is "${parts}_$i" COMPLETED || fail "task $i ended as $(field "${parts}_$i" JobState)"
  [[ $(field "${parts}_$i" Restarts) == "$((i == 0))" ]] || fail "task $i was restarted $(field "${parts}_$i" Restarts) times"
  [[ ! $(field "${parts}_$i" EndTime) > $(field "$finish" StartTime) ]] || fail "the last job did not wait for task $i"
done
cat slurm-*.out
diff --recursive local "$folder" || fail "the files differ from the local run's"
python -m data_prep.verify "$folder"
echo "proven: the files of $num_tasks tasks, one of them requeued, are those of one local run"
