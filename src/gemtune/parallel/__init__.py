"""Spreading a model over processes: the choice, the shards, and the weights of all of them."""

from gemtune.parallel.config import (
    AUTO,
    DDP,
    FSDP2,
    ParallelConfig,
    Strategy,
    decide,
    refuse_foreign_sharding,
    refuse_sharding,
    smallest_device_bytes,
    training_bytes,
)

__all__ = [
    "AUTO",
    "DDP",
    "FSDP2",
    "ParallelConfig",
    "Strategy",
    "decide",
    "refuse_foreign_sharding",
    "refuse_sharding",
    "smallest_device_bytes",
    "training_bytes",
]
