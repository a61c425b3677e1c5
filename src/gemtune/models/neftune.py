"""NEFTune: noise on the embeddings of text, in training alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class EmbeddingNoise:
    """Uniform noise of ±alpha / sqrt(L * H) on what the embeddings of tokens give (NEFTune).

    L is the tokens of the row without padding, in packed rows those of the document. Features of
    media are written over the embeddings of their placeholders, so that they have none. Nothing is
    added in evaluation or without autograd. The numbers are torch's own of the device, which a
    checkpoint holds; layers that are recomputed do not draw them again.

    Gemma multiplies its embeddings by sqrt(H) within the module; the noise comes after that, as in
    transformers' Trainer.

    Source: arXiv:2310.05914, section 2, and its code, which leaves padding out of L.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        """Registers hooks on a Gemma4ForConditionalGeneration, before any adapter."""
        self._alpha = alpha
        self._lengths: Tensor | None = None
        inner, table = model.model, model.get_input_embeddings()
        self._handles: list[RemovableHandle] = [
            inner.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            inner.register_forward_hook(self._end, always_call=True),
            table.register_forward_hook(self._add),
        ]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._lengths = lengths(kwargs.get("attention_mask"), kwargs.get("position_ids"))

    def _end(self, *_: Any) -> None:
        self._lengths = None

    def _add(self, module: nn.Module, args: tuple[Any, ...], embeddings_BSH: Tensor) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return None
        num_tokens, size = embeddings_BSH.shape[1:]
        noise = torch.empty_like(embeddings_BSH, requires_grad=False).uniform_(-1, 1)
        if self._lengths is None:
            return embeddings_BSH + noise * (self._alpha / (num_tokens * size) ** 0.5)
        bound_BS1 = self._alpha / (self._lengths * size).clamp(min=1).sqrt().unsqueeze(-1)
        return embeddings_BSH + noise * bound_BS1.to(noise.dtype)


def lengths(mask_BS: Any, position_ids_BS: Tensor | None) -> Tensor | None:
    """The tokens of each place's row, [B, 1], or document, [B, S]; None: all that are there.

    Documents of a packed row are told by their positions, which begin anew with each.
    """
    if position_ids_BS is not None:
        first = position_ids_BS[:, :1] - 1
        begins = torch.diff(position_ids_BS, prepend=first) != 1
        document_BS = begins.cumsum(-1)
        counts = torch.zeros(
            document_BS.shape[0], document_BS.shape[1] + 1, device=document_BS.device
        ).scatter_add_(1, document_BS, torch.ones(document_BS.shape, device=document_BS.device))
        return counts.gather(1, document_BS)
    if isinstance(mask_BS, Tensor) and mask_BS.dim() == 2:
        return mask_BS.sum(-1, keepdim=True).float()
    return None
