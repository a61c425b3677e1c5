"""Each kind of layers by itself: what is recomputed, what is kept, and that no gradient changes."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import gemma4_zoo as zoo
import pytest
import torch
from kept_bytes import kept_bytes

from gemtune import patches
from gemtune.errors import ConfigError
from gemtune.models import ModelConfig, load_model, load_processing
from gemtune.models.recomputation import KINDS, kinds_of, layers_with_kinds, recompute

# Of the small model: its upper three layers share, two of them sliding and one full.
LAYERS = {"sliding": 2, "full": 1, "shared": 3, "vision": 3, "audio": 2}
SUBSETS: tuple[tuple[str, ...] | None, ...] = (
    *((kind,) for kind in KINDS),
    ("sliding", "shared"),
    ("full", "vision", "audio"),
    None,
)
IMAGES, VIDEOS, AUDIOS = (1, 0, 2), (0, 1, 0), (0, 1, 1)
# A submodule of each layer that runs whenever the layer does.
FIRST_OF = {"vision": "input_layernorm", "audio": "feed_forward1"}


def hearing_model(family: str = "e2b", choice: Sequence[str] | None = None) -> Any:
    """With both towers, its embeddings frozen: gradients need no input that has one."""
    model = zoo.build(family, hears=True, frozen=("embed_tokens",))
    patches.apply(model, choice)
    return model


def batch(model: Any) -> dict[str, torch.Tensor]:
    return zoo.batch(model, IMAGES, VIDEOS, audios_per_row=AUDIOS)


def count_in_backward(model: Any) -> Counter[str]:
    """Filled with the runs of layers within backward passes, by kind, of the layers they are in."""
    counts: Counter[str] = Counter()
    for kind, layer in layers_with_kinds(model):

        def note(*_: Any, kind: str = kind, layer: Any = layer) -> None:
            if torch._C._current_graph_task_id() != -1:
                counts[kind] += 1

        layer.get_submodule(FIRST_OF.get(kind, "input_layernorm")).register_forward_pre_hook(note)
    return counts


@pytest.mark.parametrize("choice", [(), None], ids=["stock", "patched"])
@pytest.mark.parametrize("kinds", SUBSETS, ids=lambda kinds: "+".join(kinds or ["all"]))
def test_the_layers_that_are_named_are_recomputed_and_no_gradient_changes(
    kinds: tuple[str, ...] | None, choice: tuple[str, ...] | None
) -> None:
    model = hearing_model(choice=choice)
    inputs = batch(model)
    with zoo.exact_float64():
        loss, expected = zoo.loss_and_gradients(model, inputs)
        recompute(model, kinds)
        counts = count_in_backward(model)
        again, found = zoo.loss_and_gradients(model, inputs)
    assert again == loss
    assert found.keys() == expected.keys()
    assert max(zoo.relative_error(found[name], expected[name]) for name in found) < 1e-12
    # The tower runs for the images, and once more for the video.
    passes = {"vision": 2}
    assert counts == {k: LAYERS[k] * passes.get(k, 1) for k in kinds or KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_keeps_less(kind: str) -> None:
    model = hearing_model()
    inputs = batch(model)
    keeps = lambda: kept_bytes(lambda: model(**inputs, use_cache=False).loss)[1]  # noqa: E731
    with zoo.exact_float64():
        everything = keeps()
        recompute(model, [kind])
        one = keeps()
        recompute(model)
        assert keeps() < one < 0.99 * everything


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_kinds_are_those_of_the_layers(family: str) -> None:
    model = zoo.build(family, hears=family == "e2b")
    found: Counter[str] = Counter()
    for kind, layer in layers_with_kinds(model):
        found[kind] += 1
        if kind in ("sliding", "full", "shared"):
            assert layer.self_attn.is_kv_shared_layer == (kind == "shared")
        if kind in ("sliding", "full"):
            assert (layer.self_attn.sliding_window is None) == (kind == "full")
    assert found == kinds_of(model.config)
    ends = ("DecoderLayer", "EncoderLayer", "AudioLayer")
    assert sum(found.values()) == sum(type(m).__name__.endswith(ends) for m in model.modules())


def test_a_chosen_layer_runs_once_without_a_backward_pass() -> None:
    model = hearing_model()
    recompute(model)
    inputs = batch(model)
    runs = []
    layer = model.model.audio_tower.layers[0]
    layer.feed_forward1.register_forward_pre_hook(lambda *_: runs.append(layer.training))
    with zoo.exact_float64():
        with torch.no_grad():
            model(**inputs, use_cache=False)
        expected = model.eval()(**inputs, use_cache=False).loss
        assert runs == [True, False]
        copied = copy.deepcopy(model).train()
        with torch.no_grad():  # a layer of the copy is recomputed with the weights of the copy
            copied.model.audio_tower.layers[0].norm_out.weight.zero_()
        assert copied(**inputs, use_cache=False).loss != expected


def test_nothing_warns() -> None:
    model = hearing_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute(model)


def config(*kinds: str, **keys: Any) -> ModelConfig:
    keys = {"gradient_checkpointing": True} | keys
    return ModelConfig(weights="random", recomputed_layers=list(kinds), **keys)


def test_a_run_recomputes_what_its_configuration_names() -> None:
    settings = config("full", "vision")
    model = load_model(settings, load_processing(settings), seed=0)
    counts = count_in_backward(model)
    zoo.loss_and_gradients(model, zoo.batch(model))  # images alone: the tower runs once
    assert counts == {"full": LAYERS["full"], "vision": LAYERS["vision"]}


def test_a_kind_that_the_model_lacks_is_refused_before_weights_are_read() -> None:
    with pytest.raises(ConfigError, match=r"audio.*no such layers.*sliding, full, shared, vision"):
        load_processing(config("sliding", "audio"))
    with pytest.raises(ConfigError, match="names shared"):
        recompute(zoo.build("31b"), ["shared"])


@pytest.mark.parametrize(
    ("kinds", "keys", "said"),
    [
        (["slidin"], {}, "Did you mean 'sliding'"),
        ([], {}, "names no layers"),
        (["full"], {"gradient_checkpointing": False}, "Add model.gradient_checkpointing=true"),
    ],
)
def test_a_choice_that_chooses_nothing_is_refused(
    kinds: list[str], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        config(*kinds, **keys)
