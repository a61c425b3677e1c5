"""What a forward without logits returns. Imports transformers, so it is imported when needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.models.gemma4.modeling_gemma4 import Gemma4CausalLMOutputWithPast


@dataclass
class CausalLMOutputWithoutLogits(Gemma4CausalLMOutputWithPast):
    """`logits` is None. Four sums over the supervised tokens, 0-d, from the pass of the loss."""

    num_tokens: torch.Tensor | None = None
    num_correct: torch.Tensor | None = None
    entropy_sum: torch.Tensor | None = None
    logsumexp_sum: torch.Tensor | None = None
