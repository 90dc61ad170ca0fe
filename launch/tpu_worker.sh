#!/usr/bin/env bash
# What launch/tpu_pod.sh does on each host of a TPU pod, from the folder of the sources.
#
#   launch/tpu_worker.sh install             makes a Python environment
#   launch/tpu_worker.sh start --config=...  trains in the background
#   launch/tpu_worker.sh code                prints "unicl: running", its exit code, none or absent
#   launch/tpu_worker.sh stop                asks it to save, and waits
#   launch/tpu_worker.sh kill                ends it at once
#   launch/tpu_worker.sh tail                the end of its log, followed
# UNICL_RUN (~/.unicl_run): the log, the process's number, its exit code.
# UNICL_PYTHON (~/unicl_env/bin/python).
set -euo pipefail
run=${UNICL_RUN:-$HOME/.unicl_run}
python=${UNICL_PYTHON:-$HOME/unicl_env/bin/python}
mkdir -p "$run"

alive() {
  [[ -s $run/pid ]] && kill -0 "$(<"$run/pid")" 2>/dev/null
}

signal_and_wait() {
  if ! alive; then return; fi
  kill "-$1" "$(<"$run/pid")" || true
  for ((i = 0; i < 10 * $2; i++)); do
    if ! alive; then return; fi
    sleep 0.1
  done
  echo "still there after $2 s" >&2
  exit 1
}

case ${1:-} in
install)
  # The images' own Python is older than 3.11.
  export PATH=$HOME/.local/bin:$PATH
  command -v uv >/dev/null || python3 -m pip install --quiet --user uv
  uv venv --quiet --allow-existing --python 3.12 "$HOME/unicl_env"
  uv pip install --quiet --python "$python" -e ".[data,gcs,tpu]"
  ;;
start)
  shift
  if alive; then
    echo "error: a run is there already, process $(<"$run/pid"); stop it first" >&2
    exit 2
  fi
  rm -f "$run/pid" "$run/code"
  # The shell lives on without the terminal, to write down how the trainer ended.
  # shellcheck disable=SC2016
  nohup setsid bash -c '
    run=$0
    "$@" >>"$run/log" 2>&1 &
    echo $! >"$run/pid"
    code=0
    wait $! || code=$?
    echo $code >"$run/code.new" && mv "$run/code.new" "$run/code"
  ' "$run" "$python" -u -m unicl_jax.main "$@" </dev/null >/dev/null 2>&1 &
  for ((i = 0; i < 50; i++)); do
    [[ -s $run/pid ]] && break
    sleep 0.1
  done
  echo "unicl: started on $(hostname)"
  ;;
code)
  if [[ ! -x $python ]]; then
    echo "unicl: absent"
  elif alive; then
    echo "unicl: running"
  elif [[ -s $run/pid ]]; then
    # It has ended; its shell may be about to write down how.
    for ((i = 0; i < 30; i++)); do
      [[ -s $run/code ]] && break
      sleep 0.1
    done
    code=137 # it ended with its shell: the host was restarted
    [[ -s $run/code ]] && code=$(<"$run/code")
    echo "unicl: $code"
  else
    echo "unicl: none"
  fi
  ;;
stop) signal_and_wait TERM 180 ;;
kill) signal_and_wait KILL 20 ;;
tail) exec tail -n 100 -F "$run/log" ;;
*)
  echo "error: the command must be install, start, code, stop, kill or tail:" \
    "got \"${1:-}\"" >&2
  exit 2
  ;;
esac
