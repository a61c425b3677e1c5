"""A save is whole on all ranks or not at all, and costs the training no more than a copy."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sealed import files_below
from small_training import CONFIG, OneOfMany, build, read, train, write, writer_for

from gemtune.checkpoint import CheckpointFolder
from gemtune.checkpoint import writer as writer_module
from gemtune.checkpoint.tensors import read_tensors
from gemtune.errors import CheckpointError
from gemtune.export import export_model


def test_holds_trainable_parameters_only(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {
        ".metadata",
        "COMPLETE",
        "__0_0.distcp",
        "manifest.json",
        "rng_rank0.json",
        "state.json",
    }
    names = {f"{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")} - {"0.bias"}
    slots = {f"optimizer|{n}|{s}" for n in names for s in ("step", "exp_avg", "exp_avg_sq")}
    assert read_tensors(saved).keys() == {f"model|{name}" for name in names} | slots
    document = json.loads((saved / "state.json").read_text())
    assert document["config"] == CONFIG and document["world_size"] == 1
    assert document["saved_at"].startswith("20") and document["base"]["frozen_weights"]


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """Real writes fail beyond that size, half done, as on a disk that fills up."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("num_bytes", [0, 100, 10_000, 30_000])
def test_a_write_that_fails_half_way(saved: Path, tmp_path: Path, num_bytes: int) -> None:
    before = files_below(tmp_path)
    model, optimizer = build(width=4000)
    train(model, optimizer, 1)
    with (
        files_limited_to(num_bytes),
        pytest.raises(CheckpointError, match=rf"File too large.*\n.*untouched: {saved}"),
    ):
        write(tmp_path, model, optimizer, 3)
    assert files_below(tmp_path) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
    write(tmp_path, model, optimizer, 3)


@pytest.mark.parametrize("where", ["tensors", "numbers", "space"])
def test_a_full_disk_says_what_is_needed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    usage = namedtuple("usage", "total used free")
    free = 2**10 if where == "space" else 2**40
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, free))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where != "space":
        name = "save_tensors" if where == "tensors" else "write_synced"
        monkeypatch.setattr(writer_module, name, full)
    model, optimizer = build(width=4000)
    train(model, optimizer, 1)
    before = files_below(tmp_path)
    # 3 * 4000 + 4000 * 2 + 2 float32, and twice that for Adam.
    with pytest.raises(CheckpointError, match=r"234\.\d KiB needed, 1.* free"):
        write(tmp_path, model, optimizer, 3)
    assert files_below(tmp_path) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# The ranks meet first to add up the bytes, then after each stage.
STAGES = {"begin": 2, "sidecars": 3, "tensors": 4, "hashes": 5, "commit": 7}


@pytest.mark.parametrize("stage", STAGES)
def test_a_failure_on_another_rank_stops_this_one(saved: Path, tmp_path: Path, stage: str) -> None:
    ranks = OneOfMany(world_size=2, others={1: [0], 6: [{}], STAGES[stage]: ["the disk broke"]})
    with pytest.raises(CheckpointError, match=r"rank 1: the disk broke\n.*untouched"):
        write(tmp_path, *build(), 3, ranks=ranks)
    names = {saved.name} | ({"step_00000003"} if stage == "commit" else set())
    assert {p.name for p in saved.parent.iterdir()} == names


@pytest.mark.parametrize("stage", STAGES)
def test_any_failure_is_shared(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Not only those of the disk: the other ranks would wait for this one."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    if stage in ("begin", "commit"):
        monkeypatch.setattr(CheckpointFolder, stage, broken)
    else:
        names = {"sidecars": "write_synced", "tensors": "save_tensors", "hashes": "entries_of"}
        monkeypatch.setattr(writer_module, names[stage], broken)
    ranks = OneOfMany()
    with pytest.raises(CheckpointError, match="out of memory"):
        write(tmp_path, *build(), 3, ranks=ranks)
    assert ranks.met == [STAGES[stage]]
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_a_tensor_that_was_not_written_fails_the_save(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DCP itself can report success with entries missing (pytorch#191391)."""
    original = writer_module.save_tensors

    def forgetful(folder: Path, tensors: dict[str, torch.Tensor], group: Any) -> None:
        original(folder, {n: t for n, t in tensors.items() if "2.weight" not in n}, group)

    monkeypatch.setattr(writer_module, "save_tensors", forgetful)
    model, optimizer = build()
    train(model, optimizer, 1)
    with pytest.raises(CheckpointError, match=r"4 tensors are not whole on disk.*2\.weight"):
        write(tmp_path, model, optimizer, 3)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_old_ones_go_only_after_the_new_one_is_there(saved: Path, tmp_path: Path) -> None:
    model, optimizer = build()
    write(tmp_path, model, optimizer, 3)
    before = files_below(tmp_path)
    with files_limited_to(100), pytest.raises(CheckpointError):
        write(tmp_path, model, optimizer, 4)
    assert files_below(tmp_path) == before
    write(tmp_path, model, optimizer, 4)
    assert [p.name[-1] for p in sorted(saved.parent.iterdir())] == ["3", "4"]


class Slow:
    """Lets a save go on when it is told to; counts those that are under way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_go_on = threading.Event()
        self.running, self.most = 0, 0
        original = writer_module.save_tensors

        def save_tensors(*arguments: Any) -> None:
            self.running += 1
            self.most = max(self.most, self.running)
            assert self.may_go_on.wait(30)
            original(*arguments)
            self.running -= 1

        monkeypatch.setattr(writer_module, "save_tensors", save_tensors)


def test_a_save_in_the_background_holds_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    model, optimizer = build()
    train(model, optimizer, 2)
    writer = writer_for(tmp_path, model, optimizer, 2, async_save=True)
    writer.save()
    assert not CheckpointFolder(tmp_path / "checkpoints").committed()
    expected = train(model, optimizer, 3)  # goes on in the same memory
    slow.may_go_on.set()
    writer.settle()

    other, other_optimizer = build()
    read(tmp_path, tmp_path / "checkpoints" / "step_00000002", other, other_optimizer)
    assert train(other, other_optimizer, 3) == expected


def test_never_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    model, optimizer = build()
    writer = writer_for(tmp_path, model, optimizer, 0, async_save=True)
    threading.Timer(0.3, slow.may_go_on.set).start()
    for step in (1, 2, 3):
        writer._state.step = step
        writer.save()
    writer.settle()
    assert slow.most == 1
    names = [p.name for p in CheckpointFolder(tmp_path / "checkpoints").committed()]
    assert names == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("then", ["save", "settle"])
def test_a_failure_in_the_background_is_raised_once(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model, optimizer = build()
    writer = writer_for(tmp_path, model, optimizer, 3, async_save=True)
    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "save_tensors", full)
        writer.save()
        writer._thread.join()
    assert writer.has_failed
    with pytest.raises(CheckpointError, match=rf"no space.*needed.*\n.*untouched: {saved}"):
        getattr(writer, then)()
    assert not writer.has_failed
    writer.save()
    writer.settle()
    assert len(CheckpointFolder(tmp_path / "checkpoints").committed()) == 2


class Saves:
    """A model, tokenizer and image processor in one: writes a file."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(1000)]

    def save_pretrained(self, folder: Path, **_: object) -> None:
        (folder / self.name).write_text(self.text)


def test_an_export_that_fails_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = '{"text_config": {"layer_types": ["full_attention"], "head_dim": 8}}'
    parts = [Saves("config.json", config), Saves("tokenizer.json", "{}"), Saves("image.json", "{}")]
    model = export_model(*parts, tmp_path / "model")
    before = files_below(model)
    assert set(before) == {"config.json", "tokenizer.json", "image.json"}

    with files_limited_to(10), pytest.raises(CheckpointError, match="File too large"):
        export_model(*parts, model)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1024))
    with pytest.raises(CheckpointError, match=r"3\.9 KiB needed, 1\.0 KiB free"):
        export_model(*parts, model)
    assert files_below(model) == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
