"""Whole training steps of stock transformers, of TRL and of gemtune, from the same weights.

Each contestant takes a `Task` and makes `task.num_steps` steps on one batch: forward, backward,
clipping, AdamW (fused), with the same trained parameters, precision and recomputation.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from models import TINY
from session import Sections, open_session, train_on
from torch import Tensor, nn
from workbench import Outcome, sampled_gradients

from gemtune.data import Batch
from gemtune.memory import PeakTracker

# By name, as one would write it; what gemtune's adapter goes to is found by other means.
LORA_TARGETS = (
    r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
)


class Recorder:
    """Seconds, peak and loss of every step, and numbers from the gradients of the first.

    A step lasts from the end of the one before it to its own, the device being done: what a loop
    does between two steps counts. On the CPU seconds are the processor's, which it spent on this
    process: other work on the machine counts less.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: list[float] = []
        self.peaks_gib: list[float] = []
        """Allocated on CUDA, else resident."""
        self.losses: list[Tensor] = []
        self._device, self._memory = device, PeakTracker(device)
        self._gradients: dict[str, Tensor] = {}
        self._now = time.process_time if device.type == "cpu" else time.perf_counter
        self._began = math.nan

    def watch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Look at the gradients, clipped, that the first update is made of."""

        def look(*_: object) -> None:
            if not self._gradients:
                self._gradients = sampled_gradients(model)

        optimizer.register_step_pre_hook(look)

    def begin(self) -> None:
        """The first step begins."""
        self._wait()
        self._memory.enter("forward")  # one phase for all of the step
        self._began = self._now()

    def end(self, peak_gib: float | None = None) -> None:
        """A step is done, and the next one begins.

        Args:
            peak_gib: where a loop follows its phases itself: peaks begin anew with each.
        """
        self._wait()
        self.seconds.append(self._now() - self._began)
        measured = self._memory.finish()["forward"]
        self.peaks_gib.append(measured if peak_gib is None else peak_gib)
        self.begin()

    @property
    def first(self) -> Outcome:
        """What the first step computed."""
        return Outcome(float(self.losses[0]), self._gradients)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass
class Task:
    """What every contestant is given."""

    config: Sections
    """The patches in it are gemtune's alone."""
    base: nn.Module
    batch: dict[str, Tensor]
    """On the CPU; labels among them."""
    device: torch.device
    num_steps: int
    recorder: Recorder = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = Recorder(self.device)

    @property
    def is_lora(self) -> bool:
        return hasattr(self.config.adapter, "rank")

    @property
    def in_bfloat16(self) -> bool:
        return self.config.parallel.mixed_precision == "bf16"


def peft_config(task: Task) -> Any:
    """LoRA of the language layers, in peft's own terms."""
    from peft import LoraConfig

    adapter: Any = task.config.adapter
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )


def run_transformers(task: Task) -> None:
    """The model's own loss in a plain loop."""
    config, model = task.config, task.base
    if task.is_lora:
        from peft import get_peft_model

        torch.manual_seed(config.run.seed)
        model = get_peft_model(model, peft_config(task))
    optim = config.optim
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    task.recorder.watch(model, optimizer)
    task.recorder.begin()
    for _ in range(task.num_steps):
        inputs = {name: t.to(task.device, non_blocking=True) for name, t in task.batch.items()}
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.in_bfloat16):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.loop.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        task.recorder.losses.append(loss.detach())
        task.recorder.end()


def run_trl(task: Task) -> None:
    """`SFTTrainer.train()` with its fused LM head, the batch handed over by the collator."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    recorder, optim = task.recorder, task.config.optim

    class Recorded(SFTTrainer):
        def training_step(self, *args: Any, **options: Any) -> Tensor:
            loss = super().training_step(*args, **options)
            recorder.losses.append(loss.detach().clone())
            return loss

    class Steps(TrainerCallback):
        def on_train_begin(self, *_: Any, model: Any, optimizer: Any, **__: Any) -> None:
            recorder.watch(model, getattr(optimizer, "optimizer", optimizer))
            recorder.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.end()

    with tempfile.TemporaryDirectory(prefix="gemtune-trl-") as folder:
        args = SFTConfig(
            output_dir=folder,
            max_steps=task.num_steps,
            per_device_train_batch_size=1,  # an index of this data; the collator has the rows
            learning_rate=optim.lr,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_epsilon=optim.eps,
            weight_decay=optim.weight_decay,
            max_grad_norm=task.config.loop.max_grad_norm,
            bf16=task.in_bfloat16,
            gradient_checkpointing=task.config.model.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            seed=task.config.run.seed,  # set before the adapter is made
            use_cpu=task.device.type == "cpu",
            remove_unused_columns=False,
            dataset_kwargs={"skip_prepare_dataset": True},
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Recorded(
            model=task.base,
            args=args,
            train_dataset=Dataset.from_dict({"index": list(range(task.num_steps))}),
            data_collator=lambda rows: dict(task.batch),
            processing_class=AutoTokenizer.from_pretrained(TINY.parent),
            peft_config=peft_config(task) if task.is_lora else None,
            callbacks=[Steps()],
        )
        trainer.train()


def run_gemtune(task: Task) -> None:
    """`gemtune.loop.train` with the patches of the configuration."""
    recorder = task.recorder

    def log(record: Mapping[str, Any]) -> None:
        recorder.losses.append(torch.tensor(record["train/loss"], dtype=torch.float64))
        recorder.end(peak_gib=record["memory/peak_gib"])

    session = open_session(task.config, task.base, task.num_steps, log)
    recorder.watch(session.model, session.optimizer)
    inputs = {name: tensor for name, tensor in task.batch.items() if name != "labels"}
    labels = task.batch["labels"]
    batch = Batch(
        inputs,
        labels,
        num_tokens=int(inputs["attention_mask"].sum()),
        num_supervised_tokens=int((labels != -100).sum()),
        rows=[f"row {row}" for row in range(len(labels))],
    )
    recorder.begin()
    train_on(session, batch, task.config.loop)


@dataclass(frozen=True)
class Contestant:
    """A way of training."""

    run: Callable[[Task], None]
    text: str
    packages: tuple[str, ...] = ()
    """Imported before memory is looked at."""
    more_patches: tuple[str, ...] = ()


CONTESTANTS = {
    "transformers": Contestant(run_transformers, "transformers, its own loss, a plain loop"),
    "trl": Contestant(run_trl, "TRL's SFTTrainer with its fused LM head", ("datasets", "trl")),
    "gemtune": Contestant(run_gemtune, "gemtune with its default patches"),
    "gemtune_ple_offload": Contestant(
        run_gemtune,
        "the same, the table of per-layer embeddings in host memory",
        more_patches=("ple_offload",),
    ),
}
