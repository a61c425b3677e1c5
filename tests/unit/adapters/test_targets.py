"""The paths that each part stands for, and the table of them."""

from __future__ import annotations

import re

import pytest
from gemma4_zoo import build

from gemtune.adapters import Dora, Lora, adapter_rows, attach, find_targets
from gemtune.errors import ConfigError


def test_language_targets_are_the_decoder_layers_and_nothing_else() -> None:
    (found,) = find_targets(build("e2b"), ["language"])
    assert all(name.startswith("model.language_model.layers.") for name in found.modules)
    kinds = {name.rpartition(".")[2] for name in found.modules}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("vision", "model.vision_tower.encoder."), ("audio", "model.audio_tower.layers.")],
)
def test_targets_of_towers_are_the_inner_linears_of_clipped_layers(part: str, prefix: str) -> None:
    (found,) = find_targets(build("e2b", hears=True), [part])
    assert found.modules and all(name.startswith(prefix) for name in found.modules)
    clipped = [name for name in found.modules if not name.endswith("relative_k_proj")]
    assert clipped and all(name.endswith(".linear") for name in clipped)


def test_targets_of_the_other_parts() -> None:
    moe = build("26b_a4b")
    language, experts = find_targets(moe, ["language", "experts"])
    assert not any("expert" in name or "router" in name for name in language.modules)
    num_layers = moe.config.text_config.num_hidden_layers
    assert len(experts.parameters) == 2 * num_layers and not experts.modules
    (embeddings,) = find_targets(moe, ["embeddings"])
    assert embeddings.modules == ("model.language_model.embed_tokens",)
    (projector,) = find_targets(build("e2b", hears=True), ["projector"])
    assert projector.modules == (
        "model.embed_vision.embedding_projection", "model.embed_audio.embedding_projection",
    )  # fmt: skip


def test_parts_share_no_target() -> None:
    model = build("26b_a4b")
    found = find_targets(model, ["language", "experts", "embeddings", "vision", "projector"])
    names = [name for targets in found for name in (*targets.modules, *targets.parameters)]
    assert len(names) == len(set(names))
    for targets in found:
        others = [t for t in found if t is not targets]
        assert all(
            not re.fullmatch(targets.pattern, name)
            for other in others
            for name in (*other.modules, *other.parameters)
        )


@pytest.mark.parametrize(
    ("family", "part"), [("e2b", "experts"), ("31b", "audio"), ("31b", "experts")]
)
def test_a_part_that_matched_nothing_is_an_error(family: str, part: str) -> None:
    with pytest.raises(ConfigError, match=f"'{part}', but this model has nothing of it"):
        find_targets(build(family), [part])
    with pytest.raises(ConfigError, match="'router', but this model has nothing of it"):
        attach(build("e2b"), Lora(also_train=["router"]))


def test_the_table_counts_every_trained_parameter() -> None:
    adapter = Lora(
        rank=4,
        ranks={"experts": 2},
        parts=["language", "experts", "embeddings", "vision"],
        also_train=["router"],
    )
    model = attach(build("26b_a4b"), adapter)
    rows = adapter_rows(model, adapter)
    assert [part for part, _ in rows] == [
        "language", "experts", "embeddings", "vision", "router",
    ]  # fmt: skip
    counts = [int(text.split(" parameters")[0].split()[-1].replace(",", "")) for _, text in rows]
    assert sum(counts) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    texts = dict(rows)
    assert texts["experts"].startswith("rank 2, ")
    assert "(down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj" in texts["language"]
    assert texts["router"].startswith("in full, ")
    with_magnitudes = attach(build("e2b"), dora := Dora(rank=4))
    ((_, text),) = adapter_rows(with_magnitudes, dora)
    total = sum(p.numel() for p in with_magnitudes.parameters() if p.requires_grad)
    assert f"{total:,} parameters" in text
