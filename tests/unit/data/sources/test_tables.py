"""JSON, CSV, Arrow and saved folders, and rows that are read where they stand."""

import csv
import json
import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from source_rows import LINE, ROW, read, refusal

from gemtune.errors import DataError

# JSON


@pytest.mark.parametrize("wrapped", [False, True])
def test_json(tmp_path, wrapped):
    path = tmp_path / "rows.json"
    content = json.dumps({"data": [ROW, ROW], "version": 1} if wrapped else [ROW, ROW], indent=1)
    path.write_bytes(b"\xef\xbb\xbf" + content.encode())
    source = read(str(path))
    assert list(source.rows) == [ROW, ROW]
    assert source.describe(1) == f"{path} row 1"
    said = refusal(str(path), streaming=True)
    assert "a .json file is read as a whole, so it cannot be streamed" in said


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"rows": []}', "it holds an object with 'rows'."),
        ("3", "it holds int."),
        ("[1]", " row 0: a row must be a JSON object"),
        ('[{"a": 1},\n {"a" 1}]', " line 2: not valid JSON (Expecting ':' delimiter, column 7)"),
        ('{"messages": 1}\n{"messages": 1}', "name the file .jsonl"),
        ('[{"a": "\u00e9"}]', " line 1: not UTF-8"),
        ("[]", " holds no rows."),
        (" ", " holds no rows."),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_json_that_holds_no_rows(tmp_path, content, says):
    path = tmp_path / "rows.json"
    path.write_bytes(content.encode("latin-1"))
    said = refusal(str(path))
    assert str(path) in said and says in said


# CSV


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfprompt,completion,score\r\n"
        b'"say ""hi"", \n\xe2\x80\xa8twice",hi hi,1\r\n'
        b"\r\n"
        b"caf\xc3\xa9,yes,2"
    )
    source = read(str(path))
    questions = [row["messages"][0]["content"] for row in source.rows]
    assert questions == ['say "hi", \n\u2028twice', "caf\u00e9"]
    assert [row["score"] for row in source.rows] == ["1", "2"]
    assert [source.describe(i) for i in range(2)] == [f"{path} line 2", f"{path} line 5"]


def test_csv_with_messages_as_json(tmp_path):
    path = tmp_path / "rows.tsv"
    text = json.dumps(ROW["messages"]).replace('"', '""')
    path.write_text(f'messages\tkind\n"{text}"\ta\n')
    assert list(read(str(path)).rows) == [{"messages": ROW["messages"], "kind": "a"}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"prompt,completion\na,b\na,b,c\n", " line 3: 3 fields where the first line names 2"),
        (b'prompt,completion\na,b\n"open,b\nc,d\n', " line 3: not valid CSV"),
        (b"prompt,completion\na,b\n\xe9,b\n", " line 3: not UTF-8"),
        (b"prompt,prompt\na,b\n", " line 1: the first line must name every column once"),
        (b"prompt,completion\n", " holds no rows."),
        (b"", " holds no rows."),
    ],
)
def test_csv_that_is_wrong(tmp_path, content, says):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    said = refusal(str(path))
    assert f"{path}{says}" in said


def test_a_long_csv_field_leaves_the_limit_of_others(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion\n" + "x" * 200_000 + ",b\n")
    assert len(read(str(path)).rows[0]["messages"][0]["content"]) == 200_000
    assert csv.field_size_limit() == before


# Arrow, and folders saved by datasets


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow(tmp_path, kind):
    path = tmp_path / "rows.arrow"
    table = pa.Table.from_pylist([ROW | {"n": n} for n in range(7)])
    new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with new(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    source = read(str(path))
    assert [row["n"] for row in source.rows] == list(range(7))
    assert source.rows[4]["messages"] == ROW["messages"]
    assert source.describe(4) == f"{path} row 4"
    copy = pickle.loads(pickle.dumps(source))
    assert [row["n"] for row in copy.rows] == list(range(7))


@pytest.mark.parametrize("content", [b"", b"ARROW1 and nothing", b"\xff" * 100])
def test_a_corrupt_arrow(tmp_path, content):
    path = tmp_path / "rows.arrow"
    path.write_bytes(content)
    assert refusal(str(path)).startswith(f"{path} cannot be read as Arrow: ")


def test_a_saved_folder(tmp_path):
    table = datasets.Dataset.from_list([ROW | {"n": n} for n in range(5)]).select([3, 1])
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "held": table.select([0])}).save_to_disk(tmp_path / "two")
    assert [row["n"] for row in read(str(tmp_path / "one")).rows] == [3, 1]
    held = read(str(tmp_path / "two"), "held")
    assert [row["n"] for row in held.rows] == [3]
    assert held.describe(0) == f"{tmp_path / 'two'}[held] row 0"
    with pytest.raises(DataError, match=r"has no split 'test'. Its splits are: train, held."):
        read(str(tmp_path / "two"), "test")
    (tmp_path / "one" / "state.json").write_text("{")
    assert "cannot be read as a saved dataset" in refusal(str(tmp_path / "one"))


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    assert "neither a regular file nor a folder" in refusal(str(tmp_path / "rows.jsonl"))


# Reading by place


def test_rows_of_a_text_file_can_be_read_in_any_order_and_in_another_process(jsonl):
    rows = [ROW | {"n": n} for n in range(50)]
    source = read(jsonl("\n".join(map(json.dumps, rows)).encode()))
    assert [source.rows[i]["n"] for i in (49, 0, 17, 3)] == [49, 0, 17, 3]
    copy = pickle.loads(pickle.dumps(source))
    assert [row["n"] for row in copy.rows] == list(range(50))
    for bad in (50, -1):
        with pytest.raises(IndexError):
            source.rows[bad]


def test_a_file_that_changed_is_not_read_at_the_old_places(jsonl):
    path = jsonl(LINE + b"\n" + LINE)
    source = read(path)
    copy = pickle.loads(pickle.dumps(source))
    Path(path).write_bytes(b'{"a": 1}\n' + LINE + b"\n" + LINE)
    with pytest.raises(DataError, match=r"was changed while it was in use"):
        copy.rows[1]
