"""A run on two or three ranks, sharded, does what a run in one process does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from sharded_runs import COMMON, Case, mostly_text, trains
from whole_runs import SMALL, RunFolder, TrainRun, compose

from gemtune import adapters
from gemtune.export import ExportRequest, export_run
from gemtune.models import load_model, load_processing

pytestmark = pytest.mark.xdist_group("fsdp_runs")

SHARDED = "parallel=fsdp2"
FROZEN = (
    "loop.max_steps=20",
    "model.freeze=[ple,vision]",
    "model.gradient_checkpointing=true",
    "patches=[ple_offload,vision_streaming,linear_cross_entropy,supervised_positions]",
)
LORA = (
    "loop.max_steps=20",
    "recipe=gemma4_lora",
    "adapter.parts=[language,vision]",
    "optim.part_lrs.vision=5e-4",
    "optim.weight_decay=0.1",
)
READ = (
    "loop.max_steps=4",
    "checkpoint.every_steps=2",
    "recipe=gemma4_lora",
    "model.weights=pretrained",
    "model.dtype=bfloat16",
)
FULL = ("loop.max_steps=20", "checkpoint.every_steps=10")
MUON = ("loop.max_steps=10", "optim=muon", "checkpoint.every_steps=5")
# Sharded, each token of an answer gathers the whole model: some runs are enough.
SILENT = "data.eval_generate_rows=0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = mostly_text(tmp_path_factory.mktemp("data") / "rows.parquet")
    return ("loop.max_steps=5", f"data.path={path}", f"data.eval_path={path}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data: tuple[str, ...]) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    path = f"model.path={folder}/full on 2/run/model"
    read = (*READ, path, SHARDED, SILENT)
    on_two = {
        "full on 2": Case((*FULL, SHARDED, SILENT)),
        "gone on": Case((*FULL, SHARDED, SILENT), goes_on_from="full on 2"),
        "frozen": Case((*FROZEN, SHARDED)),
        "muon": Case((*MUON, SHARDED, SILENT)),
        "muon gone on": Case((*MUON, SHARDED, SILENT), goes_on_from="muon"),
        "lora": Case((*LORA, SHARDED)),
        "read": Case(read),
        "sent": Case(read, is_sent=True),
        "gone on from sent": Case(read, goes_on_from="sent"),
        "mostly text": Case((*data, SHARDED)),
        "mostly text under ddp": Case((*data, "parallel=ddp", SILENT)),
    }
    on_three = {
        "full on 3": Case((*FULL, SHARDED)),
        "from 2 on 3": Case((*FULL, SHARDED, SILENT), goes_on_from="full on 2"),
    }
    run_ranks(trains, 2, on_two, str(folder), limit_seconds=400)
    run_ranks(trains, 3, on_three, str(folder), limit_seconds=300)
    return folder


def check_same(run: RunFolder, alone: RunFolder, num_answers: int = 0) -> None:
    """Losses, evaluation and answers."""
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-4)
    assert [run.losses()[step] for step in (1, 2, 3)] == pytest.approx(
        [alone.losses()[step] for step in (1, 2, 3)], rel=1e-6
    )
    rounded = ["train/grad_norm", "eval/loss", "eval/token_accuracy"]
    rounded += ["eval/exact_match"] if num_answers else []
    for ours, theirs in zip(run.metrics(), alone.metrics(), strict=True):
        for key in ("train/supervised_tokens", "train/tokens", "train/token_accuracy"):
            assert ours.get(key) == theirs.get(key)
        for key in rounded:
            assert (key in ours) == (key in theirs)
            assert ours.get(key, 0) == pytest.approx(theirs.get(key, 0), rel=1e-3)
    if num_answers:
        answers = [(r.path / "answers.jsonl").read_text().splitlines() for r in (run, alone)]
        assert sorted(answers[0]) == sorted(answers[1]) and len(answers[0]) == num_answers


def test_every_parameter_trained(runs: Path, train_run: TrainRun) -> None:
    alone = train_run(*COMMON, *FULL)
    losses = alone.losses()
    assert len(losses) == 20 and losses[20] < losses[1] - 0.5
    check_same(RunFolder(runs / "full on 2" / "run", 0), alone)
    check_same(RunFolder(runs / "full on 3" / "run", 0), alone, num_answers=7)


def test_going_on(runs: Path) -> None:
    """From a checkpoint in the middle: to the bit, and on more ranks up to rounding."""
    whole = RunFolder(runs / "full on 2" / "run", 0)
    again = RunFolder(runs / "gone on" / "run", 0)
    assert again.losses() == whole.losses()
    for rank in (0, 1):
        ours, theirs = (torch.load(run.path / f"shards{rank}.pt") for run in (again, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    check_same(RunFolder(runs / "from 2 on 3" / "run", 0), whole)


def test_frozen_parts_in_host_memory(runs: Path, train_run: TrainRun) -> None:
    check_same(RunFolder(runs / "frozen" / "run", 0), train_run(*COMMON, *FROZEN), num_answers=7)


def test_muon(runs: Path, train_run: TrainRun) -> None:
    """Its iteration in bfloat16 turns rounding errors of gradients into larger ones."""
    whole = RunFolder(runs / "muon" / "run", 0)
    losses, alone = whole.losses(), train_run(*COMMON, *MUON).losses()
    assert losses == pytest.approx(alone, rel=1e-2)
    assert [losses[step] for step in (1, 2)] == pytest.approx([alone[1], alone[2]], rel=1e-4)
    again = RunFolder(runs / "muon gone on" / "run", 0)
    assert again.losses() == losses
    assert again.training_state() == whole.training_state()


def test_adapters(runs: Path, train_run: TrainRun) -> None:
    check_same(RunFolder(runs / "lora" / "run", 0), train_run(*COMMON, *LORA), num_answers=7)


def test_adapters_on_a_checkpoint_in_bfloat16(runs: Path, train_run: TrainRun) -> None:
    path = f"model.path={runs}/full on 2/run/model"
    run, alone = RunFolder(runs / "read" / "run", 0), train_run(*COMMON, *READ, path)
    assert "dtype: bfloat16" in (run.path / "config.yaml").read_text()
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-2)
    assert run.losses()[1] == pytest.approx(alone.losses()[1], rel=1e-6)


def test_a_checkpoint_does_not_know_how_its_base_was_read(runs: Path) -> None:
    """Read in parts, sent by the first rank, and the one gone on from the other's checkpoint."""
    folders = [RunFolder(runs / name / "run", 0) for name in ("read", "sent", "gone on from sent")]
    assert all(run.losses() == folders[0].losses() for run in folders)
    assert all(run.training_state() == folders[0].training_state() for run in folders)
    documents = [json.loads((run.checkpoints()[-1] / "state.json").read_text()) for run in folders]
    assert documents[0]["base"]["frozen_weights"] == documents[1]["base"]["frozen_weights"]


def test_steps_without_an_image(runs: Path, train_run: TrainRun, data: tuple[str, ...]) -> None:
    alone = train_run(*COMMON, *data)
    check_same(RunFolder(runs / "mostly text" / "run", 0), alone, num_answers=7)
    check_same(RunFolder(runs / "mostly text under ddp" / "run", 0), alone)


@pytest.mark.parametrize("name", ["full on 3", "frozen", "lora"])
def test_the_export_is_what_was_trained(name: str, runs: Path) -> None:
    """From the shards as they lay on the ranks: put together, and merged here."""
    overrides = {"full on 3": FULL, "frozen": FROZEN, "lora": LORA}[name]
    config = compose("run.name=run", *SMALL, *COMMON, *overrides)
    folder = runs / name / "run"
    shards = [torch.load(file) for file in sorted(folder.glob("shards*.pt"))]
    assert len(shards) == (3 if name.endswith("3") else 2)
    model = load_model(config.model, load_processing(config.model), config.run.seed)
    model = adapters.attach(model, config.adapter)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == shards[0].keys()
    with torch.no_grad():
        for n, parameter in trained.items():
            parameter.copy_(torch.cat([shard[n] for shard in shards]))
    values = adapters.merge(model).state_dict()
    exported = load_file(str(folder / "model" / "model.safetensors"))
    assert len(exported) > 100
    for n, tensor in exported.items():
        assert torch.equal(tensor, values[n]), n


@pytest.mark.parametrize("name", ["full on 2", "lora"])
def test_a_sharded_checkpoint_is_exported(runs: Path, tmp_path: Path, name: str) -> None:
    """By one process; the run itself gathered its shards for the same."""
    run = runs / name / "run"
    request = ExportRequest(run=str(run), to=str(tmp_path / "out"), dtype="float32", verify=False)
    written = load_file(str(export_run(request) / "model.safetensors"))
    expected = load_file(str(run / "model" / "model.safetensors"))
    assert written.keys() == expected.keys()
    for key, value in written.items():
        torch.testing.assert_close(value, expected[key].float(), rtol=1e-6, atol=1e-7)
