"""Runs on audio and videos: what is heard and seen is learned, packed or not, cut or whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import model_folder
from recordings import frame, png, tone, wav
from whole_runs import TrainRun, press_ctrl_c_after

NUM_ROWS = 24
# Of a model that only knows that there are two answers: ln 2 for one of their three tokens or so.
GUESSING = 0.2


def row(part: dict[str, Any], answer: str, **media: Any) -> dict[str, Any]:
    content = [part, {"type": "text", "text": "which?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | media


def audio_rows(folder: Path) -> list[dict[str, Any]]:
    """A low tone or a high one."""
    rows = []
    for number in range(NUM_ROWS):
        hertz, answer = ((200, "low"), (3000, "high"))[number % 2]
        path = folder / f"{number}.wav"
        path.write_bytes(wav(tone(0.2 + 0.02 * number, hertz, seed=number)))
        rows.append(row({"type": "audio"}, answer, audios=[path.name]))
    return rows


def video_rows(folder: Path) -> list[dict[str, Any]]:
    """Frames that grow brighter or darker; and every fourth row is of text alone."""
    rows = []
    for number in range(NUM_ROWS):
        greys = [5 + number % 7, 30, 48][:: 1 if number % 2 else -1]
        names = [f"{number}_{n}.png" for n in range(3)]
        for name, grey in zip(names, greys, strict=True):
            (folder / name).write_bytes(png(frame(grey, 48, 48)))
        answer = "up" if number % 2 else "down"
        media = {"videos": [{"frames": names, "fps": 1}]}
        rows.append(row({"type": "video"}, answer, **media) if number % 4 else plain(answer))
    return rows


def plain(answer: str) -> dict[str, Any]:
    return row({"type": "text", "text": f"say {answer}:"}, answer)


def overrides(tmp_path: Path, rows: list[dict[str, Any]], hears: bool) -> tuple[str, ...]:
    """Of a run on these rows, of a random model of a template that knows the media."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    folder = Path(model_folder("e2b", tmp_path, hears=True))
    processing = json.loads((folder / "processor_config.json").read_text())
    processing["video_processor"]["do_resize"] = False  # of 48 x 48: one soft token
    (folder / "processor_config.json").write_text(json.dumps(processing))
    if not hears:  # videos need no tower of their own
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"audio_config": None}))
    return (
        f"model.path={folder}",
        "model.weights=random",
        f"data.path={path}",
        f"data.max_rows={NUM_ROWS}",
        "data.eval_path=null",
        "data.eval_fraction=0.2",
        "checkpoint.every_steps=4",
    )


def test_what_is_heard_is_learned_and_the_run_resumes_to_the_bit(
    train_run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("loop.max_steps=30", "checkpoint.every_steps=15", "data.num_workers=1")
    chosen = (*overrides(tmp_path, audio_rows(tmp_path), True), *settings)
    whole = train_run(*chosen, run_dir=tmp_path / "whole")
    losses = whole.losses()
    assert losses[30] < GUESSING / 4 and whole.metrics()[-1]["eval/loss"] < GUESSING / 4
    first, last = (torch.cat([t.flatten() for t in tower(c)]) for c in whole.checkpoints()[-2:])
    assert not torch.equal(first, last)
    answers = [json.loads(line) for line in (whole.path / "answers.jsonl").read_text().splitlines()]
    assert {a["expected"] for a in answers} <= {"low", "high"}
    assert all(a["question"] == "[audio] which?" for a in answers)

    with monkeypatch.context() as patched:
        press_ctrl_c_after(patched, step=16)
        assert train_run(*chosen).status == 130
    resumed = train_run(*chosen)
    assert resumed.losses() == losses
    assert resumed.training_state() == whole.training_state()


def tower(checkpoint: Path) -> list[torch.Tensor]:
    """The trained parameters of the audio tower."""
    from gemtune.checkpoint.tensors import read_tensors

    tensors = {n: t for n, t in read_tensors(checkpoint).items() if n.startswith("model|")}
    found = [tensors[name] for name in sorted(tensors) if "audio_tower" in name]
    assert found
    return found


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_seen_moving_is_learned(train_run: TrainRun, tmp_path: Path, packed: bool) -> None:
    chosen = (*overrides(tmp_path, video_rows(tmp_path), False), "loop.max_steps=16")
    if packed:
        chosen += ("data.packing=true", "data.max_length=128", "loop.global_batch_size=4")
    run = train_run(*chosen)
    assert run.losses()[16] < GUESSING / 2
    assert run.status == 0


def test_streamed_rows_with_audio_are_the_same_rows(train_run: TrainRun, tmp_path: Path) -> None:
    chosen = (*overrides(tmp_path, audio_rows(tmp_path), True), "loop.max_steps=2")
    unsorted = "data.bucket_rows=0"  # a stream does not know its lengths
    whole = train_run(*chosen, unsorted, run_dir=tmp_path / "whole")
    streamed = train_run(*chosen, "data.streaming=true")
    assert streamed.losses() == whole.losses()
