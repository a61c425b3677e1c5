"""From rows of conversations to batches: sources, rendering, media, order, collation."""

from gemtune.data.chat import ChatEncoder, Example
from gemtune.data.collate import Batch, collate, collate_packed
from gemtune.data.config import DataConfig
from gemtune.data.dataset import ChatDataset, prepare
from gemtune.data.stream import BatchStream
from gemtune.data.streaming import StreamedDataset

__all__ = [
    "Batch",
    "BatchStream",
    "ChatDataset",
    "ChatEncoder",
    "DataConfig",
    "Example",
    "StreamedDataset",
    "collate",
    "collate_packed",
    "prepare",
]
