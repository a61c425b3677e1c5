"""prepare(): every row checked, good ones kept, bad ones named."""

import numpy as np
import pytest

from gemtune.data import DataConfig, prepare
from gemtune.data.media.images import ImageEncoder
from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.template import ChatTemplate
from gemtune.errors import ConfigError, DataError


@pytest.fixture
def run(tokenizer, tiny_processor):
    def prepared(path, seed=0, progress=lambda done, total: None, **config):
        config = DataConfig(path=path, **config)
        return prepare(config, tokenizer, tiny_processor, seed, progress)

    return prepared


@pytest.fixture
def rows(chat):
    return [chat(f"question {i}", f"answer {i}") for i in range(20)]


BAD = {"messages": [{"role": "user", "content": "a"}]}


def questions(dataset):
    return [dataset.row(i)["messages"][0]["content"] for i in range(len(dataset))]


# Splitting


@pytest.mark.parametrize(("fraction", "held_out"), [(0.25, 5), (0.02, 1), (0.99, 19), (0.0, 0)])
def test_a_share_is_held_out(run, rows, write_jsonl, fraction, held_out):
    path = write_jsonl(rows)
    train, judge = run(path, eval_fraction=fraction)
    assert (len(train), len(judge)) == (20 - held_out, held_out)
    both = questions(train) + questions(judge)
    assert sorted(both) == sorted(f"question {i}" for i in range(20))
    for part in (train, judge):
        numbers = [int(q.split()[1]) for q in questions(part)]
        assert numbers == sorted(numbers)  # in the order of the file


def test_what_is_held_out_depends_on_the_seed_alone(run, rows, write_jsonl):
    path = write_jsonl(rows)

    def held_out(seed):
        return tuple(questions(run(path, seed=seed, eval_fraction=0.25)[1]))

    np.random.seed(1)
    first = held_out(0)
    np.random.seed(2)
    assert held_out(0) == first
    assert len({held_out(seed) for seed in range(4)}) > 1


def test_one_row_is_never_held_out(run, rows, write_jsonl):
    train, judge = run(write_jsonl(rows[:1]), eval_fraction=0.5)
    assert (len(train), len(judge)) == (1, 0)


def test_eval_path_leaves_the_training_rows_whole(run, rows, write_jsonl):
    path = write_jsonl(rows[:15])
    other = write_jsonl(rows[15:], "other.jsonl")
    train, judge = run(path, eval_path=other)
    assert questions(train) == [f"question {i}" for i in range(15)]
    assert questions(judge) == [f"question {i}" for i in range(15, 20)]


def test_max_rows(run, rows, write_jsonl):
    path = write_jsonl(rows)
    train, judge = run(path, max_rows=8, eval_fraction=0.25)
    assert sorted(questions(train) + questions(judge)) == [f"question {i}" for i in range(8)]
    assert len(run(path, max_rows=100)[0]) == 19


@pytest.mark.parametrize("limit", [0, 2, 100])
def test_eval_max_rows(run, rows, write_jsonl, limit):
    path = write_jsonl(rows)
    train, judge = run(path, eval_fraction=0.5, eval_max_rows=limit)
    assert (len(train), len(judge)) == (10, min(limit, 10))
    _, judge = run(path, eval_path=path, eval_max_rows=limit)
    assert questions(judge) == [f"question {i}" for i in range(min(limit, 20))]


# Bad rows


def test_a_bad_row_stops_the_run(run, rows, write_jsonl):
    path = write_jsonl([*rows, BAD])
    with pytest.raises(DataError, match=r"rows.jsonl line 21: no assistant message") as caught:
        run(path, eval_fraction=0)
    assert str(caught.value).startswith(path)


def test_bad_rows_are_skipped_counted_and_named(run, rows, write_jsonl):
    path = write_jsonl([BAD, *rows[:3], {"messages": []}, *rows[3:6], BAD])
    reports = []
    train, judge = run(
        path,
        eval_path=path,
        on_bad_row="skip",
        progress=lambda done, total: reports.append((done, total)),
    )
    assert questions(train) == questions(judge) == [f"question {i}" for i in range(6)]
    for part in (train, judge):
        assert [said.split(":")[0] for said in part.rejected] == [
            f"{path} line {n}" for n in (1, 5, 9)
        ]
    assert train[3].where == f"{path} line 6"  # a row keeps its place in the file
    assert train.prompt(3)[0].where == f"{path} line 6"
    assert reports == [(9, 9)]  # of both, which are the same file; bad rows count as checked


def test_only_bad_rows_to_learn_from(run, rows, write_jsonl):
    path = write_jsonl([BAD] * 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be learned from") as caught:
        run(path, eval_path=write_jsonl(rows, "good.jsonl"), on_bad_row="skip")
    assert f"{path} line 1: no assistant message" in str(caught.value)


def test_only_bad_rows_to_judge_by(run, rows, write_jsonl):
    path = write_jsonl(rows)
    train, judge = run(path, eval_path=write_jsonl([BAD] * 3, "bad.jsonl"), on_bad_row="skip")
    assert (len(train), len(judge), len(judge.rejected)) == (20, 0, 3)
    assert judge.num_tokens == judge.num_media["image"] == judge.num_supervised_tokens == 0
    assert judge.longest_row_tokens == 0


def test_a_damaged_image_is_found_when_the_row_is_used(run, chat, png, tmp_path, write_jsonl):
    """The check reads headers only."""
    (tmp_path / "a.png").write_bytes(png(96, 96)[:500])
    path = write_jsonl([chat((None, "a"), "b", images=["a.png"])])
    train, _ = run(path)
    with pytest.raises(DataError, match=r"rows.jsonl line 1: the image is damaged"):
        train[0]


# Rows


def test_counts(run, chat, png, write_parquet):
    rows = [
        chat((None, "What digit is this?"), ("7",), images=[png(48, 96)]),
        chat((None, None, "?"), ("3 and 8",), ("And?",), ("5",), images=[png(), png(96, 96)]),
        chat(("hi",), ("yes",), images=[]),
    ]
    train, _ = run(write_parquet(rows), eval_fraction=0)
    examples = [train[i] for i in range(3)]
    assert train.num_media["image"] == 3 == sum(len(e.images) for e in examples)
    assert ("image" in train.media_in_every_row) == all(e.images for e in examples)
    assert train.num_tokens == sum(len(e.input_ids) for e in examples)
    assert train.longest_row_tokens == max(len(e.input_ids) for e in examples)
    assert train.num_supervised_tokens == sum(int((e.labels != -100).sum()) for e in examples)
    assert train.num_supervised_tokens == train.batch(examples).num_supervised_tokens


def test_a_row_is_what_the_encoder_makes_of_it(run, make_encoder):
    train, _ = run("bundled:digits/heldout.parquet", eval_fraction=0, max_rows=20)
    encoder = make_encoder()
    assert {len(train[i].images) for i in range(20)} == {1, 2}
    for i in range(20):
        expected, found = encoder.encode(train.row(i), train[i].where), train[i]
        assert found.input_ids.tolist() == expected.input_ids.tolist()
        assert found.labels.tolist() == expected.labels.tolist()
        for ours, theirs in zip(found.images, expected.images, strict=True):
            np.testing.assert_array_equal(ours.pixels, theirs.pixels)


def test_a_cut_row_has_only_the_images_before_the_cut(run, chat, png, write_parquet):
    path = write_parquet([chat((None, "a"), ("b",), (None, "c"), ("d",), images=[png(), png()])])
    train, _ = run(path, truncate="right", max_length=20)
    assert train.num_media["image"] == len(train[0].images) == 1
    assert "image" in train.media_in_every_row
    assert len(train[0].input_ids) == 20


def test_a_row_with_images_is_tokenized_once(run, monkeypatch):
    """When it is checked. Afterwards its ids are known, and only the images are read."""
    train, _ = run("bundled:digits/heldout.parquet", max_rows=5, eval_fraction=0)
    calls = []
    monkeypatch.setattr(ControlTokens, "encode", lambda *a: calls.append(a))
    monkeypatch.setattr(ChatTemplate, "render", lambda *a, **k: calls.append(a))
    monkeypatch.setattr(ChatTemplate, "trace", lambda *a, **k: calls.append(a))
    assert len(train[0].images) > 0
    assert not calls


def test_the_check_decodes_no_image(run, monkeypatch):
    monkeypatch.setattr(ImageEncoder, "encode", lambda *a: pytest.fail("decoded"))
    train, _ = run("bundled:digits/heldout.parquet", max_rows=20)
    assert train.num_media["image"] > 0


def test_batches_pad_with_the_tokenizers_token(run, rows, write_jsonl):
    train, _ = run(write_jsonl(rows), eval_fraction=0)
    right = train.batch([train[0], train[15]])
    left = train.batch([train.prompt(0)[0], train.prompt(15)[0]], padding_side="left")
    assert right.inputs["input_ids"][0, -1] == left.inputs["input_ids"][0, 0] == 0
    assert right.inputs["attention_mask"][0, -1] == left.inputs["attention_mask"][0, 0] == 0


# Configuration


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"path": None}, "data.path is not set"),
        ({"truncate": "lift"}, "data.truncate=lift is not one of none, right, left"),
        ({"learn": "asistant"}, "data.learn=asistant .* Did you mean 'assistant'"),
        ({"thinking": "yes"}, "data.thinking=yes is not one of auto, on, off"),
        ({"dropped_reasoning": "x"}, "data.dropped_reasoning=x is not one of refuse, keep, drop"),
        ({"empty_thought": "x"}, "data.empty_thought=x is not one of last, all"),
        ({"prepared": "x"}, "data.prepared=x is not one of keep, refresh, off"),
        ({"max_bad_rows": -1}, "data.max_bad_rows=-1 is too small"),
        ({"num_prepare_workers": 0}, "data.num_prepare_workers=0 is too small"),
        ({"on_bad_row": "skp"}, "data.on_bad_row=skp .* Did you mean 'skip'"),
        ({"max_length": 1}, "data.max_length=1 is too small"),
        ({"max_rows": 0}, "data.max_rows=0 is too small"),
        ({"eval_max_rows": -1}, "data.eval_max_rows=-1 is too small"),
        ({"eval_fraction": 1.0}, r"data.eval_fraction=1.0 must be in \[0, 1\)"),
        ({"eval_fraction": float("nan")}, r"data.eval_fraction=nan must be in \[0, 1\)"),
        ({"num_workers": -1}, "data.num_workers=-1 is too small"),
    ],
)
def test_impossible_values_are_refused(change, says):
    with pytest.raises(ConfigError, match=says):
        DataConfig(**{"path": "a.jsonl"} | change)
