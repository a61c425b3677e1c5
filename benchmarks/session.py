"""A run's model and training session, made from dataclasses: no Hydra, no OmegaConf, no data.

A machine with a GPU may have torch, transformers, accelerate and peft and nothing else. What
`train.py` composes is spelled out here; a test compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from environment import REPOSITORY
from torch import nn

from gemtune import adapters, patches
from gemtune.adapters import Adapter, Lora
from gemtune.checkpoint import TrainState
from gemtune.data import Batch, DataConfig
from gemtune.loop import Session, train
from gemtune.loop_config import LoopConfig
from gemtune.memory import PeakTracker
from gemtune.models import ModelConfig, Processing, base_model, load_model
from gemtune.optim import AdamW
from gemtune.parallel import ParallelConfig
from gemtune.patches import Patch, default, resolve
from gemtune.patches.host_memory import host_parameters
from gemtune.runtime import RunSettings, start

sys.path.append(str(REPOSITORY))  # for the recipe

RELEASED = {"e2b": "google/gemma-4-E2B-it", "e4b": "google/gemma-4-E4B-it"}
FROZEN = ("ple", "vision", "audio", "projector")  # as configs/model/e2b.yaml and e4b.yaml
RATES = {"full": 2e-5, "lora": 2e-4}


@dataclass
class Sections:
    """Those of a `RunConfig` that a plan and a training step read."""

    run: RunSettings
    model: ModelConfig
    data: DataConfig
    patches: dict[str, Patch]
    adapter: Adapter
    optim: AdamW
    loop: LoopConfig
    parallel: ParallelConfig


def sections(
    size: str,
    training: str,
    *,
    dtype: str = "bfloat16",
    rows: int = 1,
    row_tokens: int = 2048,
    checkpointing: bool = True,
    names: Sequence[str] | None = None,
) -> Sections:
    """What `recipe=gemma4_sft` ("full") or `recipe=gemma4_lora` ("lora") is with `model=SIZE`.

    Args:
        size: a released one, or the path of a model.
        dtype: "bfloat16" is bfloat16 autocast, over float32 weights where these are trained and
            bfloat16 ones under an adapter; "float32" is float32 throughout.
        rows: of `row_tokens` tokens each, all in one micro-batch.
        names: of the patches; None stands for the default ones.
    """
    is_lora = training == "lora"
    return Sections(
        run=RunSettings(),
        model=ModelConfig(
            name=size,
            path=RELEASED.get(size, size),
            weights="random",
            dtype=dtype if is_lora else "float32",
            gradient_checkpointing=checkpointing,
            audio_tower=False,
            freeze=list(FROZEN),
        ),
        data=DataConfig(path="conversations.jsonl", max_length=row_tokens),
        patches={name: resolve(name) for name in (default() if names is None else names)},
        adapter=Lora() if is_lora else Adapter(),
        optim=AdamW(lr=RATES[training]),
        loop=LoopConfig(micro_batch_size=rows, global_batch_size=rows),
        parallel=ParallelConfig(mixed_precision="bf16" if dtype == "bfloat16" else "no"),
    )


def build_base(config: Sections, processing: Processing, device: torch.device) -> nn.Module:
    """The model without patches and adapter, its random weights made on `device` itself."""
    with device:
        base = load_model(config.model, processing, config.run.seed)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # each weight was made in float32
    return base


def open_session(
    config: Sections, base: nn.Module, num_steps: int, log: Callable[[dict[str, Any]], None]
) -> Session:
    """Patches -> adapter -> distribution -> optimizer, as `recipes.gemma4_sft` goes.

    There is no run folder, no evaluation and no checkpoint. `log` gets the record of each step.
    """
    from recipes.batches import looking_ahead

    runtime = start(config.run, config.parallel)
    patches.apply(base, config.patches)
    torch.manual_seed(config.run.seed)  # of the adapter
    model = adapters.attach(base, config.adapter, runtime.device)
    distributed = runtime.distribute(model, on_host=host_parameters(model), base=base)
    if runtime.device.type == "cuda":
        torch.cuda.empty_cache()  # weights that a patch has moved to the host
    loss_alone = not {"linear_cross_entropy", "supervised_positions"}.isdisjoint(config.patches)
    memory = PeakTracker(runtime.device)
    memory.begin_loss_after(base_model(base))
    return Session(
        runtime=runtime,
        model=distributed,
        optimizer=config.optim.build(model),
        learning_rate=lambda step: config.optim.lr,
        memory=memory,
        forward_options={"use_cache": False} | ({"skip_logits": True} if loss_alone else {}),
        state=TrainState(run_id="benchmark"),
        num_steps=num_steps,
        log=log,
        evaluation_batches=list,
        save=lambda: None,
        look_ahead=looking_ahead(config, base, loss_alone=loss_alone),
    )


def train_on(session: Session, batch: Batch, config: LoopConfig) -> None:
    """All steps of the session, each on the same batch, by the loop of a run."""

    def batches(first: int, last: int) -> Iterator[list[Batch]]:
        return ([batch] for _ in range(first, last))

    train(session, batches, config, save_every_steps=None)
