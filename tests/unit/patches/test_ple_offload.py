"""The offloaded table against the stock lookup, and what reaches the "device" and when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error
from torch import nn

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches import ple_offload
from gemtune.patches.host_memory import host_parameters
from gemtune.patches.ple_offload import (
    FetchedRows,
    PleOffload,
    Prefetched,
    fetch_rows,
    places_of,
    prefetch,
)

CPU = torch.device("cpu")
TABLE = "model.language_model.embed_tokens_per_layer"


def frozen(dtype: torch.dtype = torch.float32) -> Any:
    return build("e2b", dtype, frozen=("embed_tokens_per_layer",))


def table_of(model: Any) -> Any:
    return model.get_submodule(TABLE)


def assert_same(found: tuple, expected: tuple) -> None:
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("besides", [None, 0])
def test_each_row_is_fetched_once_and_found_again(
    shape: tuple[int, ...], dtype: torch.dtype, besides: int | None
) -> None:
    table = torch.randn(20, 6, dtype=torch.bfloat16)
    ids = torch.randint(1, 20, shape, dtype=dtype)
    ids.view(-1)[-1] = 19  # the last row of all
    fetched = fetch_rows(table, ids, CPU, besides=besides)
    expected = sorted({*ids.flatten().tolist(), *([] if besides is None else [besides])})
    assert fetched.ids.tolist() == expected
    assert torch.equal(fetched.rows, table[expected])
    assert torch.equal(fetched.rows[places_of(fetched, ids)], table[ids.long()])
    if besides is not None:
        padding = torch.zeros(2, 3, dtype=dtype)
        assert torch.equal(fetched.rows[places_of(fetched, padding)], table[padding.long()])


@pytest.mark.parametrize("missing", [4, 6, 0, 19])
def test_an_id_that_was_not_fetched_is_an_error(missing: int) -> None:
    fetched = fetch_rows(torch.randn(20, 6), torch.tensor([3, 5, 7]), CPU)
    with pytest.raises(RuntimeError, match="prefetch"):
        places_of(fetched, torch.tensor([3, missing]))
    with pytest.raises(IndexError):
        fetch_rows(torch.randn(20, 6), torch.tensor([20]), CPU)


def test_fetched_rows_are_taken_once_by_ids_of_their_shape() -> None:
    prefetched = Prefetched()
    ids = torch.tensor([[1, 2, 3]])
    assert prefetched.take(ids) is None
    prefetched.waiting = fetched = fetch_rows(torch.randn(20, 6), ids, CPU)
    assert prefetched.take(ids[:, :2]) is None
    assert prefetched.take(ids.to("meta")) is None
    assert prefetched.take(ids) is fetched
    assert prefetched.take(ids) is None
    prefetched.waiting = fetched
    assert copy.deepcopy(prefetched).waiting is None
    assert prefetched.waiting is fetched


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_stock_model(dtype: torch.dtype) -> None:
    model = frozen(dtype)
    inputs = batch(model)
    expected = loss_and_gradients(model, inputs)
    report = patches.apply(model, [PleOffload()])
    assert report.rows[0].status == "applied"
    assert report.rows[0].sites == (TABLE,)
    assert_same(loss_and_gradients(model, inputs), expected)
    prefetch(model, inputs["input_ids"])  # the model is on the CPU: nothing to do
    assert vars(table_of(model))["_gemtune_prefetched_rows"].waiting is None
    assert_same(loss_and_gradients(model, inputs), expected)
    report.undo()
    assert_same(loss_and_gradients(model, inputs), expected)


@pytest.fixture
def fetches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The model is on a "device", which is the CPU as well; filled with the ids of each fetch."""
    found: list[list[int]] = []

    def logged(*args: Any, **options: Any) -> FetchedRows:
        fetched = fetch_rows(*args, **options)
        found.append(fetched.ids.tolist())
        return fetched

    monkeypatch.setattr(ple_offload, "_is_elsewhere", lambda device: True)
    monkeypatch.setattr(ple_offload, "fetch_rows", logged)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_rows_on_a_device_values_and_gradients_are_the_same(
    fetches: list[list[int]], dtype: torch.dtype, checkpointing: bool
) -> None:
    model = frozen(dtype)
    inputs = batch(model, (1, 0, 2), (0, 1, 0))
    expected = loss_and_gradients(model, inputs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    patches.apply(model, [PleOffload()])
    assert_same(loss_and_gradients(model, inputs), expected)
    # Once for the whole forward and backward pass, and nothing for image and video tokens.
    (fetched,) = fetches
    media = {model.config.image_token_id, model.config.video_token_id}
    assert fetched == sorted({*inputs["input_ids"].flatten().tolist()} - media)


def test_what_was_prefetched_is_not_fetched_again(fetches: list[list[int]]) -> None:
    model = frozen()
    inputs = batch(model)
    # No padding in the text: its row is needed for the images all the same.
    inputs["input_ids"][inputs["input_ids"] == 0] = 50
    expected = loss_and_gradients(model, inputs)
    patches.apply(model, [PleOffload()])
    for _ in range(2):
        prefetch(nn.ModuleDict({"wrapped": model}), inputs["input_ids"])
        assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fetches) == 2
    assert fetches[0][0] == model.config.text_config.pad_token_id == 0
    assert_same(loss_and_gradients(model, inputs), expected)
    assert len(fetches) == 3


def test_what_was_prefetched_for_another_batch_is_not_used(fetches: list[list[int]]) -> None:
    model = frozen()
    inputs, longer = batch(model, (0, 0)), batch(model, (0, 0, 0))
    expected = loss_and_gradients(model, inputs)
    patches.apply(model, [PleOffload()])
    prefetch(model, longer["input_ids"])
    assert_same(loss_and_gradients(model, inputs), expected)
    prefetch(model, inputs["input_ids"])
    inputs["input_ids"][0, 1] = min(set(range(40, 500)) - {*inputs["input_ids"].flatten().tolist()})
    with pytest.raises(RuntimeError, match="prefetch"):
        model(**inputs)


def test_generation_gives_the_same_tokens(fetches: list[list[int]]) -> None:
    model = frozen().eval()
    inputs = batch(model, (1,))
    del inputs["labels"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(**inputs, **options)
    patches.apply(model, [PleOffload()])
    assert torch.equal(model.generate(**inputs, **options), expected)
    assert [len(ids) for ids in fetches[1:]] == [1] * 5


def test_ids_are_read_on_the_cpu() -> None:
    with pytest.raises(ValueError, match="reads the ids on the CPU; these are on meta"):
        prefetch(nn.Linear(2, 2), torch.zeros(2, 3, dtype=torch.long, device="meta"))
    prefetch(nn.Linear(2, 2), torch.zeros(2, 3, dtype=torch.long))  # no table: nothing


def test_the_table_stays_when_the_model_moves() -> None:
    model = frozen()
    weight = table_of(model).weight
    values = weight.clone()
    patches.apply(model, [PleOffload()])
    model.to("meta")
    assert table_of(model).weight is weight
    assert torch.equal(weight, values)
    elsewhere = {name for name, p in model.named_parameters() if p.device.type != "cpu"}
    assert elsewhere == {name for name, _ in model.named_parameters()} - {f"{TABLE}.weight"}
    assert table_of(model).embed_scale.device.type == "meta"
    assert host_parameters(model) == [f"{TABLE}.weight"]


def test_adapters_get_the_same_gradients(fetches: list[list[int]]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install peft")
    stock, model = frozen(), frozen()
    inputs = batch(model)
    patches.apply(model, [PleOffload()])
    results = []
    for base in (stock, model):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")
        adapted = peft.get_peft_model(base, config)
        prefetch(adapted, inputs["input_ids"])
        results.append(loss_and_gradients(adapted, inputs))
    assert results[0][1]
    assert_same(results[1], results[0])
    assert len(fetches) == 1


def test_a_trained_table_is_left_alone() -> None:
    model = build("e2b", torch.float32)
    row = patches.apply(model, [PleOffload()]).rows[0]
    assert row.status == "not applicable"
    assert "model.freeze=[ple]" in row.reason
    row = patches.apply(build("31b", torch.float32), [PleOffload()]).rows[0]
    assert (row.status, row.reason) == ("not applicable", "the model has no per-layer embeddings")


def test_a_table_that_is_trained_later_is_refused() -> None:
    model = frozen()
    inputs = batch(model)
    patches.apply(model, [PleOffload()])
    table_of(model).weight.requires_grad_(True)
    with pytest.raises(PatchError, match=r"requires a gradient.*model\.freeze=\[ple\]"):
        model(**inputs)
    with torch.no_grad():
        model(**inputs)  # nobody asks for a gradient


def test_it_is_saved_and_read_again_and_other_weights_go_in(tmp_path: Path) -> None:
    model, other = frozen(), build("e2b", torch.float32, seed=1)
    inputs = batch(model)
    patches.apply(model, [PleOffload()])
    model.load_state_dict(other.state_dict())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(table_of(again).weight, table_of(other).weight)
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, other(**inputs).loss)
        model.bfloat16(), other.bfloat16()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        assert torch.equal(model(**inputs).loss, other(**inputs).loss)


def test_a_deep_copy_works_on_its_own_table(fetches: list[list[int]]) -> None:
    model = frozen()
    inputs = batch(model)
    expected, _ = loss_and_gradients(model, inputs)
    patches.apply(model, [PleOffload()])
    prefetch(model, inputs["input_ids"])
    twin = copy.deepcopy(model)
    table_of(twin).weight.data.mul_(3)
    assert relative_error(loss_and_gradients(twin, inputs)[0], expected) > 1e-5
    assert torch.equal(loss_and_gradients(model, inputs)[0], expected)


def test_a_table_of_another_kind_is_refused() -> None:
    class Gemma4TextScaledWordEmbedding(nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) * self.embed_scale + 1

    model = nn.ModuleDict({"embed_tokens_per_layer": Gemma4TextScaledWordEmbedding(4, 2)})
    with pytest.raises(PatchError, match="not one of the versions"):
        patches.apply(model, [PleOffload()])
    model = nn.ModuleDict({"embed_tokens_per_layer": nn.Embedding(4, 2)})
    with pytest.raises(PatchError, match="is a Embedding"):
        patches.apply(model, [PleOffload()])
