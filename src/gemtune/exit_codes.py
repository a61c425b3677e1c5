"""How a process of a run ends. The launcher's own code is 1 whenever one of these is not 0.

`accelerate launch` and torchrun do not pass a worker's code on: scripts read `status.json`.
"""

DONE = 0
CRASHED = 1
"""An error that nobody foresaw, with a traceback."""
REFUSED = 2
"""An error with a message: nothing runs or goes on until somebody changes something."""
PREEMPTED = 75
"""SIGTERM or SIGUSR1: saved (EX_TEMPFAIL). Run the same command again."""
HUNG = 76
"""A rank hung, was lost, or did not save within `run.grace_seconds`: run the same command again.

The cluster files do so as long as each start gets further than the one before."""
INTERRUPTED = 130
"""Ctrl-C: saved after the first; a second one stops at once, without saving."""
