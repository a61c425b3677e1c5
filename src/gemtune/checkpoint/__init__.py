"""Checkpoints of a run."""

from gemtune.checkpoint.config import CheckpointConfig
from gemtune.checkpoint.folder import CheckpointFolder, resume_candidates
from gemtune.checkpoint.identity import base_identity, software
from gemtune.checkpoint.ranks import Ranks
from gemtune.checkpoint.reader import (
    first_undamaged,
    load_parameters,
    restore,
    restore_parameters,
)
from gemtune.checkpoint.state import TrainState
from gemtune.checkpoint.writer import CheckpointWriter

__all__ = [
    "CheckpointConfig",
    "CheckpointFolder",
    "CheckpointWriter",
    "Ranks",
    "TrainState",
    "base_identity",
    "first_undamaged",
    "load_parameters",
    "restore",
    "restore_parameters",
    "resume_candidates",
    "software",
]
