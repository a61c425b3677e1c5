"""Batches with chosen labels, and how many positions went through which layers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from gemma4_zoo import batch

from gemtune import patches

EXACT = 1e-10
IGNORE = -100
ALONE = ["supervised_positions"]
WITH_LOSS = ["linear_cross_entropy", "supervised_positions"]


def text_rows(model: Any, lengths: list[int], learned: list[list[int]], left: bool = False) -> dict:
    """Rows of text of these lengths, with labels at these positions of each (from its start)."""
    generator = torch.Generator().manual_seed(3)
    longest, vocabulary = max(lengths), model.config.text_config.vocab_size
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for row, (length, positions) in enumerate(zip(lengths, learned, strict=True)):
        start = longest - length if left else 0
        words = torch.randint(40, vocabulary, (length,), generator=generator)
        ids[row, start : start + length] = words
        mask[row, start : start + length] = 1
        for position in positions:
            labels[row, start + position] = ids[row, start + position]
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": torch.zeros_like(ids),
        "labels": labels,
    }


UNEQUAL = ([30, 9, 44], [[5, 6, 29], [8], [*range(20, 30), 43]])
CASES: dict[str, Any] = {
    "one row": lambda model: text_rows(model, [40], [[7, 8, 30, 39]]),
    "unequal counts": lambda model: text_rows(model, *UNEQUAL),
    "left padding": lambda model: text_rows(model, *UNEQUAL, left=True),
    "a row without labels": lambda model: text_rows(model, [20, 31], [[], [4, 30]]),
    "the first and the last token": lambda model: text_rows(model, [12, 12], [[0, 1], [11]]),
    # No padding and no longer than the window: transformers makes no mask at all.
    "no mask": lambda model: text_rows(model, [15, 15], [[3, 9], [14]]),
    "no mask on full layers": lambda model: text_rows(model, [50, 50], [[40, 41], [1, 49]]),
    "images": lambda model: batch(model, (1, 0, 2)),
}


def packed(model: Any) -> dict[str, torch.Tensor]:
    """Two documents in one row, told apart by their positions alone."""
    inputs = text_rows(model, [50], [[3, 19, 25, 49]])
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(30)])[None]
    return inputs


CASES["packed"] = packed


@contextlib.contextmanager
def patched(model: Any, choice: Any = None) -> Iterator[Any]:
    report = patches.apply(model, ALONE if choice is None else choice)
    try:
        yield model
    finally:
        report.undo()


def most_learned(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != IGNORE).sum(1).max())


class Widths:
    """How many positions went through the MLPs below and above the first shared layer."""

    def __init__(self, model: Any) -> None:
        self.lower: set[int] = set()
        self.upper: set[int] = set()
        self._handles: list[Any] = []
        self._layers = model.model.language_model.layers

    def __enter__(self) -> Widths:
        for layer in self._layers:
            kind = self.upper if layer.self_attn.is_kv_shared_layer else self.lower
            self._handles.append(
                layer.mlp.register_forward_hook(
                    lambda module, args, output, kind=kind: kind.add(output.shape[1])
                )
            )
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
