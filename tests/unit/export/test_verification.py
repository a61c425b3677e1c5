"""A folder that is not what was trained is refused, whatever is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import processing_of, shift
from gemma4_zoo import build, model_folder
from safetensors.torch import load_file, save_file

from gemtune.errors import CheckpointError
from gemtune.export import export_model, verification
from gemtune.export.probe import MESSAGES, Probe, make_probe
from gemtune.export.stock_reader import answer, digests, logits_of, routed, routers
from gemtune.export.verification import (
    FLOAT32_BOUND,
    Expected,
    difference,
    require_same,
    verify_export,
)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Expected, Any]:
    """A small mixture of experts in a folder, in several shards; what is expected of it; itself."""
    parent = tmp_path_factory.mktemp("moe")
    processing = processing_of(model_folder("26b_a4b", parent))
    model = build("26b_a4b", torch.float32).eval()
    probe = make_probe(model, processing)
    logits = probe.logits(model)
    expected = Expected(probe, logits, logits, digests(model), FLOAT32_BOUND)
    folder = export_model(
        model,
        processing.tokenizer,
        processing.image_processor,
        parent / "exported",
        processing.processor_file,
        shard_bytes=600_000,
    )
    return folder, expected, model


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader without the seconds that a process takes to start."""

    def ask(folder: Path, expected: Expected, _: Path) -> tuple[dict[str, Any], Any]:
        probe = expected.probe
        tensors = {"image": torch.from_numpy(probe.image)}
        for each in probe.passes:
            tensors |= {f"{each.name}|{k}": v for k, v in each.inputs.items()}
            tensors |= {f"{each.name}|route{i}": r for i, r in enumerate(each.routes)}
        request = {
            "folder": str(folder),
            "base": None,
            "messages": MESSAGES,
            "passes": [{"name": each.name, "evenly": each.evenly} for each in probe.passes],
            "num_threads": torch.get_num_threads(),
        }
        found = answer(request, tensors)
        return found, found.pop("logits")

    monkeypatch.setattr(verification, "_ask", ask)


@pytest.fixture
def copied(moe: tuple[Path, Expected, Any], tmp_path: Path) -> Path:
    for file in moe[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_fresh_process_computes_the_same(moe: tuple[Path, Expected, Any]) -> None:
    folder, expected, _ = moe
    assert len(list(folder.glob("*.safetensors"))) > 2
    found = verify_export(folder, expected)
    assert [each.name for each in found] == ["text", "image", "experts"]
    assert max(each.error for each in found) <= FLOAT32_BOUND


def test_every_expert_of_every_layer_is_used(moe: tuple[Path, Expected, Any]) -> None:
    _, expected, model = moe
    *natural, every = expected.probe.passes
    assert every.evenly and len(every.routes) == len(routers(model)) > 0
    for route in every.routes:
        assert set(route.flatten().tolist()) == set(range(4))
    # The others go where the model itself sends them.
    for each in natural:
        with routed(model, None) as chosen:
            logits_of(model, each.inputs)
        assert all(torch.equal(*pair) for pair in zip(chosen, each.routes, strict=True))


@pytest.mark.parametrize("expert", range(4))
def test_one_changed_expert_shows_in_the_logits(
    moe: tuple[Path, Expected, Any], expert: int
) -> None:
    _, expected, model = moe
    weight = model.get_parameter("model.language_model.layers.5.experts.down_proj")
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[expert] *= 1.05
    changed = expected.probe.logits(model)
    with torch.no_grad():
        weight.copy_(kept)
    assert difference("experts", changed["experts"], expected.trained["experts"]).error > 1e-3
    with pytest.raises(CheckpointError, match=r"experts row differ from those before by"):
        require_same(expected.probe, changed, expected.trained, "those before")


def change_weight(folder: Path) -> None:
    """By the least that a float32 can: no logit would show it."""
    file = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = max(tensors, key=lambda n: tensors[n].numel())
    bits = tensors[name].view(-1)[7:8].view(torch.int32)
    bits += 1
    save_file(tensors, file, metadata={"format": "pt"})


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["final_logit_softcapping"] = 10.0
    (folder / "config.json").write_text(json.dumps(config))


def change_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text("x" + file.read_text())


def change_processor(folder: Path) -> None:
    file = folder / "processor_config.json"
    values = json.loads(file.read_text())
    values["image_processor"]["rescale_factor"] *= 2
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (change_weight, r"1 of \d+ tensors load with other values, such as"),
        (change_config, r"logits of the text row differ from the weights that were written by"),
        (change_template, "its template render"),
        (change_processor, "image processor gives other pixel_values"),
    ],
)
def test_a_change_after_the_save_is_found(
    moe: tuple[Path, Expected, Any],
    copied: Path,
    in_this_process: None,
    change: Callable[[Path], None],
    says: str,
) -> None:
    verify_export(copied, moe[1])
    change(copied)
    with pytest.raises(CheckpointError, match=says):
        verify_export(copied, moe[1])


def test_a_missing_shard_is_found(moe: tuple[Path, Expected, Any], copied: Path) -> None:
    sorted(copied.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="Stock transformers cannot load what was written"):
        verify_export(copied, moe[1])


def test_a_check_that_fails_leaves_nothing(moe: tuple[Path, Expected, Any], tmp_path: Path) -> None:
    processing = processing_of(moe[0])

    def refuse(staging: Path) -> None:
        assert (staging / "config.json").exists()
        raise CheckpointError("not this one")

    with pytest.raises(CheckpointError, match="not this one"):
        export_model(
            moe[2],
            processing.tokenizer,
            processing.image_processor,
            tmp_path / "out",
            check=refuse,
        )
    assert list(tmp_path.iterdir()) == []


def test_the_difference_is_of_the_worst_position_over_the_spread() -> None:
    expected = torch.tensor([[0.0, 2.0, 4.0], [0.0, 20.0, 40.0]])
    found = expected + torch.tensor([[0.0], [5.0]])
    worst = difference("text", found, expected)
    assert (worst.position, worst.error) == (1, pytest.approx(5 / 20))
    assert difference("text", found * torch.nan, expected).error == float("inf")


def test_a_dense_model_has_no_experts_row(tmp_path: Path) -> None:
    folder = model_folder("e2b", tmp_path)
    model = build("e2b", torch.float32).eval()
    probe: Probe = make_probe(model, processing_of(folder))
    assert [each.name for each in probe.passes] == ["text", "image"]
    before = probe.logits(model)
    shift(model, "model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight", 2.0)
    after = probe.logits(model)
    assert difference("image", after["image"], before["image"]).error > 1e-4
    assert difference("text", after["text"], before["text"]).error == 0
