"""From a checkpoint of a run to a folder: weights by hand, PEFT, experts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from exported import QUICK, all_tensors, logits_of, on, processing_of, stock, with_peft
from gemma4_zoo import build, model_folder
from whole_runs import RunFolder, TrainRun

from gemtune.checkpoint.tensors import read_tensors
from gemtune.export import ExportRequest, export_model, export_run

pytestmark = pytest.mark.xdist_group("exports")


def test_full_training_is_rounded_once(finished_run: RunFolder, tmp_path: Path) -> None:
    request = ExportRequest(run=str(finished_run.path), to=str(tmp_path / "out"), max_shard_gb=1e-3)
    said: list[str] = []
    folder = export_run(request, said.append)
    assert [line.split(":")[0] for line in said[-2:]] == ["text", "image"]
    written, trained = all_tensors(folder), finished_run.tensors()
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert trained.keys() - {"lm_head.weight"} <= written.keys()
    for name, value in written.items():
        assert value.dtype == torch.bfloat16
        if name in trained:
            assert torch.equal(value, trained[name].to(torch.bfloat16))
    card = (folder / "README.md").read_text()
    assert "48 rows to learn from" in card and "eval/loss" in card and "optim.lr | 0.003" in card
    assert str(finished_run.path) not in card
    # The run itself leaves the same card beside its model.
    assert (finished_run.path / "model" / "README.md").read_text() == card


def test_lora_merged_and_alone(train_run: TrainRun, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """rsLoRA: its scale stands in no tensor, so that a wrong kind of adapter would show."""
    run = train_run("recipe=gemma4_lora", "adapter=rslora", *QUICK, *on(tiny_checkpoint))
    request = {"run": str(run.path), "dtype": "float32"}
    merged = export_run(ExportRequest(**request, to=str(tmp_path / "merged")))
    alone = export_run(ExportRequest(**request, to=str(tmp_path / "alone"), kind="adapter"))

    base, factors = all_tensors(tiny_checkpoint), run.tensors()
    adapted = {
        re.sub(r"^base_model\.model\.|\.lora_A\.default", "", name): name
        for name in factors
        if ".lora_A." in name
    }
    assert adapted
    for name, value in all_tensors(merged).items():
        expected = base[name].to(torch.bfloat16).float()
        if name in adapted:
            a, b = (factors[adapted[name].replace("lora_A", part)] for part in ("lora_A", "lora_B"))
            assert b.abs().max() > 1e-3
            expected = expected + 32.0 / a.shape[0] ** 0.5 * b.float() @ a.float()
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)

    settings = json.loads((alone / "adapter_config.json").read_text())
    paths = {name.removesuffix(".weight") for name in adapted}
    assert set(settings["target_modules"]) == paths and settings["use_rslora"]
    assert settings["base_model_name_or_path"] == str(tiny_checkpoint.resolve())
    assert {p.name for p in alone.glob("*.safetensors")} == {"adapter_model.safetensors"}
    there = logits_of(stock(merged))
    torch.testing.assert_close(
        logits_of(with_peft(tiny_checkpoint, alone)), there, atol=1e-4, rtol=0
    )
    assert (there - logits_of(stock(tiny_checkpoint))).abs().max() > 0.1


def test_an_adapter_of_the_embeddings_is_the_tied_heads_too(
    train_run: TrainRun, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    parts = ("adapter=lora", "adapter.parts=[language,embeddings]")
    run = train_run(*parts, *QUICK, *on(tiny_checkpoint))
    request = {"run": str(run.path), "dtype": "float32"}
    alone = export_run(ExportRequest(**request, to=str(tmp_path / "alone"), kind="adapter"))
    merged = export_run(ExportRequest(**request, to=str(tmp_path / "merged"), verify=False))
    with_adapter, whole = with_peft(tiny_checkpoint, alone), stock(merged)
    torch.testing.assert_close(logits_of(with_adapter), logits_of(whole), atol=1e-4, rtol=0)
    assert whole.lm_head.weight is whole.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in all_tensors(merged)
    # Small: the table itself is not in it.
    assert max(t.numel() for t in all_tensors(alone).values()) < 100_000


def test_experts_merged_and_alone(train_run: TrainRun, tmp_path: Path) -> None:
    processing = processing_of(model_folder("26b_a4b", tmp_path))
    base = export_model(
        build("26b_a4b", torch.float32),
        processing.tokenizer,
        processing.image_processor,
        tmp_path / "base",
        processing.processor_file,
    )
    parts = ("recipe=gemma4_lora", "adapter.parts=[language,experts]", "adapter.ranks.experts=2")
    run = train_run(*parts, *QUICK, *on(base))
    request = {"run": str(run.path), "dtype": "float32"}
    said: list[str] = []
    alone = ExportRequest(**request, to=str(tmp_path / "alone"), kind="adapter")
    export_run(alone, said.append)
    merged = export_run(ExportRequest(**request, to=str(tmp_path / "merged")), said.append)
    assert sum(line.startswith("experts: ") for line in said) == 2
    settings = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    assert "model.language_model.layers.0.experts.down_proj" in settings["target_parameters"]

    before, after = all_tensors(base), all_tensors(merged)
    index = "model.language_model.layers.{}.experts.{}"
    changed = [
        (after[name] - before[name].to(torch.bfloat16).float()).abs().amax(dim=(1, 2))
        for layer in range(6)
        for name in (index.format(layer, "gate_up_proj"), index.format(layer, "down_proj"))
    ]
    assert max(change.max() for change in changed) > 1e-4
    assert sum(key.startswith("model|") for key in read_tensors(run.checkpoints()[-1])) > 20
