"""Stand-in media for forward passes that have none, while others have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

# What tells that a forward has a kind. In the order in which every release encodes them.
_INPUTS = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}
_TOWERS = {"image": "vision", "video": "vision", "audio": "audio"}
_MEL_FRAMES = 4  # of one soft token


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


class StandIns:
    """Runs the trained towers in every forward of a Gemma 4, on a medium of one token if need be.

    Processes that train a tower together have to run it together: DDP waits for its gradients,
    FSDP2 for its weights as well, forward and backward. A rank whose rows have no image encodes
    a black one of one soft token, whose features go nowhere and get gradients of zero; instead of a
    video the same as its frame, and 40 ms of features of zero instead of audio. Each takes
    the place in the order of collectives at which the others encode theirs: images, then videos,
    then audio, in which gradients go back in the opposite order by themselves. Where a tower is
    frozen its projector alone runs. Not in decoding steps of `generate`: nobody encodes then.

    Args:
        model: the Gemma4ForConditionalGeneration.
        kinds: of image, video and audio, those that a forward of any rank may have and whose
            modules are trained. The tower runs once for each in every forward.
        without_autograd: in forwards without it as well.
    """

    def __init__(self, model: nn.Module, kinds: Collection[str], *, without_autograd: bool) -> None:
        self._model = model.model
        self._kinds = [kind for kind in _INPUTS if kind in kinds]
        self._without_autograd = without_autograd
        self._runs_tower = {
            name: any(p.requires_grad for p in self._modules(name)[0].parameters())
            for name in {_TOWERS[kind] for kind in self._kinds}
        }
        self._due: list[str] = []
        """What is still to stand in for in this forward, in order."""
        self._given: list[str] = []
        """What of this forward is still to be encoded."""
        self._attached: list[torch.Tensor] = []
        self._is_standing_in = False
        self._fed: set[str] = set()
        """Towers, since `forget_unfed`, in forwards with autograd."""
        self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
        for name in self._runs_tower:
            tower, _ = self._modules(name)
            tower.register_forward_pre_hook(lambda *_, name=name: self._before_tower(name))
        self._model.language_model.register_forward_pre_hook(self._attach, with_kwargs=True)

    def forget_unfed(
        self, on_any_rank: Callable[[bool], bool], always_fed: Collection[str] = ()
    ) -> None:
        """Gradients of zero become none where no rank had media, as in a single process.

        An optimizer would otherwise move a tower by its momentum. Call it after the backward
        passes of a step, on all ranks.

        Args:
            always_fed: kinds that every row has: nothing is to be asked.
        """
        for name in sorted(set(self._runs_tower) - {_TOWERS[kind] for kind in always_fed}):
            if not on_any_rank(name in self._fed):
                for module in self._modules(name):
                    for parameter in module.parameters():
                        parameter.grad = None
        self._fed.clear()

    def _modules(self, name: str) -> Sequence[nn.Module]:
        """Tower and projector."""
        return getattr(self._model, f"{name}_tower"), getattr(self._model, f"embed_{name}")

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = [kind for kind in self._kinds if kwargs.get(_INPUTS[kind]) is not None]
        self._due, self._attached = [], []
        if torch.is_grad_enabled():
            self._fed |= {_TOWERS[kind] for kind in self._given}
        cache = kwargs.get("past_key_values")
        is_decoding = cache is not None and cache.get_seq_length() > 0
        if not is_decoding and (self._without_autograd or torch.is_grad_enabled()):
            self._due = [kind for kind in self._kinds if kind not in self._given]

    def _before_tower(self, name: str) -> None:
        """Before a tower encodes what was given: all that comes before that."""
        if self._is_standing_in or not self._given:
            return
        kind = next((kind for kind in self._given if _TOWERS[kind] == name), None)
        if kind is None:
            return  # a second pass over the same, in a backward pass or in parts
        # What was given of other kinds before it has been encoded by now.
        self._given = self._given[self._given.index(kind) + 1 :]
        self._stand_in([k for k in self._due if self._kinds.index(k) < self._kinds.index(kind)])

    def _attach(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._given = []
        self._stand_in(list(self._due))
        attached, self._attached = self._attached, []
        if not attached:
            return None
        embeddings = kwargs["inputs_embeds"]
        for features in attached:
            embeddings = _Attach.apply(embeddings, features)
        return args, kwargs | {"inputs_embeds": embeddings}

    def _stand_in(self, kinds: Sequence[str]) -> None:
        self._is_standing_in = True
        try:
            for kind in kinds:
                self._due.remove(kind)
                encode = self._audio if kind == "audio" else self._picture
                self._attached.append(encode())
        finally:
            self._is_standing_in = False

    def _picture(self) -> torch.Tensor:
        config = self._model.config.vision_config
        tower, projector = self._modules("vision")
        if not self._runs_tower["vision"]:
            return projector(inputs_embeds=self._zeros(projector, 1, config.hidden_size))
        side = config.pooling_kernel_size
        y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        positions = torch.stack([x.flatten(), y.flatten()], dim=-1).unsqueeze(0)
        pixels = self._zeros(projector, 1, side * side, 3 * config.patch_size**2)
        outputs = tower(pixel_values=pixels, pixel_position_ids=positions.to(pixels.device))
        return projector(inputs_embeds=outputs.last_hidden_state)

    def _audio(self) -> torch.Tensor:
        config = self._model.config.audio_config
        tower, projector = self._modules("audio")
        if not self._runs_tower["audio"]:
            size = getattr(config, "output_proj_dims", None) or config.hidden_size
            return projector(inputs_embeds=self._zeros(projector, 1, size))
        # Two convolutions halve it twice and leave a quarter of the channels of the first.
        num_bins = 4 * (config.subsampling_conv_channels[0] // 4)
        features = self._zeros(projector, 1, _MEL_FRAMES, num_bins)
        mask = torch.ones(1, _MEL_FRAMES, dtype=torch.bool, device=features.device)
        outputs = tower(features, mask)
        return projector(inputs_embeds=outputs.last_hidden_state)

    def _zeros(self, projector: nn.Module, *shape: int) -> torch.Tensor:
        # The weight of a sharded projector is a DTensor with the device of its shard.
        weight = projector.embedding_projection.weight
        return torch.zeros(*shape, dtype=weight.dtype, device=weight.device)


def encode_images_in_forward(model: nn.Module) -> None:
    """Have `generate` pass pixels to the first forward of the model, in every release.

    transformers from 5.22 on encodes them before it, where FSDP2 has not gathered the weights, and
    where a rank without images would not know of it.
    """
    name = "_prepare_multimodal_encoder_kwargs_for_generation"
    if hasattr(model, name):
        vars(model)[name] = lambda model_kwargs: model_kwargs
