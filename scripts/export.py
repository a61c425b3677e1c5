"""Write the result of a run as a folder for others, and prove that it is what was trained:

    python scripts/export.py run=NAME to=exports/NAME                 # merged, bfloat16
    python scripts/export.py run=NAME to=exports/NAME kind=adapter    # what peft loads
    python scripts/export.py run=NAME to=exports/NAME push=OWNER/NAME # and upload it

    run=NAME               a run's folder, or its name below runs/
    to=FOLDER              the folder to write; it must not exist
    checkpoint=newest      newest, best (by eval.best_metric), or the path of one
    kind=merged            merged: the whole model; adapter: what peft loads onto the base
    dtype=bfloat16         of the weights: bfloat16, float32
    max_shard_gb=5         gigabytes of one safetensors file, at most
    push=OWNER/NAME        a repository on the hub to upload to, made private if it is new
    verify=true            load it by stock transformers (and peft) in a fresh process, and compare
    base=PATH              where the base model is now, if not at the run's model.path

A checkpoint of any number of processes will do. Every byte of it is verified first. The folder is
put in its place only if each tensor loads to the bit and the logits of a text, an image and, for a
mixture of experts, of every expert are those of the training model within a bound that is printed.
All is computed in float32 on the CPU: it takes 4 bytes of memory for each parameter, twice.
A run on a base in few bits (adapter=qlora) is exported merged with the values that these stood for.
Its adapter is for the base as it is in its files: how far that takes the logits from those of the
training is printed, and is in the model card.
The exit status is 2 where nothing was written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not.
sys.path[:0] = [str(REPOSITORY / place) for place in ("src", "scripts")]

from command_line import finish, own_keys

from gemtune.export import ExportRequest, export_run


def export(arguments: Sequence[str]) -> int:
    """Write the folder; the exit status."""
    request, _ = own_keys("", ExportRequest, arguments)
    folder = export_run(request, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"written: {folder}")
    return 0


def main() -> int:
    """The exit status."""
    return finish(str(__doc__), export)


if __name__ == "__main__":
    sys.exit(main())
