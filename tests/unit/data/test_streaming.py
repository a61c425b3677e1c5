"""Rows that are checked at their turn: the same ones at the same places, bad ones replaced."""

import gc
import json
import os

import pytest

from gemtune.data import BatchStream, ChatDataset, DataConfig, StreamedDataset, prepare
from gemtune.errors import ConfigError, DataError

BAD = {"messages": [{"role": "user", "content": "a"}]}


@pytest.fixture
def run(tokenizer, tiny_processor):
    def prepared(**config):
        config = {"eval_fraction": 0.0, "streaming": True} | config
        return prepare(DataConfig(**config), tokenizer, tiny_processor, seed=0)

    return prepared


def rows(chat, count, start=0):
    return [chat(f"question {i}", f"answer {i}") for i in range(start, start + count)]


def question(dataset, i):
    return dataset.row(i)["messages"][0]["content"]


def test_every_place_holds_what_it_holds_without_streaming(run, chat, write_jsonl):
    path = write_jsonl(rows(chat, 20))
    for settings in ({}, {"eval_fraction": 0.25}, {"max_rows": 8}):
        streamed, judged = run(path=path, **settings)
        whole, judged_too = run(path=path, streaming=False, **settings)
        assert isinstance(streamed, StreamedDataset) and isinstance(whole, ChatDataset)
        assert len(streamed) == len(whole) and len(judged) == len(judged_too)
        for i in range(len(whole)):
            assert streamed[i].input_ids.tolist() == whole[i].input_ids.tolist()
            assert streamed[i].labels.tolist() == whole[i].labels.tolist()
            assert streamed[i].where == whole[i].where and streamed.row(i) == whole.row(i)
        assert streamed.prompt(0)[1] == whole.prompt(0)[1]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_go_on_anywhere_in_the_same_shuffled_order(run, chat, write_jsonl, num_workers):
    path = write_jsonl(rows(chat, 13))
    streamed, whole = run(path=path)[0], run(path=path, streaming=False)[0]

    def batches(dataset, first, num_workers=0):
        stream = BatchStream(dataset, 0, 4, 2, 0, 1, num_workers=num_workers)
        return [[b.inputs["input_ids"].tolist() for b in step] for step in stream(first, 9)]

    expected = batches(whole, 0)
    assert batches(streamed, 0, num_workers) == expected
    assert batches(streamed, 5, num_workers) == expected[5:]


def test_nothing_is_read_before_its_turn(run, chat, write_jsonl):
    path = write_jsonl([*rows(chat, 2), BAD, *rows(chat, 2)])
    dataset, _ = run(path=path)
    assert len(dataset) == 5
    assert question(dataset, 1) == "question 1"
    with pytest.raises(DataError, match=r"rows.jsonl line 3: no assistant message"):
        dataset[2]


def test_the_next_good_row_stands_in_for_a_bad_one(run, chat, write_jsonl, tmp_path):
    path = write_jsonl([*rows(chat, 2), BAD, BAD, *rows(chat, 2, start=2), BAD])
    dataset, _ = run(path=path, on_bad_row="skip")
    dataset.journal = tmp_path / "rejected.jsonl"
    lines = [int(dataset[i].where.split()[-1]) for i in [*range(7), *range(7)]]
    assert lines == [1, 2, 5, 5, 5, 6, 1] * 2
    assert [said.split(":")[0] for said in dataset.rejected] == [
        f"{path} line {n}" for n in (3, 4, 7)
    ]
    written = [json.loads(line) for line in dataset.journal.read_text().splitlines()]
    assert [(entry["source"], entry["line"]) for entry in written] == [(path, n) for n in (3, 4, 7)]
    assert written[0]["reason"].startswith("no assistant message")
    assert "the next good row stands in for it" in dataset.notes[-1]


def test_workers_write_what_they_leave_out(run, chat, write_jsonl, tmp_path):
    dataset, _ = run(path=write_jsonl([BAD, *rows(chat, 3)]), on_bad_row="skip")
    dataset.journal = tmp_path / "rejected.jsonl"
    stream = BatchStream(dataset, 0, 4, 4, 0, 1, num_workers=1)
    assert len(list(stream(0, 2))) == 2
    assert len(dataset.journal.read_text().splitlines()) == 1


def test_workers_end_nothing_of_the_training_process(run, chat, write_jsonl, tmp_path, monkeypatch):
    """A frame of a video that was garbage there made a worker wait for threads it did not have."""

    class Held:
        def __init__(self):
            self.itself = self

        def __del__(self):
            (tmp_path / f"ended {os.getpid()}").touch()

    original = StreamedDataset.__getitem__

    def getitem(self, i):
        gc.collect()
        return original(self, i)

    dataset, _ = run(path=write_jsonl(rows(chat, 4)))
    monkeypatch.setattr(StreamedDataset, "__getitem__", getitem)
    gc.disable()
    try:
        Held()
        assert len(list(BatchStream(dataset, 0, 4, 4, 0, 1, num_workers=1)(0, 1))) == 1
    finally:
        gc.enable()
    assert [p.name for p in tmp_path.glob("ended *")] == [f"ended {os.getpid()}"]


def test_bad_rows_alone_end_the_run(run, write_jsonl):
    dataset, _ = run(path=write_jsonl([BAD] * 150), on_bad_row="skip")
    with pytest.raises(DataError, match=r"^100 rows one after another cannot be .* line 107: no a"):
        dataset[7]


def test_images_are_checked_too(run, chat, png, tmp_path, write_jsonl):
    (tmp_path / "a.png").write_bytes(png(96, 96)[:500])
    (tmp_path / "b.png").write_bytes(png(48, 48))
    path = write_jsonl([chat((None, "a"), "b", images=[name]) for name in ("a.png", "b.png")])
    dataset, _ = run(path=path, on_bad_row="skip")
    assert len(dataset[0].images) == 1 and dataset[0].where.endswith("line 2")
    assert "the image is damaged" in dataset.rejected[0]


# A mix


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix_repeats_rows_after_some_were_held_out(run, chat, write_jsonl, streaming):
    few = write_jsonl(rows(chat, 4), "few.jsonl")
    many = write_jsonl(rows(chat, 36, start=100), "many.jsonl")
    mix = [{"path": few, "weight": 1}, {"path": many, "weight": 3}]
    training, judged = run(mix=mix, eval_fraction=0.2, streaming=streaming)
    assert len(judged) == 8
    learned = [question(training, i) for i in range(len(training))]
    held_out = {question(judged, i) for i in range(len(judged))}
    assert not held_out & set(learned)  # although rows are repeated
    assert len(set(learned)) == 32
    from_few = sum(int(q.split()[1]) < 100 for q in learned)
    assert abs(from_few / len(learned) - 0.25) < 0.02
    note = training.notes[-1]
    assert note.startswith(f"an epoch of the mix has {len(learned)} rows: {few} {from_few} rows (")
    again, _ = run(mix=mix, eval_fraction=0.2, streaming=streaming)
    assert [question(again, i) for i in range(len(again))] == learned


def test_bad_rows_of_a_mix_are_counted_once(run, chat, write_jsonl):
    few = write_jsonl([*rows(chat, 2), BAD], "few.jsonl")
    many = write_jsonl(rows(chat, 10, start=100), "many.jsonl")
    mix = [{"path": few, "weight": 1}, {"path": many, "weight": 1}]
    training, _ = run(mix=mix, streaming=False, on_bad_row="skip")
    assert len(training) == 20 and len(training.rejected) == 1
    assert training.rejected[0].startswith(f"{few} line 3: ")
    numbers = [int(question(training, i).split()[1]) for i in range(20)]
    assert numbers.count(0) == numbers.count(1) == 5


def test_the_first_rows_of_each_source(run, chat, write_jsonl):
    paths = [write_jsonl(rows(chat, 5, start=n), f"{n}.jsonl") for n in (0, 100)]
    training, _ = run(mix=[{"path": path} for path in paths], max_rows=2, streaming=False)
    assert [question(training, i) for i in range(4)] == [f"question {i}" for i in (0, 100, 1, 101)]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "a", "mix": [{"path": "b"}]}, "data.path=a and data.mix are both given"),
        ({"mix": [{"path": "b"}], "columns": {"messages": "m"}}, "data.columns is for data.path"),
        ({"mix": [{"path": "b"}], "filter": {"a": 1}}, "data.filter is for data.path"),
        ({"path": "a", "mix_epoch": "last"}, "data.mix_epoch=last is not one of all, first"),
        ({"path": "a", "columns": {"x": "y"}}, "data.columns.x is no column that is read"),
        ({"path": "a", "max_image_pixels": 0}, "data.max_image_pixels=0 is too small"),
        ({"path": "a", "max_media_bytes": 0}, "data.max_media_bytes=0 is too small"),
    ],
)
def test_settings_that_cannot_be(settings, says):
    with pytest.raises(ConfigError, match="^" + says):
        DataConfig(**settings)
