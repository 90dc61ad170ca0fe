"""What the trainer's exit codes say; `launch/exit_codes.sh` says it to launchers."""

OK = 0
FAILED = 1  # an unforeseen error, with its traceback
BAD_INPUT = 2
NON_FINITE = 3  # a loss or its gradient
NOT_SAVED = 4  # a checkpoint could not be written
HUNG = 5
LOST = 6  # a process is missing, or was lost
STOPPED_BY_SIGNAL = 128  # + the signal's number

# After these the same command goes on from the newest checkpoint, and may well end:
# preempted (saved), killed or out of memory, aborted or crashed in native code, hung,
# lost. The others would fail again.
RESTART = (STOPPED_BY_SIGNAL + 15, 137, 134, 139, HUNG, LOST)
