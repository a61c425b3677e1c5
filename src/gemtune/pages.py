"""The words of the start-up page and of the closing summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import nn

from gemtune.adapters import Lora, Qlora, adapter_rows, quantization_row
from gemtune.config import RunConfig
from gemtune.console import Row, relative
from gemtune.data import BatchStream, ChatDataset, StreamedDataset
from gemtune.loop import Session
from gemtune.models import Processing, kinds_of, leaves_out_audio, part_parameters
from gemtune.parallel.construction import Base
from gemtune.patches import PatchReport
from gemtune.preview import media_counts
from gemtune.run_files import REPORT_FILE
from gemtune.runtime import Runtime

# A pretrained Gemma 4 with its own template starts below this on ordinary text.
HIGH_FIRST_LOSS = 6.0


class _Built(Protocol):
    processing: Processing
    train_rows: ChatDataset | StreamedDataset
    batches: BatchStream
    eval_rows: ChatDataset
    base: nn.Module
    loaded: Base
    report: PatchReport
    model: nn.Module


def start_page(
    config: RunConfig, runtime: Runtime, built: _Built, session: Session, dashboard: str
) -> tuple[str, list[Row]]:
    """Title and rows: model, data, patches with their status, run folder."""
    parts = part_parameters(built.base)
    total = sum(count for count, _ in parts.values())
    trainable = sum(count for _, count in parts.values())
    rows: list[Row] = [
        ("model", f"{config.model.name}, {_source(config, built.processing)}", ""),
        ("", f"{total:,} parameters, {trainable:,} trainable ({trainable / total:.2%})", ""),
        ("", _by_part(parts), ""),
        *_audio_rows(config, built.processing),
        *_adapter_rows(config, built.model),
        *_recomputed(config, built),
        *_dtype_warning(config),
        *_data_rows(config, built),
        ("training", _training(config, runtime, session.num_steps), ""),
        *_offload_notice(config, runtime),
        ("processes", runtime.strategy.describe(runtime.world_size), ""),
    ]
    if built.loaded.reading:
        rows.append(("weights", built.loaded.reading, ""))
    for number, row in enumerate(built.report.rows):
        text = f"{row.name}: {row.status} ({row.reason})"
        rows.append(("patches" if not number else "", text, row.status))
    if not built.report.rows:
        rows.append(("patches", "none", ""))
    if runtime.device.type == "cuda" and "sdpa_guard" not in config.patches:
        text = "warning: without sdpa_guard cuDNN attention can give NaN gradients (pytorch#196678)"
        rows.append(("", text, ""))
    return (
        f"gemtune: {config.recipe.name}",
        [
            *rows,
            ("memory", f"peak of every step by phase, from: {session.memory.source}", ""),
            ("dashboard", dashboard, ""),
            ("run folder", relative(runtime.run_dir), ""),
        ],
    )


def first_loss_lines(config: RunConfig, loss: float | None) -> Iterator[str]:
    """The loss before the first step, and a warning where it is too high for a checkpoint."""
    if loss is None:
        return
    yield f"loss of the starting model on the evaluation rows: {loss:.4f}"
    if config.model.weights == "pretrained" and loss > HIGH_FIRST_LOSS:
        yield (
            "warning: that is high for a pretrained model. Look at the data and at the chat "
            "template before you spend time on it."
        )


def closing_page(
    config: RunConfig, session: Session, metrics: Mapping[str, float], dashboard: str
) -> tuple[str, list[Row]]:
    """Title and rows: what was reached, where everything is, what to try next."""
    state = session.state
    rows: list[Row] = []
    if "eval/loss" in metrics:
        before = "" if state.first_eval_loss is None else f"{state.first_eval_loss:.4f} -> "
        rows.append(("eval/loss", f"{before}{metrics['eval/loss']:.4f}", ""))
    rows += [
        (name, f"{value:.4f}", "")
        for name, value in metrics.items()
        if name.startswith("eval/")
        and not name.startswith(("eval/loss", "eval/token_accuracy", "eval/exact_match"))
        and isinstance(value, int | float)  # JSON has no word for what is not finite
    ]
    if "eval/exact_match" in metrics:
        rows.append(("eval/exact_match", f"{metrics['eval/exact_match']:.1%}", ""))
        rows += [
            ("", f"{name.removeprefix('eval/exact_match_')} {value:.1%}", "")
            for name, value in metrics.items()
            if name.startswith("eval/exact_match_")
        ]
    if state.best_step is not None:
        best = f"{state.best_metric} {state.best_value:.4f} after step {state.best_step:,}"
        rows.append(("best", f"{best}, of the evaluations between steps", ""))
    if state.stopped_early:
        rows.append(("stopped early", state.stopped_early, ""))
    if state.nonfinite_steps:
        rows.append(("left out", f"{state.nonfinite_steps} steps that were not finite", ""))
    here = relative(session.runtime.run_dir)
    rows += [
        ("model", f"{here}/model (loads in stock transformers)", ""),
        ("", f"python scripts/generate.py model={here}/model", ""),
        ("", f"python scripts/export.py run={here} to=exports/{config.run.folder.name}", ""),
        ("report", f"{here}/{REPORT_FILE} (curves, memory, data, samples; any browser)", ""),
        ("metrics", f"{here}/metrics.jsonl", ""),
        ("answers", f"{here}/answers.jsonl", ""),
        ("checkpoints", f"{here}/checkpoints", ""),
        ("dashboard", dashboard, ""),
        ("next", _next_command(config), ""),
    ]
    return f"done: {state.step} steps", rows


def _next_command(config: RunConfig) -> str:
    if config.model.weights == "random":
        return (
            "accelerate launch train.py recipe=gemma4_lora model=e2b data=chat "
            "data.path=YOUR_CONVERSATIONS.jsonl"
        )
    return f"accelerate launch train.py recipe={config.recipe.name} run.name=NEW_NAME optim.lr=..."


def _source(config: RunConfig, processing: Processing) -> str:
    if config.model.weights == "random":
        return f"built from seed {config.run.seed}"
    return processing.source


def _by_part(parts: dict[str, tuple[int, int]]) -> str:
    return ", ".join(
        f"{part} {total:,}{'' if trainable else ' (frozen)'}"
        for part, (total, trainable) in parts.items()
    )


def _audio_rows(config: RunConfig, processing: Processing) -> Iterator[Row]:
    if leaves_out_audio(config.model, processing):
        text = "without its audio tower (model.audio_tower=false), which exports have again"
        yield ("", text, "")


def _dtype_warning(config: RunConfig) -> Iterator[Row]:
    if config.model.dtype == "bfloat16" and not isinstance(config.adapter, Lora):
        yield (
            "",
            "warning: weights trained in bfloat16 lose small updates to rounding; "
            "model.dtype=float32 parallel.mixed_precision=bf16 keeps them",
            "",
        )


def _offload_notice(config: RunConfig, runtime: Runtime) -> Iterator[Row]:
    if config.optim.offload_state and runtime.device.type == "cpu":
        text = "optim.offload_state=true saves nothing here: on a CPU all state is in host memory"
        yield "", text, ""


def _recomputed(config: RunConfig, built: _Built) -> Iterator[Row]:
    if config.model.gradient_checkpointing:
        there = kinds_of(built.base.config)
        chosen = config.model.recomputed_layers or there
        kept = ", ".join(f"{count} {kind}" for kind, count in there.items() if kind not in chosen)
        yield (
            "recomputed",
            "layers: "
            + ", ".join(f"{count} {kind}" for kind, count in there.items() if kind in chosen)
            + (f"; kept: {kept}" if kept else ""),
            "",
        )


def _adapter_rows(config: RunConfig, model: nn.Module) -> Iterator[Row]:
    if isinstance(config.adapter, Lora):
        for number, (part, text) in enumerate(adapter_rows(model, config.adapter)):
            yield "" if number else "adapter", f"{part}: {text}", ""
    if isinstance(config.adapter, Qlora):
        yield "base", f"{config.adapter.quantization}: {quantization_row(model)}", ""


def _data_rows(config: RunConfig, built: _Built) -> Iterator[Row]:
    rows = built.train_rows
    if isinstance(rows, StreamedDataset):  # nothing else is known before
        held_out = f"{len(built.eval_rows):,} to judge by"
        yield "data", f"{config.data.name}: {len(rows):,} rows, streamed, {held_out}", ""
        return
    yield (
        "data",
        f"{config.data.name}: {len(rows):,} rows to learn from, {len(built.eval_rows):,} to judge "
        f"by, {media_counts(rows.num_media)}",
        "",
    )
    share = rows.num_supervised_tokens / rows.num_tokens
    yield (
        "",
        f"{rows.num_tokens:,} tokens, {share:.1%} of them learned, longest row "
        f"{rows.longest_row_tokens:,}",
        "",
    )
    if packing := built.batches.packing:
        yield "", packing, ""
    if rows.rejected:
        yield "", f"{len(rows.rejected):,} bad rows left out (listed below)", ""


def _training(config: RunConfig, runtime: Runtime, num_steps: int) -> str:
    processes = f"{runtime.world_size} process{'es' if runtime.world_size > 1 else ''}"
    method = config.adapter.name if isinstance(config.adapter, Lora) else "full"
    return (
        f"{method}, {num_steps:,} steps of {config.loop.global_batch_size} rows, "
        f"{config.optim.describe()} ({config.schedule.name}), {processes} on {runtime.device.type}"
    )
