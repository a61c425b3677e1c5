"""Checkpoints of a run, and the model folder at its end."""

from gemtune.checkpoint.config import CheckpointConfig
from gemtune.checkpoint.export import export_model
from gemtune.checkpoint.folder import CheckpointFolder, resume_candidates
from gemtune.checkpoint.identity import base_identity, software
from gemtune.checkpoint.ranks import Ranks
from gemtune.checkpoint.reader import first_undamaged, restore, restore_parameters
from gemtune.checkpoint.state import TrainState
from gemtune.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointConfig",
    "CheckpointFolder",
    "CheckpointWriter",
    "Ranks",
    "TrainState",
    "base_identity",
    "export_model",
    "first_undamaged",
    "restore",
    "restore_parameters",
    "resume_candidates",
    "software",
]
