"""cuDNN attention is off where Gemma 4 attends, and nowhere else. The switch exists on CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gemma4_zoo import batch, build
from torch import nn

from gemtune import patches
from gemtune.errors import PatchError
from gemtune.patches.sdpa_guard import SdpaGuard

is_enabled = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    before = is_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The switch, as it was at every call of scaled_dot_product_attention."""
    states: list[bool] = []
    attend = F.scaled_dot_product_attention

    def spy(*args: object, **kwargs: object) -> torch.Tensor:
        states.append(is_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return states


def num_layers(model: nn.Module) -> int:
    config = model.config
    return config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers


@pytest.mark.parametrize("training", [True, False])
def test_it_is_off_in_every_attention_of_text_and_vision_and_on_again_after(
    states: list[bool], training: bool
) -> None:
    model = build("e2b").train(training)
    inputs = batch(model)
    model(**inputs, use_cache=False)
    assert states == [True] * num_layers(model)
    states.clear()
    report = patches.apply(model, [SdpaGuard()])
    assert len(report.rows[0].sites) == num_layers(model)
    assert "pytorch#196678" in report.rows[0].reason
    model(**inputs, use_cache=False)
    assert states == [False] * num_layers(model)
    assert is_enabled()


def test_what_is_not_attention_runs_with_the_setting_of_the_user(states: list[bool]) -> None:
    model = build("e2b")
    patches.apply(model, [SdpaGuard()])
    seen = []
    model.model.language_model.layers[1].mlp.register_forward_hook(
        lambda *_: seen.append(is_enabled())
    )
    model(**batch(model, (0,)), use_cache=False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    model(**batch(model, (0,)), use_cache=False)
    assert seen == [True, False]
    assert not is_enabled()


def test_it_is_off_when_checkpointing_repeats_the_forward(states: list[bool]) -> None:
    model = build("e2b")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    patches.apply(model, [SdpaGuard()])
    loss = model(**batch(model, (1,)), use_cache=False).loss
    in_forward = len(states)
    loss.backward()
    assert len(states) == 2 * in_forward == 2 * num_layers(model)
    assert not any(states)
    assert is_enabled()


def test_an_error_in_the_attention_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("e2b")
    patches.apply(model, [SdpaGuard()])

    def fail(*args: object, **kwargs: object) -> None:
        assert not is_enabled()
        raise MemoryError("in the kernel")

    monkeypatch.setattr(F, "scaled_dot_product_attention", fail)
    with pytest.raises(MemoryError, match="in the kernel"):
        model(**batch(model, (0,)), use_cache=False)
    assert is_enabled()


def test_other_attention_than_sdpa_needs_no_guard() -> None:
    report = patches.apply(build("e2b", attention="eager"), [SdpaGuard()])
    assert report.rows[0].status == "not applicable"
    assert report.rows[0].reason == "attention is eager, not sdpa"


def test_only_the_parts_that_use_sdpa_are_guarded() -> None:
    model = build("e2b")
    model.config.vision_config._attn_implementation = "eager"
    report = patches.apply(model, [SdpaGuard()])
    assert report.rows[0].sites == tuple(
        f"model.language_model.layers.{i}.self_attn"
        for i in range(model.config.text_config.num_hidden_layers)
    )


def test_a_model_without_gemma_4_text_needs_no_guard() -> None:
    report = patches.apply(nn.Linear(2, 2), [SdpaGuard()])
    assert report.rows[0].status == "not applicable"
    assert "Gemma4TextModel" in report.rows[0].reason


class Gemma4TextModel(nn.Module):
    """Of a transformers that calls its attention something else."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x) + 1


def test_a_text_model_with_unknown_attention_is_refused() -> None:
    with pytest.raises(PatchError, match=r"no Gemma4TextAttention.*enable_cudnn_sdp\(False\)"):
        patches.apply(Gemma4TextModel(nn.Linear(2, 2)), [SdpaGuard()])


class Gemma4TextAttention(nn.Module):
    config = SimpleNamespace(_attn_implementation="sdpa")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_a_compiled_model_is_one_graph_whose_attention_runs_without_cudnn() -> None:
    states = []

    class Watch(torch.fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            if target.__name__ == "scaled_dot_product_attention":
                states.append(is_enabled())
            return super().call_function(target, args, kwargs)

    model = Gemma4TextModel(Gemma4TextAttention())
    patches.apply(model, [SdpaGuard()])
    x = torch.randn(1, 2, 8, 4)
    expected = F.scaled_dot_product_attention(x, x, x) + 1
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, _: Watch(graph).run, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert states == [False]
    assert is_enabled()
