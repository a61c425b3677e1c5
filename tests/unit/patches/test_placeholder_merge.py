"""Merging text and media: equal to stock transformers, and what it no longer does."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from types import MethodType
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.placeholder_merge import PlaceholderMerge, merge_features

MERGED = {"_gemtune_is_merged", "_gemtune_per_layer_inputs"}
FAMILIES = ("e2b", "31b")  # with and without per-layer inputs


class Calls(TorchDispatchMode):
    """Names of the operations, and of those with a bool index of [B, S, H]."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.Size]] = []
        self.by_mask: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.results.append((name, result.shape))
        if name == "index" and args[1][0] is not None and args[1][0].dtype == torch.bool:
            self.by_mask.append(args[1][0].shape)
        return result

    def names(self) -> set[str]:
        return {name for name, _ in self.results}


def text_and_media(model: nn.Module) -> dict[str, torch.Tensor]:
    return batch(model, (1, 0, 2), (0, 1, 1))


def takes_per_layer_inputs(model: nn.Module) -> bool:
    return "per_layer_inputs" in inspect.signature(type(model.model).forward).parameters


def stock_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one with every call of get_image_features, which only the stock forward makes."""
    calls: list[str] = []
    stock = type(model.model).get_image_features

    # generate() reads off the signature which inputs belong to the features.
    @functools.wraps(stock)
    def spy(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append("get_image_features")
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(model.model, "get_image_features", MethodType(spy, model.model))
    return calls


@pytest.mark.parametrize("num_features", [0, 1, 9, 40])
def test_features_replace_rows_in_order_in_value_and_gradient(num_features: int) -> None:
    generator = torch.Generator().manual_seed(num_features)
    batch_size, length, hidden = 4, 10, 3
    mask = torch.zeros(batch_size * length, dtype=torch.bool)
    places = torch.randperm(batch_size * length, generator=generator)[:num_features]
    mask[places] = True
    text = torch.randn(
        batch_size, length, hidden, generator=generator, dtype=torch.float64, requires_grad=True
    )
    features = torch.randn(
        num_features, hidden, generator=generator, dtype=torch.float64, requires_grad=True
    )
    weights = torch.randn(text.shape, generator=generator, dtype=torch.float64)

    merged = merge_features(text, mask.view(batch_size, length), features)
    (merged * weights).sum().backward()

    expected, text_gradient = text.detach().clone(), weights.clone()
    features_gradient = torch.zeros_like(features)
    for f, place in enumerate(places.sort().values.tolist()):
        row, column = divmod(place, length)
        expected[row, column] = features[f].detach()
        features_gradient[f] = weights[row, column]
        text_gradient[row, column] = 0
    assert torch.equal(merged, expected)
    assert torch.equal(text.grad, text_gradient)
    assert torch.equal(features.grad, features_gradient)


@pytest.mark.parametrize("family", ["e2b", "26b_a4b", "31b"])
@pytest.mark.parametrize("videos_per_row", [(0, 0, 0), (0, 1, 1)], ids=["images", "both"])
def test_loss_and_gradients_are_those_of_stock(
    family: str, videos_per_row: tuple[int, ...]
) -> None:
    model = build(family)
    inputs = batch(model, (1, 0, 2), videos_per_row)
    expected_loss, expected = loss_and_gradients(model, inputs, reference=True)
    patches.apply(model, [PlaceholderMerge()])
    loss, gradients = loss_and_gradients(model, inputs, reference=True)
    assert gradients.keys() == expected.keys()
    assert relative_error(loss, expected_loss) < 1e-12
    assert max(relative_error(gradients[name], expected[name]) for name in expected) < 1e-12


def test_videos_alone_are_merged_too() -> None:
    model = build("e2b").eval()
    inputs = batch(model, (0, 0), (1, 2))
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        patches.apply(model, [PlaceholderMerge()])
        assert relative_error(model(**inputs, use_cache=False).logits, expected) < 1e-12


@pytest.mark.parametrize("images_per_row", [(1, 0, 2), (0, 0, 0)], ids=["images", "text"])
def test_placeholders_without_features_are_padding_as_in_stock(
    images_per_row: tuple[int, ...],
) -> None:
    model = build("e2b").eval()
    inputs = batch(model, images_per_row)
    inputs["input_ids"][1, 2:4] = model.config.audio_token_id
    inputs["input_ids"][2, 1] = model.config.video_token_id
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        patches.apply(model, [PlaceholderMerge()])
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_scattered_counted_by_copying_or_made_for_nothing(family: str) -> None:
    model = build(family)
    inputs = text_and_media(model)
    shape = (*inputs["input_ids"].shape, model.config.text_config.hidden_size)
    with Calls() as stock:
        model.model(**inputs)
    patches.apply(model, [PlaceholderMerge()])
    with Calls() as patched:
        model.model(**inputs)
    assert stock.by_mask.count(shape) == 2  # the features of the images, and of the videos
    assert ("masked_scatter", shape) in stock.results
    assert shape not in patched.by_mask
    assert ("eq", shape) not in patched.results  # embeddings compared with placeholders
    assert "masked_scatter" not in patched.names()
    if family == "e2b":
        assert ("where", shape) in stock.results
    # 5.5 - 5.8 have no way to hand over the per-layer inputs before that tensor is made.
    if takes_per_layer_inputs(model):
        assert ("where", shape) not in patched.results


@pytest.mark.parametrize("family", FAMILIES)
def test_text_alone_makes_no_unused_tensor_either(family: str) -> None:
    model = build(family)
    inputs = batch(model, (0, 0))
    expected = model.model(**inputs).last_hidden_state
    if not takes_per_layer_inputs(model):
        pytest.skip("this transformers cannot be handed per-layer inputs")
    patches.apply(model, [PlaceholderMerge()])
    with Calls() as calls:
        hidden_states = model.model(**inputs).last_hidden_state
    assert torch.equal(hidden_states, expected)
    assert ("where", hidden_states.shape) not in calls.results


@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_count_is_an_error_in_the_words_of_transformers(kind: str, change: int) -> None:
    model = build("e2b")
    inputs = text_and_media(model)
    token = getattr(model.config, f"{kind}_token_id")
    places = (inputs["input_ids"] == token).nonzero() if change < 0 else [(1, 0)]
    row, column = places[0]
    inputs["input_ids"][row, column] = token if change > 0 else 50
    num_tokens = int((inputs["input_ids"] == token).sum())
    message = (
        f"{kind.capitalize()} features and {kind} tokens do not match, tokens: {num_tokens}, "
        f"features: {num_tokens - change}"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**inputs)
    patches.apply(model, [PlaceholderMerge()])
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(**inputs)
    model(**text_and_media(model)).loss.backward()  # as good as before


def test_the_outputs_are_the_stock_ones_field_by_field() -> None:
    model = build("e2b").eval()
    inputs = text_and_media(model)
    with torch.no_grad():
        expected = model.model(**inputs, output_hidden_states=True)
        patches.apply(model, [PlaceholderMerge()])
        output = model.model(**inputs, output_hidden_states=True)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(output.image_hidden_states, expected.image_hidden_states)
    assert len(output.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))


@pytest.mark.parametrize("by", ["argument", "config"])
def test_a_tuple_is_returned_where_asked_in_the_stock_order(by: str) -> None:
    model = build("e2b").eval()
    inputs = text_and_media(model)
    options = {"use_cache": False, "output_hidden_states": True}
    if by == "argument":
        options["return_dict"] = False
    else:
        model.model.config.return_dict = False
    with torch.no_grad():
        expected = model.model(**inputs, **options)
        patches.apply(model, [PlaceholderMerge()])
        output = model.model(**inputs, **options)
    assert isinstance(output, tuple)
    assert [type(part) for part in output] == [type(part) for part in expected]
    assert torch.equal(output[0], expected[0])
    assert torch.equal(output[-1], expected[-1])


def test_positional_arguments_mean_what_they_mean_upstream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build("e2b").eval()
    inputs = batch(model, (1, 0))
    patches.apply(model, [PlaceholderMerge()])
    calls = stock_calls(model, monkeypatch)
    with torch.no_grad():
        by_name = model.model(**inputs).last_hidden_state
        ids, pixels = inputs.pop("input_ids"), inputs.pop("pixel_values")
        assert torch.equal(model.model(ids, pixels, **inputs).last_hidden_state, by_name)
    assert calls == []


def test_calls_with_a_cache_run_the_stock_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("31b").eval()
    inputs = batch(model, (1,))
    patches.apply(model, [PlaceholderMerge()])
    calls = stock_calls(model, monkeypatch)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).logits
        assert calls == []
        cache = DynamicCache(config=model.config)
        assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)
        assert calls == ["get_image_features"]


def test_what_stock_refuses_is_refused_by_stock() -> None:
    model = build("e2b")
    inputs = batch(model, (1, 0))
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    patches.apply(model, [PlaceholderMerge()])
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.model(**inputs, inputs_embeds=embeddings)
    del inputs["input_ids"]
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model.model(**inputs)
    videos = batch(model, (0, 0), (1, 0))
    if videos.pop("num_frames_per_video", None) is not None:
        with pytest.raises(ValueError, match="`num_frames_per_video` is required"):
            model.model(**videos)


def test_embeddings_in_the_place_of_ids_are_searched_for_placeholders() -> None:
    model = build("31b").eval()
    inputs = batch(model, (1, 0))
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    with torch.no_grad():
        expected = model.model(**inputs).last_hidden_state
        patches.apply(model, [PlaceholderMerge()])
        assert torch.equal(model.model(**inputs).last_hidden_state, expected)


def test_nothing_stays_on_the_modules_after_a_call_or_an_error() -> None:
    model = build("e2b")
    patches.apply(model, [PlaceholderMerge()])
    traces = {name: set(vars(module)) for name, module in model.named_modules()}
    seen = []
    decoder = model.model.language_model
    handle = decoder.register_forward_pre_hook(lambda *_: seen.append(MERGED & set(vars(decoder))))
    model(**text_and_media(model))
    handle.remove()
    assert seen == [{"_gemtune_per_layer_inputs"}]
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces

    def fail(*_: object) -> None:
        raise MemoryError("in the decoder")

    handle = decoder.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        model(**text_and_media(model))
    handle.remove()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces


def test_two_models_do_not_share_what_is_merged() -> None:
    model = build("e2b")
    inputs = text_and_media(model)
    patches.apply(model, [PlaceholderMerge()])
    twin = copy.deepcopy(model)
    nested = []

    def call_twin(*_: object) -> None:
        nested.append(twin.model(**inputs).last_hidden_state)

    handle = model.model.language_model.layers[0].register_forward_pre_hook(call_twin)
    outer = model.model(**inputs).last_hidden_state
    handle.remove()
    assert torch.equal(nested[0], outer)


def test_a_model_of_text_alone_merges_nothing() -> None:
    from transformers import Gemma4ForCausalLM

    model = Gemma4ForCausalLM(build("e2b").config.text_config)
    report = patches.apply(model, [PlaceholderMerge()])
    assert report.rows[0].status == "not applicable"


def get_placeholder_mask(self, input_ids=None, inputs_embeds=None):
    return input_ids, inputs_embeds, None


def forward(self, input_ids=None, **kwargs):
    return input_ids


def get_image_features(self, pixel_values, image_position_ids=None, **kwargs):
    return pixel_values


def get_video_features(self, pixel_values_videos, video_position_ids=None, **kwargs):
    return pixel_values_videos


def get_per_layer_inputs(self, input_ids, inputs_embeds):
    return input_ids


@pytest.mark.parametrize(
    "method",
    [
        "forward",
        "get_placeholder_mask",
        "get_image_features",
        "get_video_features",
        "get_per_layer_inputs",
    ],
)
def test_a_forward_or_a_part_of_it_that_is_not_known_is_refused(method: str) -> None:
    model = build("e2b")
    owner = model.model if method != "get_per_layer_inputs" else model.model.language_model
    stock = type(owner)
    unknown = getattr(sys.modules[__name__], method)
    owner.__class__ = type(stock.__name__, (stock,), {method: unknown})
    traces = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(PatchError, match=rf"placeholder_merge: {method} of transformers .*proven"):
        patches.apply(model, [PlaceholderMerge()])
    assert {name: set(vars(module)) for name, module in model.named_modules()} == traces
