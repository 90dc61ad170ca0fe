#!/usr/bin/env bash
# Trains with N processes on this machine, each with its own devices.
#
#   launch/one_box.sh [--dry-run] [--restarts=R] N --config=... --workdir=...
#
# The processes' output goes to WORKDIR.logs/process_<i>.log (of gs://bucket/a/run, to
# run.logs/ here); process 0's is shown too.
# NVIDIA GPUs are divided evenly. Ctrl-C saves and stops all of them; a second one kills.
# One that fails ends the others; the exit code is that of the first that failed (the
# table is in launch/exit_codes.sh). With --restarts=R the command is started again, up
# to R times, after a code that says that it may go on from its checkpoint.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$here/steps.sh"
# shellcheck source-path=SCRIPTDIR source=exit_codes.sh
source "$here/exit_codes.sh"

restarts_left=0
while [[ $# -gt 0 ]]; do
  case $1 in
  --help | -h) usage "$0" && exit ;;
  --dry-run) dry_run=yes ;;
  --restarts=*) restarts_left=${1#*=} ;;
  *) break ;;
  esac
  shift
done
if [[ ! ${1:-} =~ ^[1-9][0-9]*$ ]]; then
  refuse "the number of processes must come first: got \"${1:-}\";" \
    "$0 2 --config=configs/quickstart.py --workdir=runs/two"
fi
if [[ ! $restarts_left =~ ^[0-9]+$ ]]; then
  refuse "--restarts must be a whole number: got \"$restarts_left\"; leave it out for 0."
fi
number=$1
shift
check_training "$@"
workdir=$(value_of workdir "$@")
logs=$(logs_of "$workdir")
grace=90 # seconds for the others, which are told when one fails, to end by themselves
need python "activate the environment that unicl_jax is installed in."

# The GPUs of process $1, as for CUDA_VISIBLE_DEVICES; nothing without GPUs.
share_of_gpus() {
  local all=() each
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra all <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    mapfile -t all < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null)
  fi
  if ((${#all[@]} == 0)); then return; fi
  if ((${#all[@]} % number)); then
    refuse "${#all[@]} GPUs must divide evenly over the processes: got $number of them;" \
      "start 1 or ${#all[@]}, or choose GPUs with CUDA_VISIBLE_DEVICES."
  fi
  each=$((${#all[@]} / number))
  (IFS=, && echo "${all[*]:$1*each:each}")
}

pids=() signals=0
on_signal() {
  signals=$((signals + 1))
  if ((signals == 1)); then
    echo "stopping: all processes save first (again: kills them)" >&2
    kill -TERM "${pids[@]}" 2>/dev/null || true
  else
    kill -KILL "${pids[@]}" 2>/dev/null || true
  fi
}

train() {
  local port gpus command tail_pid='' status=0 waited=0 code alive i
  port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
  if [[ -z $dry_run ]]; then mkdir -p "$logs"; fi
  pids=()
  for ((i = 0; i < number; i++)); do
    command=(python -u -m unicl_jax.main "$@" "--coordinator_address=127.0.0.1:$port"
      "--num_processes=$number" "--process_id=$i")
    gpus=$(share_of_gpus "$i")
    if [[ -n $gpus ]]; then command=(env "CUDA_VISIBLE_DEVICES=$gpus" "${command[@]}"); fi
    if [[ -n $dry_run ]]; then
      step "${command[@]}"
      continue
    fi
    "${command[@]}" >>"$logs/process_$i.log" 2>&1 &
    pids+=($!)
    if ((i == 0)); then
      tail -n 0 -F "$logs/process_0.log" 2>/dev/null &
      tail_pid=$!
    fi
  done
  if [[ -n $dry_run ]]; then return; fi
  local running=("${pids[@]}")
  while ((${#running[@]})); do
    sleep 0.2
    alive=()
    for pid in "${running[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        alive+=("$pid")
        continue
      fi
      code=0
      wait "$pid" || code=$?
      if ((status == 0)); then status=$code; fi
    done
    running=("${alive[@]+"${alive[@]}"}")
    if ((status)) && ((waited += 1)) && ((waited > 5 * grace)) && ((${#running[@]})); then
      kill -KILL "${running[@]}" 2>/dev/null || true
    fi
  done
  sleep 0.3 # until the last lines are shown
  kill "$tail_pid" 2>/dev/null || true
  wait "$tail_pid" 2>/dev/null || true
  return "$status"
}

trap on_signal INT TERM
while true; do
  status=0
  train "$@" || status=$?
  if ((signals || restarts_left == 0)) || ! restarts "$status"; then exit "$status"; fi
  restarts_left=$((restarts_left - 1))
  echo "ended with $status: starting again, from the newest checkpoint" >&2
done
