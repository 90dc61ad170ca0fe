#!/usr/bin/env bash
# What the trainer's exit codes say, as in unicl_jax/exit_codes.py. Sourced.
#   0 done      1 failed, with a traceback      2 wrong input      3 non-finite loss
#   4 a checkpoint could not be written (disk)  5 hung   6 a process is missing or lost
#   128+n stopped by signal n: 143 preempted, and saved; 134, 137, 139 aborted, killed

# Whether the same command should be started again: it goes on from its checkpoint.
restarts() {
  case $1 in 5 | 6 | 134 | 137 | 139 | 143) return 0 ;; *) return 1 ;; esac
}
