"""A patched model in the stock transformers Trainer: the run is that of an unpatched model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gemma4_zoo import batch, build, relative_error
from torch import nn

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

from transformers import Gemma4ForConditionalGeneration, Trainer, TrainingArguments

from gemtune import patches
from gemtune.patches.linear_cross_entropy import LinearCrossEntropy

# What the run of a patched model may differ by: three steps in float32.
LOSS_BOUND, WEIGHTS_BOUND = 1e-5, 2e-4


def settings(folder: Path, **choices: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            # Of Adam's first steps only the signs of the gradients are left.
            "optim": "sgd",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        | choices,
    )


def texts_and_images(model: nn.Module, count: int = 6) -> list[dict[str, torch.Tensor]]:
    """Batches of two rows, some with images and some without."""
    images = [(1, 0), (0, 0), (2, 1)]
    return [batch(model, images[i % len(images)], seed=i) for i in range(count)]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of parts of one length."""
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def train(
    model: nn.Module, data: list[dict[str, torch.Tensor]], folder: Path, **choices: Any
) -> tuple[Trainer, list[float], dict[str, torch.Tensor]]:
    """The trainer, the loss of every step, and how every parameter moved."""
    # As stock says from 5.6 on. In 5.5 the Trainer hands the count of tokens on to a forward that
    # ignores it, and a stock run with accumulation trains on as many times the loss.
    vars(model).setdefault("accepts_loss_kwargs", False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = Trainer(
        model=model,
        args=settings(folder, **choices),
        train_dataset=data,
        eval_dataset=data[:2],
        data_collator=stack,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, losses, {n: p.detach() - before[n] for n, p in model.named_parameters()}


def largest_difference(
    moves: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """Over the move of all parameters: some have gradients that cancel to nearly nothing."""
    scale = max(float(move.norm()) for move in expected.values())
    return max((float((moves[n] - expected[n]).norm()) / scale, n) for n in expected)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ],
    ids=["plain", "accumulation", "checkpointing"],
)
def test_losses_and_weights_are_those_of_stock(choices: dict[str, Any], tmp_path: Path) -> None:
    stock = build("e2b", torch.float32)
    data = texts_and_images(stock)
    stock_trainer, expected_losses, expected = train(stock, data, tmp_path, **choices)
    expected_metrics = stock_trainer.evaluate()

    patched = build("e2b", torch.float32)
    report = patches.apply(patched)
    assert patched.accepts_loss_kwargs is True
    patched.accepts_loss_kwargs = False  # for once the mean of means that stock trains on
    heads = []
    patched.lm_head.register_forward_hook(lambda *_: heads.append(patched.training))
    trainer, losses, moves = train(patched, data, tmp_path, **choices)

    assert {row.name for row in report.rows if row.status == "applied"} >= {
        "linear_cross_entropy",
        "placeholder_merge",
    }
    assert heads == []  # so the logits were never there
    assert len(losses) == 3
    assert losses == pytest.approx(expected_losses, rel=LOSS_BOUND)
    assert largest_difference(moves, expected) < (WEIGHTS_BOUND, "")
    assert len(set(expected_losses)) == 3  # it did train
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected_metrics["eval_loss"], rel=LOSS_BOUND)
    assert heads == [False, False]  # evaluation may look at the logits


def rows_of_unequal_labels(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Rows of one length; every other one has three labels."""
    rows = [batch(model, (1,), seed=seed) for seed in range(4)]
    for row in rows[1::2]:
        row["labels"][:, :-3] = -100
    return rows


def moves_of_one_step(folder: Path, patched: bool, **split: int) -> dict[str, torch.Tensor]:
    model = build("e2b", torch.float32)
    if patched:
        patches.apply(model)
    data = rows_of_unequal_labels(model)
    _, _, moves = train(model, data, folder, max_steps=1, **split)
    return moves


@pytest.mark.parametrize("patched", [True, False])
def test_a_patched_step_does_not_depend_on_how_it_was_split(patched: bool, tmp_path: Path) -> None:
    # Stock Gemma 4 says accepts_loss_kwargs=False, so the Trainer keeps the count of a step's
    # tokens to itself and averages the means of its parts.
    whole = moves_of_one_step(tmp_path, patched, per_device_train_batch_size=4)
    parts = moves_of_one_step(
        tmp_path, patched, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    difference, _ = largest_difference(parts, whole)
    assert difference < WEIGHTS_BOUND if patched else difference > 0.1


def test_evaluation_by_the_loss_alone_makes_no_logits(tmp_path: Path) -> None:
    stock = build("e2b", torch.float32)
    data = texts_and_images(stock)
    expected, _, _ = train(stock, data, tmp_path, max_steps=1)
    model = build("e2b", torch.float32)
    choice = [LinearCrossEntropy(loss_only_evaluation=True), "supervised_positions"]
    patches.apply(model, choice)
    trainer, _, _ = train(model, data, tmp_path, max_steps=1, prediction_loss_only=True)
    heads = []
    model.lm_head.register_forward_hook(lambda *_: heads.append("used"))
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(expected.evaluate()["eval_loss"], rel=LOSS_BOUND)
    assert heads == []


def test_what_it_saves_loads_into_stock_transformers(tmp_path: Path) -> None:
    model = build("e2b", torch.float32)
    patches.apply(model)
    data = texts_and_images(model, 3)
    trainer, _, _ = train(model, data, tmp_path / "run")
    trainer.save_model(str(tmp_path / "saved"))
    loaded = Gemma4ForConditionalGeneration.from_pretrained(tmp_path / "saved").eval()
    inputs = {name: value for name, value in data[2].items() if name != "labels"}
    with torch.no_grad():
        expected = loaded(**inputs).logits
        assert relative_error(model.eval()(**inputs).logits, expected) < 1e-5
