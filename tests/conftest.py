"""The fixtures of whole runs. A machine without Hydra can still run the tests of the GPU."""

try:
    from whole_runs import finished_run, tiny_checkpoint, train_run
except ModuleNotFoundError as error:
    if error.name not in ("hydra", "omegaconf", "datasets", "wandb"):
        raise
else:
    __all__ = ["finished_run", "tiny_checkpoint", "train_run"]
