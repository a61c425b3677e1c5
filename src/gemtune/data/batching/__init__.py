"""From rows to batches: their order, what shares a row, padding, and the loader processes."""
