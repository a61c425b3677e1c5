"""Saving and restoring: exact, all or nothing on all ranks, and in plain words when refused."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gemtune.checkpoint import (
    CheckpointConfig,
    CheckpointFolder,
    TrainState,
    export_model,
    restore,
    save,
)
from gemtune.checkpoint import state as state_module
from gemtune.errors import CheckpointError

CONFIG = {"run": {"resume": "auto"}, "optim": {"lr": 0.1}}


@dataclass
class OneRank:
    """What checkpoints need of a runtime; `others` is what other ranks report."""

    run_dir: Path
    rank: int = 0
    world_size: int = 1
    others: dict[int, list[Any]] = field(default_factory=dict)
    num_collected: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def unwrap(self, model: nn.Module) -> nn.Module:
        return model

    def collect(self, items: list[Any]) -> list[Any]:
        self.num_collected += 1
        return items + self.others.get(self.num_collected, [])


def build(width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Dropout(0.5), nn.Linear(width, 2))
    model[0].bias.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=0.1, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(torch.ones(4, 3)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 2."""
    model, optimizer = build()
    train(model, optimizer, 2)
    return write(tmp_path, model, optimizer, 2)


def write(
    run_dir: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, **rank: Any
) -> Path:
    state = TrainState("abc", step=step, nonfinite_steps=1, tokens_seen=7, first_eval_loss=2.5)
    settings = CheckpointConfig(keep_last=2)
    return save(OneRank(run_dir, **rank), model, optimizer, state, CONFIG, settings)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_goes_on_exactly(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    checkpoint = write(tmp_path, model, optimizer, 2)
    expected = train(model, optimizer, 3)

    other, other_optimizer = build()
    torch.manual_seed(99)
    state = restore(OneRank(tmp_path), checkpoint, other, other_optimizer)
    assert state == TrainState("abc", 2, 1, 7, 2.5)
    assert train(other, other_optimizer, 3) == expected
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_holds_trainable_parameters_only_and_no_pickle(saved: Path) -> None:
    assert {p.name for p in saved.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "rng_rank0.json",
        "state.json",
    }
    for file in saved.glob("*.json"):
        json.loads(file.read_text())
    assert "0.bias" not in state_module._read_tensors(saved / "model.safetensors")
    document = json.loads((saved / "state.json").read_text())
    assert document["config"] == CONFIG and document["world_size"] == 1


def test_another_runs_checkpoint_begins_a_run_of_its_own(saved: Path, tmp_path: Path) -> None:
    state = restore(OneRank(tmp_path / "other"), saved, *build())
    assert state.run_id != "abc" and state.step == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": 1, "world_size": 1, "state": {"step": 1}}', "cannot be read"),
        ('{"format": 1, "world_size": 1, "state": {"run_id": "a", "x": 1}}', "cannot be read"),
        ('{"format": 7}', "has format 7; this gemtune reads format 1"),
    ],
)
def test_damaged_state(saved: Path, tmp_path: Path, content: str, said: str) -> None:
    (saved / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=said):
        restore(OneRank(tmp_path), saved, *build())


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "rng_rank0.json"])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_files_change_nothing(saved: Path, tmp_path: Path, file: str, damage: str) -> None:
    path = saved / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    model, optimizer = build()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=f"{file} cannot be read.*delete .*step_00000002"):
        restore(OneRank(tmp_path), saved, model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state


def test_a_new_rank_keeps_its_own_random_numbers(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.random.fork_rng():
        model, optimizer = build()
    restore(OneRank(tmp_path, rank=1, world_size=2), saved, model, optimizer)
    assert torch.equal(torch.rand(3), expected)


def test_other_trainable_parameters(saved: Path, tmp_path: Path) -> None:
    model, optimizer = build()
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"1 of this model's .*0\.bias.* 1 of .*2\.bias"):
        restore(OneRank(tmp_path), saved, model, optimizer)


def test_other_shapes_and_types_change_nothing(saved: Path, tmp_path: Path) -> None:
    model, optimizer = build(width=6)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"float32 \[5, 3\] in it, but float32 \[6, 3\]"):
        restore(OneRank(tmp_path), saved, model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with pytest.raises(CheckpointError, match=r"float32 \[5, 3\] in it, but bfloat16 \[5, 3\]"):
        restore(OneRank(tmp_path), saved, build()[0].bfloat16(), optimizer)


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
        if where == "tensors":  # as safetensors says it
            raise state_module.SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    if where != "space":
        owner, name = (state_module, "save_file") if where == "tensors" else (Path, "write_text")
        monkeypatch.setattr(owner, name, full)
    model, optimizer = build(width=4000)
    train(model, optimizer, 1)
    before = files_below(tmp_path)
    # 3 * 4000 + 4000 * 2 + 2 float32, and twice that for Adam.
    with pytest.raises(CheckpointError, match=r"234\.\d KiB needed, 1.* free"):
        write(tmp_path, model, optimizer, 3)
    assert files_below(tmp_path) == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("stage", [1, 2], ids=["begin", "write"])
def test_a_failure_on_another_rank_stops_this_one(saved: Path, tmp_path: Path, stage: int) -> None:
    reports = {1: [None], 2: [None]} | {stage: ["the disk of rank 1 broke"]}
    with pytest.raises(CheckpointError, match="the disk of rank 1 broke"):
        write(tmp_path, *build(), 3, world_size=2, others=reports)
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("where", ["begin", "write", "commit"])
def test_any_failure_is_shared(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Not only those of the disk: the other ranks would wait for this one."""

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    if where == "write":
        monkeypatch.setattr(state_module, "_write_tensors", broken)
    else:
        monkeypatch.setattr(CheckpointFolder, where, broken)
    runtime = OneRank(tmp_path)
    with pytest.raises(CheckpointError, match="out of memory"):
        save(runtime, *build(), TrainState("abc", step=3), CONFIG, CheckpointConfig())
    assert runtime.num_collected == 1 + ["begin", "write", "commit"].index(where)
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


class Saves:
    """A model, tokenizer and image processor in one: writes a file."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text

    def parameters(self) -> list[torch.Tensor]:
        return [torch.zeros(1000)]

    def save_pretrained(self, folder: Path) -> None:
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
