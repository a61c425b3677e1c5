"""Rows are prepared once: by any number of processes, after any kill, for every rank and start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from gemtune.data import ChatEncoder, DataConfig, prepare
from gemtune.data.media.images import ImageEncoder
from gemtune.data.preparation import cache as module
from gemtune.data.preparation.cache import Preparation
from gemtune.data.preparation.key import code_digest, preparation_key
from gemtune.data.preparation.rows import read_batch
from gemtune.data.sources.source import read_source
from gemtune.errors import DataError


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(module, "ROWS_PER_FILE", 10)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def make_source(write_jsonl, chat):
    def make(num_rows=35, bad=(), name="rows.jsonl"):
        rows = [chat(f"question {n}", f"answer {n * 7}") for n in range(num_rows)]
        for n in bad:
            rows[n] = {"messages": [{"role": "user", "content": "a"}]}
        return read_source(write_jsonl(rows, name), "train", "data.path")

    return make


def encoded_count(encoder, monkeypatch):
    counted = []
    real = ChatEncoder.encode_rows
    monkeypatch.setattr(
        ChatEncoder, "encode_rows", lambda self, rows: counted.append(len(rows)) or real(self, rows)
    )
    return counted


def command_of(process):
    try:
        return (process / "cmdline").read_text(errors="replace")
    except OSError:  # it has ended since
        return ""


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for row in range(len(ours)):
        assert ours.ids(row).tolist() == theirs.ids(row).tolist()
        assert ours.runs(row).tolist() == theirs.runs(row).tolist()
    assert ours.is_bad.tolist() == theirs.is_bad.tolist()
    assert [ours.reason(n) for n in np.flatnonzero(ours.is_bad).tolist()] == [
        theirs.reason(n) for n in np.flatnonzero(theirs.is_bad).tolist()
    ]


# Once


def test_the_second_start_encodes_nothing(make_source, make_encoder, cache, monkeypatch):
    source, encoder = make_source(bad=(3, 21)), make_encoder()
    counted = encoded_count(encoder, monkeypatch)
    reports = []
    first = Preparation(str(cache)).rows(source, encoder, 35, lambda *at: reports.append(at))
    assert (sum(counted), reports) == (35, [(10, 35), (20, 35), (30, 35), (35, 35)])
    counted.clear()
    again = Preparation(str(cache)).rows(
        read_source(source.name, "train", "data.path"), make_encoder(), 35
    )
    assert not counted
    same(first, again)


def test_workers_give_the_same_rows(make_source, make_encoder, tmp_path):
    source, encoder = make_source(bad=(0, 17, 34)), make_encoder()
    alone = Preparation(str(tmp_path / "a"), num_processes=1).rows(source, encoder, 35)
    several = Preparation(str(tmp_path / "b"), num_processes=3).rows(source, encoder, 35)
    memory = Preparation(str(tmp_path / "c"), keeps="off").rows(source, encoder, 35)
    same(alone, several)
    same(alone, memory)
    assert not (tmp_path / "c").exists()
    plain = [encoder.encode_text(source.rows[n], "")[0] for n in (1, 16, 33)]
    for n, example in zip((1, 16, 33), plain, strict=True):
        assert several.ids(n).tolist() == example.input_ids.tolist()


def test_more_rows_later_keep_the_files(make_source, make_encoder, cache, monkeypatch):
    source, encoder = make_source(), make_encoder()
    counted = encoded_count(encoder, monkeypatch)
    Preparation(str(cache)).rows(source, encoder, 20)
    Preparation(str(cache)).rows(source, encoder, 35)
    assert sum(counted) == 35


def test_refresh_prepares_anew_once_for_all_ranks(make_source, make_encoder, cache, monkeypatch):
    source, encoder = make_source(), make_encoder()
    counted = encoded_count(encoder, monkeypatch)
    Preparation(str(cache)).rows(source, encoder, 35)
    monkeypatch.setattr(module, "_STARTED", time.time())
    for _ in range(3):
        Preparation(str(cache), keeps="refresh").rows(source, encoder, 35)
    assert sum(counted) == 70


def test_ranks_at_once_prepare_once(make_source, make_encoder, cache):
    """Processes that start together: one encodes, the others read its files."""
    source, encoder = make_source(), make_encoder()
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def rank():
        counted = []
        real = ChatEncoder.encode_rows

        def slow(self, rows):
            time.sleep(0.05)
            counted.append(len(rows))
            return real(self, rows)

        ChatEncoder.encode_rows = slow
        prepared = Preparation(str(cache), num_processes=1).rows(source, encoder, 35)
        results.put((sum(counted), prepared.lengths.tolist()))

    ranks = [context.Process(target=rank) for _ in range(4)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=30) for _ in ranks]
    for process in ranks:
        process.join(timeout=10)
        assert process.exitcode == 0
    assert sorted(count for count, _ in found) == [0, 0, 0, 35]
    assert len({tuple(lengths) for _, lengths in found}) == 1


# What decides


CHANGES = {
    "max_length": {"max_length": 100},
    "truncate": {"truncate": "right"},
    "learn": {"learn": "last_assistant"},
    "thinking": {"thinking": "on"},
    "dropped_reasoning": {"dropped_reasoning": "drop"},
    "empty_thought": {"empty_thought": "all"},
    "ignored_keys": {"ignored_keys": ("id",)},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_options_are_another_preparation(make_source, make_encoder, change):
    source = make_source()
    assert preparation_key(source, make_encoder()) == preparation_key(source, make_encoder())
    assert preparation_key(source, make_encoder()) != preparation_key(
        source, make_encoder(**change)
    )


def test_other_data_are_another_preparation(
    make_source, make_encoder, tokenizer, tiny_processor, stock_processor, tmp_path
):
    import copy

    source = make_source()
    path = Path(source.name)
    keys = {preparation_key(source, make_encoder())}
    size = path.stat().st_size
    text = path.read_text().replace("question 3", "question 4", 1)
    path.write_text(text)
    assert path.stat().st_size == size
    keys.add(preparation_key(read_source(str(path), "train", "k"), make_encoder()))
    keys.add(preparation_key(make_source(36), make_encoder()))
    filtered = read_source(source.name, "train", "k", columns={"messages": "messages"})
    keys.add(preparation_key(filtered, make_encoder()))
    other = copy.deepcopy(tokenizer)
    other.chat_template += "{# #}"
    keys.add(preparation_key(source, make_encoder(tokenizer=other)))
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<more>"])
    keys.add(preparation_key(source, make_encoder(tokenizer=more)))
    keys.add(preparation_key(source, make_encoder(processor=stock_processor)))
    keys.add(preparation_key(source, make_encoder(root=tmp_path)))
    assert len(keys) == 8
    assert None not in keys


def test_parquet_and_mixes_have_a_key(make_encoder, chat, write_parquet):
    path = write_parquet([chat(("q",), ("a",))] * 3)
    keys = {preparation_key(read_source(path, "train", "k"), make_encoder()) for _ in range(2)}
    assert len(keys) == 1 and None not in keys


# Kills, damage, bad rows


def test_a_killed_preparation_goes_on(make_source, make_encoder, cache, monkeypatch, tiny_dir):
    """SIGKILL between two files, with processes at work: what is whole is used, nothing else."""
    source = make_source(200)
    code = f"""
    import sys, time
    sys.path[:0] = {sys.path!r}
    from transformers import AutoTokenizer, Gemma4ImageProcessorPil
    from gemtune.data import ChatEncoder
    from gemtune.data.preparation import cache as preparation
    from gemtune.data.media.images import ImageEncoder
    from gemtune.data.sources.source import read_source
    preparation.ROWS_PER_FILE = 10
    real = preparation.encode_range
    def slow(source, encoder, first, end):
        time.sleep(0.2)
        return real(source, encoder, first, end)
    preparation.encode_range = slow
    source = read_source({source.name!r}, "train", "data.path")
    images = ImageEncoder(Gemma4ImageProcessorPil.from_pretrained({str(tiny_dir)!r}), None)
    encoder = ChatEncoder(AutoTokenizer.from_pretrained({str(tiny_dir)!r}), images, max_length=4096)
    preparation.Preparation({str(cache)!r}, num_processes=2).rows(
        source, encoder, 200, lambda done, total: print(done, flush=True)
    )
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if int(line) >= 60:
                break
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.wait(timeout=60)
    deadline = time.monotonic() + 60  # its own processes end with it
    while running := [p for p in Path("/proc").glob("[0-9]*") if str(cache) in command_of(p)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.05)
    (folder,) = [path for path in cache.iterdir() if path.is_dir()]
    whole = sorted(folder.glob("rows_*.arrow"))
    assert 6 <= len(whole) < 20
    assert not list(folder.glob("*done.json"))
    for path in whole:
        assert read_batch(path).num_rows == 10
    encoder = make_encoder(root=None)
    fresh = read_source(source.name, "train", "data.path")
    counted = encoded_count(encoder, monkeypatch)
    assert preparation_key(fresh, encoder) == folder.name
    prepared = Preparation(str(cache), num_processes=1).rows(fresh, encoder, 200)
    assert sum(counted) == 200 - 10 * len(whole)
    same(prepared, Preparation(keeps="off").rows(fresh, encoder, 200))


@pytest.mark.parametrize("damage", ["cut", "emptied", "gone", "other", "one bit"])
def test_a_damaged_file_is_prepared_again(make_source, make_encoder, cache, monkeypatch, damage):
    source, encoder = make_source(), make_encoder()
    before = Preparation(str(cache), keeps="off").rows(source, encoder, 35)
    Preparation(str(cache)).rows(source, encoder, 35)
    (path,) = cache.glob("*/rows_000000010_*.arrow")
    content = path.read_bytes()
    path.unlink()
    if damage == "other":
        table = pa.table({"a": [1]})
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    elif damage == "one bit":  # of an id
        at = content.index(before.ids(10).tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif damage != "gone":
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    counted = encoded_count(encoder, monkeypatch)
    same(before, Preparation(str(cache)).rows(source, encoder, 35))
    assert sum(counted) == 10


def test_the_first_bad_row_stops_and_what_is_done_stays(
    make_source, make_encoder, cache, monkeypatch
):
    source, encoder = make_source(bad=(12, 25)), make_encoder()
    for _ in range(2):  # also when it is known already
        with pytest.raises(DataError, match=r"rows.jsonl line 13: no assistant message"):
            Preparation(str(cache)).rows(source, encoder, 35, stop_at_bad_row=True)
    counted = encoded_count(encoder, monkeypatch)
    prepared = Preparation(str(cache)).rows(source, encoder, 35)
    assert sum(counted) == 15
    assert np.flatnonzero(prepared.is_bad).tolist() == [12, 25]


def test_a_folder_that_cannot_be_written(make_source, make_encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data.cache_dir=FOLDER, .* data.prepared=off"):
        Preparation(str(tmp_path / "file")).rows(make_source(), make_encoder(), 35)


def test_what_no_run_used_for_a_month_goes(make_source, make_encoder, cache):
    source = make_source()
    Preparation(str(cache)).rows(source, make_encoder(), 35)
    Preparation(str(cache)).rows(source, make_encoder(max_length=50), 35)
    old, *_ = sorted(path for path in cache.iterdir() if path.is_dir())
    for path in old.iterdir():
        os.utime(path, (0, 0))
    Preparation(str(cache)).rows(source, make_encoder(max_length=60), 35)
    assert not old.exists()
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2


def test_a_process_that_is_killed_is_told_of(make_source, make_encoder, cache, monkeypatch):
    parent = os.getpid()
    real = module.encode_range

    def fatal(source, encoder, first, end):
        if os.getpid() != parent and first == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, encoder, first, end)

    monkeypatch.setattr(module, "encode_range", fatal)
    with pytest.raises(DataError, match=r"was killed, .* fewer than 2 .*data.num_prepare_workers"):
        Preparation(str(cache), num_processes=2).rows(make_source(), make_encoder(), 35)


# prepare()


def test_a_budget_of_bad_rows(tokenizer, tiny_processor, make_source):
    path = make_source(bad=(1, 2, 3)).name

    def run(limit):
        config = DataConfig(path=path, on_bad_row="skip", max_bad_rows=limit, eval_fraction=0)
        return prepare(config, tokenizer, tiny_processor, 0)

    assert len(run(3)[0].rejected) == len(run(None)[0].rejected) == 3
    with pytest.raises(DataError, match=r"3 bad rows are more than data.max_bad_rows=2"):
        run(2)


def test_held_out_rows_are_prepared_with_the_others(
    tokenizer, tiny_processor, make_source, monkeypatch
):
    path = make_source(bad=(4,)).name
    counted = encoded_count(None, monkeypatch)
    config = DataConfig(path=path, on_bad_row="skip", eval_fraction=0.3)
    for seed in range(3):
        train, judge = prepare(config, tokenizer, tiny_processor, seed)
        assert len(train) + len(judge) == 34
        assert len(train.rejected) + len(judge.rejected) == 1
    assert sum(counted) == 35


def test_the_encoder_of_the_bundled_rows(tokenizer, tiny_processor, cache):
    """Images: counted when prepared, decoded when used."""
    source = read_source("bundled:digits/heldout.parquet", "train", "k")
    encoder = ChatEncoder(
        tokenizer, ImageEncoder(tiny_processor, source.media_root), max_length=256
    )
    kept = Preparation(str(cache), num_processes=2).rows(source, encoder, 40)
    same(kept, Preparation(keeps="off").rows(source, encoder, 40))
    assert kept.num_media["image"].sum() > 30


def test_rows_prepared_by_other_code_are_not_used(monkeypatch):
    read = []
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.stem) or b"")
    code_digest.__wrapped__()
    assert {"spans", "formats", "images", "chat", "rows", "dataset"} <= set(read)
