"""The peak memory of a run, before it is launched: no weights, no GPU, no download.

    python scripts/plan_memory.py recipe=gemma4_lora model=e2b data.max_length=8192

Takes the keys of train.py and its own:

    plan.images_per_row=2          images of full size in each row (0)
    plan.learned_fraction=0.3      share of a row that is learned (1.0: the most that can be)
    plan.world_size=8              processes, each with the whole model (1)
    plan.device_memory_gib=24      whether it fits, and what would make it
    plan.device=cpu                for a run on the CPU (cuda)
    plan.output=PLAN.json          the plan as a document

One optimizer step of the model itself, with its patches and its adapter, is followed tensor by
tensor; what tensors of floating point hold is left out. Every row has data.max_length tokens. It is
the memory of tensors: CUDA's context and what its allocator cannot use come on top, 1 GiB is kept
for them. The exit status is 1 where nothing was found that fits.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", ".", "scripts")]

from command_line import compose, finish, own_keys
from rich.console import Console
from rich.text import Text

from gemtune.config import RunConfig
from gemtune.planning import MemoryPlan, PlanConfig, plan_memory
from gemtune.planning.page import plan_document, plan_page, proposals_page
from gemtune.planning.proposals import Proposal, fits, propose


def show(arguments: Sequence[str]) -> int:
    """Print the plan, write the document; the exit status."""
    # What a patch has to say once about its batches is not about the run's.
    logging.getLogger("gemtune").setLevel(logging.ERROR)
    own, rest = own_keys("plan", PlanConfig, arguments)
    config = compose(rest)
    width = None if sys.stdout.isatty() else 120
    console = Console(highlight=False, soft_wrap=False, width=width)
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    def replan(overrides: tuple[str, ...]) -> tuple[RunConfig, MemoryPlan]:
        say(f"planning with {' '.join(overrides)}")
        changed = compose([*rest, *overrides])
        return changed, plan_memory(changed, own)

    plan = plan_memory(config, own, say)
    console.print(plan_page(plan))
    found: list[Proposal] = []
    does_fit = True
    if own.device_memory_gib is not None:
        does_fit = fits(plan, own.device_memory_gib)
        console.print(
            f"\n{'fits' if does_fit else 'does not fit'} into {own.device_memory_gib:g} GiB"
        )
        if not does_fit:
            found = list(propose(config, own.device_memory_gib, replan, plan))
            console.print(proposals_page(found, own.device_memory_gib))
            does_fit = bool(found) and found[-1].fits
            with_what = shlex.join(found[-1].overrides) if does_fit else ""
            last = f"fits with: {with_what}" if does_fit else "nothing was found that fits"
            console.print(Text(last), soft_wrap=True)  # one line, to be copied
    if own.output:
        document = plan_document(plan, found)
        path = Path(own.output).expanduser()
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {path}")
    return 0 if does_fit else 1


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), show)


if __name__ == "__main__":
    sys.exit(main())
