"""Restoring is exact, or refused with nothing changed; damage is found, and gone round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sealed import files_below, seal
from small_training import build, read, train, write
from torch import nn

from gemtune.checkpoint import (
    CheckpointFolder,
    Ranks,
    TrainState,
    base_identity,
    first_undamaged,
    restore,
)
from gemtune.errors import CheckpointError


def test_goes_on_exactly(tmp_path: Path) -> None:
    model, optimizer = build()
    train(model, optimizer, 2)
    checkpoint = write(tmp_path, model, optimizer, 2)
    expected = train(model, optimizer, 3)

    other, other_optimizer = build()
    torch.manual_seed(99)
    state = read(tmp_path, checkpoint, other, other_optimizer)
    assert state == TrainState("abc", step=2, nonfinite_steps=1, tokens_seen=7, first_eval_loss=2.5)
    assert train(other, other_optimizer, 3) == expected
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_another_runs_checkpoint_begins_a_run_of_its_own(saved: Path, tmp_path: Path) -> None:
    state = read(tmp_path / "other", saved, *build())
    assert state.run_id != "abc" and state.step == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ("{}", "cannot be read"),
        ('{"format": 2, "world_size": 1, "state": {"step": 1}}', "cannot be read"),
        ('{"format": 2, "world_size": 1, "state": {"run_id": "a", "x": 1}}', "cannot be read"),
        ('{"format": 7}', "has format 7; this gemtune reads format 2"),
    ],
)
def test_a_state_that_is_none(saved: Path, tmp_path: Path, content: str, said: str) -> None:
    (saved / "state.json").write_text(content)
    seal(saved)
    with pytest.raises(CheckpointError, match=said):
        read(tmp_path, saved, *build())


@pytest.mark.parametrize("file", ["state.json", ".metadata", "rng_rank0.json"])
def test_what_cannot_be_read_changes_nothing(saved: Path, tmp_path: Path, file: str) -> None:
    (saved / file).unlink()
    model, optimizer = build()
    before = [p.clone() for p in model.parameters()]
    numbers = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=f"{file} cannot be read"):
        read(tmp_path, saved, model, optimizer)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert not optimizer.state and torch.equal(torch.get_rng_state(), numbers)


@pytest.mark.parametrize("what", ["frozen values", "frozen shape"])
def test_another_base(saved: Path, tmp_path: Path, what: str) -> None:
    model, optimizer = build()
    if what == "frozen values":
        with torch.no_grad():
            model[0].bias[3] += 1e-6
    else:
        model[0].bias = nn.Parameter(model[0].bias.detach().view(1, 5), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"another base: the frozen weights .*model\.path"):
        read(tmp_path, saved, model, optimizer)
    assert not optimizer.state


def test_a_rank_that_does_not_hold_the_base_yet_does_not_judge_it(
    saved: Path, tmp_path: Path
) -> None:
    with torch.device("meta"):
        elsewhere = build()[0]
    assert base_identity(elsewhere) is None
    model, optimizer = build()
    state = restore(Ranks(), saved, model, optimizer, run_dir=tmp_path, base=None)
    assert state.step == 2


def test_a_new_rank_keeps_its_own_random_numbers(saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with torch.random.fork_rng():
        model, optimizer = build()
    read(tmp_path, saved, model, optimizer, rank=1)
    assert torch.equal(torch.rand(3), expected)


def test_other_trainable_parameters(saved: Path, tmp_path: Path) -> None:
    model, optimizer = build()
    base = base_identity(model)
    model[0].bias.requires_grad_(True)
    model[2].bias.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"1 of this model's .*0\.bias.* 1 of .*2\.bias"):
        restore(Ranks(), saved, model, optimizer, run_dir=tmp_path, base=base)


def test_other_shapes_and_types_change_nothing(saved: Path, tmp_path: Path) -> None:
    base = base_identity(build()[0])
    model, optimizer = build(width=6)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(CheckpointError, match=r"float32 \[5, 3\] in it, but float32 \[6, 3\]"):
        restore(Ranks(), saved, model, optimizer, run_dir=tmp_path, base=base)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    model = build()[0].bfloat16()
    with pytest.raises(CheckpointError, match=r"float32 \[5, 3\] in it, but bfloat16 \[5, 3\]"):
        restore(Ranks(), saved, model, optimizer, run_dir=tmp_path, base=base)


@pytest.fixture
def three(tmp_path: Path) -> CheckpointFolder:
    """Checkpoints of steps 1 to 3."""
    model, optimizer = build()
    for step in (1, 2, 3):
        write(tmp_path, model, optimizer, step, keep_last=3)
    return CheckpointFolder(tmp_path / "checkpoints")


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes(content)


def test_every_file_counts(three: CheckpointFolder, tmp_path: Path) -> None:
    newest_first = three.committed()[::-1]
    said: list[str] = []
    assert first_undamaged(Ranks(), newest_first, three, said.append) == newest_first[0]
    assert not said
    for name in [file.name for file in newest_first[0].iterdir()]:
        content = (newest_first[0] / name).read_bytes()
        damage(newest_first[0] / name)
        found = first_undamaged(Ranks(), newest_first, three, said.append)
        assert found == newest_first[1], name
        (aside,) = three.path.glob("damaged-*")
        (aside / name).write_bytes(content)
        aside.rename(newest_first[0])
        assert "step_00000003 is damaged" in said[-1] and aside.name in said[-1]
        assert name in said[-1] or "manifest.json" in said[-1]


def test_all_damaged_is_an_error(three: CheckpointFolder) -> None:
    newest_first = three.committed()[::-1]
    for checkpoint in newest_first:
        damage(checkpoint / "__0_0.distcp")
    with pytest.raises(CheckpointError, match=r"No undamaged checkpoint(.|\n)*run\.resume=never"):
        first_undamaged(Ranks(), newest_first, three, print)
    assert len(list(three.path.glob("damaged-*"))) == 3
    assert first_undamaged(Ranks(), [], three, print) is None


def test_the_folder_of_another_run_is_not_touched(three: CheckpointFolder, tmp_path: Path) -> None:
    newest_first = three.committed()[::-1]
    damage(newest_first[0] / "state.json")
    before = files_below(three.path)
    own = CheckpointFolder(tmp_path / "other" / "checkpoints")
    assert first_undamaged(Ranks(), newest_first, own, print) == newest_first[1]
    assert files_below(three.path) == before
