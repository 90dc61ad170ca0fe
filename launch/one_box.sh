#!/usr/bin/env bash
# Trains with N processes on this machine, each with its own devices.
#   launch/one_box.sh N --config=configs/swin_tiny.py --workdir=runs/swin_tiny
# The processes' output goes to WORKDIR.logs/process_<i>.log; process 0's is shown too.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 NUMBER_OF_PROCESSES --config=... --workdir=..." >&2
  exit 2
fi
number=$1 workdir=
shift
for argument in "$@"; do
  if [[ $argument == --workdir=* ]]; then workdir=${argument#*=}; fi
done
if [[ -z $workdir ]]; then
  echo "--workdir=... must be given" >&2
  exit 2
fi

port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
logs=$workdir.logs
mkdir -p "$logs"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < number; i++)); do
  python -m unicl_jax.main "$@" --coordinator_address="127.0.0.1:$port" \
    --num_processes="$number" --process_id="$i" >"$logs/process_$i.log" 2>&1 &
  pids+=($!)
done
tail -n +1 -f --pid="${pids[0]}" "$logs/process_0.log" &
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "$status"
