"""Losses that never hold the logits of a whole batch."""

from gemtune.losses.linear_cross_entropy import LinearCrossEntropyMetrics, linear_cross_entropy
from gemtune.losses.supervision import HostLabels

__all__ = ["HostLabels", "LinearCrossEntropyMetrics", "linear_cross_entropy"]
