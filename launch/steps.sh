#!/usr/bin/env bash
# How a launcher does its steps, or with --dry-run only prints them. Sourced.

dry_run=

# Refuses what was given: what must hold; what was given; what to do.
refuse() {
  echo "error: $*" >&2
  exit 2
}

# A command as one would type it: quotes where they are needed.
quoted() {
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

# Does a command, or prints it as the shell would read it.
step() {
  if [[ -n $dry_run ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

# need TOOL WHAT: refuses to go on without a tool; a dry run needs none.
need() {
  if [[ -z $dry_run ]] && ! command -v "$1" >/dev/null; then
    refuse "$1 must be on PATH: it is not; $2"
  fi
}

# The comment at the top of a script, from its second line on.
usage() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
}

# The value of --NAME=x or --NAME x among the rest of the arguments; empty without.
value_of() {
  local name=$1 previous="" argument
  shift
  for argument in "$@"; do
    case $argument in
    "--$name="*) echo "${argument#*=}" && return ;;
    *) if [[ $previous == "--$name" ]]; then echo "$argument" && return; fi ;;
    esac
    previous=$argument
  done
}

# Where the logs of a --workdir go: beside it, or here if it is in a bucket.
logs_of() {
  local workdir=${1%/}
  if [[ $workdir == gs://* ]]; then workdir=${workdir##*/}; fi
  echo "$workdir.logs"
}

# Refuses a training command without a recipe or a directory.
check_training() {
  local name
  for name in config workdir; do
    if [[ -z $(value_of "$name" "$@") ]]; then
      refuse "--$name must be given to the trainer, as in:" \
        "--config=configs/swin_tiny.py --workdir=/shared/runs/swin_tiny"
    fi
  done
}
