"""A sharded model costs its ranks a share of it each, while it is built and afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import findings, run_ranks
from sharded_construction import NUM_LAYERS, bring_up

pytestmark = pytest.mark.xdist_group("construction")

RANKS = 3
SLACK = 15 * 2**20


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("construction")
    with pytest.MonkeyPatch.context() as patched:
        # Else freed units leave holes in the heap of the C library that count as resident.
        patched.setenv("MALLOC_MMAP_THRESHOLD_", str(2**17))
        run_ranks(bring_up, RANKS, str(folder), limit_seconds=200)
    return findings(folder, RANKS)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from /proc")
def test_no_rank_but_the_first_holds_the_model(found: list[dict[str, Any]]) -> None:
    whole = found[0]["whole"]
    assert whole > 150 * 2**20
    share, unit = whole / RANKS, whole / NUM_LAYERS
    assert found[0]["peak"] > whole  # it is a measurement
    for finding in found[1:]:
        assert finding["peak"] < share + 2 * unit + SLACK < 0.65 * whole
    for finding in found:
        assert finding["after"] < share + SLACK


def test_parameters_and_optimizer_state_are_shared_out(found: list[dict[str, Any]]) -> None:
    whole = found[0]["whole"]
    for finding in found:
        assert finding["parameter bytes"] == pytest.approx(whole / RANKS, rel=0.01)
        assert finding["optimizer bytes"] == pytest.approx(2 * whole / RANKS, rel=0.01)


def test_values_are_those_of_a_single_process(found: list[dict[str, Any]]) -> None:
    assert not any(finding["on meta"] for finding in found)
    assert found[0]["differing"] == []
    for name, buffer in found[0]["buffers"].items():
        for finding in found[1:]:
            assert torch.equal(finding["buffers"][name], buffer), name
