"""Which columns and rows of a source are taken, and several sources as one."""

import json

import pytest

from gemtune.data.sources.mixture import MixEntry
from gemtune.data.sources.source import join_sources, mixed_order, read_source
from gemtune.errors import DataError, UserError

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def read(path):
    return read_source(path, "train", "data.path")


def test_the_source_says_what_was_understood(write_jsonl):
    path = write_jsonl(
        [{"conversations": [{"from": "human", "value": "a"}], "id": n} for n in "ab"]
    )
    assert read(path).notes == [f"{path} read as ShareGPT: 2 rows, columns conversations, id"]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"messages": "mesages"}, "no column 'mesages', which data.columns names for 'messages'. "
         "Did you mean 'messages'? Its columns are: messages."),
        ({"mesages": "messages"}, "data.columns.mesages is no column that is read. Did you mean"),
        ({"messages": 3}, "data.columns.messages=3 must be the name of a column"),
    ],
)  # fmt: skip
def test_a_mapping_that_cannot_be(write_jsonl, columns, says):
    with pytest.raises(UserError) as caught:
        read_source(write_jsonl([ROW]), "train", "data.path", columns=columns)
    assert says in str(caught.value)


def test_a_mapped_name_hides_one_of_the_same_name(write_jsonl):
    row = {"prompt": "not this", "completion": "b", "real": "this", "messages": "nor this"}
    columns = {"prompt": "real"}
    source = read_source(write_jsonl([row]), "train", "data.path", columns=columns)
    assert "read as prompt/completion" in source.notes[0]
    assert source.rows[0]["messages"][0]["content"] == "this"


@pytest.mark.parametrize(
    ("spec", "taken"),
    [
        ({"lang": "en"}, [0, 2, 3]),
        ({"lang": ["de", "fr"]}, [1]),
        ({"lang": "en", "score": {">=": 2, "<": 9}}, [2]),
        ({"lang": {"!=": "en"}}, [1]),
        ({"lang": {"not_in": ["en"]}}, [1]),
        ({"text": {"contains": "x"}}, [0, 3]),
        ({"score": None}, [3]),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_a_filter_takes_rows_and_they_keep_their_lines(write_jsonl, write_parquet, spec, taken):
    rows = [
        ROW | {"lang": "en", "score": 1, "text": "xy"},
        ROW | {"lang": "de", "score": 2, "text": "y"},
        ROW | {"lang": "en", "score": 3, "text": ""},
        ROW | {"lang": "en", "score": None, "text": "x"},
    ]
    for path in (write_jsonl(rows), write_parquet(rows)):
        source = read_source(path, "train", "data.path", filter=spec)
        assert [row["lang"] for row in source.rows] == [rows[i]["lang"] for i in taken]
        named = [source.describe(i).split()[-1] for i in range(len(source.rows))]
        assert named == [str(i + (1 if path.endswith("jsonl") else 0)) for i in taken]
        if spec:
            assert source.notes[1] == f"{path}: {len(taken)} of 4 rows pass data.filter"


def test_a_filter_that_cannot_be(write_jsonl):
    path = write_jsonl([ROW | {"score": "high"}, ROW | {"score": 3}])

    def said(spec):
        with pytest.raises(UserError) as caught:
            list(read_source(path, "train", "data.path", filter=spec).rows)
        return str(caught.value)

    assert "no column 'lang', which data.filter names. Its columns are: messages, score." in said(
        {"lang": "en"}
    )
    assert "data.filter.score: '=>' is no comparison. Did you mean '>'" in said(
        {"score": {"=>": 1}}
    )
    assert "none of its 2 rows passes data.filter" in said({"score": 7})
    assert f"{path} line 1: data.filter cannot compare it" in said({"score": {">": 1}})
    assert "data.filter.score.in=3 must be a list" in said({"score": {"in": 3}})


def test_an_id_that_stands_twice_is_a_fault_of_the_second_row(write_jsonl, write_parquet):
    rows = [ROW | {"id": n} for n in ("1", "2", "1", None, None)]
    for path in (write_jsonl(rows), write_parquet(rows)):
        source = read(path)
        with pytest.raises(DataError) as caught:
            source.rows[2]
        assert str(caught.value).startswith(source.describe(2) + ": its id '1' stands already at ")
        assert source.describe(0) + "." in str(caught.value)
        assert [source.rows[i]["id"] for i in (0, 1, 3, 4)] == ["1", "2", None, None]
        free = read_source(path, "train", "data.path", id_column=None)
        assert len(list(free.rows)) == 5


def test_the_data_do_not_choose_their_media_root(write_jsonl, tmp_path):
    path = write_jsonl([ROW | {"media_root": "/"}, ROW | {"images": ["a"], "media_root": "/"}])
    rows = read(path).rows
    assert "media_root" not in rows[0] and rows[1]["media_root"] == str(tmp_path)
    other = read_source(path, "train", "data.path", media_root=str(tmp_path / ".."))
    assert other.rows[1]["media_root"] == str(tmp_path / "..")
    with pytest.raises(DataError, match=r"data.media_root=/gone/it is no folder"):
        read_source(path, "train", "data.path", media_root="/gone/it")


# Several sources


def test_sources_are_joined_each_with_its_own_name_and_root(tmp_path, write_parquet):
    (tmp_path / "a").mkdir()
    first = tmp_path / "a" / "rows.jsonl"
    first.write_text("\n" + json.dumps(ROW | {"images": ["x.png"]}) + "\n" + json.dumps(ROW))
    second = write_parquet([{"q": "c", "answer": "d", "n": n} for n in (5, 6, 7)])
    source = join_sources(
        [
            MixEntry(str(first), weight=1.0),
            MixEntry(second, 3.0, columns={"question": "q"}, filter={"n": {">": 5}}),
        ]
    )
    assert [source.describe(i) for i in range(4)] == [
        f"{first} line 2", f"{first} line 3", f"{second} row 1", f"{second} row 2",
    ]  # fmt: skip
    assert source.rows[0]["media_root"] == str(tmp_path / "a")
    assert [row["messages"][0]["content"] for row in source.rows] == ["a", "a", "c", "c"]
    assert [(p.first, p.end, p.weight) for p in source.parts] == [(0, 2, 1.0), (2, 4, 3.0)]
    assert len(source.notes) == 3
    order, note = mixed_order(source, [0, 2, 3], seed=0, epoch="all")
    assert sorted(order.tolist()) == [0, 1, 1, 2] or sorted(order.tolist()) == [0, 1, 2, 2]
    assert note == (
        f"an epoch of the mix has 4 rows: {first} 1 rows (25.0%, 1.00 times each); {second} 3 rows "
        "(75.0%, 1.50 times each)"
    )
    with pytest.raises(DataError, match=r"data.mix\[0\] .*none of its rows is left"):
        mixed_order(source, [2, 3], seed=0, epoch="all")
