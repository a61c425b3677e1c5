"""The lookup against the one-hot matmul it replaces, written out here as the reference."""

from __future__ import annotations

import types

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.table_lookup import sum_of_table_lookups
from gemtune.patches.vision_position_lookup import VisionPositionLookup


class Gemma4VisionPatchEmbedder(nn.Module):
    """As transformers 5.5-5.9 have it: int64 one-hot, cast, times the table."""

    def __init__(self, rows: int = 11, hidden: int = 5) -> None:
        super().__init__()
        self.position_embedding_size = rows
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(2, rows, hidden, generator=generator, dtype=torch.float64)
        self.position_embedding_table = nn.Parameter(table)

    def _position_embeddings(
        self, pixel_position_ids: torch.Tensor, padding_positions: torch.Tensor
    ) -> torch.Tensor:
        one_hot = F.one_hot(pixel_position_ids.clamp(min=0), self.position_embedding_size)
        one_hot = one_hot.permute(0, 2, 1, 3).to(self.position_embedding_table)
        embeddings = (one_hot @ self.position_embedding_table).sum(dim=1)
        return torch.where(padding_positions.unsqueeze(-1), 0.0, embeddings)


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 11, (3, 7, 2), generator=torch.Generator().manual_seed(1))
    ids[0, 5:] = -1
    ids[2, 1:] = -1
    return ids, (ids == -1).all(-1)


def test_equals_the_one_hot_matmul_in_value_and_gradient() -> None:
    stock, patched = Gemma4VisionPatchEmbedder(), Gemma4VisionPatchEmbedder()
    report = patches.apply(patched, [VisionPositionLookup()])
    assert report.rows[0].status == "applied"
    ids, padding = positions()
    weights = torch.randn(3, 7, 5, dtype=torch.float64)
    outputs = []
    for module in (stock, patched):
        output = module._position_embeddings(ids, padding)
        (output * weights).sum().backward()
        outputs.append(output.detach())
    assert torch.equal(outputs[1][padding], torch.zeros_like(outputs[1][padding]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        patched.position_embedding_table.grad,
        stock.position_embedding_table.grad,
        rtol=1e-13,
        atol=1e-13,
    )


def test_an_id_beyond_the_table_raises_as_before() -> None:
    module = Gemma4VisionPatchEmbedder()
    patches.apply(module, [VisionPositionLookup()])
    ids, padding = positions()
    ids[1, 0, 0] = 11
    with pytest.raises((IndexError, RuntimeError)):
        module._position_embeddings(ids, padding)


def test_nothing_of_the_size_of_the_one_hot_is_ever_made() -> None:
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    module = Gemma4VisionPatchEmbedder(rows=1000)
    patches.apply(module, [VisionPositionLookup()])
    ids, padding = positions()
    with torch.no_grad(), Largest() as largest:
        module._position_embeddings(ids, padding)
    one_hot_numel = ids.numel() * 1000
    # A view of one table is the largest tensor that is ever seen.
    assert largest.numel == module.position_embedding_table[0].numel() < one_hot_numel


def test_reports_upstream_where_transformers_looks_up_itself() -> None:
    model = build("e2b")
    embedder = type(model.model.vision_tower.patch_embedder)
    has_one_hot = "one_hot" in embedder._position_embeddings.__code__.co_names
    plan = VisionPositionLookup().plan(model)
    assert plan.status == ("applied" if has_one_hot else "upstream")


def test_an_unknown_computation_is_an_error() -> None:
    unknown = type("Gemma4VisionPatchEmbedder", (nn.Module,), {})
    unknown._position_embeddings = types.FunctionType((lambda self: None).__code__, {})
    with pytest.raises(PatchError, match="not known here"):
        VisionPositionLookup().plan(unknown())


def test_not_applicable_without_a_tower() -> None:
    plan = VisionPositionLookup().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "vision tower" in plan.reason


@pytest.mark.parametrize("num_tables", [1, 2, 4])
def test_sum_of_table_lookups_is_a_sum_of_one_hot_products(num_tables: int) -> None:
    generator = torch.Generator().manual_seed(2)
    tables = torch.randn(num_tables, 6, 3, generator=generator, dtype=torch.float64)
    indices = torch.randint(0, 6, (4, 5, num_tables), generator=generator)
    expected = torch.einsum("...kr,krh->...h", F.one_hot(indices, 6).double(), tables)
    torch.testing.assert_close(sum_of_table_lookups(tables, indices), expected)
