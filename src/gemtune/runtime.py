"""The processes of a run: devices, seeds, agreement between ranks, the run folder."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gemtune.errors import ConfigError
from gemtune.models.stored import StoredTensor
from gemtune.options import option, require_range
from gemtune.parallel import ParallelConfig, Strategy, refuse_foreign_sharding
from gemtune.parallel.fsdp import shard_model
from gemtune.signals import StopSignal
from gemtune.status import StatusFile
from gemtune.watchdog import Watchdog

# The watchdog speaks first: it names the rank.
_WATCHDOG_FIRST_SECONDS = 30


@dataclass
class RunSettings:
    """Name, place and seed of a run."""

    name: str = option("run", "the run folder is run.dir/run.name; the same name resumes")
    dir: str = option("runs", "parent of the run folders")
    seed: int = option(0, "decides initial weights, sample order and dropout")
    resume: str = option(
        "auto", "auto: go on from the newest checkpoint; never: start anew; or a checkpoint folder"
    )

    grace_seconds: float | None = option(
        300.0, "from SIGTERM to the end, else the run counts as hung; null: any time"
    )

    def __post_init__(self) -> None:
        require_range("run.grace_seconds", self.grace_seconds, above=0)
        if not self.name or "/" in self.name or self.name in (".", ".."):
            raise ConfigError(f"run.name={self.name!r} must be a plain folder name.")
        require_range("run.seed", self.seed, at_least=0)

    @property
    def folder(self) -> Path:
        return Path(self.dir).expanduser() / self.name


@dataclass
class Runtime:
    """This process among the others of the run."""

    accelerator: Accelerator
    run_dir: Path
    stop: StopSignal = field(default_factory=StopSignal)
    watchdog: Watchdog = field(default_factory=Watchdog)
    status: StatusFile = field(default_factory=StatusFile)
    strategy: Strategy = field(default_factory=Strategy)

    @property
    def is_sharded(self) -> bool:
        """Each forward is then a joint one: every rank has to make as many as the others."""
        return self.strategy.is_sharded and self.world_size > 1

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def is_first_on_machine(self) -> bool:
        return self.accelerator.is_local_main_process

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def distribute(
        self,
        model: nn.Module,
        *,
        on_host: Sequence[str] = (),
        base: nn.Module | None = None,
        stored: Mapping[nn.Parameter, StoredTensor] | None = None,
    ) -> nn.Module:
        """On the device, under autocast where asked, and wrapped for DDP or sharded (FSDP2) where
        there are processes. Optimizers are made after it: sharding replaces the parameters.

        DDP waits for ever for a parameter that got no gradient on one rank: `models.StandIns` sees
        to it that each gets one. `on_host` are the names
        of frozen parameters that stay in host memory. FSDP2 shards `base`, which holds all
        parameters: `model` itself, or what an adapter is around. Parameters that are `stored` in
        files are read by each rank, the others come from rank 0.
        """
        if self.is_sharded:
            shard_model(
                model,
                base or model,
                self.device,
                on_host=on_host,
                mixed_precision=self.accelerator.mixed_precision,
                stored=stored or {},
            )
            # Autocast; not DDP's wrapper.
            return self.accelerator.prepare_model(
                model, device_placement=False, evaluation_mode=True
            )
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(broadcast_buffers=False)
        # DDP takes parameters on one kind of device only; those on the host are frozen.
        # Buffers (RoPE frequencies, clipping ranges) are constants that every rank has. DDP would
        # copy rank 0's over them by position, and transformers before 5.10 registers some in the
        # order of a set, which differs between processes: ranks ended up with the wrong ones.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [*on_host, *_quantized(model), *(name for name, _ in model.named_buffers())]
        )
        return self.accelerator.prepare(model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model without DDP around it, still under autocast where that was asked for."""
        return self.accelerator.unwrap_model(model)

    def release(self, model: nn.Module) -> nn.Module:
        """The model as it was before `distribute`; it is not to be trained after this."""
        return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def gradient_sync(self, model: nn.Module, sync: bool) -> AbstractContextManager:
        """Within it gradients are only added up locally unless `sync`."""
        return nullcontext() if sync else self.accelerator.no_sync(model)

    def totals(self, values: list[float]) -> torch.Tensor:
        """Sums over ranks, [len(values)] float64 on the device; does not wait for the GPU."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(tensor, "sum")

    def table(self, values: list[torch.Tensor | float]) -> list[list[float]]:
        """[world_size][len(values)]: what every rank passed in. Waits for the GPU."""
        row = torch.stack(
            [torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values]
        )
        return self.accelerator.gather(row.unsqueeze(0)).tolist()

    def collect(self, items: list[Any]) -> list[Any]:
        """The lists of all ranks joined, in the order of the ranks."""
        return gather_object(items) if self.world_size > 1 else items

    def stop_agreed(self) -> bool:
        """Whether any rank was asked to stop, also since the last step; decided for all."""
        if self.stop.agreed is None:
            self.stop.agree(self.collect([self.stop.received]))
        return self.stop.agreed is not None

    def on_any(self, flag: bool) -> bool:
        """Whether it is set on some rank. Waits for the GPU."""
        return bool(self.totals([float(flag)]).item())

    def wait_for_everyone(self) -> None:
        self.accelerator.wait_for_everyone()

    def seed_training(self, seed: int) -> None:
        """Dropout differs between ranks; everything before this call was the same on all."""
        seed_everything(seed + self.rank)


def _quantized(model: nn.Module) -> list[str]:
    """Frozen weights of a library's class: every rank made the same, and DDP cannot send them."""
    return [name for name, p in model.named_parameters() if type(p) is not nn.Parameter]


def start(settings: RunSettings, parallel: ParallelConfig) -> Runtime:
    """Join the processes of this launch and make the run folder's path.

    On a machine without CUDA the processes use gloo on the CPU, also when started by
    `accelerate launch --multi_gpu`.
    """
    # Forked loader workers would otherwise warn once each.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=parallel.mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(
                timeout=timedelta(seconds=parallel.timeout_seconds + _WATCHDOG_FIRST_SECONDS)
            )
        ],
    )
    refuse_foreign_sharding(accelerator.distributed_type.value)
    seed_everything(settings.seed)
    return Runtime(accelerator, settings.folder)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
