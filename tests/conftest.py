"""The fixtures of whole runs. A machine without Hydra can still run the tests of the GPU."""

import os

# Before torch is imported, here and in the processes that tests start: the tensors are small, and
# the threads of several test processes on few cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from whole_runs import finished_run, tiny_checkpoint, train_run
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf", "datasets", "wandb"):
        raise
else:
    __all__ = ["finished_run", "tiny_checkpoint", "train_run"]
