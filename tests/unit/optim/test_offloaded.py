"""State in host memory: the numbers of the plain optimizer to the bit, and never more than said."""

from __future__ import annotations

import copy

import pytest
import torch
from offloading import (
    SETTINGS,
    Counted,
    LateTransport,
    block,
    feed,
    model_of,
    moved,
    same_model,
    same_state,
    uncounted,
    values_of,
)
from torch import Tensor, nn

from gemtune.errors import ConfigError
from gemtune.optim import AdamW, AdamW8bit, Muon
from gemtune.optim.combined import CombinedOptimizer
from gemtune.optim.groups import set_learning_rate
from gemtune.optim.offloaded import (
    OffloadedOptimizer,
    offloaded,
    require_host_memory,
    state_sizes,
)
from gemtune.optim.state_group import state_groups
from gemtune.optim.transport import Transport
from gemtune.planning.host_state import rest_on_host
from gemtune.planning.storages import StorageFollower

KIB = 2**10
WAYS = pytest.mark.parametrize(
    "transport",
    [None, lambda: Transport(block, block), LateTransport],
    ids=["on a cpu", "at once", "late"],
)


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_steps_are_those_of_the_plain_optimizer_to_the_bit(
    kind: type[AdamW], dtype: torch.dtype, transport: type[Transport] | None
) -> None:
    settings = kind(lr=0.01, weight_decay=0.1)
    ours, theirs = model_of(dtype), model_of(dtype)
    optimizer = moved(settings, ours, 20 * KIB)
    optimizer.transport = transport() if transport else None
    plain = settings.build(theirs)
    for group in (*optimizer.param_groups[1:], *plain.param_groups[1:]):
        group["lr_ratio"] = 0.5
    assert optimizer.num_groups >= 3
    for step in range(6):
        for each, its_model in ((optimizer, ours), (plain, theirs)):
            set_learning_rate(each.param_groups, 0.01 / (step + 1))
            feed(its_model, step)
            gradients = [p.grad for p in its_model.parameters()]
            each.step()
            assert all(p.grad is g for p, g in zip(its_model.parameters(), gradients, strict=True))
        assert same_model(ours, theirs) and same_state(optimizer, plain), step
    sizes = [[len(g["params"]) for g in each.param_groups] for each in (optimizer, plain)]
    assert sizes[0] == sizes[1]
    rates = [[g["lr"] for g in each.param_groups] for each in (optimizer, plain)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 2
    assert ours[5].bias not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def tracked(
    kind: type[AdamW], group_bytes: int
) -> tuple[nn.Module, OffloadedOptimizer, Counted, Counted]:
    host, device, model = Counted(), Counted(), model_of()
    return model, moved(kind(), model, group_bytes, LateTransport(host, device)), host, device


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_step_takes_two_groups_of_the_device_and_gives_them_back(kind: type[AdamW]) -> None:
    # The largest parameter has 64 KiB of moments, or 20, and a little more.
    bound = 24 * KIB if kind is AdamW8bit else 70 * KIB
    model, optimizer, host, device = tracked(kind, bound)
    inner, seen = optimizer._inner, []
    step = inner.step

    def watched() -> None:
        step()
        stepped = [p for g in inner.param_groups for p in g["params"] if p.grad is not None]
        # All of it was made in this step, or lies on the device.
        assert all(not host.has(v) for p in stepped for v in optimizer.state[p].values())
        seen.append(sum(device.has(v) for p in stepped for v in optimizer.state[p].values()))

    inner.step = watched  # type: ignore[method-assign]
    for number in range(5):
        feed(model, number)
        optimizer.step()
        assert device.live == 0
        assert all(host.has(value) for value in values_of(optimizer))
    assert len(seen) > 5 * 2 and sum(seen) > 0
    largest = max(g.num_bytes for g in optimizer._groups or ())
    assert largest <= bound and largest < device.highest <= 2 * largest
    assert host.live == optimizer.resting_bytes > device.highest


def test_no_more_than_a_group_is_there_while_the_state_is_made() -> None:
    """Counted tensor by tensor: what the optimizer makes by itself too."""
    bound = 70 * KIB
    model = model_of()
    optimizer = moved(AdamW(), model, bound)
    follower = StorageFollower(block_bytes=1)
    rest_on_host(optimizer, follower, uncounted)
    feed(model, 2)
    with follower:
        with follower.phase("first"):
            optimizer.step()
        assert follower.live_bytes == 0
        with follower.phase("second"):
            optimizer.step()
        assert follower.live_bytes == 0
    sizes = [group.num_bytes for group in optimizer._groups or ()]
    peaks = {name: peak.total_bytes for name, peak in follower.peaks().items()}
    assert 0.9 * max(sizes) < peaks["first"] <= max(sizes)  # not padded yet
    assert peaks["second"] == max(sizes[0::2]) + max(sizes[1::2])


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("fails_at", [1, 2, 4])
def test_after_a_failure_everything_is_back(kind: type[AdamW], fails_at: int) -> None:
    model, optimizer, host, device = tracked(kind, 20 * KIB)
    plain_model = model_of()
    plain = kind().build(plain_model)
    feed(model, 2)
    feed(plain_model, 2)
    optimizer.step()
    plain.step()
    before = {id(p): copy.deepcopy(slots) for p, slots in optimizer.state.items()}
    inner, stepped = optimizer._inner, []
    step = inner.step

    def failing() -> None:
        stepped.append([p for g in inner.param_groups for p in g["params"]])
        if len(stepped) == fails_at:
            raise RuntimeError("as if")
        step()

    inner.step = failing  # type: ignore[method-assign]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    with pytest.raises(RuntimeError, match="as if"):
        optimizer.step()
    inner.step = step  # type: ignore[method-assign]
    assert device.live == 0 and all(host.has(value) for value in values_of(optimizer))
    assert [len(group["params"]) for group in optimizer.param_groups] == sizes
    # Those before it are stepped, the others as they were: made good, the step is a whole one.
    done = {id(p) for parameters in stepped[:-1] for p in parameters}
    for parameter, slots in optimizer.state.items():
        if id(parameter) not in done:
            assert all(v.equal(before[id(parameter)][s]) for s, v in slots.items())
    for parameter in model.parameters():
        if id(parameter) in done:
            parameter.grad = None
    optimizer.step()
    plain.step()
    assert same_model(model, plain_model) and same_state(optimizer, plain)


def test_a_closure_is_called_once() -> None:
    model = model_of()
    optimizer = moved(AdamW(), model, 20 * KIB)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(feed(model, 2))
        return 3.0

    before = copy.deepcopy(model)
    assert optimizer.step(closure) == 3.0 and len(calls) == 1
    assert not same_model(model, before)


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("source", ["plain", "offloaded"])
def test_a_state_dict_goes_either_way(kind: type[AdamW], source: str) -> None:
    if kind is AdamW8bit and source == "offloaded":
        pytest.skip("torch's own load_state_dict makes numbers in float32 of the codes of 8 bits")
    settings = kind(lr=0.01)
    first, other = model_of(), model_of()
    plain, host, device = settings.build(other), Counted(), Counted()
    optimizer = moved(settings, first, 20 * KIB, LateTransport(host, device))
    pairs = [(plain, other), (optimizer, first)]
    (written, its_model), (reading, read_model) = pairs if source == "plain" else pairs[::-1]
    for step in range(3):
        feed(its_model, step)
        written.step()
    feed(read_model, 0)
    reading.step()  # state of its own, which goes
    for group in written.param_groups:
        group["lr"] = 0.3
    saved = written.state_dict()
    assert device.live == 0
    reading.load_state_dict(copy.deepcopy(saved))
    read_model.load_state_dict(its_model.state_dict())
    assert device.live == 0 and {g["lr"] for g in reading.param_groups} == {0.3}
    assert same_state(reading, written)
    for step in range(3, 6):
        for each, model in pairs:
            feed(model, step)
            each.step()
        assert same_model(first, other) and same_state(optimizer, plain)


def test_groups_keep_the_order_and_the_bound() -> None:
    parameters = [nn.Parameter(torch.empty(n)) for n in (3, 4, 20, 1, 2, 3, 4, 5)]
    param_groups = [{"params": parameters[:3]}, {"params": []}, {"params": parameters[3:]}]
    sizes = {p: p.numel() for p in parameters}
    groups = list(state_groups(param_groups, sizes, 10))
    found = [[p.numel() for p in group.parameters] for group in groups]
    assert found == [[3, 4], [20], [1, 2, 3, 4], [5]]
    assert [[p.numel() for p in own] for own in groups[2].by_param_group] == [[], [], [1, 2, 3, 4]]
    [all_of_them] = state_groups(param_groups, sizes, 100)
    assert [len(own) for own in all_of_them.by_param_group] == [3, 0, 5]


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_size_that_groups_are_made_by_is_never_less_than_the_state(kind: type[AdamW]) -> None:
    settings, model = kind(), model_of()
    optimizer = moved(settings, model, 1)
    sizes = state_sizes(optimizer, settings.moment_bytes)
    feed(model, 2)
    optimizer.step()
    assert optimizer.num_groups == len(sizes)
    for group in optimizer._groups or ():
        assert group.num_bytes <= sum(sizes[p] for p in group.parameters)


def test_what_cannot_work_is_refused() -> None:
    far = model_of().to("meta")
    with pytest.raises(ConfigError, match=r"on one GPU or on the CPU; they are on meta\. Use"):
        AdamW(offload_state=True).build(far)
    far[0].to_empty(device="cpu")
    with pytest.raises(ConfigError, match=r"they are on cpu, meta"):
        offloaded(torch.optim.AdamW(far.parameters()), group_bytes=1, state_bytes=Tensor.numel)
    with pytest.raises(ConfigError, match=r"4 processes takes 12\.0 GiB.*has 11\.9 GiB"):
        require_host_memory(3 * 2**30, 4, 11.9)
    require_host_memory(3 * 2**30, 4, 12.0)
    require_host_memory(3 * 2**30, 4, float("nan"))  # this machine does not say
    with pytest.raises(ConfigError, match=r"optim\.offload_group_mib=0"):
        AdamW(offload_group_mib=0)
    optimizer = moved(AdamW(), model_of(), KIB)
    with pytest.raises(RuntimeError, match="takes no further parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_key_builds_it(kind: type[AdamW]) -> None:
    optimizer = kind(offload_state=True, offload_group_mib=1).build(model_of())
    assert isinstance(optimizer, OffloadedOptimizer)
    assert optimizer.transport is None, "on the CPU nothing moves"
    assert isinstance(optimizer._inner, CombinedOptimizer) == (kind is Muon)
    assert not isinstance(kind().build(model_of()), OffloadedOptimizer)
    parameter = torch.empty(64, 128)
    assert kind(offload_state=True).device_bytes(parameter) == 0
    assert kind().device_bytes(parameter) == kind().moment_bytes(parameter) > 0
    assert "host memory" in kind(offload_state=True).describe()
    assert "host memory" not in kind().describe()
