"""The lookup against the two computations that it replaces, and against a one-hot in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import build
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.fingerprint import fingerprint
from gemtune.patches.vision_position_lookup import VisionPositionLookup

ROWS, HIDDEN = 11, 5
BOTH_ERAS = ("one_hot", "lookup")


class _PatchEmbedder(nn.Module):
    def __init__(self, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.position_embedding_size = rows
        generator = torch.Generator().manual_seed(0)
        table = torch.randn(2, rows, HIDDEN, generator=generator, dtype=torch.float64)
        self.position_embedding_table = nn.Parameter(table.to(dtype))


def one_hot_era() -> type[nn.Module]:
    # fmt: off
    class Gemma4VisionPatchEmbedder(_PatchEmbedder):
        """`_position_embeddings` as transformers 5.5.2-5.9.0 have it: its fingerprint is known."""

        def _position_embeddings(self, pixel_position_ids, padding_positions):
            clamped_positions = pixel_position_ids.clamp(min=0)
            one_hot = F.one_hot(clamped_positions, num_classes=self.position_embedding_size)
            one_hot = one_hot.permute(0, 2, 1, 3).to(self.position_embedding_table)
            position_embeddings = one_hot @ self.position_embedding_table
            position_embeddings = position_embeddings.sum(dim=1)
            position_embeddings = torch.where(padding_positions.unsqueeze(-1), 0.0, position_embeddings)  # noqa: E501
            return position_embeddings  # noqa: RET504
    # fmt: on
    return Gemma4VisionPatchEmbedder


def lookup_era() -> type[nn.Module]:
    # fmt: off
    class Gemma4VisionPatchEmbedder(_PatchEmbedder):
        """As transformers 5.10.1-5.23.0 have it."""

        def _position_embeddings(self, pixel_position_ids, padding_positions):
            clamped_positions = pixel_position_ids.clamp(min=0)
            x_emb = F.embedding(clamped_positions[..., 0], self.position_embedding_table[0])
            y_emb = F.embedding(clamped_positions[..., 1], self.position_embedding_table[1])
            position_embeddings = x_emb + y_emb
            position_embeddings = torch.where(padding_positions.unsqueeze(-1), 0.0, position_embeddings)  # noqa: E501
            return position_embeddings  # noqa: RET504
    # fmt: on
    return Gemma4VisionPatchEmbedder


@pytest.fixture(params=BOTH_ERAS)
def embedder_class(request: pytest.FixtureRequest) -> type[nn.Module]:
    return {"one_hot": one_hot_era, "lookup": lookup_era}[request.param]()


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, ROWS, (3, 7, 2), generator=torch.Generator().manual_seed(1))
    ids[0, 5:] = -1
    ids[2, 1:] = -1
    return ids, (ids == -1).all(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_original(
    embedder_class: type[nn.Module], dtype: torch.dtype
) -> None:
    stock, patched = embedder_class(dtype=dtype), embedder_class(dtype=dtype)
    report = patches.apply(patched, [VisionPositionLookup()])
    assert report.rows[0].status == "applied"
    ids, padding = positions()
    weights = torch.randn(3, 7, HIDDEN, dtype=torch.float64).to(dtype)
    outputs = []
    for module in (stock, patched):
        output = module._position_embeddings(ids, padding)
        output.backward(weights)
        outputs.append(output.detach())
    tolerance = 4 * torch.finfo(dtype).eps
    assert outputs[1].dtype == dtype
    assert torch.equal(outputs[1][padding], torch.zeros_like(outputs[1][padding]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        patched.position_embedding_table.grad,
        stock.position_embedding_table.grad,
        rtol=tolerance,
        atol=tolerance,
    )


def test_an_id_beyond_the_table_raises_as_before(embedder_class: type[nn.Module]) -> None:
    module = embedder_class()
    ids, padding = positions()
    ids[1, 0, 0] = ROWS
    for _ in range(2):
        with pytest.raises((IndexError, RuntimeError)):
            module._position_embeddings(ids, padding)
        if not hasattr(module, "_gemtune_patch_report"):
            patches.apply(module, [VisionPositionLookup()])


class _Sizes(TorchDispatchMode):
    """The size of every tensor that is made, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.numels: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if (
            isinstance(result, torch.Tensor)
            and result.untyped_storage().data_ptr() not in given
            and "out" not in (kwargs or {})
        ):
            self.numels.append(result.numel())
        return result


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_one_tensor_of_the_size_of_the_result_is_made(
    embedder_class: type[nn.Module], needs_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemtune.patches.table_lookup._CPU_BLOCK_BYTES", 400)
    module = embedder_class(rows=1000)
    module.requires_grad_(needs_gradient)
    patches.apply(module, [VisionPositionLookup()])
    ids, padding = positions()
    result_numel = ids.shape[0] * ids.shape[1] * HIDDEN
    with _Sizes() as sizes:
        module._position_embeddings(ids, padding)
    large = [numel for numel in sizes.numels if numel > result_numel / 2]
    assert large == [result_numel]


def test_deep_copies_look_up_in_their_own_table(embedder_class: type[nn.Module]) -> None:
    module = embedder_class()
    patches.apply(module, [VisionPositionLookup()])
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.position_embedding_table.zero_()
    assert twin._position_embeddings(*positions()).abs().max() == 0
    assert module._position_embeddings(*positions()).abs().max() > 0


def test_applies_to_the_transformers_that_is_installed() -> None:
    plan = VisionPositionLookup().plan(build("e2b"))
    assert plan.status == "applied"
    assert [change.site for change in plan.changes] == ["model.vision_tower.patch_embedder"]


def test_the_reason_says_what_is_saved() -> None:
    reasons = [VisionPositionLookup().plan(era()()).reason for era in (one_hot_era, lookup_era)]
    assert "one-hot" in reasons[0]
    assert "one copy" in reasons[1]


def test_the_classes_here_are_those_of_transformers() -> None:
    from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionPatchEmbedder as Original

    known = {fingerprint(era()._position_embeddings) for era in (one_hot_era, lookup_era)}
    assert len(known) == 2
    assert fingerprint(Original._position_embeddings) in known


def test_an_unknown_computation_is_an_error() -> None:
    class Gemma4VisionPatchEmbedder(_PatchEmbedder):
        def _position_embeddings(self, pixel_position_ids, padding_positions):
            return F.embedding(pixel_position_ids[..., 0] % 7, self.position_embedding_table[0])

    with pytest.raises(PatchError, match="not one of the versions"):
        VisionPositionLookup().plan(Gemma4VisionPatchEmbedder())


def test_a_patch_embedder_without_the_method_is_an_error() -> None:
    with pytest.raises(PatchError, match="no _position_embeddings"):
        VisionPositionLookup().plan(type("Gemma4VisionPatchEmbedder", (nn.Module,), {})())


def test_not_applicable_without_a_tower() -> None:
    plan = VisionPositionLookup().plan(nn.Linear(2, 2))
    assert plan.status == "not applicable"
    assert "vision tower" in plan.reason
