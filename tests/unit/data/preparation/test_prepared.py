"""Prepared rows on disk, and the record of those that were left out."""

import json
import pickle

import pytest

from gemtune.data.preparation.rejected import rejected_record, write_rejected
from gemtune.data.preparation.rows import (
    PreparedRows,
    is_undamaged,
    read_prepared,
    to_batch,
    write_batch,
)
from gemtune.data.rendering.fitting import EncodedText
from gemtune.data.rendering.plans import Span
from gemtune.errors import DataError


def test_a_batch_comes_back_as_it_was(tmp_path):
    rows = [
        EncodedText([1, 2, 3], [(1, 3)], "row 0"),
        DataError("row 1: bad \ud800 é"),
        EncodedText(
            [4] * 9,
            [(0, 2), (5, 9)],
            "row 2",
            [Span("image", 0, 2), Span("audio", 2, 3), Span("image", 3, 5)],
            {"image": 1},
        ),
        EncodedText([5], [], "row 3"),
    ]
    path = tmp_path / "a.arrow"
    write_batch(to_batch(rows), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]
    for prepared in (read_prepared([path]), PreparedRows([to_batch(rows)])):
        assert prepared.lengths.tolist() == [3, 0, 9, 1]
        assert prepared.is_bad.tolist() == [False, True, False, False]
        assert prepared.reason(1) == "row 1: bad \\ud800 é"
        assert prepared.num_supervised_tokens.tolist() == [2, 0, 5, 0]
        assert prepared.kept_media(2) == {"image": (1, 2), "video": (0, 0), "audio": (0, 1)}
        assert prepared.kept_media(0) == prepared.kept_media(1) == {}
        assert prepared.ids(2).tolist() == [4] * 9
        assert prepared.runs(2).tolist() == [[0, 2], [5, 9]]
        assert prepared.runs(3).shape == (0, 2)
    with pytest.raises(ValueError, match="read-only"):
        prepared.ids(0)[0] = 1


def test_any_bit_that_flips_is_found(tmp_path):
    path = tmp_path / "a.arrow"
    write_batch(to_batch([EncodedText([1, 2, 3], [(1, 3)], ""), DataError("bad")]), path)
    content = path.read_bytes()
    assert is_undamaged(path)
    for at in range(0, len(content), 7):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert not is_undamaged(path), at


def test_nothing_at_all():
    prepared = PreparedRows([])
    assert len(prepared) == 0 and not prepared.is_bad.any()


def test_rows_of_files_can_be_handed_to_another_process(tmp_path):
    write_batch(to_batch([EncodedText([1, 2], [(0, 2)], "")]), tmp_path / "a.arrow")
    prepared = read_prepared([tmp_path / "a.arrow"])
    assert len(pickle.dumps(prepared)) < 500
    assert pickle.loads(pickle.dumps(prepared)).ids(0).tolist() == [1, 2]


def test_rejected_rows_on_record(tmp_path):
    path = tmp_path / "rejected.jsonl"
    said = [
        "a b.jsonl line 12: no assistant message",
        "dir/x.parquet row 3, message 2: bad 'é'",
        "something else",
        "a b.jsonl line 12: no assistant message",
    ]
    write_rejected(said, path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records == [
        {"source": "a b.jsonl", "line": 12, "reason": "no assistant message"},
        {"source": "dir/x.parquet", "row": 3, "reason": "message 2: bad 'é'"},
        {"source": "", "reason": "something else"},
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["rejected.jsonl"]
    assert rejected_record("x line 1: y\nz")["reason"] == "y\nz"
