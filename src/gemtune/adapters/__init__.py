"""Adapters by peft: which parameters they go to, by part, and merging them back."""

from gemtune.adapters.attachment import attach, merge
from gemtune.adapters.config import Adapter, Dora, Lora, Qlora, RsLora
from gemtune.adapters.quantization import dequantized_weights, quantization_row
from gemtune.adapters.targets import Targets, adapter_rows, find_targets

__all__ = [
    "Adapter",
    "Dora",
    "Lora",
    "Qlora",
    "RsLora",
    "Targets",
    "adapter_rows",
    "attach",
    "dequantized_weights",
    "find_targets",
    "merge",
    "quantization_row",
]
