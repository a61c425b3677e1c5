"""A patched model in TRL's SFTTrainer: text, images and an adapter, without any option for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import TINY_CONFIG, batch, build
from torch import nn

pytest.importorskip("trl", reason="TRL is not installed: its SFTTrainer stays untested")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from gemtune import patches
from gemtune.errors import PatchError

# What the run of a patched model may differ by: three steps in float32.
LOSS_BOUND, WEIGHTS_BOUND = 1e-5, 2e-4
METRICS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
LORA = {"r": 4, "target_modules": r".*language_model\.layers\.\d+\.self_attn\.[qkvo]_proj"}


def settings(folder: Path, **choices: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            # Of Adam's first steps only the signs of the gradients are left.
            "optim": "sgd",
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        | choices,
    )


def sums(kind: str) -> Dataset:
    rows = []
    for a in range(12):
        question, answer = f"What is {a} + {2 * a}?", f"It is {3 * a}, I believe."
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        if kind == "messages":
            rows.append({"messages": turns})
        else:
            rows.append({"prompt": turns[:1], "completion": turns[1:]})
    return Dataset.from_list(rows)


def trainer_of(model: nn.Module, data: Dataset, args: SFTConfig, **choices: Any) -> SFTTrainer:
    tokenizer = AutoTokenizer.from_pretrained(TINY_CONFIG.parent)
    torch.manual_seed(0)  # of the adapter
    return SFTTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer, **choices
    )


def train(trainer: SFTTrainer) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Losses and TRL's metrics of every step, and how every trained parameter moved."""
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    trainer.train()
    steps = [
        {name: entry[name] for name in METRICS}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    return steps, {name: p.detach() - before[name] for name, p in trained.items()}


def require_equal(
    run: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
    expected: tuple[list[dict[str, float]], dict[str, torch.Tensor]],
) -> None:
    (steps, moves), (expected_steps, expected_moves) = run, expected
    assert len(steps) == 3
    for step, expected_step in zip(steps, expected_steps, strict=True):
        assert step["loss"] == pytest.approx(expected_step["loss"], rel=LOSS_BOUND)
        assert step == pytest.approx(expected_step, rel=WEIGHTS_BOUND)
    assert moves.keys() == expected_moves.keys()
    scale = max(float(move.norm()) for move in expected_moves.values())
    assert scale > 0
    for name, move in expected_moves.items():
        assert float((moves[name] - move).norm()) < WEIGHTS_BOUND * scale, name


@pytest.mark.parametrize("kind", ["messages", "prompt_completion"])
@pytest.mark.parametrize("adapter", [None, LORA], ids=["full", "lora"])
def test_losses_metrics_and_weights_are_those_of_stock(
    kind: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    data, runs = sums(kind), []
    for patched in (False, True):
        model = build("e2b", torch.float32)
        if patched:
            patches.apply(model)
        else:
            # What the patch says too. Stock Gemma 4 does not, and has its means averaged.
            model.accepts_loss_kwargs = True
        args = settings(tmp_path, gradient_accumulation_steps=2)
        peft_config = LoraConfig(**adapter) if adapter else None
        runs.append(train(trainer_of(model, data, args, peft_config=peft_config)))
    require_equal(runs[1], runs[0])


def images(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Batches with several images, as a processor and a collator would make them."""
    return [batch(model, (1, 0, 2), seed=seed) for seed in range(6)]


def trainer_of_batches(
    model: nn.Module, batches: list[dict[str, torch.Tensor]], folder: Path
) -> SFTTrainer:
    """Stands in for Gemma4Processor, which needs torchvision."""
    data = Dataset.from_list([{"index": index} for index in range(len(batches))])
    args = settings(
        folder,
        per_device_train_batch_size=1,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return trainer_of(model, data, args, data_collator=lambda rows: batches[rows[0]["index"]])


def test_images_are_trained_on_as_in_stock(tmp_path: Path) -> None:
    runs = []
    for patched in (False, True):
        model = build("e2b", torch.float32)
        if patched:
            patches.apply(model)
        runs.append(train(trainer_of_batches(model, images(model), tmp_path)))
    require_equal(runs[1], runs[0])
    assert any("vision_tower" in name and bool(move.any()) for name, move in runs[1][1].items())


def test_a_cut_image_is_answered_with_the_advice_of_trl(tmp_path: Path) -> None:
    # TRL knows the cause by the words of the error, which the patch has to keep.
    model = build("e2b", torch.float32)
    patches.apply(model)
    batches = images(model)
    for inputs in batches:
        ids = inputs["input_ids"]
        row, column = (ids == model.config.image_token_id).nonzero()[-1]
        ids[row, column] = 50
    trainer = trainer_of_batches(model, batches, tmp_path)
    with pytest.raises(ValueError, match=r"`max_length` \(1024\) is too short"):
        trainer.train()


def test_evaluation_and_its_logits_are_those_of_stock(tmp_path: Path) -> None:
    data, results = sums("messages"), []

    def metrics(prediction: Any) -> dict[str, float]:
        return {"largest_logit": float(prediction.predictions.max())}

    for patched in (False, True):
        model = build("e2b", torch.float32)
        if patched:
            patches.apply(model)
        trainer = trainer_of(
            model, data, settings(tmp_path), eval_dataset=data, compute_metrics=metrics
        )
        results.append(trainer.evaluate())
    stock, patched_results = results
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_largest_logit"):
        assert patched_results[name] == pytest.approx(stock[name], rel=1e-5), name


def test_patches_come_before_the_trainer(tmp_path: Path) -> None:
    # TRL puts its own LM head into the forward of the model, which a patch must not write over.
    model = build("e2b", torch.float32)
    trainer = trainer_of(model, sums("messages"), settings(tmp_path))
    with pytest.raises(PatchError, match=r"forward was replaced .* before a trainer gets it"):
        patches.apply(trainer.model)
    assert len(train(trainer)[0]) == 3
