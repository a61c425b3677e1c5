"""Runs without the audio tower train the same, and what they leave is a whole Gemma 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hearing import WITHOUT, all_tensors, hearing_checkpoint, is_audio
from recordings import tone, wav
from whole_runs import RunFolder, TrainRun, compose, press_ctrl_c_after

import recipes.gemma4_sft as recipe
from gemtune.errors import CheckpointError, ConfigError, DataError
from gemtune.export import ExportRequest, export_run

pytestmark = pytest.mark.xdist_group("without_audio")

LORA = ("recipe=gemma4_lora", "optim.lr=2e-2", "model.dtype=bfloat16")
EVERY_PATCH = "patches=[ple_offload,vision_streaming,linear_cross_entropy,supervised_positions]"
CASES = {
    # Everything, the tower as well where it is loaded: no row has audio, so that nothing moves it.
    "in full": ("model.dtype=float32", "optim.weight_decay=0.1"),
    "lora": LORA,
    # Its adapter of the projector of audio learns nothing, where there is one.
    "projector, packed": (
        *LORA,
        "adapter.parts=[language,vision,projector]",
        *("data.packing=true", "data.max_length=256", "loop.max_steps=2"),
    ),
    "in host memory": (*LORA, "model.freeze=[ple,vision,audio,projector]", EVERY_PATCH),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hearing_checkpoint(tmp_path_factory.mktemp("hearing"))


def on(base: Path) -> tuple[str, ...]:
    return ("model.weights=pretrained", f"model.path={base}")


@pytest.mark.parametrize("case", CASES)
def test_the_training_is_the_same_to_the_bit_and_so_is_the_model(
    train_run: TrainRun, base: Path, tmp_path: Path, case: str
) -> None:
    whole = train_run(*CASES[case], *on(base), run_dir=tmp_path / "whole")
    deaf = train_run(*CASES[case], *on(base), WITHOUT, run_dir=tmp_path / "deaf")
    assert deaf.losses() == whole.losses() and len(set(deaf.losses().values())) > 1
    evaluated = [m["eval/loss"] for run in (whole, deaf) for m in run.metrics() if "eval/loss" in m]
    assert len(evaluated) == 4 and evaluated[:2] == evaluated[2:]
    answers = [(run.path / "answers.jsonl").read_text() for run in (whole, deaf)]
    assert answers[0] == answers[1] and answers[0].count("\n") == 4
    trained, expected = deaf.tensors(), whole.tensors()
    assert trained and not any(map(is_audio, trained))
    assert trained.keys() == {name for name in expected if not is_audio(name)}
    assert all(torch.equal(value, expected[name]) for name, value in trained.items())
    check_same_export(deaf.path / "model", whole.path / "model", base)


def check_same_export(exported: Path, expected: Path, base: Path) -> None:
    """Tensors and configuration; the tower's tensors are those of the base."""
    ours, theirs, stored = (all_tensors(folder) for folder in (exported, expected, base))
    assert ours.keys() == theirs.keys() == stored.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
        if is_audio(name):
            assert torch.equal(value, stored[name].to(value.dtype)), name
    files = [
        {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".jinja")}
        for folder in (exported, expected)
    ]
    assert files[0] == files[1] and {"config.json", "processor_config.json"} < files[0].keys()
    assert json.loads(files[0]["config.json"])["audio_config"]["num_hidden_layers"] == 2


def test_exports_of_a_checkpoint_are_verified_as_any(
    train_run: TrainRun, base: Path, tmp_path: Path
) -> None:
    """By stock transformers in a fresh process: every tensor, and logits of text and image."""
    whole = train_run(*LORA, *on(base), run_dir=tmp_path / "whole")
    deaf = train_run(*LORA, *on(base), WITHOUT, run_dir=tmp_path / "deaf")
    folders = []
    for run, name, keys in (
        (whole, "whole", {"verify": False}),
        (deaf, "deaf", {}),
        (deaf, "adapter", {"kind": "adapter"}),
    ):
        said: list[str] = []
        request = ExportRequest(run=str(run.path), to=str(tmp_path / f"{name} exported"), **keys)
        folders.append(export_run(request, said.append))
        if name != "whole":
            assert [line.split(":")[0] for line in said[-2:]] == ["text", "image"]
    check_same_export(folders[1], folders[0], base)
    assert not any(map(is_audio, all_tensors(folders[2])))


def test_a_random_model_gets_the_tower_of_its_seed(
    train_run: TrainRun, base: Path, tmp_path: Path
) -> None:
    random = ("model.weights=random", f"model.path={base}", "loop.max_steps=2")
    whole = train_run(*random, run_dir=tmp_path / "whole")
    deaf = train_run(*random, WITHOUT, run_dir=tmp_path / "deaf")
    assert deaf.losses() == whole.losses()
    ours, theirs = (all_tensors(run.path / "model") for run in (deaf, whole))
    assert ours.keys() == theirs.keys() and sum(map(is_audio, ours)) > 40
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_going_on_is_to_the_bit_and_only_in_the_same_way(
    train_run: TrainRun, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = (*LORA, *on(base), WITHOUT)
    whole = train_run(*chosen, run_dir=tmp_path / "whole")
    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=2)
        assert train_run(*chosen).status == 130
    with pytest.raises(ConfigError, match=r"model\.audio_tower: False there, True now"):
        train_run(*LORA, *on(base))
    with pytest.raises(CheckpointError, match=r"another base.*model\.audio_tower"):
        train_run(*LORA, *on(base), f"run.resume={whole.path}", run_dir=tmp_path / "other")
    resumed = train_run(*chosen)
    assert resumed.status == 0
    assert resumed.training_state() == whole.training_state()
    ours, theirs = (all_tensors(run.path / "model") for run in (resumed, whole))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def rows_with_audio(folder: Path) -> tuple[str, ...]:
    """Two rows of text for each one with audio."""
    (folder / "a.wav").write_bytes(wav(tone(0.3)))
    rows: list[dict[str, Any]] = []
    for number in range(24):
        parts: list[dict[str, str]] = [{"type": "text", "text": f"say {number % 3}:"}]
        row: dict[str, Any] = {}
        if number % 3 == 1:
            parts, row = [{"type": "audio"}, *parts], {"audios": ["a.wav"]}
        answer = {"role": "assistant", "content": str(number % 3)}
        rows.append(row | {"messages": [{"role": "user", "content": parts}, answer]})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (f"data.path={path}", "data.eval_path=null", "data.eval_fraction=0.2")


def test_rows_with_audio_are_bad_rows_whose_reason_names_the_key(
    train_run: TrainRun, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows_with_audio(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(recipe, "build_base", lambda *_: pytest.fail("weights were read"))
        with pytest.raises(DataError, match=r"line 2.*'audio' is not read: model\.audio_tower=fal"):
            train_run(*LORA, *on(base), *data, WITHOUT)
    run = train_run(*LORA, *on(base), *data, WITHOUT, "data.on_bad_row=skip")
    rejected = (run.path / "rejected.jsonl").read_text().splitlines()
    assert len(rejected) == 8
    assert all("model.audio_tower=true loads it" in line for line in rejected)


def test_the_first_page_says_that_it_is_not_there(
    train_run: TrainRun, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: RunFolder = train_run(*LORA, *on(base), WITHOUT, "loop.max_steps=1")
    page = " ".join(capsys.readouterr().out.split())
    assert run.status == 0 and "without its audio tower (model.audio_tower=false)" in page
    assert "LOAD REPORT" not in page


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (("adapter=lora", "adapter.parts=[language,audio]"), r"adapter\.parts=\[language,audio\]"),
        (("optim.part_lrs.audio=1e-5",), r"optim\.part_lrs\.audio=1e-05"),
    ],
)
def test_what_would_train_it_is_refused(keys: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=rf"{says} trains the audio.*model\.audio_tower=true"):
        compose(*keys, WITHOUT)
    assert compose(*keys).model.audio_tower


def test_the_released_sizes_leave_it_out() -> None:
    for size, is_loaded in (("e2b", False), ("e4b", False), ("26b_a4b", True), ("31b", True)):
        assert compose(f"model={size}").model.audio_tower is is_loaded
