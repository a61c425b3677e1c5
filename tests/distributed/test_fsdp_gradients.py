"""Gradients of three ranks are those of one process, whatever the model, and who has images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemma4_ranks import CASES, MAX_NORM, Case, all_gradients, expected
from gemma4_zoo import SHARING_FAMILIES, relative_error
from ranks import findings, run_ranks

from gemtune.parallel import FSDP2

pytestmark = pytest.mark.xdist_group("fsdp_gradients")

RANKS = 3


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gradients")
    run_ranks(all_gradients, RANKS, list(CASES), str(folder), limit_seconds=300)
    return findings(folder, RANKS)


def bound(case: Case) -> float:
    """Each rank computes what the single process does, bit for bit; sums are in another order.

    In bfloat16 the accumulated shares are rounded to it, as a single process would.
    """
    if case.is_exact:
        return 1e-12
    return 2e-2 if case.dtype == torch.bfloat16 and not case.lora else 1e-5


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    case = CASES[name]
    reference = expected(case, RANKS)
    ranks = [finding[name] for finding in found]
    gradients = ranks[0]["gradients"]
    assert gradients.keys() == reference.keys()
    errors = {n: relative_error(g, reference[n]) for n, g in gradients.items()}
    assert max(errors.values()) < bound(case), max(errors.items(), key=lambda item: item[1])

    norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    # torch computes it in the dtype of the gradients.
    wide = all(g.dtype != torch.bfloat16 for g in gradients.values())
    for rank in ranks:
        assert rank["norm"] == ranks[0]["norm"]
        assert rank["norm"] == pytest.approx(float(norm), rel=1e-5 if wide else 1e-2)
    scale = MAX_NORM / float(norm)
    assert scale < 1
    for n, clipped in ranks[0]["clipped"].items():
        assert relative_error(clipped, gradients[n] * scale) < max(bound(case), 1e-5)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.strategy == FSDP2])
def test_shards_hold_the_values_of_rank_0(name: str, found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        mine = found[rank][name]
        frozen, adapted = CASES[name].frozen, CASES[name].lora
        for n, is_shard in mine["kinds"].items():
            is_tower_alone = any(
                tower in n and (tower in frozen or (adapted and part not in adapted))
                for part, tower in (("vision", "vision_tower"), ("audio", "audio_tower"))
            )
            assert is_shard != is_tower_alone, n
        assert mine["kinds after evaluation"] == mine["kinds"]
    first = found[0][name]
    for n, value in first["values"].items():
        assert torch.equal(value, first["before"][n]), n


@pytest.mark.parametrize("name", CASES)
def test_layers_are_recomputed_where_that_was_chosen(
    name: str, found: list[dict[str, Any]]
) -> None:
    case = CASES[name]
    chosen = case.recomputed or ("sliding", "full", "shared", "vision", "audio")
    for finding in found:
        kinds = finding[name]["recomputed"]
        assert kinds == (set(chosen) & kinds_of(case) if case.checkpointing else set())


def kinds_of(case: Case) -> set[str]:
    """Of the layers in which something is trained."""
    kinds = {"sliding", "full"} | ({"shared"} if case.family in SHARING_FAMILIES else set())
    has_vision = not case.lora or "vision" in case.lora
    return kinds | ({"vision"} if has_vision else set()) | ({"audio"} if case.hears else set())


@pytest.mark.parametrize("name", CASES)
def test_patches_stay_active(name: str, found: list[dict[str, Any]]) -> None:
    case = CASES[name]
    is_patched = case.patches is None
    for finding in found:
        assert finding[name]["no logits"] == is_patched
        for first, last in finding[name]["lengths"]:
            if is_patched and case.family in SHARING_FAMILIES:
                assert last < 0.75 * first
            else:
                assert last == first
