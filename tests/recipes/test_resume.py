"""A run that is cut anywhere and started again is the run that was never cut."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from wandb_files import written_starts
from whole_runs import REPOSITORY, SMALL, RunFolder, TrainRun, press_ctrl_c_after

from gemtune.errors import CheckpointError, ConfigError
from gemtune.tracking.groups import GROUPS
from gemtune.tracking.workspace import layout

LORA = ("recipe=gemma4_lora", "adapter.dropout=0.1")


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and content."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def copied(finished_run: RunFolder, tmp_path: Path) -> RunFolder:
    """The finished run, at the place where `train_run` looks."""
    folder = tmp_path / "runs" / "run"
    shutil.copytree(finished_run.path, folder)
    return RunFolder(folder, 0)


PART_RATES = ("optim.part_lrs.vision=1e-4", "optim.part_lrs.ple=1e-2", "optim.weight_decay=0.1")
MUON = ("optim=muon", "optim.weight_decay=0.1")
NEFTUNE = ("model.neftune_alpha=5",)
WANDB = ("tracker=wandb", "tracker.mode=offline", "loop.log_every_steps=1")


@pytest.mark.parametrize(
    "overrides",
    [
        WANDB,
        ("data.num_workers=2",),
        ("data.packing=true", "data.max_length=64", "data.num_workers=2"),
        ("data.bucket_rows=16",),
        ("model.gradient_checkpointing=true",),
        LORA,
        (*LORA, "model.gradient_checkpointing=true", "data.num_workers=2"),
        PART_RATES,
        MUON,
        (*NEFTUNE, "model.gradient_checkpointing=true"),
        (*NEFTUNE, "data.packing=true", "data.max_length=64"),
    ],
    ids=[
        "plain-wandb",
        "workers",
        "packed",
        "buckets",
        "recompute",
        "lora-dropout",
        "lora-dropout-recompute-workers",
        "rates-by-part",
        "muon",
        "neftune-recompute",
        "neftune-packed",
    ],
)
def test_ctrl_c_and_the_same_command_again(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    whole = train_run(*overrides, run_dir=tmp_path / "whole")

    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=1)
        cut = train_run(*overrides)
    assert cut.status == 130
    assert [p.name for p in cut.checkpoints()] == ["step_00000002"]
    assert not (cut.path / "model").exists()

    resumed = train_run(*overrides)
    assert resumed.status == 0
    assert resumed.losses() == whole.losses()
    assert [m["step"] for m in resumed.metrics()] == [0, 1, 2, 3, 4]
    assert resumed.training_state() == whole.training_state()
    assert resumed.metrics()[-1]["eval/loss"] == whole.metrics()[-1]["eval/loss"]
    if overrides == WANDB:
        assert_one_run_in_wandb(resumed, whole)


def assert_one_run_in_wandb(resumed: RunFolder, whole: RunFolder) -> None:
    """Two starts wrote what one start does, under one id; names and steps are those of the file."""
    first, second = written_starts(resumed.path)
    (alone,) = written_starts(whole.path)
    assert first.run_id == second.run_id != alone.run_id
    assert first.config["optim"]["lr"] == second.config["optim"]["lr"] == 3e-3
    assert not first.points.keys() & second.points.keys()
    points = first.points | second.points
    stalls = {(name, n) for name, n in points if name == "system/checkpoint_stall_seconds"}
    assert points.keys() - stalls == {p for p in alone.points if p[0] not in {n for n, _ in stalls}}
    assert {n for _, n in stalls} == {2, 4}  # saved when it was stopped, and at its end
    recorded = {
        (name, record["step"]): value
        for record in resumed.metrics()
        for name, value in record.items()
    }
    for n in range(1, 5):
        assert points["train/loss", n] == recorded["train/loss", n]
        (peak,) = recorded["memory/peak_gib_per_rank", n]
        assert points["memory/rank_0_peak_gib", n] == peak
        assert points["data/tokens", n] == recorded["train/tokens", n]
    assert {name.split("/")[0] for name, _ in points} == set(GROUPS)
    panels = [panel for section in layout() for panel in section.panels]
    logged = {name for name, _ in [*points, *alone.tables]}
    unseen = {name for name in logged if not any(p.shows(name) for p in panels)}
    assert not unseen, "logged, and in no panel of the layout"

    assert [name for name, _ in first.tables] == ["patches", "data/preview"]
    ((name, samples),) = second.tables  # of the end
    assert name == "eval/samples" and [row[0] for row in samples["data"]] == [4] * 4
    assert [name for name, _ in alone.tables] == ["patches", "data/preview", "eval/samples"]
    (_, patches), (_, preview) = first.tables
    state = json.loads((resumed.checkpoints()[-1] / "state.json").read_text())
    assert patches["data"] == [[p["name"], p["status"], p["reason"]] for p in state["patches"]]
    assert len(preview["data"]) == 4 and all("«" in row[-1] for row in preview["data"])


def test_dropout_is_on_in_the_test_above(train_run: TrainRun, tmp_path: Path) -> None:
    with_dropout = train_run(*LORA)
    without = train_run(*LORA, "adapter.dropout=0", run_dir=tmp_path / "other")
    # Before the first update LoRA adds zero, dropout or not.
    assert with_dropout.losses()[1] == without.losses()[1]
    assert with_dropout.losses()[4] != without.losses()[4]


def test_resume_from_an_earlier_checkpoint(
    train_run: TrainRun, finished_run: RunFolder, copied: RunFolder
) -> None:
    shutil.rmtree(copied.checkpoints()[-1])
    resumed = train_run("checkpoint.every_steps=2")
    assert resumed.losses() == finished_run.losses()
    assert resumed.training_state() == finished_run.training_state()


def test_sigkill_at_any_moment(finished_run: RunFolder, tmp_path: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "train.py"), f"run.dir={tmp_path}", "run.name=run"]
    command += [*SMALL, "checkpoint.every_steps=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = RunFolder(tmp_path / "run", 0)
    metrics = run.path / "metrics.jsonl"

    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # The line of step 2 is written just before the checkpoint of step 2.
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()

    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=120)
    assert run.losses() == finished_run.losses()
    assert run.training_state() == finished_run.training_state()


def test_a_finished_run_is_not_trained_again(train_run: TrainRun, copied: RunFolder) -> None:
    checkpoints, losses = snapshot(copied.path / "checkpoints"), copied.metrics()
    model = snapshot(copied.path / "model")
    again = train_run("checkpoint.every_steps=2")
    assert again.status == 0
    assert snapshot(again.path / "checkpoints") == checkpoints
    assert again.metrics() == losses  # with the seconds of every step
    assert snapshot(again.path / "model") == model  # not even written again


def test_a_run_killed_before_its_model_was_written_writes_it(
    train_run: TrainRun, copied: RunFolder
) -> None:
    model = {name: content for name, (_, content) in snapshot(copied.path / "model").items()}
    losses = copied.losses()
    shutil.rmtree(copied.path / "model")
    again = train_run("checkpoint.every_steps=2")
    assert again.losses() == losses
    after = {name: content for name, (_, content) in snapshot(again.path / "model").items()}
    assert after == model


def test_a_finished_model_without_checkpoints_is_kept(
    train_run: TrainRun, copied: RunFolder
) -> None:
    shutil.rmtree(copied.path / "checkpoints")
    before = snapshot(copied.path)
    with pytest.raises(CheckpointError, match=r"finished model.*run\.resume=never"):
        train_run()
    assert snapshot(copied.path) == before


def test_never_moves_the_old_folder_aside(train_run: TrainRun, copied: RunFolder) -> None:
    before = snapshot(copied.path)
    new = train_run("run.resume=never", "loop.max_steps=1")
    assert snapshot(copied.path.with_name("run.1")) == before
    assert [m["step"] for m in new.metrics()] == [0, 1]
    again = train_run("run.resume=never", "loop.max_steps=1")
    assert snapshot(copied.path.with_name("run.1")) == before
    assert copied.path.with_name("run.2").is_dir() and again.status == 0


def test_go_on_from_another_run(train_run: TrainRun, copied: RunFolder) -> None:
    before = snapshot(copied.path)
    command = ("run.name=second", f"run.resume={copied.path}", "loop.max_steps=6", "optim.lr=1e-3")
    second = train_run(*command)
    assert list(second.losses()) == [5, 6]
    assert snapshot(copied.path) == before

    states = [
        json.loads((run.checkpoints()[-1] / "state.json").read_text())["state"]
        for run in (copied, second)
    ]
    assert states[0]["run_id"] != states[1]["run_id"]  # two runs in the dashboard

    # The same command again goes on in its own folder.
    again = train_run(*command)
    assert again.metrics() == second.metrics()
    with pytest.raises(CheckpointError, match="not the newest checkpoint"):
        train_run(*command, f"run.resume={copied.checkpoints()[0]}")


def test_an_older_own_checkpoint_is_refused(train_run: TrainRun, copied: RunFolder) -> None:
    before = snapshot(copied.path)
    oldest, newest = copied.checkpoints()
    with pytest.raises(CheckpointError, match=r"step_00000004.*run\.name=NEW"):
        train_run(f"run.resume={oldest}")
    assert snapshot(copied.path) == before
    assert train_run(f"run.resume={newest}").status == 0


def test_another_configuration_is_refused(train_run: TrainRun, copied: RunFolder) -> None:
    before = snapshot(copied.path)
    with pytest.raises(ConfigError) as refused:
        train_run("optim.lr=1e-3", "data.max_rows=40", "patches=[]", "loop.log_every_steps=1")
    text = str(refused.value)
    assert "optim.lr: 0.003 there, 0.001 now" in text
    assert "data.max_rows: 48 there, 40 now" in text
    assert "patches.linear_cross_entropy" in text
    assert "log_every_steps" not in text and "run.resume=never" in text
    assert snapshot(copied.path) == before


def test_what_decides_nothing_may_change(
    train_run: TrainRun,
    finished_run: RunFolder,
    copied: RunFolder,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.rmtree(copied.checkpoints()[-1])
    shutil.move(copied.path, copied.path.with_name("renamed"))
    resumed = train_run(
        "run.name=renamed",
        "checkpoint.keep_last=1",
        "checkpoint.every_steps=3",
        "loop.micro_batch_size=2",
        "loop.log_every_steps=1",
        "loop.eval_every_steps=1",
        "data.num_workers=1",
        "model.gradient_checkpointing=true",
        "model.recomputed_layers=[sliding,vision]",
    )
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "recomputed layers: 2 sliding, 3 vision; kept: 1 full, 3 shared" in said
    # Of step 3 the evaluation loss is known, and the lowest there is.
    assert [p.name for p in resumed.checkpoints()] == ["step_00000003", "step_00000004"]
    assert resumed.losses() == pytest.approx(finished_run.losses(), rel=1e-4)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_the_checkpoint_before_a_damaged_one_is_used(
    train_run: TrainRun,
    finished_run: RunFolder,
    copied: RunFolder,
    capsys: pytest.CaptureFixture,
) -> None:
    flip_a_bit(copied.checkpoints()[-1] / "__0_0.distcp")
    resumed = train_run("checkpoint.every_steps=2")
    said = capsys.readouterr().out
    assert "step_00000004 is damaged: __0_0.distcp is not what was written" in said
    assert "kept as damaged-step_00000004" in said and "going on after step 2" in said
    assert resumed.losses() == finished_run.losses()
    assert resumed.training_state() == finished_run.training_state()
    assert (copied.path / "checkpoints" / "damaged-step_00000004").is_dir()


def test_nothing_is_trained_anew_where_all_are_damaged(
    train_run: TrainRun, copied: RunFolder
) -> None:
    for checkpoint in copied.checkpoints():
        flip_a_bit(checkpoint / "rng_rank0.json")
    with pytest.raises(CheckpointError, match=r"No undamaged.*\n.*_00000004.*\n.*_00000002.*\n"):
        train_run("checkpoint.every_steps=2")
    before = snapshot(copied.path)
    shutil.rmtree(copied.path / "model")
    with pytest.raises(CheckpointError, match=r"Every checkpoint .* damaged and set aside"):
        train_run("checkpoint.every_steps=2")
    after = snapshot(copied.path)
    assert after.items() <= before.items()


def test_another_base_is_refused(
    train_run: TrainRun, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    command = ("recipe=gemma4_lora", f"model.path={base}", "model.weights=pretrained")
    short = ("loop.max_steps=2", "schedule.name=constant")
    run = train_run(*command, *short)
    shutil.rmtree(run.path / "model")
    weights = load_file(str(base / "model.safetensors"))
    for name, tensor in weights.items():
        weights[name] = tensor * 1.001
    save_file(weights, str(base / "model.safetensors"), metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another base: the frozen weights .* differ"):
        train_run(*command, *short)


def test_a_folder_in_use_is_refused(copied: RunFolder, train_run: TrainRun) -> None:
    program = (
        "import sys, time; from gemtune.run_folder import FolderLock; from pathlib import Path"
    )
    program += "; lock = FolderLock(Path(sys.argv[1])); lock.take()"
    program += "; print('locked', flush=True); time.sleep(60)"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(copied.path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        before = snapshot(copied.path)
        with pytest.raises(CheckpointError, match=rf"in use by process {other.pid} on .* since 20"):
            train_run("checkpoint.every_steps=2")
        assert snapshot(copied.path) == before
        other.kill()
    assert train_run("checkpoint.every_steps=2").status == 0


def test_saving_beside_the_training_changes_nothing(
    train_run: TrainRun, finished_run: RunFolder
) -> None:
    run = train_run("checkpoint.every_steps=1", "checkpoint.async_save=true")
    assert [p.name for p in run.checkpoints()] == ["step_00000003", "step_00000004"]
    assert run.losses() == finished_run.losses()
    assert run.training_state() == finished_run.training_state()
    assert all("checkpoint/stall_seconds" in m for m in run.metrics()[1:])
