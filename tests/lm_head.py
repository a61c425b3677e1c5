"""Small problems for the LM-head loss, and what plain float64 PyTorch says about them."""

import torch
import torch.nn.functional as F

IGNORE = -100


def problem(num_rows=37, hidden_size=13, vocab_size=101, ignored=0.0, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    silent = torch.randperm(num_rows, generator=generator)[: round(num_rows * ignored)]
    labels[silent] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def reference_logits(hidden, weight, softcap=None):
    logits = hidden.double() @ weight.double().T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference_losses(hidden, weight, labels, softcap=None, label_smoothing=0.0, z_loss_weight=0.0):
    """One loss per label, 0 where ignored."""
    logits = reference_logits(hidden, weight, softcap)
    losses = F.cross_entropy(
        logits.flatten(0, -2),
        labels.flatten().long(),
        reduction="none",
        label_smoothing=label_smoothing,
    ).reshape(labels.shape)
    return losses + z_loss_weight * logits.logsumexp(-1).square() * (labels != IGNORE)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def assert_close(actual, expected, tolerance=1e-12):
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).norm()
    assert error <= tolerance * max(1.0, expected.double().norm().item())


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()
