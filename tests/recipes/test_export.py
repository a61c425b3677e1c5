"""The model at the end of a run is one that stock transformers knows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from whole_runs import RunFolder, TrainRun

import recipes.gemma4_sft as recipe

EVERYTHING = ("adapter.parts=[language,embeddings,projector]", "adapter.also_train=[norms]")
STOCK = """
import sys
sys.modules["gemtune"] = sys.modules["peft"] = None  # importing them is an error
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

torch.set_num_threads(1)
folder, inputs, outputs = sys.argv[1:]
model, info = Gemma4ForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
tokenizer = AutoTokenizer.from_pretrained(folder)
assert tokenizer.chat_template
Gemma4ImageProcessorPil.from_pretrained(folder)
with torch.no_grad():
    save_file({"logits": model.eval()(**load_file(inputs)).logits}, outputs)
"""


@pytest.mark.parametrize(
    ("overrides", "tolerance"),
    [
        ((), 1e-5),
        (("recipe=gemma4_lora", "optim.lr=1e-2"), 1e-4),
        (("recipe=gemma4_vision_lora", "adapter=dora", "optim.lr=1e-2"), 1e-4),
        (("adapter=lora", *EVERYTHING, "optim.lr=1e-2"), 1e-4),
    ],
    ids=["full", "lora", "dora", "embeddings and norms"],
)
def test_stock_transformers_gives_the_same_logits(
    train_run: TrainRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    tolerance: float,
) -> None:
    trained: dict[str, torch.Tensor] = {}
    conclude = recipe.conclude

    @torch.no_grad()
    def conclude_and_keep(config: Any, stages: Any, session: Any, *rest: Any) -> None:
        batch = stages.eval_rows.batch([stages.eval_rows[i] for i in range(4)])
        assert "pixel_values" in batch.inputs
        save_file(batch.inputs, str(tmp_path / "inputs.safetensors"))
        trained["logits"] = session.model.eval()(**batch.inputs).logits
        conclude(config, stages, session, *rest)

    monkeypatch.setattr(recipe, "conclude", conclude_and_keep)
    run = train_run(*overrides)

    arguments = [run.path / "model", tmp_path / "inputs.safetensors", tmp_path / "out.safetensors"]
    subprocess.run(
        [sys.executable, "-c", STOCK, *map(str, arguments)], check=True, cwd=tmp_path, timeout=120
    )
    logits = load_file(str(tmp_path / "out.safetensors"))["logits"]
    assert logits.shape == trained["logits"].shape and logits.std() > 0.1
    torch.testing.assert_close(logits, trained["logits"], atol=tolerance, rtol=0)


def test_a_lora_checkpoint_holds_the_adapter_alone(train_run: TrainRun) -> None:
    run = train_run("recipe=gemma4_lora", "loop.max_steps=1")
    names = run.tensors()
    assert names and all(".lora_A." in name or ".lora_B." in name for name in names)
    slots = [key.split("|") for key in run.training_state() if key.startswith("optimizer|")]
    assert {name for _, name, _ in slots} == names.keys()
    exported = load_file(str(run.path / "model" / "model.safetensors"))
    assert not any("lora" in name for name in exported)


def test_older_readers_find_the_head_sizes(tiny_checkpoint: Path) -> None:
    text = json.loads((tiny_checkpoint / "config.json").read_text())["text_config"]
    assert text["global_head_dim"] == 32
    assert "num_global_key_value_heads" in text


def test_everyone_may_read_what_the_owner_shares(tiny_checkpoint: Path) -> None:
    modes = {p.stat().st_mode for p in tiny_checkpoint.iterdir()}
    assert len(modes) == 1


def test_nothing_but_tensors_is_binary(finished_run: RunFolder) -> None:
    files = [p for p in finished_run.path.rglob("*") if p.is_file()]
    # DCP's index, and its pieces, are read by what can execute nothing: test_tensors.py.
    files = [p for p in files if p.name != ".metadata" and p.suffix != ".distcp"]
    assert {p.suffix for p in files} == {
        ".json",
        ".jsonl",
        ".yaml",
        ".safetensors",
        ".jinja",
        ".md",
        ".html",
        "",
    }
    for file in files:
        start = file.read_bytes()[:10]
        if file.suffix == ".safetensors":
            assert start[8:9] == b"{"
        else:
            file.read_text(encoding="utf-8")
