"""A LoRA on the head: its product is added to the logits, and only its factors are made."""

import pytest
import torch
import torch.nn.functional as F
from lm_head import IGNORE, assert_close, gradients, problem, relative_error

from gemtune.losses import linear_cross_entropy, traced


def low_rank_problem(rank=4, num_rows=37, vocab_size=101, **options):
    hidden, weight, labels = problem(num_rows, vocab_size=vocab_size, **options)
    generator = torch.Generator().manual_seed(9)
    new = [
        torch.randn(size, rank, generator=generator, dtype=torch.float64).to(hidden.dtype)
        for size in (num_rows, vocab_size)
    ]
    return hidden, weight, labels, *(tensor.requires_grad_() for tensor in new)


def reference(hidden, weight, labels, rows, low_weight, softcap):
    logits = hidden.double() @ weight.double().T + rows.double() @ low_weight.double().T
    logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, reduction="sum") / (labels != IGNORE).sum().clamp(min=1)


@pytest.mark.parametrize("tracing", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("ignored", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_loss_and_four_gradients(ignored, frozen_head, reduction, tracing, monkeypatch):
    if tracing:
        monkeypatch.setattr(traced, "is_tracing", lambda: True)
    hidden, weight, labels, rows, low_weight = low_rank_problem(ignored=ignored)
    weight.requires_grad_(not frozen_head)
    trained = [t for t in (hidden, weight, rows, low_weight) if t.requires_grad]
    expected = reference(hidden, weight, labels, rows, low_weight, 5.0)
    found = linear_cross_entropy(
        hidden,
        weight,
        labels,
        softcap=5.0,
        reduction=reduction,
        low_rank=(rows, low_weight),
        chunk_bytes=101 * 8 * 5,
    )
    if reduction == "none":
        found = found.sum() / (labels != IGNORE).sum().clamp(min=1)
    assert_close(found, expected)
    if ignored == 1.0:
        assert all((g == 0).all() for g in gradients(found, *trained))
        return
    for ours, theirs in zip(gradients(found, *trained), gradients(expected, *trained), strict=True):
        assert_close(ours, theirs)


def test_leading_dimensions_and_bfloat16():
    hidden, weight, labels, rows, low_weight = low_rank_problem(
        num_rows=512, vocab_size=997, dtype=torch.bfloat16
    )
    expected = reference(hidden, weight, labels, rows, low_weight, 30.0)
    found = linear_cross_entropy(
        hidden.reshape(8, 64, -1),
        weight,
        labels.reshape(8, 64),
        softcap=30.0,
        low_rank=(rows.reshape(8, 64, -1), low_weight),
    )
    tensors = (hidden, weight, rows, low_weight)
    for ours, theirs in zip(gradients(found, *tensors), gradients(expected, *tensors), strict=True):
        assert relative_error(ours, theirs.double()) < 3e-3


@pytest.mark.parametrize(
    ("rows", "low_weight"),
    [
        (torch.zeros(4, 2), torch.zeros(7, 3)),
        (torch.zeros(5, 2), torch.zeros(7, 2)),
        (torch.zeros(4, 2), torch.zeros(6, 2)),
        (torch.zeros(4, 2), torch.zeros(7)),
        (torch.zeros(4, 2).long(), torch.zeros(7, 2)),
        (torch.zeros(4, 2, device="meta"), torch.zeros(7, 2)),
    ],
)
def test_what_does_not_fit_is_refused(rows, low_weight):
    labels = torch.tensor([0, 6, 2, IGNORE])
    with pytest.raises(ValueError, match="low_rank"):
        linear_cross_entropy(
            torch.ones(4, 3), torch.ones(7, 3), labels, low_rank=(rows, low_weight)
        )
