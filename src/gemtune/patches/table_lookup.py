"""Sums of rows of learned tables: what one-hot x table computes, without the one-hot."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sum_of_table_lookups(tables: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`sum_k tables[k, indices[..., k]]`, exactly, in the dtype of the tables.

    Equal to `(one_hot(indices) @ tables).sum(k)`, value and gradient, in O(output) memory instead
    of O(output x rows). Position encodings of this kind are found in Gemma 4's vision tower
    (transformers#46176) and in AlphaFold3-style relative position encodings (PXDesign#17).

    Args:
        tables: [K, R, H], K tables of R rows.
        indices: [..., K] integers in [0, R).

    Returns:
        [..., H].

    Raises:
        IndexError: an index outside [0, R) (on CUDA: a device-side assertion).
    """
    total = F.embedding(indices[..., 0], tables[0])
    for k in range(1, tables.shape[0]):
        total = total + F.embedding(indices[..., k], tables[k])
    return total
