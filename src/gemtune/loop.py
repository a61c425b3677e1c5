"""The training loop: one explicit step, and four cadences around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from gemtune.checkpoint.state import TrainState
from gemtune.errors import TrainingError
from gemtune.evaluation.mode import evaluation_mode
from gemtune.loop_config import LoopConfig
from gemtune.memory import (
    PHASES,
    PeakTracker,
    Place,
    Readings,
    RunFacts,
    read_memory,
    reported_when_out_of_memory,
)
from gemtune.optim.groups import set_learning_rate
from gemtune.parallel.gradients import clip_gradients
from gemtune.runtime import Runtime
from gemtune.skipped_steps import remember_loss, spike_limit
from gemtune.step_result import StepResult, step_record


class TrainBatch(Protocol):
    """What the loop needs of a micro-batch."""

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor
    num_tokens: int
    num_supervised_tokens: int
    rows: list[str]

    def to(self, device: torch.device) -> Any: ...


@dataclass
class Session:
    """What a run trains with. The callbacks are called on every rank."""

    runtime: Runtime
    model: nn.Module
    optimizer: torch.optim.Optimizer
    learning_rate: Callable[[int], float]
    """Of the step with that index, from 0. Groups with a `lr_ratio` get it times that."""
    memory: PeakTracker
    forward_options: dict[str, Any]
    """Passed to the model with every batch."""
    state: TrainState
    num_steps: int
    log: Callable[[dict[str, Any]], None]
    """Takes the record of every step."""
    evaluation_batches: Callable[[], Iterable[TrainBatch]]
    """This rank's share of the evaluation rows; where forwards are joint, as many as other ranks,
    those in excess without supervised tokens."""
    save: Callable[[], None]
    """Writes a checkpoint, or begins to; raises what went wrong with an earlier one."""
    save_failed: Callable[[], bool] = lambda: False
    """Whether a checkpoint that is written in the background has failed on this rank."""
    look_ahead: Callable[[TrainBatch], dict[str, Any]] = lambda batch: {}
    """Sees every batch while it is on the CPU still; what it returns is passed to the model too."""
    run_facts: Callable[[], RunFacts] = RunFacts
    """For the report when memory runs out."""
    watch_memory: Callable[[StepResult, list[TrainBatch]], dict[str, float]] = lambda *_: {}
    """Sees every step when it is done; what it returns joins the record."""
    recorded: Callable[[int], AbstractContextManager] = lambda step: nullcontext()
    """Around the step with that number: a trace, a snapshot of the allocator."""
    after_backward: Callable[[], None] = lambda: None
    """Called when the gradients of a step are complete, before they are looked at."""
    score_answers: Callable[[], dict[str, float]] = dict
    """Figures of generated answers, where they are due after the step that is done."""
    judge: Callable[[dict[str, float]], bool] = lambda metrics: False
    """Takes the figures of an evaluation; whether to save this state. May set `stopped_early`."""

    def enter(self, phase: str) -> None:
        """A phase of the step begins: memory and the watchdog follow."""
        self.memory.enter(phase)
        self.runtime.watchdog.progress(phase, self.state.step + 1)


def train(
    session: Session,
    batches: Callable[[int, int], Iterator[list[TrainBatch]]],
    config: LoopConfig,
    save_every_steps: int | None,
) -> bool:
    """Train from `session.state.step` to `session.num_steps`; True if it got there.

    It also did where `state.stopped_early` says why no further step was made. False: somebody asked
    to stop. The state was saved.

    Raises:
        TrainingError: more than `max_nonfinite_steps` steps were not finite.
        CheckpointError: a checkpoint could not be written.
    """
    state, watchdog = session.state, session.runtime.watchdog
    session.model.train()
    started = time.perf_counter()
    last = state.step if state.stopped_early else session.num_steps
    for micro_batches in batches(state.step, last):
        fetched = time.perf_counter()
        limit = spike_limit(state.recent_losses, config.spike_sigma)
        with (
            session.recorded(state.step + 1),
            reported_when_out_of_memory(lambda batches=micro_batches: _place(session, batches)),
        ):
            result = step(session, micro_batches, config.max_grad_norm, limit)
        watchdog.limit(True)  # not in the first step: it compiles and allocates
        state.step += 1
        session.runtime.status.step = state.step
        state.tokens_seen += result.tokens
        now = time.perf_counter()
        record = step_record(
            result,
            learning_rate=session.learning_rate(state.step - 1),
            nonfinite_steps=state.nonfinite_steps,
            spike_steps=state.spike_steps,
            seconds=now - started,
            waited=fetched - started,
        )
        record |= session.watch_memory(result, micro_batches)
        started = now
        if result.updated:
            remember_loss(state.recent_losses, result.loss, config.spike_window_steps)
        else:
            _count_left_out(session, result, record, config)
        done = state.step == session.num_steps
        stopping, is_best = result.stop_requested, False
        if config.eval_every_steps and not state.step % config.eval_every_steps and not done:
            is_best = _evaluate_in_between(session, record)
            started = time.perf_counter()  # evaluation is no training time
        session.log(record)
        due = save_every_steps is not None and not state.step % save_every_steps
        early = bool(state.stopped_early)
        if due or done or stopping or early or is_best or result.save_failed:
            with watchdog.unlimited("saving"):
                session.save()
            started = time.perf_counter()
        if stopping or early:
            break
        watchdog.progress("data", state.step + 1)
    watchdog.limit(False)
    return not session.runtime.stop_agreed()


def _place(session: Session, micro_batches: list[TrainBatch]) -> Place:
    """Where this rank is within a step."""
    memory = session.memory
    phase, number = memory.phase, max(1, memory.num_forwards)
    batch = micro_batches[number - 1]
    shapes = {name: list(value.shape) for name, value in batch.inputs.items()}
    return Place(
        rank=session.runtime.rank,
        step=session.state.step + 1,
        phase=f"{phase} of micro-batch {number} of {len(micro_batches)}",
        rows=batch.rows,
        shapes=shapes,
        num_tokens=batch.num_tokens,
        peaks_gib=memory.finish(),
        device=session.runtime.device,
        source=memory.source,
        facts=session.run_facts(),
    )


def step(
    session: Session,
    micro_batches: list[TrainBatch],
    max_grad_norm: float | None,
    loss_limit: float = math.inf,
) -> StepResult:
    """One optimizer step over this rank's micro-batches.

    The gradient is that of the sum of the token losses of all ranks, divided once by the number
    of supervised tokens of all ranks: it does not depend on how the rows are split. A loss above
    `loss_limit` changes nothing, as one that is not finite.
    """
    runtime, model = session.runtime, session.model
    supervised, tokens = runtime.totals(
        [
            sum(batch.num_supervised_tokens for batch in micro_batches),
            sum(batch.num_tokens for batch in micro_batches),
        ]
    )
    sums = _accumulate(session, micro_batches, supervised)
    session.after_backward()
    session.enter("optimizer")
    grad_norm = clip_gradients(model.parameters(), max_grad_norm)
    stop = float(runtime.stop.received)
    failed = float(session.save_failed())
    longest = max(batch.labels.shape[-1] for batch in micro_batches)
    shared = runtime.table([*sums.sum(0), grad_norm, stop, failed, longest, supervised, tokens])
    *totals, _, _, _, _, _, _ = (sum(column) for column in zip(*shared, strict=True))
    *_, grad_norm, _, _, _, supervised, tokens = shared[0]
    loss, token_accuracy, entropy = (total / supervised for total in totals)
    # Agreed by all ranks before anything changes. The norm is the same on all, the losses are not.
    finite = math.isfinite(loss) and all(math.isfinite(row[3]) for row in shared)
    updated = finite and loss <= loss_limit
    if updated:
        rate = session.learning_rate(session.state.step)
        set_learning_rate(session.optimizer.param_groups, rate)
        session.optimizer.step()
    session.optimizer.zero_grad(set_to_none=True)
    peaks = session.memory.finish()
    held = read_memory(runtime.device).as_row()
    rows = runtime.table([*(peaks[phase] for phase in PHASES), *held])
    return StepResult(
        loss=loss,
        grad_norm=grad_norm,
        token_accuracy=None if math.isnan(token_accuracy) else token_accuracy,
        entropy=None if math.isnan(entropy) else entropy,
        supervised_tokens=int(supervised),
        tokens=int(tokens),
        longest_row_tokens=int(max(row[6] for row in shared)),
        peaks_gib=[dict(zip(PHASES, row, strict=False)) for row in rows],
        readings=[Readings(*row[len(PHASES) :]) for row in rows],
        updated=updated,
        suspects=[] if updated else _suspects(runtime, micro_batches, sums[:, 0], loss_limit),
        stop_requested=runtime.stop.agree([row[4] for row in shared]),
        save_failed=any(row[5] for row in shared),
        spike=finite and not updated,
    )


def _accumulate(
    session: Session, micro_batches: list[TrainBatch], supervised: float
) -> torch.Tensor:
    """Forward and backward of every micro-batch; the gradients add up.

    Returns [micro-batches, 3]: summed loss, correct tokens, summed entropy; the latter two are NaN
    where the model's loss does not come with them.
    """
    runtime, model = session.runtime, session.model
    sums: list[torch.Tensor] = []
    for number, batch in enumerate(micro_batches, start=1):
        session.enter("forward")
        with runtime.gradient_sync(model, number == len(micro_batches)):
            options = session.forward_options | session.look_ahead(batch)
            batch = batch.to(runtime.device)
            output = model(**batch.inputs, labels=batch.labels, **options)
            # The model returns the mean over this micro-batch.
            micro_sum = output.loss.double() * batch.num_supervised_tokens
            session.enter("backward")
            # DDP and FSDP2 average gradients over the ranks; the factor makes it a sum again.
            runtime.accelerator.backward(micro_sum * (runtime.world_size / supervised))
        sums.append(torch.stack([micro_sum.detach(), *_token_sums(output)]))
        del output, micro_sum
    return torch.stack(sums)


def _token_sums(output: Any) -> list[torch.Tensor]:
    """Correct tokens and summed entropy, if the model's loss came with them, else NaN; float64."""
    found = [getattr(output, name, None) for name in ("num_correct", "entropy_sum")]
    missing = output.loss.new_full((), math.nan, dtype=torch.float64)
    return [missing if value is None else value.double() for value in found]


def _evaluate_in_between(session: Session, record: dict[str, Any]) -> bool:
    """Evaluate after a step, into its record; whether to save this state.

    The training goes on as if nothing had been: to the bit on a CPU.
    """
    with session.runtime.watchdog.unlimited("evaluation"), evaluation_mode(session.model):
        metrics = evaluate(session) | session.score_answers()
    record |= metrics
    return session.judge(metrics)


@torch.no_grad()
def evaluate(session: Session) -> dict[str, float]:
    """`eval/loss`, `eval/perplexity` (its exponential) and `eval/token_accuracy`, over the
    supervised tokens of all ranks' batches.

    Empty without any; the last only where the model's loss comes with it. The model is left in
    evaluation mode. Where its loss needs no logits, none are made.
    """
    # Not DDP's own forward: ranks may have different numbers of batches there.
    model = session.runtime.unwrap(session.model)
    model.eval()
    loss_sum, correct, supervised = 0.0, 0.0, 0
    for batch in session.evaluation_batches():
        options = session.forward_options | session.look_ahead(batch)
        moved = batch.to(session.runtime.device)
        output = model(**moved.inputs, labels=moved.labels, **options)
        if not batch.num_supervised_tokens:
            continue
        loss_sum += float(output.loss) * batch.num_supervised_tokens
        correct += float(_token_sums(output)[0])
        supervised += batch.num_supervised_tokens
    shared = session.runtime.table([loss_sum, correct, supervised])
    loss_sum, correct, total = (sum(column) for column in zip(*shared, strict=True))
    if not total:
        return {}
    accuracy = {} if math.isnan(correct) else {"eval/token_accuracy": correct / total}
    loss = loss_sum / total
    return {"eval/loss": loss, "eval/perplexity": _exp(loss), **accuracy}


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _suspects(
    runtime: Runtime, micro_batches: list[TrainBatch], loss_sums: torch.Tensor, loss_limit: float
) -> list[str]:
    mine = []
    for batch, loss_sum in zip(micro_batches, loss_sums.tolist(), strict=True):
        loss = loss_sum / max(1, batch.num_supervised_tokens)
        if not math.isfinite(loss) or loss > loss_limit:
            mine += batch.rows
    suspects = runtime.collect(mine)
    return suspects or runtime.collect([row for batch in micro_batches for row in batch.rows])


def _count_left_out(
    session: Session, result: StepResult, record: dict[str, Any], config: LoopConfig
) -> None:
    """Count a step whose update was left out; log it and raise when there were too many."""
    state = session.state
    if result.spike:
        state.spike_steps += 1
        count, budget = state.spike_steps, config.max_spike_steps
        what = f"a spike (loop.spike_sigma={config.spike_sigma:g})"
        remedy = "lower optim.lr, or raise loop.spike_sigma or loop.max_spike_steps"
    else:
        state.nonfinite_steps += 1
        count, budget = state.nonfinite_steps, config.max_nonfinite_steps
        what = "not finite"
        remedy = "lower optim.lr, or use float32 (model.dtype=float32)"
    message = (
        f"step {state.step}: loss {result.loss}, gradient norm {result.grad_norm}: {what}, so "
        f"nothing was updated ({count} such steps, {budget} allowed). "
        f"Rows: {'; '.join(result.suspects)}"
    )
    if count > budget:
        session.log(record)
        raise TrainingError(
            f"{message}\nThe run stops. Look at these rows, {remedy}. "
            "The last checkpoint is from before this step."
        )
    if session.runtime.is_main:
        print(message, flush=True)
