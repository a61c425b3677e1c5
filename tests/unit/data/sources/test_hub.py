"""Datasets of the hub, whole and streamed; the network is replaced, nothing of the client is."""

import pickle

import datasets
import huggingface_hub
import pytest
from fake_hub import FakeHub

from gemtune.data import BatchStream, DataConfig, StreamedDataset, prepare
from gemtune.data.sources.source import read_source
from gemtune.errors import ConfigError, DataError

ROWS = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(12)]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets, "is_progress_bar_enabled", lambda: False)
    datasets.disable_progress_bars()
    hub = FakeHub(monkeypatch, tmp_path)
    yield hub
    hub.close()
    datasets.enable_progress_bars()


def read(path="org/name", split="train", **options):
    return read_source(path, split, "data.path", **options)


def questions(rows):
    return [row["messages"][0]["content"] for row in rows]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set(hub, streaming):
    hub.add("org/name", ROWS, splits=("train", "test"))
    source = read(split="test", streaming=streaming)
    assert source.notes[0] == (
        "org/name[test] read as prompt/completion: 12 rows, columns prompt, completion"
    )
    assert questions(source.rows) == [row["prompt"] for row in ROWS]
    assert source.describe(3) == "org/name[test] row 3"
    assert source.is_sequential == streaming
    assert not any(path.endswith("/train.jsonl") for _, path, _ in hub.asked) or not streaming


def test_a_subset(hub):
    hub.add("org/name", ROWS, subset="small")
    assert len(read(subset="small").rows) == 12
    with pytest.raises(DataError, match=r"data.path=org/name, split train, cannot be read"):
        read(subset="large")


def test_a_split_that_is_not_there(hub):
    hub.add("org/name", ROWS)
    with pytest.raises(
        DataError, match=r"split test, cannot be read .*(Unknown|Bad) split"
    ) as said:
        read(split="test")
    assert "data.path=FILE.jsonl" in str(said.value)


def test_a_data_set_that_is_not_there(hub):
    with pytest.raises(DataError, match=r"data.path=org/gone, split train, cannot be read") as said:
        read("org/gone")
    for remedy in ("Check the name and the network", "hf auth login", "data.path=FILE.jsonl"):
        assert remedy in str(said.value)


def test_the_hub_offline(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"^data.path=gemtune-tests/no-such-data, split train, cann"
    ):
        read("gemtune-tests/no-such-data")


# Streamed


def test_a_stream_is_read_as_it_is_asked_for(hub):
    hub.add("org/name", ROWS)
    source = read(streaming=True)
    bodies = [range_ for method, path, range_ in hub.asked if path.endswith("train.jsonl")]
    assert not any(bodies)  # nothing of the rows yet
    asked = [2, 3, 7, 7, 11, 0, 1, 6, 2]
    assert [questions([source.rows[i]])[0] for i in asked] == [f"q {i}" for i in asked]
    copy = pickle.loads(pickle.dumps(source))
    assert questions([copy.rows[5]]) == ["q 5"]


def test_a_stream_that_is_shorter_than_the_hub_says(hub):
    hub.add("org/name", ROWS)
    hub.repositories["org/name"]["README.md"] = hub.repositories["org/name"]["README.md"].replace(
        b": 12", b": 20"
    )
    source = read(streaming=True)
    with pytest.raises(DataError, match=r"the stream ended after 12 rows; the hub had said 20"):
        source.rows[12]


def test_a_stream_of_unknown_length(hub):
    hub.add("org/name", ROWS, declared=False)
    with pytest.raises(DataError, match=r"how many rows it has.*Set data.streaming=false"):
        read(streaming=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"shuffle": True}, r"would need all of it. Set data.shuffle=false"),
        ({"eval_fraction": 0.1}, r"data.eval_fraction=0.1 would hold rows out .*data.eval_path"),
        ({"filter": {"prompt": "q 1"}}, r"data.filter cannot be used on a streamed hub dataset"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(hub, tokenizer, tiny_processor, change, says):
    hub.add("org/name", ROWS)
    settings = {"shuffle": False, "eval_fraction": 0.0, "streaming": True} | change
    with pytest.raises((ConfigError, DataError), match=says):
        prepare(DataConfig(path="org/name", **settings), tokenizer, tiny_processor, seed=0)


def test_a_mix_does_not_stream_from_the_hub(hub, tokenizer, tiny_processor):
    hub.add("org/name", ROWS)
    config = DataConfig(mix=[{"path": "org/name"}], streaming=True)
    with pytest.raises(DataError, match=r"data.mix cannot stream from the hub"):
        prepare(config, tokenizer, tiny_processor, seed=0)


def test_batches_of_a_stream_are_those_of_the_whole(hub, tokenizer, tiny_processor):
    """Whatever the ranks, and wherever a run goes on."""
    hub.add("org/name", ROWS)

    def batches(streaming, first=0, rank=0, world_size=1):
        config = DataConfig(path="org/name", streaming=streaming, shuffle=False, eval_fraction=0.0)
        rows, _ = prepare(config, tokenizer, tiny_processor, seed=0)
        assert isinstance(rows, StreamedDataset) == streaming
        stream = BatchStream(rows, 0, 4, 2, rank, world_size, shuffle=False)
        return [[batch.inputs["input_ids"].tolist() for batch in step] for step in stream(first, 5)]

    whole = batches(False)
    assert len(whole) == 5  # beyond the end of an epoch
    assert batches(True) == whole
    assert batches(True, first=2) == whole[2:]
    for rank in range(2):
        assert batches(True, 1, rank, 2) == batches(False, 1, rank, 2)
