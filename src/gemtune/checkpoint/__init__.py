"""Checkpoints of a run, and the model folder at its end."""

from gemtune.checkpoint.config import CheckpointConfig
from gemtune.checkpoint.export import export_model
from gemtune.checkpoint.folder import CheckpointFolder, find_resume_point
from gemtune.checkpoint.state import TrainState, restore, save

__all__ = [
    "CheckpointConfig",
    "CheckpointFolder",
    "TrainState",
    "export_model",
    "find_resume_point",
    "restore",
    "save",
]
