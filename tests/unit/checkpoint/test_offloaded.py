"""Optimizer state in host memory, saved and restored as any other, and read into host memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import small_training
import torch
from offloading import LateTransport, feed, model_of, moved, same_model, same_state, values_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from gemtune.checkpoint import writer as writer_module
from gemtune.checkpoint.reader import _destinations
from gemtune.optim import AdamW, Muon
from gemtune.optim.offloaded import OffloadedOptimizer

KIB = 2**10


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_dcp_reads_and_sets_it_as_any_optimizer(kind: type[AdamW]) -> None:
    ours, theirs = model_of(), model_of()
    optimizer, plain = moved(kind(), ours, 20 * KIB), kind().build(theirs)
    for each, model in ((optimizer, ours), (plain, theirs)):
        feed(model, 2)
        each.step()
        model.zero_grad()
    found = get_optimizer_state_dict(ours, optimizer)
    expected = get_optimizer_state_dict(theirs, plain)
    assert found["state"].keys() == expected["state"].keys()
    for name, slots in expected["state"].items():
        assert all(torch.equal(found["state"][name][slot], v) for slot, v in slots.items())
    again = model_of()
    other = moved(kind(), again, 20 * KIB)
    options = StateDictOptions(strict=False)  # one parameter has no state
    set_optimizer_state_dict(again, other, optim_state_dict=expected, options=options)
    again.load_state_dict(theirs.state_dict())
    for each, model in ((other, again), (plain, theirs)):
        feed(model, 3)
        each.step()
    assert same_model(again, theirs)


def test_what_is_loaded_lies_in_host_memory_wherever_the_parameters_are() -> None:
    """The meta device is the GPU here: whatever went there could not be compared."""
    model = model_of()
    plain = AdamW().build(model)
    feed(model, 2)
    plain.step()
    far = model_of().to("meta")
    optimizer = moved(AdamW(), far, 20 * KIB)
    optimizer.load_state_dict(plain.state_dict())
    assert same_state(optimizer, plain)
    assert {value.device.type for value in values_of(optimizer)} == {"cpu"}


def test_a_checkpoint_is_restored_into_host_memory(tmp_path: Path) -> None:
    model, optimizer = small_training.build()
    small_training.train(model, optimizer, 1)
    checkpoint = small_training.write(tmp_path, model, optimizer, 1)
    far = small_training.build()[0].to("meta")
    trained = [p for p in far.parameters() if p.requires_grad]
    places = {}
    for name, group_bytes in (("plain", None), ("offloaded", KIB)):
        each: torch.optim.Optimizer = torch.optim.AdamW(trained, fused=False)
        if group_bytes:
            each = OffloadedOptimizer(each, group_bytes=KIB, state_bytes=AdamW().moment_bytes)
        wanted = _destinations(checkpoint, far, each)
        places[name] = {
            kind: {t.device.type for key, t in wanted.items() if key.startswith(kind)}
            for kind in ("model", "optimizer")
        }
    assert places["plain"] == {"model": {"meta"}, "optimizer": {"meta"}}
    assert places["offloaded"] == {"model": {"meta"}, "optimizer": {"cpu"}}


def small_offloaded() -> tuple[nn.Module, OffloadedOptimizer]:
    model, optimizer = small_training.build()
    transport = LateTransport()
    bytes_of = AdamW().moment_bytes
    return model, OffloadedOptimizer(
        optimizer, group_bytes=1, state_bytes=bytes_of, transport=transport
    )


def test_a_checkpoint_is_the_same_bytes_and_goes_on_either_way(tmp_path: Path) -> None:
    made = {"plain": small_training.build, "offloaded": small_offloaded}
    files, after = {}, {}
    for name, build in made.items():
        model, optimizer = build()
        small_training.train(model, optimizer, 2)
        checkpoint = small_training.write(tmp_path / name, model, optimizer, 2)
        files[name] = {
            file.name: file.read_bytes()
            for file in checkpoint.iterdir()
            if file.name in (".metadata", "__0_0.distcp")
        }
        after[name] = small_training.train(model, optimizer, 3)
    assert files["plain"] == files["offloaded"] and len(files["plain"]) == 2
    assert after["plain"] == after["offloaded"]
    for written, build in (("plain", small_offloaded), ("offloaded", small_training.build)):
        model, optimizer = build()
        checkpoint = tmp_path / written / "checkpoints" / "step_00000002"
        small_training.read(tmp_path / written, checkpoint, model, optimizer)
        assert small_training.train(model, optimizer, 3) == after["plain"]


def test_a_save_in_the_background_holds_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state between two steps is memory that the next step writes to."""
    may_go_on, write = threading.Event(), writer_module.save_tensors

    def slow(*arguments: object) -> None:
        assert may_go_on.wait(60)
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writer_module, "save_tensors", slow)
    model, optimizer = small_offloaded()
    small_training.train(model, optimizer, 2)
    writer = small_training.writer_for(tmp_path, model, optimizer, 2, async_save=True)
    writer.save()
    blocks = [group.block for group in optimizer._groups or ()]
    expected = small_training.train(model, optimizer, 3)
    assert len(blocks) == 3, "and the steps have written to them"
    assert all(g.block is b for g, b in zip(optimizer._groups or (), blocks, strict=True))
    may_go_on.set()
    writer.settle()
    again, other = small_training.build()
    checkpoint = tmp_path / "checkpoints" / "step_00000002"
    small_training.read(tmp_path, checkpoint, again, other)
    assert small_training.train(again, other, 3) == expected
