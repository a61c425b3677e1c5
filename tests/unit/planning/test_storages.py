"""Every storage counts once, as long as it is there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gemtune.planning.shadow import Shadow
from gemtune.planning.storages import GRADIENTS, PARAMETERS, StorageFollower

KIB = 1024


def made(kib: int) -> torch.Tensor:
    return torch.zeros(kib * KIB // 4)


@pytest.fixture(params=[StorageFollower, Shadow], ids=["with values", "without"])
def follower(request: pytest.FixtureRequest) -> StorageFollower:
    return request.param()


def test_what_is_held_at_the_peak_of_each_phase(follower: StorageFollower) -> None:
    with follower:
        with follower.phase("forward"):
            kept = made(100)
            made(50)  # gone at once
            made(70)
            view = kept.view(2, -1)[0]  # no storage of its own
            kept.add_(1)
        with follower.phase("backward"):
            del kept  # the view holds it
            more = made(30)
            follower.add([more], GRADIENTS)
            del view
            made(20)
        with follower.phase("optimizer"):
            del more
    peaks = follower.peaks()
    assert list(peaks) == ["forward", "backward", "optimizer"]
    assert peaks["forward"].total_bytes == 170 * KIB
    assert peaks["backward"].total_bytes == 130 * KIB
    # At that moment it was a gradient to be, known as one only afterwards.
    assert peaks["backward"].by_kind["forward"] == 100 * KIB
    assert peaks["optimizer"].total_bytes == 30 * KIB
    assert peaks["optimizer"].by_kind == {GRADIENTS: 30 * KIB}
    assert follower.live_bytes == 0


def test_sizes_are_those_of_whole_blocks(follower: StorageFollower) -> None:
    with follower, follower.phase("forward"):
        held = [torch.zeros(1), torch.zeros(129)]
    assert follower.peaks()["forward"].total_bytes == 512 + 1024
    assert len(held) == 2


def test_a_phase_begins_with_what_is_there_and_may_come_again(follower: StorageFollower) -> None:
    with follower:
        with follower.phase("forward"):
            first = made(10)
            follower.enter("loss")
            made(5)
            follower.enter("backward")
        with follower.phase("forward"):
            second = made(20)
    peaks = follower.peaks()
    assert peaks["loss"].total_bytes == 15 * KIB
    assert peaks["backward"].total_bytes == 10 * KIB
    assert peaks["forward"].total_bytes == 30 * KIB
    assert first.numel() + second.numel() == 30 * KIB // 4


def test_weights_on_other_memory_do_not_count() -> None:
    follower, here, there = StorageFollower(), nn.Linear(64, 64), nn.Linear(64, 64)
    follower.add([*here.parameters(), *there.parameters()], PARAMETERS)
    both = follower.live_bytes
    follower.leave_out(there.parameters())
    follower.add(there.parameters(), PARAMETERS)
    assert follower.live_bytes == both / 2 == 64 * 64 * 4 + 512


def test_modules_are_named(follower: StorageFollower) -> None:
    class Doubles(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x])

    model = nn.Sequential(Doubles(), Doubles())
    with follower:
        x = made(8)
        with follower.attributing(model), follower.phase("forward"):
            model(x)
    assert follower.peaks()["forward"].by_module == {"": 8 * KIB, "0": 16 * KIB, "1": 32 * KIB}


def test_counts_and_positions_keep_their_values() -> None:
    with Shadow():
        ids = torch.arange(6)
        mask = ids > 3
        weights = torch.ones(6, 4)
        assert weights[mask].shape == (2, 4)
        weights[mask] = 0.0
        assert mask.sum().item() == 2
        assert int(ids.max()) == 5


def test_shared_weights_stay_shared_and_take_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(10**9, 64), nn.Linear(64, 10**9, bias=False))
        model[1].weight = model[0].weight
        model.register_buffer("positions", torch.zeros(3, dtype=torch.int64))
    model[0].weight.requires_grad_(False)
    shadow = Shadow()
    shadow.without_values(model)
    assert model[1].weight is model[0].weight
    assert not model[0].weight.requires_grad and model[0].weight.device.type == "cpu"
    with shadow:
        shadow.add(model.parameters(), PARAMETERS)
        assert shadow.live_bytes == 10**9 * 64 * 4
        assert model(torch.tensor([1, 2])).shape == (2, 10**9)
