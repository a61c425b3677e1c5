"""The ways of computing the LM-head loss that linear_cross_entropy.py compares.

Each takes a `Case` and returns the mean cross-entropy over the labels that are not -100.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from gemtune.losses import linear_cross_entropy

LOWER_BOUND = "matmuls"
LOWER_BOUND_LOGITS_BYTES = 2 << 30
TRL_VERSION = "1.16"  # the first whose fused LM head was read
PACKAGES = {"trl": "trl", "liger": "liger-kernel"}


class Case(NamedTuple):
    """Inputs of one comparison; the weight asks for a gradient unless the head is frozen."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    softcap: float

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def loss_gemtune(case: Case) -> Tensor:
    return linear_cross_entropy(case.hidden, case.weight, case.labels, softcap=case.softcap)


def loss_gemtune_metrics(case: Case) -> Tensor:
    options = {"softcap": case.softcap, "metrics": True}
    loss, _ = linear_cross_entropy(case.hidden, case.weight, case.labels, **options)
    return loss


def loss_gemtune_no_cap(case: Case) -> Tensor:
    return linear_cross_entropy(case.hidden, case.weight, case.labels)


def loss_transformers(case: Case) -> Tensor:
    """modeling_gemma4 and loss_utils.ForCausalLMLoss, line by line."""
    logits = F.linear(case.hidden, case.weight)
    logits = logits / case.softcap
    logits = torch.tanh(logits)
    logits = logits * case.softcap
    logits = logits.float()
    return F.cross_entropy(logits, case.labels, ignore_index=-100)


def loss_transformers_dropped(case: Case) -> Tensor:
    kept = case.labels != -100
    return loss_transformers(case._replace(hidden=case.hidden[kept], labels=case.labels[kept]))


class HeadOnly:
    """What TRL asks of a causal language model; the backbone gives back ready hidden states."""

    def __init__(self, case: Case) -> None:
        self.hidden = case.hidden
        self.head = SimpleNamespace(weight=case.weight, bias=None)
        self.config = SimpleNamespace(final_logit_softcapping=case.softcap)
        self.config.get_text_config = lambda: self.config

    def base_model(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self.hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self.head

    def forward(self, **_: Any) -> Any:
        raise AssertionError("TRL's fused forward takes its place")


def loss_trl(case: Case) -> Tensor:
    # Imported here: it takes seconds, which the processes of the other contestants need not wait.
    from trl.trainer.utils import add_fused_lm_head

    model = HeadOnly(case)
    add_fused_lm_head(model)
    return model.forward(fused_lm_head=True, shift_labels=case.labels).loss


def loss_liger(case: Case) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    # Its default sums the head's gradient in the dtype of the parameter, over some hundred chunks.
    loss = LigerFusedLinearCrossEntropyLoss(softcap=case.softcap, accum_dtype=torch.float32)
    return loss(case.weight, case.hidden, case.labels)


def loss_torch_no_cap(case: Case, **chunks: Any) -> Tensor:
    # Without options it makes the whole logits.
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(case.hidden, case.weight, case.labels, options=options)


def loss_torch_512_no_cap(case: Case) -> Tensor:
    return loss_torch_no_cap(case, batch_chunk_size=512, chunking_method=None)


# gemtune comes before those that are compared with it.
CONTESTANTS: dict[str, tuple[Callable[[Case], Tensor], str]] = {
    "gemtune": (loss_gemtune, "gemtune.losses.linear_cross_entropy"),
    "gemtune_metrics": (
        loss_gemtune_metrics,
        "the same with token accuracy, entropy and log-sum-exp, as a training step has it",
    ),
    "trl": (
        loss_trl,
        "TRL's fused LM head (trl.trainer.utils.add_fused_lm_head), asked for the loss alone; "
        "without Triton, as on a CPU, it scores the ignored rows too, in plain torch",
    ),
    "liger": (
        loss_liger,
        "Liger Kernel's LigerFusedLinearCrossEntropyLoss, the head's gradient summed in float32",
    ),
    "transformers": (
        loss_transformers,
        "the way of transformers: logits of all rows, cap, F.cross_entropy",
    ),
    "transformers_dropped": (loss_transformers_dropped, "the same on the rows that have a label"),
    "gemtune_no_cap": (
        loss_gemtune_no_cap,
        "gemtune.losses.linear_cross_entropy without the cap",
    ),
    "torch_no_cap": (
        loss_torch_no_cap,
        "torch.nn.functional.linear_cross_entropy, the chunks it chooses, without the cap",
    ),
    "torch_512_no_cap": (
        loss_torch_512_no_cap,
        "torch.nn.functional.linear_cross_entropy, chunks of 512 rows, without the cap",
    ),
}


def not_measured(device: str) -> dict[str, str]:
    """Contestant -> what says that, and why, it cannot run here on `device`."""
    found = {
        "trl": ("TRL", why_no_trl()),
        "liger": ("Liger Kernel", why_no_liger(device)),
        "torch_no_cap": ("torch_no_cap", why_no_torch()),
        "torch_512_no_cap": ("torch_512_no_cap", why_no_torch()),
    }
    return {key: f"{name}: not measured ({why})" for key, (name, why) in found.items() if why}


def why_no_trl() -> str:
    """Empty where it can run, as the next two."""
    if find_spec("trl") is None:
        return "trl is not installed"
    if Version(version("trl")) < Version(TRL_VERSION):
        return f"trl {version('trl')} is installed; needs {TRL_VERSION}"
    return ""


def why_no_liger(device: str) -> str:
    if device != "cuda" or find_spec("triton") is None:
        return "needs a GPU with Triton"
    return "" if find_spec("liger_kernel") else "liger-kernel is not installed"


def why_no_torch() -> str:
    present = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return "" if present else "not in this build of torch"


def contestant(name: str, case: Case) -> Callable[[], object]:
    """Forward and backward of one contestant."""
    loss, _ = CONTESTANTS[name]
    return lambda: loss(case).backward()


def lower_bound(case: Case) -> Callable[[], tuple[Tensor, Tensor | None]]:
    """The products that no way of computing these gradients can leave out."""
    rows = case.hidden.detach()[case.labels != -100]
    weight = case.weight.detach()
    # The logits of all rows may not fit a GPU; in chunks as large as this the products stay wide.
    most = LOWER_BOUND_LOGITS_BYTES // (len(weight) * weight.element_size())
    size = max(1, min(len(rows), most))
    logits = weight.new_empty(size, len(weight))
    grad_rows = torch.empty_like(rows)
    grad_weight = torch.empty_like(weight) if case.weight.requires_grad else None

    def multiply() -> tuple[Tensor, Tensor | None]:
        for start in range(0, len(rows), size):
            part, part_grad = rows[start : start + size], grad_rows[start : start + size]
            part_logits = torch.mm(part, weight.t(), out=logits[: len(part)])
            torch.mm(part_logits, weight, out=part_grad)
            if grad_weight is not None:
                grad_weight.addmm_(part_logits.t(), part, beta=int(start > 0))
        return grad_rows, grad_weight

    return multiply
