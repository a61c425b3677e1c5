"""Losses that never hold the logits of a whole batch."""

from gemtune.losses.linear_cross_entropy import LinearCrossEntropyMetrics, linear_cross_entropy

__all__ = ["LinearCrossEntropyMetrics", "linear_cross_entropy"]
