"""Gradients of small Gemma 4 models on several ranks, and those of a single process.

One group of processes goes through all cases: starting processes is what takes the time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import gemma4_zoo as zoo
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTuner
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gemtune import adapters, patches
from gemtune.adapters import Dora, Lora
from gemtune.models import StandIns, trained_modalities
from gemtune.models.recomputation import layers_with_kinds, recompute
from gemtune.parallel import DDP, FSDP2
from gemtune.parallel.fsdp import shard
from gemtune.parallel.gradients import clip_gradients
from gemtune.parallel.units import find_units
from gemtune.parallel.weights import whole_on_first

CPU = torch.device("cpu")
MAX_NORM = 0.5

# Images of the rows of each rank, in two micro-batches: in each of them some rank
# has text alone, and another one images.
IMAGES = (
    ((1, 0, 2), (0, 0), (2,)),
    ((0,), (1, 1), (0, 3)),
)
# The same with videos and audio: no two ranks of a micro-batch have the same kinds.
MIXED = (
    ((1, 0), (0, 0), (0, 0)),
    ((0,), (1, 1), (0, 1)),
)
VIDEOS = (
    ((0, 0), (0, 0), (1, 0)),
    ((0,), (0, 0), (0, 0)),
)
AUDIOS = (
    ((0, 0), (0, 0), (2, 1)),
    ((1,), (0, 1), (0, 0)),
)


@dataclass(frozen=True)
class Case:
    """A model, what is done to it, and how it is spread."""

    family: str = "e2b"
    strategy: str = FSDP2
    patches: tuple[str, ...] | None = None
    frozen: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    """The parts of an adapter."""
    adapter: type[Lora] = Lora
    checkpointing: bool = False
    recomputed: tuple[str, ...] | None = None
    """Kinds of layers; None: all."""
    dtype: torch.dtype = torch.float64
    mixed_precision: str = "no"
    images: tuple[tuple[tuple[int, ...], ...], ...] = IMAGES
    hears: bool = False
    """With an audio tower, and rows with videos and audio too."""

    @property
    def is_exact(self) -> bool:
        return self.dtype == torch.float64

    def build(self) -> tuple[Any, Any]:
        """(the model around which an adapter may be, the Gemma 4 itself)."""
        base = zoo.build(self.family, self.dtype, frozen=self.frozen, hears=self.hears)
        patches.apply(base, self.patches)
        if self.checkpointing:
            recompute(base, self.recomputed)
        model = base
        if self.lora:
            torch.manual_seed(3)
            model = adapters.attach(base, self.adapter(rank=2, parts=list(self.lora)))
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "_B" in name:  # zeros would leave lora_A without a gradient
                        parameter.normal_(std=0.05)
        return model.train(), base

    def batches(self, base: Any) -> list[list[dict[str, torch.Tensor]]]:
        """[micro-batch][rank]"""
        if self.hears:
            return [
                [
                    zoo.batch(base, images, videos, 7 * number + rank, audios)
                    for rank, (images, videos, audios) in enumerate(zip(*per_rank, strict=True))
                ]
                for number, per_rank in enumerate(zip(MIXED, VIDEOS, AUDIOS, strict=True))
            ]
        return [
            [
                zoo.batch(base, images_per_row=images, seed=7 * number + rank)
                for rank, images in enumerate(per_rank)
            ]
            for number, per_rank in enumerate(self.images)
        ]

    def context(self) -> Any:
        return zoo.exact_float64() if self.is_exact else nullcontext()

    def autocast(self) -> Any:
        if self.mixed_precision == "bf16":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()


def _as_peft_0_20_does(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Past the hooks of the model inside."""
    return self.model.forward(*args, **kwargs)


def supervised(inputs: dict[str, torch.Tensor]) -> int:
    return int((inputs["labels"][:, 1:] != -100).sum())


CASES = {
    "stock, recomputed": Case(patches=(), checkpointing=True),
    "patched, recomputed": Case(checkpointing=True),
    "frozen tower and projector": Case(frozen=("vision_tower", "embed_vision")),
    "frozen table": Case(frozen=("embed_tokens_per_layer",)),
    "E4B": Case("e4b"),
    "experts": Case("26b_a4b_all_experts"),
    "dense": Case("31b", checkpointing=True),
    "LoRA": Case(lora=("language",), checkpointing=True),
    "LoRA on experts": Case("26b_a4b_all_experts", lora=("experts", "language")),
    "LoRA on embeddings": Case(lora=("language", "embeddings")),
    "DoRA": Case(lora=("language", "vision"), adapter=Dora, checkpointing=True),
    "LoRA on everything": Case(lora=("language", "vision", "projector")),
    "float32 LoRA on bfloat16": Case(lora=("language",), dtype=torch.bfloat16),
    "bfloat16": Case(dtype=torch.bfloat16),
    "mixed precision": Case(dtype=torch.float32, mixed_precision="bf16"),
    "every kind": Case(hears=True, checkpointing=True),
    "every kind, frozen towers": Case(hears=True, frozen=("vision_tower", "audio_tower")),
    "some recomputed": Case(hears=True, checkpointing=True, recomputed=("shared", "audio")),
    "every kind, DDP, recomputed": Case(hears=True, strategy=DDP, checkpointing=True),
    "DDP, recomputed": Case(strategy=DDP, checkpointing=True),
    "DDP, frozen tower": Case(strategy=DDP, frozen=("vision_tower",)),
}


def expected(case: Case, num_ranks: int) -> dict[str, torch.Tensor]:
    """Gradients of one process for the micro-batches of all ranks, one after the other.

    Each is computed by itself, with the ranks' factor, which decides the rounding of bfloat16, and
    added in float32 or wider.
    """
    model, base = case.build()
    if case.mixed_precision == "bf16":  # what each rank computes with
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    batches = [inputs for per_rank in case.batches(base) for inputs in per_rank]
    total = sum(map(supervised, batches))
    sums: dict[str, torch.Tensor] = {}
    for inputs in batches:
        model.zero_grad(set_to_none=True)
        with case.context():
            with case.autocast():
                loss = model(**inputs, use_cache=False).loss
            (loss.double() * (supervised(inputs) * num_ranks / total)).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                wide = torch.promote_types(parameter.grad.dtype, torch.float32)
                sums[name] = sums.get(name, 0) + parameter.grad.to(wide) / num_ranks
    return sums


def all_gradients(rank: int, names: list[str], folder: str) -> None:
    """The worker: every case on this rank."""
    BaseTuner.forward = _as_peft_0_20_does
    found = {name: _gradients(rank, CASES[name]) for name in names}
    torch.save(found, f"{folder}/rank{rank}.pt")


def _gradients(rank: int, case: Case) -> dict[str, Any]:
    num_ranks = dist.get_world_size()
    model, base = case.build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if rank and case.strategy == FSDP2:  # the values are to come from rank 0
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for buffer in base.buffers():
                buffer.fill_(7)
    wrapped = model
    if case.strategy == DDP:
        buffers = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, buffers)
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    else:
        shard(base, find_units(base), CPU, mixed_precision=case.mixed_precision)
    if trained := trained_modalities(model):
        kinds = {"image", "video", "audio"} if case.hears else {"image"}
        kinds -= {"image", "video"} if "vision" not in trained else set()
        StandIns(base, kinds, without_autograd=case.strategy == FSDP2)
    batches = case.batches(base)
    total = sum(supervised(inputs) for per_rank in batches for inputs in per_rank)
    lengths = _lengths_of_last_layer(base)
    recomputed = _kinds_in_backward(base)
    losses, logits = [], []
    for number, per_rank in enumerate(batches):
        inputs = per_rank[rank]
        is_last = number == len(batches) - 1
        skips = case.strategy == DDP and not is_last
        with case.context(), wrapped.no_sync() if skips else nullcontext():
            with case.autocast():
                output = wrapped(**inputs, use_cache=False)
            (output.loss.double() * (supervised(inputs) * num_ranks / total)).backward()
        losses.append(float(output.loss.detach()))
        logits.append(output.logits is None)
    layers = len(base.model.language_model.layers)
    found: dict[str, Any] = {
        "losses": losses,
        "no logits": all(logits),
        "lengths": list(zip(lengths[::layers], lengths[layers - 1 :: layers], strict=True)),
        "values": dict(whole_on_first(model.named_parameters())),
        "kinds": {n: isinstance(p, DTensor) for n, p in model.named_parameters()},
        "gradients": dict(
            whole_on_first((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
        ),
        "before": before,
        "recomputed": recomputed,
    }
    found["norm"] = float(clip_gradients(model.parameters(), MAX_NORM))
    found["clipped"] = dict(
        whole_on_first((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    )
    if case.strategy == FSDP2:
        model.eval()
        with torch.no_grad(), case.context(), case.autocast():
            model(**batches[0][rank], use_cache=False)
        found["kinds after evaluation"] = {
            n: isinstance(p, DTensor) for n, p in model.named_parameters()
        }
    return found


def _lengths_of_last_layer(base: Any) -> list[int]:
    """Filled with the positions that go into each decoder layer's MLP, at first passes only."""
    lengths: list[int] = []

    def note(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        if torch._C._current_graph_task_id() == -1:  # not recomputed in a backward pass
            lengths.append(arguments[0].shape[1])

    for layer in base.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(note)
    return lengths


def _kinds_in_backward(base: Any) -> set[str]:
    """Filled with the kinds of layers that run within backward passes."""
    kinds: set[str] = set()
    for kind, layer in layers_with_kinds(base):

        def note(*_: Any, kind: str = kind) -> None:
            if torch._C._current_graph_task_id() != -1:
                kinds.add(kind)

        first = layer.feed_forward1 if kind == "audio" else layer.input_layernorm
        first.register_forward_pre_hook(note)
    return kinds
