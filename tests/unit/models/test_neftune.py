"""Noise on the embeddings of text: how much, where, and when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, loss_and_gradients

from gemtune import adapters, patches
from gemtune.adapters import Lora
from gemtune.models import EmbeddingNoise
from gemtune.models.neftune import lengths

ALPHA = 5.0


@contextmanager
def embeddings_seen(model: Any) -> Iterator[list[torch.Tensor]]:
    """What the decoder gets, one [B, S, H] a forward."""
    seen: list[torch.Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"].detach()), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def noise_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """With it, less without: [B, S, H]."""
    with embeddings_seen(model) as seen:
        model(**inputs, use_cache=False)
        noise = EmbeddingNoise(model, ALPHA)
        torch.manual_seed(1)
        model(**inputs, use_cache=False)
        noise.remove()
        model(**inputs, use_cache=False)
    assert torch.equal(seen[2], seen[0])
    return seen[1] - seen[0]


@pytest.mark.parametrize("choice", [[], ["placeholder_merge"]], ids=["stock", "patched"])
def test_each_row_by_its_tokens_and_no_feature_of_an_image(choice: list[str]) -> None:
    model = build("e2b")
    patches.apply(model, choice)
    inputs = batch(model, images_per_row=(0, 0, 2, 1))
    noise = noise_of(model, inputs)
    size = noise.shape[-1]
    is_text = inputs["mm_token_type_ids"] == 0
    assert not noise[~is_text].any()
    lengths_B = inputs["attention_mask"].sum(-1)
    assert len(set(lengths_B.tolist())) == 4
    for row, count in enumerate(lengths_B.tolist()):
        values = noise[row][(inputs["attention_mask"][row] == 1) & is_text[row]]
        bound = ALPHA / (count * size) ** 0.5
        assert bound * 0.99 < values.abs().max() < bound
        # Uniform: its mean is 0, its variance a third of the bound's square.
        assert values.var() == pytest.approx(bound**2 / 3, rel=0.1)
        assert abs(values.mean()) < 0.1 * bound


def test_documents_of_a_packed_row_by_theirs() -> None:
    model = build("e2b")
    model.config._attn_implementation = "sdpa"
    positions = torch.tensor([[*range(6), *range(20), *range(2)], [*range(28)]])
    ids = torch.randint(40, 600, positions.shape, generator=torch.Generator().manual_seed(0))
    noise = noise_of(model, {"input_ids": ids, "position_ids": positions})
    size = noise.shape[-1]
    for row, start, count in ((0, 0, 6), (0, 6, 20), (1, 0, 28)):
        bound = ALPHA / (count * size) ** 0.5
        largest = noise[row, start : start + count].abs().max()
        assert bound * 0.98 < largest < bound
    assert lengths(None, positions)[0].tolist() == [6.0] * 6 + [20.0] * 20 + [2.0] * 2


def test_none_in_evaluation_or_without_autograd() -> None:
    model = build("e2b")
    inputs = batch(model)
    EmbeddingNoise(model, ALPHA)
    state = torch.get_rng_state()
    with embeddings_seen(model) as seen:
        with torch.no_grad():
            model(**inputs, use_cache=False)
        model.eval()
        model(**inputs, use_cache=False)
        model.train()
        assert torch.equal(torch.get_rng_state(), state)
        model(**inputs, use_cache=False)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


def test_recomputation_sees_the_same_noise() -> None:
    found = []
    for is_recomputed in (False, True):
        model = build("e2b")
        EmbeddingNoise(model, ALPHA)
        if is_recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        found.append(loss_and_gradients(model, batch(model)))
    (loss, gradients), (again, others) = found
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-12, rtol=1e-9)


def test_under_an_adapter_of_the_embeddings() -> None:
    """Registered before the adapter, as a run does it: the noise of a plain model, once."""
    seen_by = []
    for is_adapted in (False, True):
        model = build("e2b")
        EmbeddingNoise(model, ALPHA)
        adapted = (
            adapters.attach(model, Lora(rank=2, parts=["embeddings"])) if is_adapted else model
        )
        torch.manual_seed(1)
        with embeddings_seen(model) as seen:
            adapted(**batch(model, images_per_row=(0, 0)), use_cache=False)
        seen_by.append(seen[0])
    torch.testing.assert_close(*seen_by)
