"""From a checkpoint of a run to a folder that others load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemtune import adapters
from gemtune.checkpoint.state import read_document
from gemtune.config import RunConfig, from_dict
from gemtune.errors import ConfigError
from gemtune.export.adapter import adapter_parameters, require_adapter_alone, write_adapter
from gemtune.export.folder import export_model, put_in_place, write_processing
from gemtune.export.hub import push_folder, require_hub
from gemtune.export.model_card import model_card, public_name
from gemtune.export.probe import make_probe
from gemtune.export.source import find_checkpoint
from gemtune.export.stock_reader import digests
from gemtune.export.trained_model import cast, persistent, put_weights, read_trained
from gemtune.export.verification import (
    BFLOAT16_BOUND,
    FLOAT32_BOUND,
    Difference,
    Expected,
    Logits,
    difference,
    require_same,
    verify_export,
)
from gemtune.models import Processing, load_processing, put_back_audio_tower
from gemtune.options import option, require_choice, require_range

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class ExportRequest:
    """The keys of an export."""

    run: str = option("", "a run: its folder, or its name below runs/")
    to: str = option("", "the folder to write; it must not exist")
    checkpoint: str = option("newest", "newest, best (by eval.best_metric), or one by its path")
    kind: str = option("merged", "merged: the whole model; adapter: what peft loads onto the base")
    dtype: str = option("bfloat16", f"of the weights: {', '.join(DTYPES)}")
    max_shard_gb: float = option(5.0, "gigabytes (10^9 bytes) of one safetensors file, at most")
    push: str = option("", "a repository on the hub (OWNER/NAME) to upload to, private if new")
    verify: bool = option(True, "load it by stock transformers in a fresh process, and compare")
    base: str = option("", "where the base model is now, if not at the run's model.path")

    def __post_init__(self) -> None:
        if not self.to:
            raise ConfigError("to= is missing: the folder to write, as in to=exports/NAME.")
        if not self.run and self.checkpoint in ("newest", "best"):
            raise ConfigError("run= is missing: a run's folder, or its name below runs/.")
        require_choice("kind", self.kind, ["merged", "adapter"])
        if self.dtype == "float16":
            raise ConfigError(
                "dtype=float16: Gemma 4 overflows in it (transformers#46277). Use bfloat16."
            )
        require_choice("dtype", self.dtype, DTYPES)
        require_range("max_shard_gb", self.max_shard_gb, above=0)


def export_run(request: ExportRequest, say: Callable[[str], None] = lambda text: None) -> Path:
    """Write the folder that `request` asks for, and upload it if it says so.

    With `verify` the folder is in its place only if stock transformers loads every tensor of it to
    the bit and computes the logits of the training model, within the bounds of `verification`.

    Raises:
        UserError: before anything is written, or with nothing left behind.
    """
    folder = Path(request.to).expanduser()
    if folder.exists() or folder.is_symlink():
        raise ConfigError(f"to={request.to} exists already. Choose another folder, or delete it.")
    checkpoint = find_checkpoint(request.run, request.checkpoint)
    document = read_document(checkpoint)
    config = from_dict(document["config"])
    if request.base:
        config.model.path = request.base
    if request.kind == "adapter":
        require_adapter_alone(config)
    if request.push:
        require_hub(request.push)
    say(f"reading {checkpoint} and {config.model.path}")
    processing = load_processing(config.model)
    model, stock_weights = read_trained(config, processing, checkpoint)
    run_dir, step = checkpoint.absolute().parents[1], int(document["state"]["step"])
    card = partial(model_card, config, run_dir, step=step, kind=request.kind)
    _Export(request, config, processing, card, say).write(model, stock_weights, folder)
    if request.push:
        say(f"uploading to {request.push}")
        say(f"uploaded: {push_folder(folder, request.push)}")
    return folder


@dataclass(frozen=True)
class _Export:
    request: ExportRequest
    config: RunConfig
    processing: Processing
    card: Callable[..., str]
    say: Callable[[str], None]

    def write(self, model: nn.Module, stock_weights: dict[str, Tensor], folder: Path) -> None:
        """Compute what is expected, bring the model into the form that is written, write it.

        Everything is computed in float32, merging too, so that each weight is rounded once.

        Args:
            stock_weights: what the base's own files have where the training had few bits.
        """
        is_adapter, dtype = self.request.kind == "adapter", DTYPES[self.request.dtype]
        probe = trained = None
        if self.request.verify:
            self.say("computing the logits of the training model")
            probe = make_probe(model, self.processing)
            trained = probe.logits(model)
        gaps: list[Difference] = []
        if is_adapter and stock_weights:
            put_weights(model, stock_weights)
            if probe is not None and trained is not None:
                before, trained = trained, probe.logits(model)
                gaps = self._gaps(trained, before)
        plain = model if is_adapter else adapters.merge(model)
        if probe is not None and trained is not None and not is_adapter:
            require_same(probe, probe.logits(plain), trained, "those before the adapter was merged")
        if not is_adapter:
            seed = self.config.run.seed
            put_back_audio_tower(plain, self.config.model, self.processing, seed).float()
        written = adapter_parameters(plain) if is_adapter else list(persistent(plain))
        cast(written, dtype)

        def check(staging: Path) -> None:
            if probe is None or trained is None:
                return
            # As float32 the rounded weights lose nothing.
            cast(written, torch.float32)
            expected = Expected(
                probe,
                trained,
                probe.logits(plain),
                digests(plain, "lora_" if is_adapter else ""),
                FLOAT32_BOUND if dtype == torch.float32 else BFLOAT16_BOUND,
                self._stock_base() if is_adapter else None,
            )
            self._compare(staging, expected)

        if is_adapter:
            self._write_adapter(plain, written, folder, check, gaps)
        else:
            export_model(
                plain,
                self.processing.tokenizer,
                self.processing.image_processor,
                folder,
                self.processing.processor_file,
                card=self.card(),
                shard_bytes=int(self.request.max_shard_gb * 10**9),
                check=check,
            )

    def _compare(self, staging: Path, expected: Expected) -> None:
        self.say("loading it by stock transformers in a fresh process")
        for found in verify_export(staging, expected):
            self.say(
                f"{found.name}: logits differ by {found.error:.1e} of their spread at the "
                f"worst position; {expected.bound:.1e} is allowed"
            )

    def _gaps(self, on_stock: Logits, trained: Logits) -> list[Difference]:
        """How far the base in its own precision takes the logits from those of the training."""
        found = [difference(name, logits, trained[name]) for name, logits in on_stock.items()]
        for each in found:
            self.say(
                f"{each.name}: on the base in {self.config.model.dtype} logits differ from those "
                f"of the training by {each.error:.1e} of their spread at the worst position"
            )
        return found

    def _write_adapter(
        self,
        model: nn.Module,
        written: list[nn.Parameter],
        folder: Path,
        check: Callable[[Path], None],
        gaps: Sequence[Difference],
    ) -> None:
        source, tokenizer = self.processing.source, self.processing.tokenizer
        if not self.processing.hub_options:
            # Of use on this machine only.
            source = public_name(source) if self.request.push else str(Path(source).resolve())

        def fill(staging: Path) -> None:
            write_adapter(staging, model, self.config, source)
            processor = self.processing.image_processor
            write_processing(staging, tokenizer, processor, self.processing.processor_file)

        needed_bytes = sum(p.numel() * p.element_size() for p in written)
        put_in_place(folder, fill, needed_bytes, card=self.card(gaps=gaps), check=check)

    def _stock_base(self) -> dict[str, Any]:
        where = {"pretrained_model_name_or_path": self.processing.source}
        dtype = self.config.model.dtype
        return {"where": where | self.processing.hub_options, "dtype": dtype}
