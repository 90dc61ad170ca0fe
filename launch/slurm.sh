#!/usr/bin/env bash
# Submits a run to SLURM; it is queued again, and goes on, after the time limit, a
# preemption, a lost node or a hang.
#
#   launch/slurm.sh [--dry-run] [OPTIONS OF SBATCH] -- --config=... --workdir=...
#
# One process a GPU, on two nodes of eight:
#   launch/slurm.sh --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=24:00:00 -- \
#     --config=configs/swin_tiny.py --workdir=/shared/runs/swin_tiny
# One process a node (--ntasks-per-node=1) takes all of its GPUs.
#
# --workdir must be on a file system that all nodes share, or gs://bucket/folder. The log
# is WORKDIR.logs/%j.log; of gs://bucket/a/run, run.logs/%j.log here.
# UNICL_SETUP: a command of the job before training, as in "source env/bin/activate".
# UNICL_MAX_RESTARTS: how often it is queued again (100).
# scancel ends it for good. What is queued again after which exit code: see
# launch/exit_codes.sh and launch/slurm.sbatch.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=steps.sh
source "$here/steps.sh"

options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  case $1 in
  --help | -h) usage "$0" && exit ;;
  --dry-run) dry_run=yes ;;
  --config=* | --workdir=*) refuse "what the trainer takes must follow --: got $1;" \
    "$0 --nodes=2 -- --config=... --workdir=..." ;;
  *) options+=("$1") ;;
  esac
  shift
done
[[ ${1:-} == -- ]] && shift
check_training "$@"
workdir=$(value_of workdir "$@")
logs=$(logs_of "$workdir")
if [[ $logs != /* ]]; then logs=$PWD/$logs; fi
need sbatch "log in to a node of the cluster that has SLURM's commands."
step mkdir -p "$logs" # SLURM does not make it, and loses the log then
step sbatch --job-name="$(basename "$workdir")" --requeue --open-mode=append \
  --signal=B:USR1@180 --output="$logs/%j.log" \
  --export="ALL,UNICL_LAUNCH=$here" "${options[@]+"${options[@]}"}" \
  "$here/slurm.sbatch" "$@"
