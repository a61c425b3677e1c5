"""Supervised fine-tuning of Gemma 4, with or without adapters: the stages in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune import adapters, patches
from gemtune.checkpoint import (
    CheckpointFolder,
    CheckpointWriter,
    Ranks,
    TrainState,
    base_identity,
    export_model,
    first_undamaged,
    restore,
    software,
)
from gemtune.config import RunConfig
from gemtune.console import Screen
from gemtune.data import Batch, BatchStream, ChatDataset, StreamedDataset, prepare
from gemtune.evaluation import exact_match, generate_answers
from gemtune.loop import Session, evaluate, train
from gemtune.losses import HostLabels
from gemtune.memory import PeakTracker
from gemtune.models import (
    Processing,
    base_model,
    load_model,
    load_processing,
    trained_modalities,
)
from gemtune.pages import closing_page, first_loss_lines, start_page
from gemtune.patches.host_memory import host_parameters
from gemtune.patches.ple_offload import prefetch
from gemtune.reporting import Reporter
from gemtune.run_folder import MODEL_FOLDER, FolderLock, claim, open_folder, resume_points
from gemtune.runtime import Runtime, start
from gemtune.tracking import new_run_id

EXIT_DONE, EXIT_INTERRUPTED = 0, 130


@dataclass
class Stages:
    """What is built before the processes meet."""

    processing: Processing
    train_rows: ChatDataset | StreamedDataset
    eval_rows: ChatDataset
    base: nn.Module
    """The Gemma 4 itself, patched."""
    report: patches.PatchReport
    model: nn.Module
    """`base`, or an adapter around it."""
    identity: dict[str, str] | None
    """Of what is frozen in it."""
    optimizer: torch.optim.Optimizer
    num_steps: int


def run(config: RunConfig) -> int:
    """Train to the end, or until Ctrl-C; returns the exit status."""
    points = resume_points(config)  # before anything slow: the folder may be another run's
    runtime = start(config.run, config.parallel)
    config.loop.check_world_size(runtime.world_size)
    screen = Screen(runtime.is_main)
    runtime.stop.install(screen.say)
    ranks = Ranks.meet(config.parallel.timeout_seconds)
    lock = FolderLock(config.run.folder)
    try:
        point = None
        if points:  # a damaged one would be renamed
            ranks.all_or_none(lambda: claim(config, points, lock) if ranks.is_main else None)
            point = first_undamaged(ranks, points, checkpoint_folder(config), screen.say)
        screen.say(f"reading {config.model.path} and checking {config.data.sources}")
        stages = build(config, screen)
        # Not before: a mistake in data or model leaves no trace on the disk.
        ranks.all_or_none(lambda: claim(config, points, lock) if ranks.is_main else None)
        return train_from(point, config, runtime, ranks, stages, screen)
    finally:
        lock.release()


def train_from(
    point: Path | None,
    config: RunConfig,
    runtime: Runtime,
    ranks: Ranks,
    stages: Stages,
    screen: Screen,
) -> int:
    """The stages from distribution to the finished model; returns the exit status."""
    session, reporter, writer = open_session(config, runtime, ranks, stages, point, screen)
    if isinstance(stages.train_rows, StreamedDataset):
        stages.train_rows.journal = runtime.run_dir / "rejected.jsonl"
    screen.panel(*start_page(config, runtime, stages, session, reporter.notice))
    rejected = stages.train_rows.rejected + stages.eval_rows.rejected
    screen.lines(f"left out: {row}" for row in rejected)
    if is_finished(runtime, session):
        screen.say(f"this run is finished: all {session.num_steps} steps are done")
        screen.panel(*closing_page(config, session, reporter.newest, reporter.notice))
        reporter.finish()
        return EXIT_DONE
    if point is not None:
        screen.say(f"going on after step {session.state.step}, from {point}")
    else:
        first = evaluate(session)
        session.state.first_eval_loss = first.get("eval/loss")
        reporter.figures(first)
        screen.lines(first_loss_lines(config, session.state.first_eval_loss))

    with screen.training(session.state.step, session.num_steps):
        finished = train(
            session,
            batch_stream(config, runtime, stages.train_rows),
            config.loop,
            config.checkpoint.every_steps,
        )
        writer.settle()
    if finished:
        conclude(config, stages, session, reporter, screen)
    else:
        again = " without run.resume=never" if config.run.resume == "never" else ""
        screen.say(
            f"Stopped after step {session.state.step} of {session.num_steps}; everything is saved "
            f"in {runtime.run_dir}. To go on, run the same command again{again}."
        )
    reporter.finish()
    return EXIT_DONE if finished else EXIT_INTERRUPTED


def checkpoint_folder(config: RunConfig) -> CheckpointFolder:
    return CheckpointFolder(config.run.folder / "checkpoints")


def is_finished(runtime: Runtime, session: Session) -> bool:
    """Whether an earlier start did everything; decided by the main process for all."""
    exported = (runtime.run_dir / MODEL_FOLDER).exists()
    return runtime.collect([session.state.step == session.num_steps and exported])[0]


def build(config: RunConfig, screen: Screen) -> Stages:
    """Data -> model -> patches -> adapter -> optimizer: a bad row is found before weights load."""
    processing = load_processing(config.model)
    train_rows, eval_rows = prepare(
        config.data,
        processing.tokenizer,
        processing.image_processor,
        config.run.seed,
        screen.checking,
    )
    screen.lines(dict.fromkeys([*train_rows.notes, *eval_rows.notes]))
    num_steps = config.loop.num_steps(len(train_rows))
    base = load_model(config.model, processing, config.run.seed)
    report = patches.apply(base, config.patches)
    model = adapters.attach(base, config.adapter)
    identity = base_identity(model)
    optimizer = config.optim.build(model)
    return Stages(
        processing, train_rows, eval_rows, base, report, model, identity, optimizer, num_steps
    )


def open_session(
    config: RunConfig,
    runtime: Runtime,
    ranks: Ranks,
    stages: Stages,
    point: Path | None,
    screen: Screen,
) -> tuple[Session, Reporter, CheckpointWriter]:
    """Distribute -> restore -> open the run folder, its metrics and the dashboard."""
    # A batch of text alone gives the vision tower no gradient; nothing here feeds the audio tower.
    trained = trained_modalities(stages.model)
    text_alone = "vision" in trained and not stages.train_rows.every_row_has_images
    model = runtime.distribute(
        stages.model,
        find_unused_parameters=text_alone or "audio" in trained,
        on_host=host_parameters(stages.model),
    )
    runtime.seed_training(config.run.seed)
    state, writer = restore_from(point, config, runtime, ranks, stages, runtime.unwrap(model))
    ranks.all_or_none(lambda: open_folder(config, point) if runtime.is_main else None)
    reporter = Reporter(runtime, config, state, screen)

    forward_options: dict[str, bool] = {"use_cache": False}
    loss_alone = not {"linear_cross_entropy", "supervised_positions"}.isdisjoint(config.patches)
    if loss_alone:
        forward_options["skip_logits"] = True  # in evaluation too
    memory = PeakTracker(runtime.device)
    memory.begin_loss_after(base_model(stages.base))
    session = Session(
        runtime=runtime,
        model=model,
        optimizer=stages.optimizer,
        learning_rate=lambda step: config.optim.lr * config.schedule.ratio(step, stages.num_steps),
        memory=memory,
        forward_options=forward_options,
        state=state,
        num_steps=stages.num_steps,
        log=reporter.training,
        evaluation_batches=lambda: evaluation_batches(config, runtime, stages.eval_rows),
        save=lambda: reporter.figures(writer.save()),
        save_failed=lambda: writer.has_failed,
    )

    def look_ahead(batch: Batch) -> dict[str, Any]:
        if "ple_offload" in config.patches:
            prefetch(stages.base, batch.inputs["input_ids"])
        # Labels that stay on the CPU are counted there: the GPU is not waited for.
        return {"host_labels": HostLabels(batch.labels)} if loss_alone else {}

    session.look_ahead = look_ahead
    return session, reporter, writer


def restore_from(
    point: Path | None,
    config: RunConfig,
    runtime: Runtime,
    ranks: Ranks,
    stages: Stages,
    model: nn.Module,
) -> tuple[TrainState, CheckpointWriter]:
    """Counters, parameters and optimizer as they were at `point`; and what writes the next one."""
    optimizer = stages.optimizer
    state = TrainState(run_id=new_run_id())
    if point is not None:
        run_dir, base = runtime.run_dir, stages.identity
        state = restore(ranks, point, model, optimizer, run_dir=run_dir, base=base)
    folder, settings = checkpoint_folder(config), config.checkpoint
    made_with = facts(config, stages)
    return state, CheckpointWriter(ranks, folder, settings, model, optimizer, state, made_with)


def facts(config: RunConfig, stages: Stages) -> dict[str, Any]:
    """What a checkpoint says of how it was made."""
    return {
        "config": config.as_dict(),
        "base": stages.identity,
        "patches": [
            {"name": row.name, "status": row.status, "reason": row.reason}
            for row in stages.report.rows
        ],
        **software(),
    }


def batch_stream(
    config: RunConfig, runtime: Runtime, rows: ChatDataset | StreamedDataset
) -> BatchStream:
    """This rank's micro-batches of every step."""
    return BatchStream(
        rows,
        seed=config.run.seed,
        global_batch_size=config.loop.global_batch_size,
        micro_batch_size=config.loop.micro_batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        num_workers=config.data.num_workers,
        shuffle=config.data.shuffle,
        pin_memory=runtime.device.type == "cuda",
    )


def evaluation_batches(config: RunConfig, runtime: Runtime, rows: ChatDataset) -> Iterator[Batch]:
    """This rank's share of the evaluation rows."""
    mine = range(runtime.rank, len(rows), runtime.world_size)
    size = config.loop.eval_micro_batch_size
    for first in range(0, len(mine), size):
        yield rows.batch([rows[i] for i in mine[first : first + size]])


def conclude(
    config: RunConfig, stages: Stages, session: Session, reporter: Reporter, screen: Screen
) -> None:
    """Evaluate by loss and by generating, write the model, say where everything is."""
    runtime = session.runtime
    limit = config.data.eval_generate_rows
    num_rows = len(stages.eval_rows) if limit is None else min(limit, len(stages.eval_rows))
    screen.say(f"judging by {num_rows} generated answers")
    metrics = evaluate(session)
    answers = generate_answers(
        runtime,
        runtime.unwrap(session.model),
        stages.eval_rows,
        num_rows=num_rows,
        batch_size=config.loop.eval_micro_batch_size,
        max_new_tokens=config.data.eval_max_new_tokens,
    )
    metrics |= exact_match(answers)
    reporter.figures(metrics)
    reporter.answers(answers)
    if runtime.is_main:
        export_model(
            adapters.merge(runtime.release(session.model)),
            stages.processing.tokenizer,
            stages.processing.image_processor,
            runtime.run_dir / MODEL_FOLDER,
            stages.processing.processor_file,
        )
    runtime.wait_for_everyone()
    screen.panel(*closing_page(config, session, metrics, reporter.notice))
