#!/usr/bin/env bash
# A real Slurm on this machine only, to prove what is submitted to Slurm: two CPUs, one partition, jobs may be requeued.
#
#   apt-get install slurm-wlm munge               # Debian or Ubuntu; no systemd and no cgroups needed
#   eval "$(tests/slurm/start_cluster.sh)"        # starts it unless it is running, and tells the shell where it is
#   sbatch ...; squeue; scontrol requeue ...
#   tests/slurm/start_cluster.sh stop             # ends the jobs and the daemons; logs stay until the next start
#
# Everything runs as the calling user, root in a container or anybody else. Configuration, key, state and logs are in one
# folder, $CLUSTER (/tmp/mc3_jax-slurm-<uid>). A system's own Slurm and munge are not touched. Exits with 1 and one line if a
# program is missing or a daemon does not start.
set -euo pipefail

home=${CLUSTER:-/tmp/mc3_jax-slurm-$(id -u)}
export SLURM_CONF=$home/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
num_cpus=2
controller_port=36817
node_port=36818

fail() {
  echo "$0: $*" >&2
  exit 1
}

# Whether the daemon that left a pid file is running; another process may have got its pid since.
runs() {
  local pid
  pid=$(cat "$home/$1.pid" 2>/dev/null) && [[ $(ps -o comm= -p "$pid") == "$1" ]]
}

await() {
  local what=$1
  shift
  for _ in {1..150}; do
    if "$@" >"$home/await.log" 2>&1; then return; fi
    sleep 0.2
  done
  fail "$what: $(tail -n 1 "$home/await.log"); see the logs in $home"
}

is_idle() {
  [[ $(sinfo --noheader --format=%T) =~ ^(idle|mixed|allocated)$ ]] || { sinfo; return 1; }
}

is_gone() {
  ! runs "$1"
}

has_no_jobs() {
  [[ -z $(squeue --noheader) ]] || { squeue --noheader; return 1; }
}

stop() {
  if runs slurmctld; then
    scancel --quiet --user="$(id -un)" || true
    # Jobs must end before the node's daemon, which would leave them running.
    await "jobs do not end" has_no_jobs
  fi
  local daemon
  for daemon in slurmd slurmctld munged; do
    if runs "$daemon"; then
      kill "$(cat "$home/$daemon.pid")"
      await "$daemon does not end" is_gone "$daemon"
    fi
  done
}

configure() {
  local user
  user=$(id -un)
  [[ ! -e $home || -e $SLURM_CONF ]] || fail "$home is there and holds no cluster of mine: remove it or set CLUSTER"
  rm -rf "$home"
  mkdir -m 755 "$home"
  mkdir "$home/state" "$home/spool"
  (umask 077 && dd if=/dev/urandom of="$home/munge.key" bs=128 count=1 status=none)
  cat >"$SLURM_CONF" <<END
ClusterName=mc3
SlurmctldHost=localhost
SlurmctldPort=$controller_port
SlurmdPort=$node_port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its first credential is no longer valid, by default two minutes.
AuthInfo=socket=$home/munge.socket,cred_expire=5
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd.log
# No cgroups: processes are found by their parents, and nothing is bound.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=5,batch_sched_delay=0
JobRequeue=1
KillWait=30
ReturnToService=2
# There are as many CPUs as is written here, whatever the machine has.
SlurmdParameters=config_overrides
NodeName=$(hostname -s) NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 CPUs=$num_cpus State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
}

start() {
  local program
  for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || fail "no $program: apt-get install slurm-wlm munge"
  done
  if ! { runs munged && runs slurmctld && runs slurmd; }; then
    stop
    configure
    # --force: munged may find its folder unsafe, and then only warns in its log.
    munged --force --key-file="$home/munge.key" --socket="$home/munge.socket" --pid-file="$home/munged.pid" \
      --seed-file="$home/munge.seed" --log-file="$home/munged.log" 2>"$home/munged.err" || fail "$(cat "$home/munged.err")"
    slurmctld 2>"$home/slurmctld.err" || fail "$(cat "$home/slurmctld.err")"
    slurmd 2>"$home/slurmd.err" || fail "$(cat "$home/slurmd.err")"
  fi
  await "the node does not come up" is_idle
  echo "export SLURM_CONF=$SLURM_CONF"
}

case ${1:-start} in
  start) start ;;
  stop) stop ;;
  *) fail "start or stop, got $1" ;;
esac
