#!/usr/bin/env bash
# Trains on a Cloud TPU pod, or on several slices of it.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] \
#     [-- --config=... --workdir=...]
#
# Commands
#   create    asks for the TPU (a queued resource) and waits until it is there
#   install   copies these sources to all hosts and makes their Python environments
#   run       starts the trainer on all hosts, in the background
#   tail      the log of the first host, followed
#   status    of the TPU, and of the trainer on each host
#   stop      asks the trainer to save and stop, on all hosts
#   delete    the TPU
#   watch     all of it: creates what is not there, installs, runs, and looks after it:
#             after a preemption it makes the TPU anew, after an exit code that says so
#             it runs the command again, which goes on from the newest checkpoint. Ends
#             with the run's exit code; Ctrl-C ends the watching alone. The TPU
#             stays, and costs, until delete.
# Options
#   --dry-run           prints the commands, and does nothing
#   --name=NAME         of the TPU
#   --zone=ZONE
#   --project=PROJECT   (gcloud's)
#   --type=TYPE         as in v5litepod-256, v5p-512, v6e-64, v4-128; for create, watch
#   --slices=N          (1)
#   --runtime=VERSION   of the VMs' image; chosen by the type
#   --spot              cheaper, and preempted at any time
#   --reserved          from a reservation
#   --setup=COMMAND     on every host before training, to mount --workdir's disk, say
#   --poll=SECONDS      between two looks (60)
#   --max-restarts=N    of the trainer or the TPU (100)
# LIBTPU_INIT_ARGS, if it is set here, goes to the hosts: flags of the compiler.
# Every host learns from the TPU who it is: the trainer needs no other flags. --workdir
# must be gs://bucket/folder, or a directory that all hosts share and that outlives the
# TPU: Filestore, NFS.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$here/steps.sh"
# shellcheck source-path=SCRIPTDIR source=exit_codes.sh
source "$here/exit_codes.sh"

name='' zone='' project='' type='' slices=1 runtime='' setup='' poll=60 max_restarts=100
create_flags=()
command=${1:-}
case $command in
create | install | run | tail | status | stop | delete | watch) shift ;;
--help | -h | help) usage "$0" && exit ;;
*) refuse "the command must be create, install, run, tail, status, stop, delete or" \
  "watch: got \"$command\"; see $0 --help." ;;
esac
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
  --help | -h) usage "$0" && exit ;;
  --dry-run) dry_run=yes ;;
  --name=*) name=${1#*=} ;;
  --zone=*) zone=${1#*=} ;;
  --project=*) project=${1#*=} ;;
  --type=*) type=${1#*=} ;;
  --slices=*) slices=${1#*=} ;;
  --runtime=*) runtime=${1#*=} ;;
  --spot | --reserved) create_flags+=("$1") ;;
  --setup=*) setup=${1#*=} ;;
  --poll=*) poll=${1#*=} ;;
  --max-restarts=*) max_restarts=${1#*=} ;;
  *) refuse "options must be known: got $1; see $0 --help. What the trainer takes" \
    "follows --." ;;
  esac
  shift
done
[[ ${1:-} == -- ]] && shift
training=("$@")
if [[ -z $name || -z $zone ]]; then
  refuse "--name and --zone must be given: got \"$name\" and \"$zone\"."
fi
for pair in "slices=$slices" "max-restarts=$max_restarts" "poll=$poll"; do
  if [[ ! ${pair#*=} =~ ^[0-9]+$ ]]; then
    refuse "--${pair%%=*} must be a whole number: got \"${pair#*=}\"."
  fi
done
case $command in run | watch) check_training "${training[@]+"${training[@]}"}" ;; esac
case $command in create | watch)
  if [[ -z $type ]]; then refuse "--type must be given, as in --type=v5litepod-256."; fi
  if [[ -z $runtime ]]; then
    case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) refuse "--type must be a v4, v5litepod, v5p or v6e: got \"$type\"; for another" \
      "one, name its --runtime too." ;;
    esac
  fi ;;
esac
need gcloud "install the Google Cloud CLI, and log in with: gcloud auth login."

tpus=(gcloud compute tpus queued-resources)
at=("--zone=$zone")
if [[ -n $project ]]; then at+=("--project=$project"); fi

# A command in the sources' folder on all hosts of all slices, or on host $1 of the first.
on_hosts() {
  local worker=$1 node=all
  if [[ $worker == 0 ]]; then node=0; fi
  step "${tpus[@]}" ssh "$name" "${at[@]}" "--node=$node" "--worker=$worker" \
    "--command=cd unicl_jax_sources && $2"
}

state() {
  local said
  if said=$("${tpus[@]}" describe "$name" "${at[@]}" '--format=value(state.state)' 2>&1); then
    echo "$said" | tail -n 1
  elif [[ $said == *NOT_FOUND* ]]; then
    echo ABSENT
  else
    echo UNKNOWN # no network, say: look again later
    echo "$said" >&2
  fi
}

create() {
  local nodes=("--node-id=$name")
  if ((slices > 1)); then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
  step "${tpus[@]}" create "$name" "${at[@]}" "--accelerator-type=$type" \
    "--runtime-version=$runtime" "${nodes[@]}" \
    "${create_flags[@]+"${create_flags[@]}"}"
  if [[ -n $dry_run ]]; then return; fi
  local now last=''
  while true; do
    now=$(state)
    if [[ $now != "$last" ]]; then echo "$name: $now" >&2 && last=$now; fi
    case $now in
    ACTIVE) return ;;
    FAILED | SUSPENDED | ABSENT)
      echo "error: the TPU was not given: $now; see: ${tpus[*]} describe $name ${at[*]}" >&2
      return 1 ;;
    esac
    sleep "$poll"
  done
}

remove() {
  step "${tpus[@]}" delete "$name" "${at[@]}" --force --quiet
}

install() {
  local folder=${TMPDIR:-/tmp} archive
  if [[ -z $dry_run ]]; then folder=$(mktemp -d); fi
  archive=$folder/unicl_jax.tar.gz
  step tar -czf "$archive" -C "$here/.." --exclude=__pycache__ \
    unicl_jax configs launch pyproject.toml setup.py README.md LICENSE
  step "${tpus[@]}" scp "$archive" "$name:unicl_jax.tar.gz" "${at[@]}" --node=all \
    --worker=all
  step "${tpus[@]}" ssh "$name" "${at[@]}" --node=all --worker=all \
    "--command=mkdir -p unicl_jax_sources && tar -xzf unicl_jax.tar.gz -C unicl_jax_sources && cd unicl_jax_sources && bash launch/tpu_worker.sh install"
  if [[ -z $dry_run ]]; then rm -r "$folder"; fi
}

run() {
  local before=''
  if [[ -n $setup ]]; then before="{ $setup; } && "; fi
  if [[ -n ${LIBTPU_INIT_ARGS:-} ]]; then
    before+="LIBTPU_INIT_ARGS=$(quoted "$LIBTPU_INIT_ARGS") "
  fi
  on_hosts all "${before}bash launch/tpu_worker.sh start $(quoted "${training[@]}")"
}

# How the trainer does on the hosts, a line each: its exit code, "running", "none", or
# "absent" where it is not installed.
codes() {
  { step "${tpus[@]}" ssh "$name" "${at[@]}" --node=all --worker=all \
    "--command=cd unicl_jax_sources && bash launch/tpu_worker.sh code || echo unicl: absent" \
    2>/dev/null || true; } | sed -n 's/^unicl: //p'
}

# What the hosts' codes (in $1) mean together: absent, running, done, none, again, or a
# code that ends the run; nothing if no host answers.
verdict() {
  local code again='' running='' none='' finished=''
  for code in $1; do
    case $code in
    running) running=yes ;;
    none) none=yes ;;
    absent) echo absent && return ;;
    0) finished=yes ;;
    *) if restarts "$code"; then again=yes; else echo "$code" && return; fi ;;
    esac
  done
  if [[ -n $again ]]; then
    echo again
  elif [[ -n $running ]]; then
    echo running
  elif [[ -n $finished && -z $none ]]; then # on all of them
    echo "done"
  elif [[ -n $none ]]; then
    echo none
  fi
}

watch() {
  local restarted=0 fresh='' found
  while true; do
    case $(state) in
    ACTIVE) ;;
    ABSENT)
      fresh=yes
      create || true
      continue_or_give_up || return 1
      continue ;;
    FAILED | SUSPENDED | SUSPENDING)
      echo "the TPU was taken away: making it anew" >&2
      remove || true
      restarted=$((restarted + 1))
      continue_or_give_up || return 1
      continue ;;
    *) sleep "$poll" && continue ;;
    esac
    if [[ -n $fresh ]]; then
      # A host may not answer yet.
      if ! install; then sleep "$poll" && continue; fi
      fresh=''
    fi
    found=$(codes)
    case $(verdict "$found") in
    running) sleep "$poll" ;;
    done) echo "done" >&2 && return ;;
    "") sleep "$poll" ;; # no host answers
    absent) fresh=yes ;;
    none)
      run || true
      sleep "$poll" ;;
    again)
      restarted=$((restarted + 1))
      continue_or_give_up || return 1
      echo "ended with $(echo "$found" | sort -u | paste -sd' ' -): starting again" >&2
      on_hosts all "bash launch/tpu_worker.sh kill" >/dev/null 2>&1 || true
      run || true
      sleep "$poll" ;;
    *)
      found=$(verdict "$found")
      echo "error: the trainer ended with $found, and would again; see: $0 tail" \
        "--name=$name --zone=$zone" >&2
      on_hosts all "bash launch/tpu_worker.sh stop" >/dev/null 2>&1 || true
      return "$found" ;;
    esac
  done
}

continue_or_give_up() {
  if ((restarted > max_restarts)); then
    echo "error: given up after $max_restarts restarts" >&2
    return 1
  fi
}

case $command in
create) create ;;
install) install ;;
run) run ;;
tail) on_hosts 0 "bash launch/tpu_worker.sh tail" ;;
stop) on_hosts all "bash launch/tpu_worker.sh stop" ;;
delete) remove ;;
status)
  step "${tpus[@]}" describe "$name" "${at[@]}" "--format=value(state.state)"
  on_hosts all "bash launch/tpu_worker.sh code" ;;
watch)
  if [[ -n $dry_run ]]; then
    create
    install
    run
    echo "# every $poll s:"
    on_hosts all "bash launch/tpu_worker.sh code"
    echo "# after a preemption:"
    remove
    echo "# and all of it again"
  else
    watch
  fi ;;
esac
