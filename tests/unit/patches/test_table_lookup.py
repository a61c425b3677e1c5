"""Sums of table lookups against one-hot matmuls in float64, along both ways of computing them."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from gemtune.patches import table_lookup
from gemtune.patches.table_lookup import sum_of_table_lookups

HIDDEN = 7
WAYS = {"tables added up first": 1, "in place": 10**9}


@pytest.fixture(params=WAYS, ids=lambda way: way.replace(" ", "_"))
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fixes the choice that is otherwise made from the sizes; blocks of a few lookups."""
    monkeypatch.setattr(table_lookup, "LOOKUPS_PER_SUM", WAYS[request.param])
    monkeypatch.setattr(table_lookup, "_CPU_BLOCK_BYTES", 1000)
    return request.param


def make_case(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = (40, 50)
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """Tables, indices of `shape`, the gradient of the result."""
    new = torch.Generator().manual_seed(len(sizes))
    tables = [
        torch.randn(rows, HIDDEN, generator=new, dtype=torch.float64).to(dtype).requires_grad_()
        for rows in sizes
    ]
    indices = [torch.randint(rows, shape, generator=new) for rows in sizes]
    gradient = torch.randn(*shape, HIDDEN, generator=new, dtype=torch.float64).to(dtype)
    return tables, indices, gradient


def one_hot_products(
    tables: list[torch.Tensor], indices: list[torch.Tensor], gradient: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Value and gradients of the tables, all in float64."""
    tables = [table.detach().double().requires_grad_() for table in tables]
    products = [
        F.one_hot(index.long(), len(table)).double() @ table
        for table, index in zip(tables, indices, strict=True)
    ]
    value = torch.stack(products).sum(0)
    return value.detach(), torch.autograd.grad(value, tables, gradient.double())


# The last is too large for sums of gradients in float64, and for a table of sums.
@pytest.mark.parametrize("sizes", [(6,), (5, 9), (5, 3, 4), (400, 300)], ids=str)
def test_value_and_gradients_are_those_of_one_hot_products(way: str, sizes: tuple[int, ...]):
    tables, indices, gradient = make_case(sizes)
    value = sum_of_table_lookups(tables, indices)
    gradients = torch.autograd.grad(value, tables, gradient)
    expected, expected_gradients = one_hot_products(tables, indices, gradient)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_both_ways_give_the_same_bits(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tables, indices, _ = make_case((5, 3, 4), dtype)
    found = []
    for lookups_per_sum in WAYS.values():
        monkeypatch.setattr(table_lookup, "LOOKUPS_PER_SUM", lookups_per_sum)
        found.append(sum_of_table_lookups(tables, indices))
    assert found[0].dtype == dtype
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(6,), (5, 9), (5, 3, 4), (400, 300)], ids=str)
def test_16_bit_sums_are_rounded_once(way: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    # Up to hundreds of lookups of each row: a running sum in bfloat16 would stop growing.
    tables, indices, gradient = make_case(sizes, dtype)
    gradient = gradient.abs()
    value = sum_of_table_lookups(tables, indices)
    gradients = torch.autograd.grad(value, tables, gradient)
    expected, expected_gradients = one_hot_products(tables, indices, gradient)
    half_a_place = torch.finfo(dtype).eps / 2
    for found, exact in zip([value, *gradients], [expected, *expected_gradients], strict=True):
        assert found.dtype == dtype
        # float32 may move a number over the middle between two of 16 bits.
        torch.testing.assert_close(found.double(), exact, rtol=1.01 * half_a_place, atol=1e-6)


def test_another_dtype_of_the_result(way: str) -> None:
    tables, indices, gradient = make_case((5, 9), torch.float32)
    value = sum_of_table_lookups(tables, indices, dtype=torch.bfloat16)
    gradients = torch.autograd.grad(value, tables, gradient.bfloat16())
    expected, expected_gradients = one_hot_products(tables, indices, gradient.bfloat16())
    assert value.dtype == torch.bfloat16
    torch.testing.assert_close(value.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(
        [g.double() for g in gradients], list(expected_gradients), rtol=1e-5, atol=1e-5
    )


def test_one_stacked_table_and_one_stacked_index(way: str) -> None:
    tables, indices, gradient = make_case((6, 6, 6))
    stacked = torch.stack([table.detach() for table in tables]).requires_grad_()
    value = sum_of_table_lookups(stacked, torch.stack(indices))
    (found,) = torch.autograd.grad(value, stacked, gradient)
    expected, expected_gradients = one_hot_products(tables, indices, gradient)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found, torch.stack(expected_gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_every_integer_dtype_indexes(way: str, dtype: torch.dtype) -> None:
    tables, indices, _ = make_case((5, 9))
    small = [index.to(dtype) for index in indices]
    expected = sum_of_table_lookups(tables, indices)
    assert torch.equal(sum_of_table_lookups(tables, small), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_places_called_zero_are_zero_and_reach_no_table(way: str, dtype: torch.dtype) -> None:
    tables, indices, gradient = make_case((5, 9), dtype)
    zero = torch.rand(indices[0].shape, generator=torch.Generator().manual_seed(0)) < 0.3
    gradient = torch.where(zero[..., None], math.nan, gradient)  # what is there is not looked at
    before = gradient.clone()
    value = sum_of_table_lookups(tables, indices, zero=zero)
    gradients = torch.autograd.grad(value, tables, gradient)
    kept = gradient.masked_fill(zero[..., None], 0.0)
    expected, expected_gradients = one_hot_products(tables, indices, kept)
    expected = expected.masked_fill(zero[..., None], 0.0)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(value.double(), expected, rtol=tolerance, atol=0.0)
    for found, exact in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=1e-5)
    torch.testing.assert_close(gradient, before, rtol=0, atol=0, equal_nan=True)


# 5 is inside the second table. In the table of sums every one of them would be some other row.
@pytest.mark.parametrize(("table", "wrong"), [(0, -1), (0, 5), (0, 2**32), (1, -1), (1, 9)])
def test_an_index_outside_its_own_table_raises(way: str, table: int, wrong: int) -> None:
    tables, indices, _ = make_case((5, 9))
    indices[1 - table][3, 4] = 2
    indices[table][3, 4] = wrong
    with pytest.raises(IndexError):
        sum_of_table_lookups(tables, indices)


def test_the_result_may_be_changed_in_place(way: str) -> None:
    tables, indices, gradient = make_case((5, 9))
    doubled = sum_of_table_lookups(tables, indices).mul_(2)
    _, expected = one_hot_products(tables, indices, gradient)
    found = torch.autograd.grad(doubled, tables, gradient)
    torch.testing.assert_close(found, tuple(2 * e for e in expected), rtol=1e-12, atol=1e-12)


def test_frozen_tables_get_no_gradient(way: str) -> None:
    tables, indices, gradient = make_case((5, 9))
    tables[0].requires_grad_(False)
    sum_of_table_lookups(tables, indices).backward(gradient)
    assert tables[0].grad is None
    _, expected = one_hot_products(tables, indices, gradient)
    torch.testing.assert_close(tables[1].grad, expected[1], rtol=1e-12, atol=1e-12)


def test_millions_of_lookups_of_one_row_are_summed_well_in_float32() -> None:
    # One running sum of float32 is off by 1e-2 here.
    num_lookups = 3 * 10**6
    table = torch.zeros(4, 2, requires_grad=True)
    index = torch.zeros(num_lookups, dtype=torch.int32)
    value = sum_of_table_lookups([table], [index])
    tenth = torch.tensor([[0.1, 0.7]])
    value.backward(tenth.expand_as(value))
    exact = tenth.double()[0] * num_lookups
    torch.testing.assert_close(table.grad[0].double(), exact, rtol=1e-6, atol=0.0)


def test_the_choice_goes_by_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    original = table_lookup._table_of_sums
    monkeypatch.setattr(
        table_lookup, "_table_of_sums", lambda tables: chosen.append(1) or original(tables)
    )
    for num_lookups, expected in ((5 * 9 * 8 - 1, 0), (5 * 9 * 8, 1)):
        chosen.clear()
        tables, indices, _ = make_case((5, 9), shape=(num_lookups,))
        sum_of_table_lookups(tables, indices)
        assert len(chosen) == expected


@pytest.mark.parametrize(
    ("tables", "indices", "message"),
    [
        ([(5, 2), (5, 2)], [(3,)], "2 tables and 1 indices"),
        ([(5, 2), (5, 3)], [(3,), (3,)], "one H and dtype"),
        ([(5,)], [(3,)], "one H and dtype"),
        ([(5, 2), (5, 2)], [(3,), (1, 3)], "one shape"),
        ([], [], "0 tables"),
    ],
)
def test_what_does_not_fit_is_refused(tables: list, indices: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sum_of_table_lookups(
            [torch.zeros(shape) for shape in tables],
            [torch.zeros(shape, dtype=torch.int64) for shape in indices],
        )


def test_indices_must_be_integers() -> None:
    with pytest.raises(ValueError, match=r"integers, not torch\.float32"):
        sum_of_table_lookups([torch.zeros(5, 2)], [torch.zeros(3)])
