"""What a run does about its memory: the plan beside it, the watch for leaks, facts for oom.md."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemtune import patches
from gemtune.adapters import Adapter
from gemtune.checkpoint import CheckpointFolder
from gemtune.config import RunConfig
from gemtune.data import BatchStream
from gemtune.errors import ConfigError
from gemtune.loop import TrainBatch
from gemtune.memory import LeakWatch, RunFacts, advice
from gemtune.memory.holdings import holdings
from gemtune.memory.readings import machine_memory
from gemtune.planning.background import BackgroundPlan
from gemtune.planning.bounds import bounds_of
from gemtune.run_files import PLAN_FILE
from gemtune.runtime import Runtime
from gemtune.step_result import StepResult, held_mib

GIB = 2**30


class RunMemory:
    """One for each rank; the plan is the main process's.

    Args:
        resident_gib: of this process before the model was built. Without a GPU that is what the
            measured peak has beside the run's tensors.
        on_plan: gets the plan, once, when it is there.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        *,
        resident_gib: float,
        say: Callable[[str], None],
        on_plan: Callable[[dict[str, Any]], None] = lambda document: None,
    ) -> None:
        self._config, self._runtime, self._say = config, runtime, say
        self._on_plan = on_plan
        self._leaks = LeakWatch(config.memory.leak_mib_per_step)
        self._before_gib = resident_gib if runtime.device.type != "cuda" else 0.0
        self._highest_gib = 0.0
        self._beside: BackgroundPlan | None = None
        self._command: list[str] = []
        self._planned_gib: float | None = None

    def plan(self, stream: BatchStream, arguments: Sequence[str] | None = None) -> None:
        """Begin to plan beside the run, if train.py was started for it.

        Args:
            arguments: the command line, the script first; None: that of this process.
        """
        words = list(sys.argv if arguments is None else arguments)
        script = Path(words[0]).resolve().parent / "scripts" / "plan_memory.py"
        is_asked = self._config.memory.plan and self._runtime.is_main
        if not is_asked or Path(words[0]).name != "train.py" or not script.exists():
            return
        try:
            bounds = bounds_of(stream)
        except ConfigError as error:
            self._say(f"memory: no plan: {error}")
            return
        on_gpu = self._runtime.device.type == "cuda"
        self._command = [
            *words[1:],
            *bounds.as_keys(),
            f"plan.world_size={self._runtime.world_size}",
            f"plan.device={'cuda' if on_gpu else 'cpu'}",
            f"plan.device_memory_gib={_device_gib(self._runtime.device):.1f}",
        ]
        path = self._runtime.run_dir / PLAN_FILE
        # Without a GPU processors are what the run is made with: no more than the plan itself.
        more = [f"plan.alternatives={4 if on_gpu else 0}", f"plan.output={path}"]
        self._beside = BackgroundPlan(path, [str(script), *self._command, *more])

    def watch(self, result: StepResult, micro_batches: Sequence[TrainBatch]) -> dict[str, float]:
        """After every step: what joins its record. Says what is new about plan and leaks."""
        found: dict[str, float] = {}
        peak_gib = max(max(peaks.values()) for peaks in result.peaks_gib) - self._before_gib
        self._highest_gib = max(self._highest_gib, peak_gib)
        self._look_for_plan()
        if self._planned_gib is not None:
            found["memory/planned_peak_gib"] = self._planned_gib
            if not math.isnan(self._highest_gib):
                found["memory/plan_error"] = self._highest_gib / self._planned_gib - 1
        step = self._runtime.status.step
        shape = tuple(tuple(batch.labels.shape) for batch in micro_batches)
        growing = self._leaks.growth(step, shape, held_mib(result.readings))
        if growing is not None:
            rank, mib = growing
            found["memory/growth_mib_per_step"] = mib
            self._say(
                f"warning: step {step}: rank {rank} holds {mib:.1f} MiB more after each step, "
                "batches being of one shape. Something keeps tensors from step to step."
            )
        return found

    def facts(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> RunFacts:
        """For the report of this rank when its memory has run out."""
        folder = self._runtime.run_dir
        checkpoints = CheckpointFolder(folder / "checkpoints").committed()
        device = self._runtime.device
        command = [word.removeprefix("++") for word in self._command]
        command += ["plan.alternatives=4"] * bool(command)
        return RunFacts(
            folder=folder if folder.is_dir() else None,
            checkpoint=str(checkpoints[-1]) if checkpoints else "",
            plan=self._beside.document if self._beside else None,
            plan_command=shlex.join(["python", "scripts/plan_memory.py", *command]) * bool(command),
            advice=_advice(self._config, self._runtime),
            holdings=lambda: holdings(model, optimizer, device),
        )

    def _look_for_plan(self) -> None:
        if self._beside is None or self._planned_gib is not None:
            return
        document = self._beside.document
        if document is not None:
            self._planned_gib = document["peak_bytes"] / GIB
            self._say(
                f"memory: {self._planned_gib:.2f} GiB planned for the largest batch "
                f"({document['batch']}), {self._highest_gib:.2f} so far"
            )
            self._on_plan(document)
        elif problem := self._beside.problem:
            self._say(f"memory: no plan: {problem}")
            self._beside.close()
            self._beside = None


def _device_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return machine_memory()[1]


def _advice(config: RunConfig, runtime: Runtime) -> list[str]:
    """What of this configuration to change when memory runs out."""
    candidates = [*patches.default(), "ple_offload", "vision_streaming"]
    return advice(
        micro_batch_size=config.loop.micro_batch_size,
        max_length=config.data.max_length,
        gradient_checkpointing=config.model.gradient_checkpointing,
        recomputes_all=config.model.recomputed_layers is None,
        patches_off=[name for name in candidates if name not in config.patches],
        adapter=type(config.adapter) is not Adapter,
        world_size=runtime.world_size,
        sharded=runtime.is_sharded,
        mixed_precision=config.parallel.mixed_precision != "no",
        state_on_gpu=runtime.device.type == "cuda" and not config.optim.offload_state,
    )
