"""One step looked at closely: a trace of its operators, a snapshot of the allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from gemtune.config import RunConfig
from gemtune.errors import ConfigError
from gemtune.runtime import Runtime

_MAX_ALLOCATIONS = 1_000_000
"""Kept for a snapshot; a step of a large model has some hundred thousand."""


class StepRecordings:
    """A context around a step, which does nothing but at the steps that were asked for.

    Every rank writes files of its own: `trace_step_N_rank_R.json.gz` for Perfetto or
    chrome://tracing, and `memory_step_N_rank_R.pickle` for https://pytorch.org/memory_viz, which is
    written also where the step fails.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, say: Callable[[str], None]) -> None:
        self._folder, self._rank, self._device = runtime.run_dir, runtime.rank, runtime.device
        self._say = say
        self._profile_at_step = config.loop.profile_at_step
        self._snapshot_at_step = config.memory.snapshot_at_step

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        with ExitStack() as stack:
            if step == self._snapshot_at_step:
                stack.enter_context(self._snapshot(step))
            if step == self._profile_at_step:
                stack.enter_context(self._trace(step))
            yield

    @contextmanager
    def _snapshot(self, step: int) -> Iterator[None]:
        path = self._folder / f"memory_step_{step}_rank_{self._rank}.pickle"
        torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS, stacks="python")
        try:
            yield
        finally:
            torch.cuda.memory._dump_snapshot(str(path))
            torch.cuda.memory._record_memory_history(enabled=None)
            self._say(f"step {step}: snapshot of the allocator in {path}")

    @contextmanager
    def _trace(self, step: int) -> Iterator[None]:
        path = self._folder / f"trace_step_{step}_rank_{self._rank}.json.gz"
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(
            activities=activities, record_shapes=True, profile_memory=True
        ) as profile:
            yield
        profile.export_chrome_trace(str(path))
        self._say(f"step {step}: trace in {path}")


def require_gpu_for_snapshot(snapshot_at_step: int | None, device: torch.device) -> None:
    """ConfigError where a snapshot is asked for and there is no allocator that could make one."""
    if snapshot_at_step is not None and device.type != "cuda":
        raise ConfigError(
            f"memory.snapshot_at_step={snapshot_at_step} is a record of the GPU's allocator, and "
            "there is no GPU. loop.profile_at_step records the memory of operators as well."
        )
