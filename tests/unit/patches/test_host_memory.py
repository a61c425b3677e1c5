"""Weights that stay on the host, against what `nn.Module` does with all others."""

from __future__ import annotations

import copy
import errno
import mmap
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import Journal
from gemtune.patches.host_memory import (
    HOST_MEMORY,
    MAPPED,
    PINNED,
    HostMemory,
    can_map,
    host_parameters,
    packed,
    stay_on_host,
)

SMAPS = Path("/proc/self/smaps")
needs_linux = pytest.mark.skipif(
    not (can_map() and SMAPS.exists()), reason="needs Linux, to see which pages are resident"
)
KINDS = ["ordinary", pytest.param(MAPPED, marks=needs_linux)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3), requires_grad=False)
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))
        self.count = nn.Parameter(torch.tensor([7]), requires_grad=False)
        self.register_buffer("limit", torch.tensor(2.5))
        self.requires_grad_(False)


def model_with_block(memory: HostMemory) -> tuple[nn.Sequential, Journal]:
    model = nn.Sequential(nn.Linear(2, 5), Block())
    journal = Journal()
    for change in stay_on_host(model[1], memory, "1"):
        journal.make(change)
    return model, journal


def resident_bytes(address: int) -> int:
    """Of the mapping that holds an address, as the kernel counts it."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and head == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("not mapped")


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_to_another_device_leaves_them_and_takes_everything_else(kind: str) -> None:
    model, _ = model_with_block(HostMemory(kind))
    parameters = dict(model.named_parameters())
    values = {name: p.clone() for name, p in parameters.items()}
    assert model.to("meta") is model
    for name, parameter in model.named_parameters():
        stays = name.startswith("1.")
        assert parameter.device.type == ("cpu" if stays else "meta"), name
        assert not stays or parameter is parameters[name]
        assert not stays or torch.equal(parameter, values[name])
    assert model[1].limit.device.type == "meta"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_change_of_dtype_is_followed_as_by_any_module(kind: str, dtype: torch.dtype) -> None:
    model, _ = model_with_block(HostMemory(kind))
    stock = copy.deepcopy(nn.Sequential(model[0], Block()))
    stock.load_state_dict(model.state_dict())
    parameters = list(model[1].parameters())
    model.to("meta", dtype), stock.to(dtype)
    found, expected = model[1].state_dict(), stock[1].state_dict()
    del found["limit"]  # a buffer: it left
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert {t.dtype for t in found.values()} == {dtype, torch.int64}
    assert all(a is b for a, b in zip(model[1].parameters(), parameters, strict=True))
    assert not any(p.requires_grad for p in model[1].parameters())


def test_only_what_may_follow_follows() -> None:
    model, _ = model_with_block(HostMemory(follows=frozenset({"table"})))
    model.to("meta")
    assert model[1].table.device.type == "meta"
    assert model[1].inner[0].weight.device.type == "cpu"
    names = ["1.count", "1.inner.0.weight", "1.inner.0.bias", "1.inner.1.weight"]
    assert host_parameters(model) == names
    assert host_parameters(model[1]) == [name[2:] for name in names]
    assert host_parameters(nn.Linear(2, 2)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_undo_gives_ordinary_memory_with_the_values_of_now(kind: str, tmp_path: Path) -> None:
    model, journal = model_with_block(HostMemory(kind, str(tmp_path)))
    model[1].inner[0].weight.data.fill_(3.0)
    journal.undo()
    assert torch.equal(model[1].inner[0].weight, torch.full((4, 3), 3.0))
    assert not {HOST_MEMORY, "_apply"} & set(vars(model[1]))
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@needs_linux
class TestMapped:
    def test_pages_given_back_are_not_resident_and_come_back_unchanged(self) -> None:
        memory = HostMemory(MAPPED)
        values = [torch.randn(700, 1000), torch.randn(50, dtype=torch.bfloat16), torch.arange(3)]
        held = memory.hold(values)
        address = held[0].data_ptr()
        assert address % mmap.PAGESIZE == 0
        assert resident_bytes(address) == 0
        assert all(torch.equal(h, v) for h, v in zip(held, values, strict=True))
        assert resident_bytes(address) >= values[0].nbytes
        held[1].mul_(2)  # written, and not flushed
        memory.release()
        assert resident_bytes(address) == 0
        memory.prefetch()
        assert torch.equal(held[0], values[0])
        assert torch.equal(held[1], values[1] * 2)

    def test_the_file_has_no_name(self, tmp_path: Path) -> None:
        held = HostMemory(MAPPED, str(tmp_path)).hold([torch.ones(10)])
        assert list(tmp_path.iterdir()) == []
        mappings = Path("/proc/self/maps").read_text()
        assert any(str(tmp_path) in line and "deleted" in line for line in mappings.splitlines())
        del held
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()

    def test_after_a_change_of_dtype_they_are_mapped_again(self) -> None:
        memory = HostMemory(MAPPED)
        model, _ = model_with_block(memory)
        model.to(torch.bfloat16)
        assert resident_bytes(model[1].inner[0].weight.data_ptr()) == 0

    def test_each_tensor_is_saved_alone(self, tmp_path: Path) -> None:
        model, _ = model_with_block(HostMemory(MAPPED))
        torch.save(model.state_dict(), tmp_path / "all.pt")
        loaded = torch.load(tmp_path / "all.pt", weights_only=True)
        assert all(torch.equal(loaded[name], t) for name, t in model.state_dict().items())
        assert loaded["1.count"].untyped_storage().nbytes() == 8

    def test_a_copy_lies_in_ordinary_memory_and_is_separate(self) -> None:
        model, _ = model_with_block(HostMemory(MAPPED))
        twin = copy.deepcopy(model)
        twin[1].table.data.zero_()
        assert model[1].table.abs().sum() > 0
        memory = vars(twin[1])[HOST_MEMORY]
        memory.release()  # nothing of its own, and nothing of the original's
        memory.prefetch()
        assert memory.kind == MAPPED
        twin.to("meta")
        assert twin[1].table.device.type == "cpu"
        assert pickle.loads(pickle.dumps(memory)).kind == MAPPED

    def test_a_folder_that_will_not_do_is_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(PatchError, match=r"nowhere.*Name another folder"):
            HostMemory(MAPPED, str(tmp_path / "nowhere")).hold([torch.ones(3)])

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", full)
        with pytest.raises(PatchError, match="No space left"):
            HostMemory(MAPPED, str(tmp_path)).hold([torch.ones(3)])


@needs_linux
def test_pinned_pages_are_whole_and_unpinned_before_they_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple] = []

    def register(address: int, size: int, flags: int) -> int:
        calls.append(("pin", address, size, flags))
        return 0

    def unregister(address: int) -> int:
        calls.append(("unpin", address, resident_bytes(address) >= 0))
        return 0

    fake = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append(("wait",)))
    memory = HostMemory(PINNED)
    values = [torch.randn(30, 20), torch.randn(7).bfloat16()]
    held = memory.hold(values)
    address = held[0].data_ptr()
    assert calls == [("pin", address, packed(values)[1], 1)]
    assert address % mmap.PAGESIZE == 0
    assert all(torch.equal(h, v) for h, v in zip(held, values, strict=True))
    last = memory.hold(held)[1]
    calls.clear()
    del held
    assert calls == [("wait",), ("unpin", address, True)]
    del memory
    assert len(calls) == 2  # a tensor still lies there
    del last
    assert len(calls) == 4

    fake.cudaHostRegister = lambda *_: 2
    with pytest.raises(PatchError, match="could not pin"):
        HostMemory(PINNED).hold(values)
