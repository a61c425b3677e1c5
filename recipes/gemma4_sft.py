"""Supervised fine-tuning of Gemma 4, with or without adapters: the stages in order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune import adapters, patches, signals
from gemtune.attention import separate_documents
from gemtune.checkpoint import (
    CheckpointFolder,
    CheckpointWriter,
    Ranks,
    TrainState,
    base_identity,
    first_undamaged,
    restore,
    software,
)
from gemtune.config import RunConfig
from gemtune.console import Screen
from gemtune.data import (
    BatchStream,
    ChatDataset,
    OtherMedia,
    StreamedDataset,
    prepare,
)
from gemtune.evaluation import Metrics, load_metrics, select_by
from gemtune.exit_codes import DONE
from gemtune.export import export_model, model_card
from gemtune.guard import guarded
from gemtune.loop import Session, evaluate, train
from gemtune.memory import PeakTracker, resident_gib
from gemtune.models import (
    EmbeddingNoise,
    Processing,
    base_model,
    encode_images_in_forward,
    load_processing,
    put_back_audio_tower,
    trained_modalities,
)
from gemtune.pages import closing_page, first_loss_lines, start_page
from gemtune.parallel.construction import Base, build_base, choose_strategy, rebuild_around
from gemtune.patches.host_memory import host_parameters
from gemtune.reporting import Reporter
from gemtune.run_files import MODEL_FOLDER
from gemtune.run_folder import FolderLock, claim, open_folder, resume_points
from gemtune.run_memory import RunMemory
from gemtune.runtime import Runtime, start
from gemtune.step_recordings import StepRecordings, require_gpu_for_snapshot
from gemtune.tracking import new_run_id
from gemtune.watchdog import Limits
from recipes.batches import batch_stream, evaluation_batches, looking_ahead, stand_in
from recipes.judging import (
    judge_in_between,
    num_generated_rows,
    put_back_best,
    require_rows,
    score_answers,
)


@dataclass
class Stages:
    """What is built before the processes meet."""

    processing: Processing
    train_rows: ChatDataset | StreamedDataset
    batches: BatchStream
    """This rank's micro-batches of every step."""
    eval_rows: ChatDataset
    loaded: Base
    """The Gemma 4 itself, patched, and how its weights come to the processes."""
    report: patches.PatchReport
    model: nn.Module
    """`base`, or an adapter around it."""
    identity: dict[str, str] | None
    """Of what is frozen in it."""
    num_steps: int
    resident_gib: float
    """Of this process before the model was built."""
    metrics: Metrics
    """Of generated answers."""

    @property
    def base(self) -> nn.Module:
        """The Gemma 4 itself, patched."""
        return self.loaded.model


def run(config: RunConfig) -> int:
    """Train to the end, or until a signal; returns the exit status."""
    points = resume_points(config)  # before anything slow: the folder may be another run's
    runtime = start(config.run, config.parallel)
    runtime.stop = signals.install()
    limits = Limits(
        heartbeat_seconds=config.parallel.heartbeat_seconds,
        timeout_seconds=config.parallel.timeout_seconds,
        grace_seconds=config.run.grace_seconds,
    )
    with guarded(runtime, limits):
        return go_through(config, runtime, points)


def go_through(config: RunConfig, runtime: Runtime, points: list[Path]) -> int:
    """The stages up to the model in memory, and then the rest."""
    config.loop.check_world_size(runtime.world_size)
    require_gpu_for_snapshot(config.memory.snapshot_at_step, runtime.device)
    screen = Screen(runtime.is_main)
    runtime.stop.say = screen.say
    ranks = Ranks.meet(config.parallel.timeout_seconds)
    lock = FolderLock(config.run.folder)
    try:
        point = None
        if points:  # a damaged one would be renamed
            ranks.all_or_none(lambda: claim(config, points, lock) if ranks.is_main else None)
            point = first_undamaged(ranks, points, checkpoint_folder(config), screen.say)
        screen.say(f"reading {config.model.path} and checking {config.data.sources}")
        stages = build(config, runtime, screen)
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
    reporter.begin(
        start_page(config, runtime, stages, session, reporter.notice),
        stages.report,
        stages.train_rows,
        num_steps=session.num_steps,
        memory_source=session.memory.source,
    )
    reporter.rejected(stages.train_rows, stages.eval_rows, is_new=point is None)
    if is_finished(runtime, session):
        return say_finished(config, session, reporter, screen)
    reporter.patches(stages.report)
    reporter.preview(stages.train_rows)
    if point is not None:
        screen.say(f"going on after step {session.state.step}, from {point}")
    else:
        first = evaluate(session)
        session.state.first_eval_loss = first.get("eval/loss")
        reporter.figures(first)
        screen.lines(first_loss_lines(config, session.state.first_eval_loss))

    runtime.stop.training()
    with screen.training(session.state.step, session.num_steps):
        finished = train(
            session,
            stages.batches,
            config.loop,
            config.checkpoint.every_steps,
        )
        writer.settle()
    code, reason = DONE, session.state.stopped_early
    if finished:
        runtime.stop.not_training()
        if reason:
            screen.say(f"stopped early after step {session.state.step}: {reason}")
        conclude(config, stages, session, reporter, screen, ranks)
    else:
        code, reason = runtime.stop.exit_code, runtime.stop.reason
        again = " without run.resume=never" if config.run.resume == "never" else ""
        screen.say(
            f"Stopped by {reason} after step {session.state.step} of {session.num_steps}; "
            f"everything is saved in {runtime.run_dir}. To go on, run the same command again"
            f"{again}. Exit code {code}."
        )
    reporter.finish()
    runtime.stop.ending()
    runtime.status.end(code, reason)
    reporter.page(hurry=not finished)
    return code


def say_finished(config: RunConfig, session: Session, reporter: Reporter, screen: Screen) -> int:
    """All that a start of a finished run does."""
    early = session.state.stopped_early
    done = f"it was stopped early: {early}" if early else f"all {session.num_steps} steps are done"
    screen.say(f"this run is finished: {done}")
    screen.panel(*closing_page(config, session, reporter.newest, reporter.notice))
    reporter.finish()
    session.runtime.status.end(DONE, early or "it was finished before")
    reporter.page()
    return DONE


def checkpoint_folder(config: RunConfig) -> CheckpointFolder:
    return CheckpointFolder(config.run.folder / "checkpoints")


def is_finished(runtime: Runtime, session: Session) -> bool:
    """Whether an earlier start did everything; decided by the main process for all."""
    exported = (runtime.run_dir / MODEL_FOLDER).exists()
    done = session.state.step == session.num_steps or bool(session.state.stopped_early)
    return runtime.collect([done and exported])[0]


def build(config: RunConfig, runtime: Runtime, screen: Screen) -> Stages:
    """Data -> model -> patches -> adapter: a bad row is found before weights load, and a metric
    that cannot run before any row is read."""
    metrics = load_metrics(config.eval)
    processing = load_processing(config.model)
    with screen.preparing():
        train_rows, eval_rows = prepare(
            config.data,
            processing.tokenizer,
            processing.image_processor,
            config.run.seed,
            screen.checking,
            OtherMedia(**processing.other_media),
        )
    require_rows(config, eval_rows)
    screen.lines(dict.fromkeys([*train_rows.notes, *eval_rows.notes]))
    batches = batch_stream(config, runtime, train_rows)
    num_steps = config.loop.num_steps(batches.num_rows)
    runtime.strategy = choose_strategy(config, runtime, processing)
    before_gib = resident_gib()
    loaded = build_base(config, runtime, processing)
    base = loaded.model
    report = patches.apply(base, config.patches)
    if config.data.packing:
        separate_documents(base)
    if config.model.neftune_alpha is not None:
        EmbeddingNoise(base, config.model.neftune_alpha)
    model = loaded.attach(config.adapter, runtime.device)
    # Sharded, rank 0 alone tells: it has the weights, or looks into their files.
    stored = loaded.stored if runtime.is_main else {}
    identity = runtime.collect([base_identity(model, stored)])[0]
    return Stages(
        processing,
        train_rows,
        batches,
        eval_rows,
        loaded,
        report,
        model,
        identity,
        num_steps,
        before_gib,
        metrics,
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
    trained = trained_modalities(stages.model)
    on_host = host_parameters(stages.model)
    model = runtime.distribute(
        stages.model, on_host=on_host, base=stages.base, stored=stages.loaded.stored
    )
    if runtime.is_sharded:
        encode_images_in_forward(stages.base)
    optimizer = config.optim.build(stages.model)
    runtime.seed_training(config.run.seed)
    state, writer = restore_from(
        point, config, runtime, ranks, stages, runtime.unwrap(model), optimizer
    )
    ranks.all_or_none(lambda: open_folder(config, point) if runtime.is_main else None)
    runtime.status.open(runtime.run_dir, step=state.step, writes=runtime.is_main)
    reporter = Reporter(runtime, config, state, screen)

    loss_alone = not {"linear_cross_entropy", "supervised_positions"}.isdisjoint(config.patches)
    # Without logits in evaluation too.
    forward_options = {"use_cache": False} | ({"skip_logits": True} if loss_alone else {})
    run_memory = RunMemory(
        config, runtime, resident_gib=stages.resident_gib, say=screen.say, on_plan=reporter.log_plan
    )
    run_memory.plan(stages.batches)
    memory = PeakTracker(runtime.device)
    memory.begin_loss_after(base_model(stages.base))
    session = Session(
        runtime=runtime,
        model=model,
        optimizer=optimizer,
        learning_rate=lambda step: config.optim.lr * config.schedule.ratio(step, stages.num_steps),
        memory=memory,
        forward_options=forward_options,
        state=state,
        num_steps=stages.num_steps,
        log=reporter.training,
        evaluation_batches=lambda: evaluation_batches(config, runtime, stages.eval_rows),
        run_facts=lambda: run_memory.facts(stages.model, optimizer),
        watch_memory=run_memory.watch,
        recorded=StepRecordings(config, runtime, screen.say),
        save=lambda: reporter.figures(writer.save()),
        save_failed=lambda: writer.has_failed,
        look_ahead=looking_ahead(config, stages.base, loss_alone=loss_alone),
    )
    judge_in_between(config, stages, session, reporter)
    if trained and runtime.world_size > 1:
        rows = (stages.train_rows, stages.eval_rows)
        session.after_backward = stand_in(trained, runtime, stages.base, *rows)
    return session, reporter, writer


def restore_from(
    point: Path | None,
    config: RunConfig,
    runtime: Runtime,
    ranks: Ranks,
    stages: Stages,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[TrainState, CheckpointWriter]:
    """Counters, parameters and optimizer as they were at `point`; and what writes the next one."""
    state = TrainState(run_id=new_run_id())
    if point is not None:
        run_dir, base = runtime.run_dir, stages.identity
        state = restore(ranks, point, model, optimizer, run_dir=run_dir, base=base)
    select_by(config.eval, state)
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


def conclude(
    config: RunConfig,
    stages: Stages,
    session: Session,
    reporter: Reporter,
    screen: Screen,
    ranks: Ranks,
) -> None:
    """Evaluate by loss and by generating, write the model, say where everything is."""
    runtime = session.runtime
    screen.say(f"judging by {num_generated_rows(config, stages)} generated answers")
    metrics = evaluate(session)
    metrics |= score_answers(config, stages, session, reporter, on_screen=True)
    reporter.figures(metrics)
    step = put_back_best(config, ranks, checkpoint_folder(config), session, metrics, screen)
    if runtime.is_sharded:
        model = rebuild_around(session.model, config, stages.processing)
    else:
        model = runtime.release(session.model) if runtime.is_main else None
    if model is not None:
        seed = config.run.seed
        export_model(
            put_back_audio_tower(adapters.merge(model), config.model, stages.processing, seed),
            stages.processing.tokenizer,
            stages.processing.image_processor,
            runtime.run_dir / MODEL_FOLDER,
            stages.processing.processor_file,
            card=model_card(config, runtime.run_dir, step=step),
        )
    runtime.wait_for_everyone()
    screen.panel(*closing_page(config, session, metrics, reporter.notice))
