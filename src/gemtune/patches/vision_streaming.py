"""The weights of a frozen vision tower stay in host memory and visit the device layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from gemtune.errors import PatchError
from gemtune.options import option
from gemtune.patches.base import APPLIED, NOT_APPLICABLE, Change, Edit, Plan, Wrap, modules_of_class
from gemtune.patches.fingerprint import require_known
from gemtune.patches.host_memory import (
    HOST_MEMORY,
    MAPPED,
    PINNED,
    HostMemory,
    can_map,
    packed,
    stay_on_host,
)

_STREAM = "_gemtune_weight_stream"

# transformers takes the device of a model's first parameter for the device of the model, and
# `generate` moves its inputs there. From transformers 5.9 on that parameter is this table.
_POSITIONS = "position_embedding_table"

# What runs around the streamed modules: known to leave their weights alone.
_TOWER_FORWARD = frozenset({"e97664c08040", "70663d3a0d26", "21e62676ae9f"})  # 5.5.2, 5.10.1, 5.18
_ENCODER_FORWARD = frozenset({"f807f6b63baa"})  # 5.5.2 to 5.23


def _on_host(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.device.type == "cpu"]


def _is_elsewhere(module: nn.Module, device: torch.device) -> bool:
    return device.type != "cpu" and bool(_on_host(module))


class DeviceBuffers:
    """Two buffers on a device: one with the weights in use, one into which the next are copied.

    Modules with an even place in the sequence use one, those with an odd place the other. A
    buffer is written once the GPU is done with what it held, in the order of the streams: the CPU
    waits for nothing, however far it runs ahead, and no third buffer is ever needed.
    """

    def __init__(self, modules: list[nn.Module], device: torch.device) -> None:
        self.device = device
        self._modules = modules
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        sizes = [packed(_on_host(module))[1] for module in modules]
        self._buffers = [
            torch.empty(max(sizes[slot::2], default=0), dtype=torch.uint8, device=device)
            for slot in (0, 1)
        ]
        if self._side is not None:
            for buffer in self._buffers:
                # A pass that ends early drops its buffers while they may still be written.
                buffer.record_stream(self._side)
        self._filled: list[tuple[int, dict[int, torch.Tensor], Any] | None] = [None, None]
        self._used: list[Any] = [None, None]

    def start_copy(self, index: int) -> None:
        """Begin to copy the weights of one module into its buffer, unless that was begun."""
        slot, parameters = index % 2, _on_host(self._modules[index])
        filled = self._filled[slot]
        if filled is not None and filled[0] == index:
            return
        if self._side is not None:
            if self._used[slot] is not None:
                self._side.wait_event(self._used[slot])
            else:  # memory that the stream of the computation may not be done with
                self._side.wait_stream(torch.cuda.current_stream(self.device))
        weights = {}
        with nullcontext() if self._side is None else torch.cuda.stream(self._side):
            for parameter, offset in zip(parameters, packed(parameters)[0], strict=True):
                size = parameter.numel() * parameter.element_size()
                view = self._buffers[slot][offset : offset + size].view(parameter.dtype)
                weight = view.view(parameter.shape)
                weight.copy_(parameter.detach(), non_blocking=self._side is not None)
                weights[id(parameter)] = weight
        event = None if self._side is None else self._side.record_event()
        self._filled[slot] = (index, weights, event)

    def take(self, index: int) -> dict[int, torch.Tensor]:
        """The weights of one module on the device, by the id of their parameter."""
        self.start_copy(index)
        _, weights, event = self._filled[index % 2]
        self._filled[index % 2] = None
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        return weights

    def start_next(self, index: int) -> None:
        """Begin with the module after this one, where a copy runs beside the computation."""
        if self._side is not None and index + 1 < len(self._modules):
            self.start_copy(index + 1)

    def done(self, index: int) -> None:
        """The computation with the weights of this module is in the queue of the device."""
        if self._side is not None:
            self._used[index % 2] = torch.cuda.current_stream(self.device).record_event()


def streamed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose weights visit the device, in the order in which they run."""
    streams = (vars(module).get(_STREAM) for module in model.modules())
    return next((list(stream.modules) for stream in streams if stream is not None), [])


def buffer_bytes(modules: Sequence[nn.Module]) -> int:
    """Of the two buffers of `DeviceBuffers`, which are there from the first module to the last."""
    sizes = [packed(list(module.parameters()))[1] for module in modules]
    return sum(max(sizes[slot::2], default=0) for slot in (0, 1))


@dataclass(eq=False)
class WeightStream:
    """The modules of a tower in the order in which they run, and where the pass has got to."""

    modules: list[nn.Module]
    _buffers: DeviceBuffers | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_buffers": None}

    @contextmanager
    def weights_of(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        """Within it the weights of `module` are on `device`; after it their memory is free."""
        index = next(i for i, other in enumerate(self.modules) if other is module)
        is_last = index + 1 == len(self.modules)
        if not is_last:
            vars(self.modules[index + 1])[HOST_MEMORY].prefetch()
        try:
            if _is_elsewhere(module, device):
                with self._copies_of(module, index, device):
                    yield
            else:
                yield
        finally:
            vars(module)[HOST_MEMORY].release()
            if is_last:
                self._buffers = None

    @contextmanager
    def _copies_of(self, module: nn.Module, index: int, device: torch.device) -> Iterator[None]:
        if index == 0 or self._buffers is None or self._buffers.device != device:
            self._buffers = DeviceBuffers(self.modules, device)
        buffers = self._buffers
        weights = buffers.take(index)
        buffers.start_next(index)
        places = [
            (owner, name, parameter)
            for owner in module.modules()
            for name, parameter in owner._parameters.items()
            if id(parameter) in weights
        ]
        # As torch.func.functional_call does it, which cannot be used here: it would call the
        # module, and with it this very method, once more.
        for owner, name, parameter in places:
            owner._parameters[name] = weights[id(parameter)]
        try:
            yield
        finally:
            for owner, name, parameter in places:
                owner._parameters[name] = parameter
            buffers.done(index)


def _refuse_training(why: str) -> None:
    raise PatchError(
        f"vision_streaming: {why}, but the vision tower runs without autograd: its weights are "
        "gone again before a backward pass. Freeze the tower (model.freeze=[vision]) and leave "
        "adapters off it, or leave vision_streaming out of patches=[...]."
    )


def _with_weights(self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One module of the tower, with its weights on the device of its input, without autograd."""
    if torch.is_grad_enabled():
        trained = [name for name, p in self.named_parameters() if p.requires_grad]
        if trained:
            _refuse_training(f"{trained[0]} of a {type(self).__name__} requires a gradient")
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    with torch.no_grad(), vars(self)[_STREAM].weights_of(self, inputs[0].device):
        return inner(*args, **kwargs)


def _with_weights_from_pixels(
    self: nn.Module, inner: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # Only here: a hook as those of `enable_input_require_grads` may mark what goes into the
    # layers, although nobody asks for its gradient.
    inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    if torch.is_grad_enabled() and any(value.requires_grad for value in inputs):
        _refuse_training("pixel_values require a gradient")
    return _with_weights(self, inner, *args, **kwargs)


@dataclass(frozen=True)
class VisionStreaming:
    """A frozen vision tower under a memory limit (cactus#590): one layer at a time.

    On a GPU the weights are copied from pinned memory, the next layer's while one computes, and
    take no more of the GPU than two layers and the position table. On a CPU they lie in a mapped
    file without a name, and the pages of each layer are given back right after its use. Same
    values, no backward pass through the tower, so it has to be frozen. Costs the time of the
    copies where they take longer than the layers. The clipping ranges and other buffers go
    where the model goes.
    """

    name: ClassVar[str] = "vision_streaming"

    memory: str | None = option(
        None, "of the host: pinned, or mapped (a file); null: pinned with CUDA, else mapped"
    )
    folder: str | None = option(
        None, "for the mapped file, on a disk; null: $TMPDIR, else /var/tmp"
    )

    def plan(self, model: nn.Module) -> Plan:
        """Each layer of the tower and the patch embedder: weights moved, forward wrapped."""
        if self.memory not in (None, PINNED, MAPPED):
            raise PatchError(
                f"vision_streaming: memory={self.memory} is not one of {PINNED}, {MAPPED}."
            )
        has_cuda = torch.cuda.is_available()
        if self.memory == PINNED and not has_cuda:
            raise PatchError("vision_streaming: memory=pinned needs CUDA. Use memory=mapped.")
        towers = modules_of_class(model, "Gemma4VisionModel")
        if not towers:
            return Plan(NOT_APPLICABLE, "the model has no Gemma 4 vision tower")
        if any(p.requires_grad for _, tower in towers for p in tower.parameters()):
            reason = "the vision tower is trained; freeze it: model.freeze=[vision]"
            return Plan(NOT_APPLICABLE, reason)
        kind = self.memory or (PINNED if has_cuda else MAPPED)
        if kind == MAPPED and not can_map():
            return Plan(NOT_APPLICABLE, "this system cannot give mapped pages back")
        changes = tuple(c for site, tower in towers for c in self._changes(site, tower, kind))
        return Plan(APPLIED, f"weights in {kind} host memory, a layer at a time", changes)

    def _changes(self, site: str, tower: nn.Module, kind: str) -> Iterator[Change]:
        modules = _modules_in_order(tower)
        require_known(self.name, type(tower).forward, _TOWER_FORWARD)
        require_known(self.name, type(tower.encoder).forward, _ENCODER_FORWARD)
        stream = WeightStream(list(modules.values()))
        for place, module in modules.items():
            where = f"{site}.{place}" if site else place
            is_layer = place != "patch_embedder"
            follows = frozenset() if is_layer else frozenset({_POSITIONS})
            yield from stay_on_host(module, HostMemory(kind, self.folder, follows), where)
            yield Edit(module, _STREAM, stream, where)
            around = _with_weights if is_layer else _with_weights_from_pixels
            yield Wrap(module, "forward", around, where)


def _modules_in_order(tower: nn.Module) -> dict[str, nn.Module]:
    """What holds the parameters of a tower, by name. PatchError for one that is built otherwise."""
    modules = {
        name: module
        for name, module in tower.named_modules()
        if name == "patch_embedder" or name.rpartition(".")[0] == "encoder.layers"
    }
    known = {id(p) for module in modules.values() for p in module.parameters()}
    unknown = [name for name, p in tower.named_parameters() if id(p) not in known]
    if unknown or next(iter(modules), None) != "patch_embedder":
        raise PatchError(
            "vision_streaming: this transformers builds the vision tower in a way that is not "
            f"known here: {', '.join(unknown) or 'no patch_embedder comes first'}. Leave the "
            "patch out of patches=[...], and report it."
        )
    return modules
