# Common parts of the proofs, to be sourced. Sets `project` and `work`: the folder named by the first argument, or a new one.
# shellcheck shell=bash
project=$(cd "$(dirname "$0")/../.." && pwd)
work=${1:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
export PYTHONPATH=$project

fail() {
  echo "$0: $*; see $work" >&2
  exit 1
}

# await SECONDS WHAT COMMAND...
await() {
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@"; do
    ((SECONDS < deadline)) || fail "$what: not within its time"
    sleep 0.1
  done
}

# field JOB NAME
field() {
  scontrol show job --oneliner "$1" | tr ' ' '\n' | sed -n "s/^$2=//p"
}

state_is() {
  [[ $(field "$1" JobState) == "$2" ]]
}
