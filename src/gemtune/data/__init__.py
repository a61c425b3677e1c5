"""From rows of conversations to batches: sources, rendering, media, order, collation."""

from gemtune.data.batching.collate import Batch, collate, collate_packed
from gemtune.data.batching.stream import BatchStream
from gemtune.data.config import DataConfig
from gemtune.data.dataset import ChatDataset, prepare
from gemtune.data.media.encoders import OtherMedia
from gemtune.data.rendering.chat import ChatEncoder, Example
from gemtune.data.streaming import StreamedDataset

__all__ = [
    "Batch",
    "BatchStream",
    "ChatDataset",
    "ChatEncoder",
    "DataConfig",
    "Example",
    "OtherMedia",
    "StreamedDataset",
    "collate",
    "collate_packed",
    "prepare",
]
