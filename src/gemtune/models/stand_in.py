"""A stand-in image for forward passes that have none, while others have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class _Attach(torch.autograd.Function):
    """Hidden states as they are. What is attached gets a gradient of zeros, whatever it holds."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, attached: torch.Tensor) -> torch.Tensor:
        ctx.attached = attached.shape, attached.dtype, attached.device
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape, dtype, device = ctx.attached
        return grad, torch.zeros(shape, dtype=dtype, device=device)


class StandInImage:
    """Runs the trained vision modules in every forward of a Gemma 4, on one patch cell if need be.

    Processes that train a tower together have to run it together: DDP waits for its gradients,
    FSDP2 for its weights as well, forward and backward. A rank whose rows have no image encodes
    a black one of one soft token, whose features go nowhere and get gradients of zero. It
    takes the place in the order of collectives at which the others encode theirs. Where the tower
    is frozen the projector alone runs. Not in decoding steps of `generate`: nobody encodes then.

    For images and text; a forward with images and videos runs the tower twice.
    """

    def __init__(self, model: nn.Module, *, without_autograd: bool) -> None:
        """`model` is the Gemma4ForConditionalGeneration; `without_autograd`: then as well."""
        self._model = model.model
        self._without_autograd = without_autograd
        self._runs_tower = any(p.requires_grad for p in self._model.vision_tower.parameters())
        self._has_run = False
        self._is_standing_in = False
        self.saw_an_image = False
        """Since `forget_unfed`, in a forward with autograd."""
        self._model.embed_vision.register_forward_hook(self._note)
        self._model.language_model.register_forward_pre_hook(self._stand_in, with_kwargs=True)

    def forget_unfed(self, on_any_rank: Callable[[bool], bool]) -> None:
        """Gradients of zero become none where no rank had an image, as in a single process.

        An optimizer would otherwise move the tower by its momentum. Call it after the backward
        passes of a step, on all ranks.
        """
        if not on_any_rank(self.saw_an_image):
            for module in (self._model.vision_tower, self._model.embed_vision):
                for parameter in module.parameters():
                    parameter.grad = None
        self.saw_an_image = False

    def _note(self, *_: Any) -> None:
        self._has_run = True
        if torch.is_grad_enabled() and not self._is_standing_in:
            self.saw_an_image = True

    def _stand_in(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        has_run, self._has_run = self._has_run, False
        cache = kwargs.get("past_key_values")
        is_decoding = cache is not None and cache.get_seq_length() > 0
        if has_run or is_decoding or not (self._without_autograd or torch.is_grad_enabled()):
            return None
        embeddings = kwargs["inputs_embeds"]
        self._is_standing_in = True
        try:
            features = self._features(embeddings.device)
        finally:
            self._is_standing_in = self._has_run = False
        return args, kwargs | {"inputs_embeds": _Attach.apply(embeddings, features)}

    def _features(self, device: torch.device) -> torch.Tensor:
        config = self._model.config.vision_config
        if not self._runs_tower:
            tokens = torch.zeros(1, config.hidden_size, device=device, dtype=self._dtype())
            return self._model.embed_vision(inputs_embeds=tokens)
        side = config.pooling_kernel_size
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([x.flatten(), y.flatten()], dim=-1).unsqueeze(0).to(device)
        size = 3 * config.patch_size**2
        pixels = torch.zeros(1, side * side, size, device=device, dtype=self._dtype())
        outputs = self._model.vision_tower(pixel_values=pixels, pixel_position_ids=positions)
        return self._model.embed_vision(inputs_embeds=outputs.last_hidden_state)

    def _dtype(self) -> torch.dtype:
        return self._model.embed_vision.embedding_projection.weight.dtype


def encode_images_in_forward(model: nn.Module) -> None:
    """Have `generate` pass pixels to the first forward of the model, in every release.

    transformers from 5.22 on encodes them before it, where FSDP2 has not gathered the weights, and
    where a rank without images would not know of it.
    """
    name = "_prepare_multimodal_encoder_kwargs_for_generation"
    if hasattr(model, name):
        vars(model)[name] = lambda model_kwargs: model_kwargs
