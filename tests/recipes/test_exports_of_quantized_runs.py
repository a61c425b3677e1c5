"""Runs on a base in few bits, exported: what was trained, and the adapter for the stock base."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import QUICK, all_tensors, logits_of, on, processing_of, stock, with_peft
from gemma4_zoo import build, model_folder, relative_error
from quantized import CPU, INT8, KINDS, NF4
from ranks import run_ranks
from sharded_runs import Case, trains
from whole_runs import RunFolder, TrainRun

from gemtune.adapters.quantization import dequantized, quantize, quantized_linears
from gemtune.checkpoint.tensors import read_tensors
from gemtune.config import from_dict
from gemtune.errors import CheckpointError, ConfigError
from gemtune.export import ExportRequest, export_model, export_run, model_card
from gemtune.export.probe import make_probe
from gemtune.export.verification import FLOAT32_BOUND, Difference, difference

pytestmark = pytest.mark.xdist_group("exports")

SCALE = 32.0 / 16  # alpha / rank, as they are unless a run says otherwise


def train(train_run: TrainRun, kind: str, base: Path, *overrides: str) -> RunFolder:
    quantized = ("adapter=qlora", f"adapter.quantization={kind}")
    return train_run("recipe=gemma4_lora", *quantized, *QUICK, *on(base), *overrides)


def updates(factors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name of a weight -> what its two factors come to."""
    found = {}
    for name, a in factors.items():
        if ".lora_A." in name:
            b = factors[name.replace("lora_A", "lora_B")]
            weight = re.sub(r"^base_model\.model\.|\.lora_A\.default", "", name)
            found[weight] = SCALE * b.float() @ a.float()
    assert found and max(update.abs().max() for update in found.values()) > 1e-3
    return found


def stood_for(kind: str, base: Path) -> dict[str, torch.Tensor]:
    """Name of a weight in few bits -> its values, by the library, of the weights in bfloat16."""
    model = stock(base).to(torch.bfloat16)
    quantize(model, kind, CPU)
    return {f"{n}.weight": dequantized(linear).float() for n, linear in quantized_linears(model)}


@KINDS
def test_merged_it_has_the_values_that_were_trained(
    kind: str, train_run: TrainRun, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = train(train_run, kind, tiny_checkpoint)
    request = {"run": str(run.path), "dtype": "float32", "verify": False}
    written = all_tensors(export_run(ExportRequest(**request, to=str(tmp_path / "exact"))))
    base, few = all_tensors(tiny_checkpoint), stood_for(kind, tiny_checkpoint)
    change = updates(run.tensors())
    assert change.keys() == few.keys() < written.keys()
    for name, value in written.items():
        expected = few[name] + change[name] if name in few else base[name].bfloat16().float()
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6)
        if name in few:
            assert relative_error(expected, base[name]) > 1e-3
    said: list[str] = []
    rounded = export_run(
        ExportRequest(run=str(run.path), to=str(tmp_path / "rounded")), said.append
    )
    assert [line.split(":")[0] for line in said[-2:]] == ["text", "image"]
    for name, value in all_tensors(rounded).items():
        assert torch.equal(value, written[name].bfloat16())
    # The run's own, whose sums are not in the same order; and its card.
    own = run.path / "model"
    for name, value in all_tensors(own).items():
        torch.testing.assert_close(value.float(), written[name], atol=1e-6, rtol=2**-7)
    card = (rounded / "README.md").read_text()
    assert (own / "README.md").read_text() == card
    assert f"linear weights in {kind.strip('inft')} bits ({kind}, " in card


@KINDS
def test_alone_it_is_for_the_stock_base_and_says_how_far_that_is(
    kind: str, train_run: TrainRun, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    run = train(train_run, kind, tiny_checkpoint)
    said: list[str] = []
    request = {"run": str(run.path), "dtype": "float32"}
    alone = export_run(
        ExportRequest(**request, to=str(tmp_path / "alone"), kind="adapter"), said.append
    )
    settings = json.loads((alone / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny_checkpoint.resolve())
    change = updates(run.tensors())
    assert set(settings["target_modules"]) == {name.removesuffix(".weight") for name in change}

    # Independently: the stock base with the updates added by hand.
    expected = stock(tiny_checkpoint)
    with torch.no_grad():
        for name, value in expected.state_dict().items():
            value.copy_(value.bfloat16())
            if name in change:
                value.add_(change[name])
    found = logits_of(with_peft(tiny_checkpoint, alone))
    torch.testing.assert_close(found, logits_of(expected), atol=1e-4, rtol=0)

    # What is said of the distance from the training is what it is.
    merged = export_run(ExportRequest(**request, to=str(tmp_path / "merged"), verify=False))
    trained = stock(merged).eval()
    probe = make_probe(trained, processing_of(tiny_checkpoint))
    before, after = probe.logits(trained), probe.logits(with_peft(tiny_checkpoint, alone).eval())
    lines = [line for line in said if "differ from those of the training by" in line]
    card = (alone / "README.md").read_text()
    measured = re.search(r"at the worst position: text ([\d.e-]+), image ([\d.e-]+)\.", card)
    assert measured is not None
    for name, line, number in zip(("text", "image"), lines, measured.groups(), strict=True):
        distance = difference(name, after[name], before[name]).error
        assert distance > 100 * FLOAT32_BOUND
        assert float(number) == pytest.approx(distance, rel=0.05)
        assert f"{name}: on the base in bfloat16" in line and f"by {distance:.1e} of" in line


@pytest.mark.parametrize("kind", [INT8])
def test_experts_and_what_is_trained_in_full_come_along(
    kind: str, train_run: TrainRun, tmp_path: Path
) -> None:
    processing = processing_of(model_folder("26b_a4b", tmp_path))
    base = export_model(
        build("26b_a4b", torch.float32),
        processing.tokenizer,
        processing.image_processor,
        tmp_path / "base",
        processing.processor_file,
    )
    parts = ("adapter.parts=[language,experts]", "adapter.also_train=[norms]")
    run = train(train_run, kind, base, *parts)
    said: list[str] = []
    request = ExportRequest(run=str(run.path), to=str(tmp_path / "out"), dtype="float32")
    written = all_tensors(export_run(request, said.append))
    assert sum(line.startswith("experts: ") for line in said) == 1
    before, trained = all_tensors(base), run.tensors()
    norms = [name for name in trained if name.endswith("norm.weight")]
    assert norms
    for name in norms:
        plain = name.removeprefix("base_model.model.")
        assert torch.equal(written[plain], trained[name].float())
    experts = [name for name in before if ".experts." in name]
    moved = [(written[n] - before[n].bfloat16().float()).abs().max() for n in experts]
    assert max(moved) > 1e-4


@pytest.mark.parametrize("kind", [INT8])
def test_a_checkpoint_of_two_processes_and_another_base(
    kind: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    overrides = ("recipe=gemma4_lora", "adapter=qlora", f"adapter.quantization={kind}", *QUICK)
    case = Case((*overrides, *on(tiny_checkpoint)))
    run_ranks(trains, 2, {"two": case}, str(tmp_path), limit_seconds=300)
    run = tmp_path / "two" / "run"
    request = ExportRequest(run=str(run), to=str(tmp_path / "out"), dtype="float32", verify=False)
    written, few = all_tensors(export_run(request)), stood_for(kind, tiny_checkpoint)
    tensors = read_tensors(sorted((run / "checkpoints").glob("step_*"))[-1])
    factors = {n.removeprefix("model|"): t for n, t in tensors.items() if n.startswith("model|")}
    for name, change in updates(factors).items():
        torch.testing.assert_close(written[name], few[name] + change, atol=1e-6, rtol=1e-6)

    # The same with one weight changed, in the files of the base.
    other = export_model_with(tiny_checkpoint, tmp_path / "other")
    changed = ExportRequest(run=str(run), to=str(tmp_path / "no"), base=str(other))
    with pytest.raises(CheckpointError, match="was trained on another base: the frozen weights"):
        export_run(changed)
    assert not (tmp_path / "no").exists()


def export_model_with(base: Path, folder: Path) -> Path:
    """The model of `base` with its linear weights turned round, in `folder`."""
    processing, model = processing_of(base), stock(base).to(torch.bfloat16)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.mlp.up_proj.weight.neg_()
    parts = (processing.tokenizer, processing.image_processor)
    return export_model(model, *parts, folder, processing.processor_file)


@pytest.mark.parametrize("kind", [NF4, INT8])
def test_without_the_library_it_is_one_error(
    kind: str,
    train_run: TrainRun,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = train(train_run, kind, tiny_checkpoint, "loop.max_steps=1")
    found = importlib.util.find_spec
    gone = {"nf4": "bitsandbytes", "int8": "torchao"}[kind]
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == gone else found(name)
    )
    with pytest.raises(ConfigError, match=rf"={kind} needs {gone}, which is not installed: pip"):
        export_run(ExportRequest(run=str(run.path), to=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def finished_config(finished_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Any:
    """config(quantization) -> that of a run, as if it had been one of QLoRA."""
    monkeypatch.setattr("gemtune.adapters.config.require_library", lambda kind: None)
    state = json.loads((finished_run.checkpoints()[-1] / "state.json").read_text())

    def config(quantization: str) -> Any:
        adapter = {"_target_": "gemtune.adapters.Qlora", "quantization": quantization}
        return from_dict(state["config"] | {"adapter": adapter})

    return config


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("nf4", "4 bits (nf4, bitsandbytes)"),
        ("int4", "4 bits (int4, torchao)"),
        ("int8", "8 bits (int8, torchao)"),
    ],
)
def test_the_card_says_what_the_base_was_in(
    kind: str, said: str, finished_config: Any, tmp_path: Path
) -> None:
    """Needs no library."""
    config = finished_config(kind)
    merged = model_card(config, tmp_path, step=2)
    assert f"In training its language layers had their linear weights in {said}." in merged
    gaps = [Difference("text", 3, 0.3141), Difference("image", 0, 0.02)]
    alone = model_card(config, tmp_path, step=2, kind="adapter", gaps=gaps)
    assert "learned on a quantised base" in alone and said in alone
    assert "at the worst position: text 0.31, image 0.02." in alone and "kind=merged" in alone
    unmeasured = model_card(config, tmp_path, step=2, kind="adapter")
    assert "By how much was not measured." in unmeasured
    assert "tags" in alone and "- qlora" in alone


def test_the_same_adapter_without_quantisation(finished_config: Any) -> None:
    adapter = finished_config("nf4").adapter
    adapter.rank, adapter.parts, adapter.ranks = 3, ["language", "vision"], {"vision": 2}
    plain = adapter.on_whole_base()
    assert (plain.rank, plain.parts, plain.ranks) == (3, ["language", "vision"], {"vision": 2})
    assert not isinstance(plain, type(adapter)) and not hasattr(plain, "quantization")
