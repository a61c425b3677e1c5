"""Files and hub data sets become rows, or a message with the remedy."""

import errno
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_rows import LINE, ROW, read, refusal

from gemtune.data.sources.source import read_source, resolve_path

# JSONL


def test_jsonl_rows_are_named_by_their_line(jsonl):
    path = jsonl(b"\n" + LINE + b"\n  \n\r\n" + LINE + b"\r\n" + LINE)
    source = read(path)
    assert list(source.rows) == [ROW] * 3
    assert [source.describe(i) for i in range(3)] == [f"{path} line {n}" for n in (2, 5, 6)]


def test_a_byte_order_mark_is_skipped(jsonl):
    assert list(read(jsonl(b"\xef\xbb\xbf" + LINE)).rows) == [ROW]


def test_characters_that_look_like_line_ends_are_text(jsonl):
    row = {"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}
    content = json.dumps(row, ensure_ascii=False).encode() + b"\n" + LINE
    assert list(read(jsonl(content)).rows) == [row, ROW]


def test_a_broken_line_is_named(jsonl):
    path = jsonl(LINE + b"\n\n" + LINE[:-3] + b"\n" + LINE)
    assert refusal(path).startswith(f"{path} line 3: not valid JSON (")


def test_one_object_over_several_lines(jsonl):
    path = jsonl(json.dumps(ROW, indent=2).encode())
    assert refusal(path).startswith(f"{path} line 1: not valid JSON")
    assert "Each line must hold one whole object" in refusal(path)


@pytest.mark.parametrize("value", [b"[1]", b'"text"', b"3", b"null"])
def test_a_row_that_is_no_object(jsonl, value):
    path = jsonl(LINE + b"\n" + value)
    assert refusal(path) == f"{path} line 2: a row must be a JSON object {{...}}."


@pytest.mark.parametrize("bad", ['{"a": "é"}'.encode("latin-1"), LINE.decode().encode("utf-16")])
def test_another_encoding_is_named_with_the_remedy(jsonl, bad):
    path = jsonl((LINE + b"\n") * 500 + bad)  # beyond the first block of a text reader
    assert refusal(path).startswith(f"{path} line 501: not UTF-8 (")
    assert "iconv -f LATIN1 -t UTF-8" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_jsonl(jsonl, content):
    path = jsonl(content)
    assert refusal(path) == f"data.path={path} holds no rows."


def test_the_media_root_is_the_folder_of_the_file(jsonl, monkeypatch, tmp_path):
    assert read(jsonl(LINE)).media_root == tmp_path
    monkeypatch.chdir(tmp_path)
    source = read("rows.jsonl")
    monkeypatch.chdir("/")
    assert source.media_root == tmp_path  # also after the working folder changed
    assert source.name == "rows.jsonl"


def test_a_file_that_may_not_be_read(jsonl, monkeypatch):
    path = jsonl(LINE)

    def refuse(*_, **__):  # root may read everything, so the mode of the file would not do
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    for place in ("pathlib.Path.open", "os.open", "builtins.open"):
        monkeypatch.setattr(place, refuse)
    assert refusal(path) == f"{path} cannot be read: Permission denied."


# Parquet


def test_parquet_rows_are_named_from_0(write_parquet):
    path = write_parquet([ROW, ROW])
    source = read(path)
    assert [source.rows[i] for i in range(len(source.rows))] == [ROW, ROW]
    assert list(source.rows) == [ROW, ROW]
    assert source.describe(1) == f"{path} row 1"


def test_parquet_null_fields_are_none(write_parquet):
    part = {"type": "text", "text": "a"}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image"}, part]}], "images": [b"x"]},
        {"messages": [{"role": "user", "content": [part]}], "images": None},
    ]
    source = read(write_parquet(rows))
    assert source.rows[0]["messages"][0]["content"] == [{"text": None, "type": "image"}, part]
    assert source.rows[1]["images"] is None


@pytest.mark.parametrize("inside", [False, True])
def test_images_are_not_decoded(tmp_path, inside):
    """Bytes that no decoder would take, in both places where an Image feature may stand."""
    image = {"bytes": b"not an image", "path": "a.png"}
    part = {"type": "image", "image": image}
    row = {"messages": [{"role": "user", "content": [part]}], "images": [image]}
    feature = datasets.Image() if inside else {"bytes": datasets.Value("binary"), "path": text()}
    features = {
        "messages": datasets.List(
            {"role": text(), "content": datasets.List({"type": text(), "image": feature})}
        ),
        "images": datasets.List(datasets.Image()),
    }
    path = str(tmp_path / "a.parquet")
    table = datasets.Dataset.from_list([row], features=datasets.Features(features))
    table.to_parquet(path)
    assert isinstance(read_features(path)["images"].feature, datasets.Image)
    assert list(read(path).rows) == [row | {"media_root": str(tmp_path)}]


def text():
    return datasets.Value("string")


def read_features(path):
    return datasets.Dataset.from_parquet(path).features


def test_the_bundled_digits():
    source = read("bundled:digits/heldout.parquet")
    row = source.rows[0]
    assert len(source.rows) == 600
    assert row["images"][0]["bytes"].startswith(b"\x89PNG")
    assert row["messages"][0]["content"][0]["type"] == "image"


@pytest.mark.parametrize("content", [b"", b"PAR1 and then nothing", LINE])
def test_a_corrupt_parquet(tmp_path, content):
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    assert refusal(str(path)).startswith(f"{path} cannot be read as Parquet: ")


def test_a_parquet_damaged_in_the_middle(write_parquet):
    path = write_parquet([ROW] * 100)
    content = bytearray(Path(path).read_bytes())
    content[4:200] = b"\xff" * 196  # the footer is whole
    Path(path).write_bytes(content)
    assert refusal(path).startswith(f"{path} cannot be read as Parquet: ")


def test_an_empty_parquet(tmp_path):
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"messages": pa.array([], pa.list_(pa.string()))}), path)
    assert refusal(path) == f"data.path={path} holds no rows."


def test_no_progress_bar_is_shown_or_switched_off_for_others(write_parquet, capfd):
    datasets.enable_progress_bars()
    read(write_parquet([ROW]))
    assert datasets.is_progress_bar_enabled()
    assert capfd.readouterr() == ("", "")


# What is no source


def test_a_missing_column_lists_the_others_and_the_mapping(write_jsonl, write_parquet):
    rows = [{"query": "a", "reply": "b"}]
    for path in (write_jsonl(rows), write_parquet(rows)):
        said = refusal(path)
        assert said.startswith(f"data.path={path} has no columns of a format that is read")
        assert "its columns are: query, reply." in said
        assert "Alpaca (instruction, output)" in said
        assert said.endswith("data.columns='{prompt: query, completion: reply}'")
        mapping = {"prompt": "query", "completion": "reply"}
        source = read_source(path, "train", "data.path", columns=mapping)
        assert [m["content"] for m in source.rows[0]["messages"]] == ["a", "b"]


def test_a_missing_file(tmp_path):
    for name in ("gone.jsonl", "gone.parquet", "folder/gone.jsonl", "gone"):
        path = str(tmp_path / name)
        assert refusal(path).startswith(f"data.path={path}: there is no such file (looked in ")


def test_a_relative_path_is_never_asked_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    for path in ("./a/b", "../a", "folder/gone", "gone.jsonl", "a/gone.jsonl", "a/b/c", "gone"):
        assert "there is no such file" in refusal(path)


def test_a_folder(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(LINE)
    assert refusal(str(tmp_path)) == (
        f"data.path={tmp_path} is a folder, and not one that datasets' save_to_disk wrote. Give "
        "one file (.jsonl, .json, .parquet, .arrow, .csv, .tsv) inside it. It holds rows.jsonl."
    )


@pytest.mark.parametrize("name", ["rows.txt", "rows.jsonl.gz", "rows"])
def test_an_unknown_suffix(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(LINE)
    assert "are not read. Give .jsonl, .json, .parquet, .arrow" in refusal(str(path))


def test_a_bundled_file_that_is_none():
    said = refusal("bundled:digits/test.parquet")
    assert said.startswith("data.path=bundled:digits/test.parquet: the package holds no such file.")
    assert "bundled:digits/heldout.parquet, bundled:digits/train.parquet" in said


def test_paths_are_resolved(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_path("~/a.jsonl") == str(tmp_path / "a.jsonl")
    assert resolve_path("org/name") == "org/name"
    assert resolve_path("bundled:digits/train.parquet").endswith("assets/digits/train.parquet")
