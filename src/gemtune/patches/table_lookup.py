"""Sums of rows of learned tables: what one-hot x table computes, without the one-hot."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# The tables are added up first where the table of their sums has at most a row for this many
# lookups: it is then small beside the result, and one gather and one scatter remain where there
# were one for each table.
LOOKUPS_PER_SUM = 8

_MIB = 2**20
# Work goes over the result in blocks. On the CPU a block stays in the cache; on a GPU it is large
# enough to keep the device busy and small beside a result worth saving.
_CPU_BLOCK_BYTES = 1 * _MIB
_DEVICE_BLOCK_BYTES = 128 * _MIB


def sum_of_table_lookups(
    tables: Sequence[torch.Tensor] | torch.Tensor,
    indices: Sequence[torch.Tensor] | torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`tables[0][indices[0]] + tables[1][indices[1]] + ...`, exactly, in the dtype of the tables.

    Equal to `sum_k one_hot(indices[k]) @ tables[k]`, value and first derivative. Memory: the
    result, one block and the indices; in the backward pass the gradients of the tables and one
    block. Sums of 16-bit numbers, those of the gradients as well, are taken in float32 and rounded
    once.

    Where the product of the numbers of rows is at most an eighth of the number of lookups, the
    tables are added up to one table of all sums first, and one row of it is looked up: the
    same values bit for bit, because the order of addition is the same.

    Position encodings of this kind are in Gemma 4's vision tower (transformers#46176) and in
    AlphaFold3-style relative position encodings (PXDesign#17).

    Args:
        tables: K tensors [R_k, H] of one dtype, or one [K, R, H].
        indices: K integer tensors of one shape [...], of any integer dtype, or one [K, ...].
        zero: bool [...]: places where the result is zero and nothing reaches the tables. Their
            indices must be valid as well.
        dtype: of the result, where it is not that of the tables.

    Returns:
        [..., H].

    Raises:
        IndexError: an index outside its own table (on CUDA: a device-side assertion).
        ValueError: another number of tables than of indices, or shapes or dtypes that differ.
    """
    _check(tables, indices, zero)
    dtype = dtype or tables[0].dtype
    sizes = [table.shape[0] for table in tables]
    if len(sizes) > 1 and math.prod(sizes) * LOOKUPS_PER_SUM <= indices[0].numel():
        indices = [_joint_index(indices, sizes)]
        tables = [_table_of_sums(tables)]
    elif isinstance(tables, torch.Tensor):
        tables = [tables]  # whole, so that its gradient is made in one piece
    return _Sum.apply(dtype, zero, len(indices), *indices, *tables)


def _check(tables: Any, indices: Any, zero: torch.Tensor | None) -> None:
    if len(tables) != len(indices) or not len(tables):
        raise ValueError(f"{len(tables)} tables and {len(indices)} indices: one index each.")
    kinds = {(table.dtype, table.dim(), table.shape[-1]) for table in tables}
    if len(kinds) > 1 or next(iter(kinds))[1] != 2:
        found = [f"{list(table.shape)} {table.dtype}" for table in tables]
        raise ValueError(f"tables must be [rows, H] of one H and dtype, not {', '.join(found)}.")
    shapes = {index.shape for index in indices} | ({zero.shape} if zero is not None else set())
    if len(shapes) > 1:
        raise ValueError(f"indices and zero must have one shape, not {[*map(list, shapes)]}.")
    for index in indices:
        if index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
            raise ValueError(f"indices must be integers, not {index.dtype}.")


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What sums of `dtype` are taken in."""
    return torch.promote_types(dtype, torch.float32)


def _table_of_sums(tables: Sequence[torch.Tensor]) -> torch.Tensor:
    """[R_0 * R_1 * ..., H]: the sum of every choice of one row from each table, not rounded."""

    def add(sums: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return (sums[:, None] + table[None]).flatten(0, 1)

    return functools.reduce(add, [table.to(_wide(table.dtype)) for table in tables])


def _joint_index(indices: Sequence[torch.Tensor], sizes: list[int]) -> torch.Tensor:
    """The row of the table of sums; one past its end where an index is outside its own table."""
    num_sums = math.prod(sizes)
    fits = num_sums <= torch.iinfo(torch.int16).max
    flat = [index.reshape(-1) for index in indices]
    joint = torch.empty_like(flat[0], dtype=torch.int16 if fits else torch.int32)
    for block in _blocks(joint.numel(), 8, joint.device):
        # In int64, so that no index can wrap into another row before it is checked.
        rows = torch.zeros_like(flat[0][block], dtype=torch.int64)
        outside = torch.zeros_like(rows, dtype=torch.bool)
        for index, size in zip(flat, sizes, strict=True):
            part = index[block].to(torch.int64)
            outside |= (part < 0) | (part >= size)
            rows.mul_(size).add_(part)
        joint[block] = rows.masked_fill_(outside, num_sums)
    return joint.view(indices[0].shape)


def _blocks(num_lookups: int, bytes_each: int, device: torch.device) -> Iterator[slice]:
    block_bytes = _CPU_BLOCK_BYTES if device.type == "cpu" else _DEVICE_BLOCK_BYTES
    step = max(1, block_bytes // max(1, bytes_each))
    for start in range(0, num_lookups, step):
        yield slice(start, min(start + step, num_lookups))


class _Sum(torch.autograd.Function):
    """dtype, zero, K, then K indices, then K tables [R_k, H] or one [K, R, H] -> [..., H]."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        zero: torch.Tensor | None,
        num_indices: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        indices, tables = tensors[:num_indices], tensors[num_indices:]
        ctx.save_for_backward(zero, *indices)
        ctx.tables = [(table.shape, table.dtype) for table in tables]
        rows = tables[0].unbind(0) if tables[0].dim() == 3 else tables
        if len(rows) == 1:
            rows = [rows[0].to(dtype)]
        # Not a view, so that the caller may change it in place.
        result = rows[0].new_empty(*indices[0].shape, rows[0].shape[-1], dtype=dtype)
        flat = [index.reshape(-1) for index in indices]
        _look_up(result.view(-1, result.shape[-1]), rows, flat)
        if zero is not None:
            result.masked_fill_(zero.unsqueeze(-1), 0.0)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zero, *indices = ctx.saved_tensors
        flat = [index.reshape(-1) for index in indices]
        grad = grad.reshape(-1, grad.shape[-1])
        needed = ctx.needs_input_grad[3 + len(indices) :]
        grads: list[torch.Tensor | None] = []
        for number, (shape, dtype) in enumerate(ctx.tables):
            if not needed[number]:
                grads.append(None)
                continue
            whole = grad.new_zeros(shape, dtype=dtype)
            parts = whole.unbind(0) if whole.dim() == 3 else [whole]
            for part, index in zip(parts, flat[number : number + len(parts)], strict=True):
                _add_gradient(part, index, grad, zero)
            grads.append(whole)
        return (None, None, None, *[None] * len(indices), *grads)


def _look_up(
    result: torch.Tensor, tables: Sequence[torch.Tensor], indices: Sequence[torch.Tensor]
) -> None:
    """`result[i] = sum_k tables[k][indices[k][i]]`."""
    dtype = tables[0].dtype
    # Two numbers of 16 bits are added in float32 as it is; more would be rounded in between.
    wide = dtype if len(tables) < 3 and result.dtype == dtype else _wide(dtype)
    bytes_each = result.shape[-1] * wide.itemsize
    found = total = None
    for block in _blocks(len(result), bytes_each, result.device):
        piece = result[block]
        if found is None and len(tables) > 1:
            found = torch.empty_like(piece, dtype=dtype)
            total = None if result.dtype == wide else torch.empty_like(piece, dtype=wide)
        sum_ = piece if total is None else total[: len(piece)]
        first = sum_ if wide == dtype else found[: len(piece)]
        torch.index_select(tables[0], 0, _int32_or_64(indices[0][block]), out=first)
        if first is not sum_:
            sum_.copy_(first)
        for table, index in zip(tables[1:], indices[1:], strict=True):
            row = found[: len(piece)]
            sum_.add_(torch.index_select(table, 0, _int32_or_64(index[block]), out=row))
        if sum_ is not piece:
            piece.copy_(sum_)


def _add_gradient(
    total: torch.Tensor, index: torch.Tensor, grad: torch.Tensor, zero: torch.Tensor | None
) -> None:
    """`total[index] += grad`, summed in float32 at least; `total` is zero before."""
    on_cpu = grad.device.type == "cpu"
    dtype = _wide(total.dtype)
    # A small table can have millions of lookups of one row: one after the other in float32 they
    # are off by a thousandth.
    if on_cpu and total.numel() * torch.float64.itemsize <= 8 * _CPU_BLOCK_BYTES:
        dtype = torch.float64
    rows = None
    if on_cpu and total.dtype.itemsize < 4 and dtype != torch.float64:
        # Images leave most of a table of 16 bits alone: its float32 sums are of the rows in use.
        rows, index = _int32_or_64(index).unique(return_inverse=True)
        sums = total.new_zeros(len(rows), total.shape[-1], dtype=dtype)
    else:
        sums = total if total.dtype == dtype else torch.zeros_like(total, dtype=dtype)
    for block in _blocks(len(grad), total.shape[-1] * dtype.itemsize, grad.device):
        piece = grad[block].to(dtype, copy=zero is not None)
        if zero is not None:
            piece.masked_fill_(zero.reshape(-1, 1)[block], 0.0)
        where = _int32_or_64(index[block])
        if on_cpu:
            sums.index_add_(0, where, piece)
        else:
            # index_add_ would add in no fixed order there, one row's lookups one after the other.
            sums += torch.ops.aten.embedding_dense_backward(piece, where, len(sums), -1, False)
    if rows is not None:
        total.index_copy_(0, rows.to(torch.int64), sums.to(total.dtype))
    elif sums is not total:
        total.copy_(sums)


def _int32_or_64(index: torch.Tensor) -> torch.Tensor:
    """As index_select takes it, every value as it was."""
    if index.dtype in (torch.int32, torch.int64):
        return index
    return index.to(torch.int32 if index.dtype.itemsize < 4 else torch.int64)
