"""The peak memory of a run, before it is launched: no weights, no GPU, no download.

    python scripts/plan_memory.py recipe=gemma4_lora model=e2b data.max_length=8192

Takes the keys of train.py and its own:

    plan.from_data=true            rows are as long and as full as the largest of the data
    plan.row_tokens=900            tokens of each row (data.max_length)
    plan.images_per_row=2          images in each row (0)
    plan.image_tokens=64           tokens of each image (of one of full size)
    plan.learned_fraction=0.3      share of a row that is learned (1.0: the most that can be)
    plan.world_size=8              processes, with copies of the model or shards of it (1)
    plan.device_memory_gib=24      whether it fits, and what would make it; parallel=auto
                                   needs it to choose between copies and shards
    plan.alternatives=3            changes to plan where it fits as well (0)
    plan.device=cpu                for a run on the CPU (cuda)
    plan.output=PLAN.json          the plan as a document

One optimizer step of the model itself, with its patches and its adapter, is followed tensor by
tensor; what tensors of floating point hold is left out. With parallel=fsdp2 it is the step of the
first of plan.world_size processes: its shards, weights while they are gathered, and the buffers of
collectives. It is the memory of tensors: CUDA's context, NCCL's buffers and what the allocator
cannot use come on top, 1 GiB is kept for them. The exit status is 1 where nothing was found that
fits.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", ".", "scripts")]

from command_line import compose, finish, own_keys
from rich.console import Console
from rich.text import Text

from gemtune.config import RunConfig
from gemtune.data import BatchStream, OtherMedia, prepare
from gemtune.errors import ConfigError
from gemtune.models import load_processing
from gemtune.planning import MemoryPlan, PlanConfig, plan_memory
from gemtune.planning.bounds import bounds_of
from gemtune.planning.page import plan_document, plan_page, proposals_page
from gemtune.planning.proposals import Proposal, fits, propose


def show(arguments: Sequence[str]) -> int:
    """Print the plan, write the document; the exit status."""
    # What a patch has to say once about its batches is not about the run's.
    logging.getLogger("gemtune").setLevel(logging.ERROR)
    own, rest = own_keys("plan", PlanConfig, arguments)
    config = compose(rest)
    if own.output and not Path(own.output).expanduser().parent.is_dir():
        raise ConfigError(f"plan.output={own.output}: there is no folder for it.")
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, soft_wrap=False, width=width)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    def replan(overrides: tuple[str, ...]) -> tuple[RunConfig, MemoryPlan]:
        say(f"planning with {' '.join(overrides)}")
        changed = compose([*rest, *overrides])
        return changed, plan_memory(changed, own)

    if own.from_data:
        say("reading the data")
        own = with_bounds(own, config)
    plan = plan_memory(config, own, say)
    console.print(plan_page(plan))
    found: list[Proposal] = []
    write(own, plan, found)
    device_gib = own.device_memory_gib
    if device_gib is None:
        return 0
    does_fit = fits(plan, device_gib)
    console.print(f"\n{'fits' if does_fit else 'does not fit'} into {device_gib:g} GiB")
    changes = propose(config, device_gib, replan, plan, until_it_fits=not does_fit)
    for proposal in islice(changes, own.alternatives if does_fit else None):
        found.append(proposal)
        write(own, plan, found)  # who waits for it has what there is
    if found:
        console.print(proposals_page(found, device_gib))
    if not does_fit:
        does_fit = bool(found) and found[-1].fits
        with_what = shlex.join(found[-1].overrides) if does_fit else ""
        last = f"fits with: {with_what}" if does_fit else "nothing was found that fits"
        console.print(Text(last), soft_wrap=True)  # one line, to be copied
    if own.output:
        console.print(f"written: {own.output}")
    return 0 if does_fit else 1


def with_bounds(own: PlanConfig, config: RunConfig) -> PlanConfig:
    """The largest rows of the data in the place of those that were named."""
    processing = load_processing(config.model)
    rows, _ = prepare(
        config.data,
        processing.tokenizer,
        processing.image_processor,
        config.run.seed,
        others=OtherMedia(**processing.other_media),
    )
    stream = BatchStream(
        rows,
        seed=config.run.seed,
        global_batch_size=config.loop.global_batch_size,
        micro_batch_size=config.loop.micro_batch_size,
        rank=0,
        world_size=1,
        lengths=rows.lengths,
        packed_tokens=config.data.max_length if config.data.packing else None,
    )
    return replace(own, **asdict(bounds_of(stream)))


def write(own: PlanConfig, plan: MemoryPlan, found: list[Proposal]) -> None:
    """The document, in one step."""
    if not own.output:
        return
    path = Path(own.output).expanduser()
    staging = path.with_name(f".{path.name}.staging")
    try:
        document = plan_document(plan, found, own.device_memory_gib)
        staging.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        staging.replace(path)
    except OSError as error:
        raise ConfigError(f"plan.output={own.output} cannot be written: {error}") from error


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), show)


if __name__ == "__main__":
    sys.exit(main())
