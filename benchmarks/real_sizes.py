"""Whole training steps of gemtune beside stock transformers and TRL: tokens a second, peak memory.

    python benchmarks/real_sizes.py                                    # CPU, small shapes
    python benchmarks/real_sizes.py --device cuda --dtype bfloat16     # E2B and E4B
    python benchmarks/real_sizes.py --device cuda --dtype bfloat16 --wheels FOLDER

Random weights at the shapes of benchmarks/shapes, made on the device; one batch, of text or with
images. Every contestant trains the same parameters with the same AdamW, precision and gradient
checkpointing, from the same weights, in a process of its own, which makes --warm-up and then
--steps steps; in each case and round another one comes first. Loss and gradients of the first step
must agree, or nothing of the case is written.

Needs torch, transformers, accelerate, peft, pyarrow and Pillow: neither Hydra nor OmegaConf. TRL
takes part where it and datasets are installed. On a machine without a network they may come as
wheels: `pip download --no-deps -d FOLDER trl datasets dill multiprocess xxhash` for its Python (and
what of their requirements it lacks) makes the folder for --wheels, which is unpacked for the time
of the run.

Writes after each case; with --limit-seconds what is left then says so. On the CPU times are those
of the processor, and the peak is the resident one above what was resident before the model was
built.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from child_process import NO_TIME, Deadline, OutOfTimeError, found_by
from environment import describe, typed_command, write_result
from lm_head_contestants import why_no_trl
from measure import add_device_arguments, finish, parse_for_device
from models import SHAPES, batch, shape
from session import Sections, build_base, sections
from settings import Settings
from step_comparison import BOUNDS, case_of, line_of, refuse_disagreement
from whole_steps import CONTESTANTS, Task
from workbench import Outcome

from gemtune.memory import resident_gib
from gemtune.models import Processing
from gemtune.patches import default

SETTINGS = (
    *("device", "dtype", "rows", "row_tokens", "learned_percent", "images_per_row", "soft_tokens"),
    *("checkpointing", "steps", "warm_up", "rounds", "threads"),
)


@dataclass(frozen=True)
class Case:
    """A model, what of it is trained, and on what."""

    size: str
    training: str
    content: str

    @property
    def name(self) -> str:
        return f"{self.size}_{self.training}_{self.content}"


# The most important first.
CASES = tuple(
    Case(size, training, content)
    for content in ("text", "images")
    for size, training in (("e2b", "full"), ("e2b", "lora"), ("e4b", "lora"))
)


def cases_of(small: bool) -> list[Case]:
    """All of them, in the shapes that fit a CPU where `small`."""
    return [Case(f"{c.size}_small", c.training, c.content) if small else c for c in CASES]


def configuration(options: argparse.Namespace, case: Case, contestant: str) -> Sections:
    """What all contestants are to do, with the patches of this one."""
    return sections(
        case.size,
        case.training,
        dtype=options.dtype,
        rows=options.rows,
        row_tokens=options.row_tokens,
        checkpointing=options.checkpointing,
        names=(*default(), *CONTESTANTS[contestant].more_patches),
    )


def make_batch(options: argparse.Namespace, case: Case, base: Any) -> dict[str, torch.Tensor]:
    """Rows of at most `row_tokens`, the first token among them; the end of the text is learned."""
    images = options.images_per_row if case.content == "images" else 0
    text_tokens = options.row_tokens - 1 - images * (options.soft_tokens + 2)
    settings = Settings(
        size=case.size,
        rows=options.rows,
        text_tokens=text_tokens,
        images_per_row=images,
        soft_tokens=options.soft_tokens,
        supervised_percent=options.learned_percent,
    )
    made = batch(base, settings, torch.device("cpu"))
    if options.device == "cuda":
        return {name: tensor.pin_memory() for name, tensor in made.items()}
    return made


def run_part(options: argparse.Namespace, case: Case) -> dict[str, Any]:
    """All steps of one contestant, in this process; gradients of the first go to a file."""
    from transformers import Gemma4Config

    contestant = CONTESTANTS[options.part]
    for package in ("peft", *contestant.packages):
        importlib.import_module(package)
    config = configuration(options, case, options.part)
    device = torch.device(options.device)
    resident = resident_gib() if options.device == "cpu" else 0.0
    model_config = Gemma4Config.from_dict(shape(case.size))
    processing = Processing(None, None, model_config, str(SHAPES), {}, None, {})
    base = build_base(config, processing, device)
    inputs = make_batch(options, case, base)
    task = Task(config, base, inputs, device, options.warm_up + options.steps)
    try:
        contestant.run(task)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    recorder = task.recorder
    torch.save(recorder.first.gradients, options.gradients)
    timed = slice(options.warm_up, None)
    on_cuda = options.device == "cuda"
    return {
        "seconds": recorder.seconds[timed],
        "peak_gib": max(recorder.peaks_gib[timed]) - resident,
        "reserved_gib": torch.cuda.max_memory_reserved() / 2**30 if on_cuda else None,
        "losses": [float(loss) for loss in recorder.losses],
        "batch": batch_facts(inputs),
        "parameters": sum(p.numel() for p in base.parameters()),
        "trained_parameters": sum(p.numel() for p in base.parameters() if p.requires_grad),
    }


def batch_facts(inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Tokens without padding, those with a label, images."""
    pixels = inputs.get("pixel_values")
    return {
        "tokens": int(inputs["attention_mask"].sum()),
        "supervised_tokens": int((inputs["labels"] != -100).sum()),
        "images": 0 if pixels is None else len(pixels),
    }


def in_process(
    options: argparse.Namespace, case: Case, contestant: str, packages: str, deadline: Deadline
) -> tuple[dict[str, Any], Outcome | None]:
    """What `run_part` finds in a process of its own, and what its first step computed.

    Raises:
        OutOfTimeError: before it was done.
    """
    environment = dict(os.environ)
    if packages:
        before = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{before}{os.pathsep}{packages}" if before else packages
    if options.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(prefix="gemtune-steps-") as folder:
        gradients = Path(folder) / "gradients.pt"
        words = [f"--part={contestant}", f"--cases={case.name}", f"--gradients={gradients}"]
        part = found_by(__file__, *sys.argv[1:], *words, environment=environment, deadline=deadline)
        if part.get("out_of_memory"):
            return part, None
        return part, Outcome(part["losses"][0], torch.load(gradients))


def measure(
    options: argparse.Namespace,
    case: Case,
    number: int,
    names: Sequence[str],
    packages: str,
    deadline: Deadline,
) -> dict[str, Any]:
    """Every contestant once a round, each round beginning with another one; as each case does.

    Raises:
        SystemExit: they do not agree.
        OutOfTimeError: before the first round was done.
    """
    parts: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    first: dict[str, Outcome] = {}
    for turn in range(options.rounds):
        shift, found = (number + turn) % len(names), {}
        try:
            for name in [*names[shift:], *names[:shift]]:
                found[name], outcome = in_process(options, case, name, packages, deadline)
                print(f"{case.name}, round {turn + 1}: {line_of(name, found[name])}", flush=True)
                if outcome is not None:
                    first.setdefault(name, outcome)
        except OutOfTimeError:
            if not turn:
                raise
            break  # an unfinished round compares nothing
        for name, part in found.items():
            parts[name].append(part)
    differences = refuse_disagreement(case.name, first, options.dtype)
    return case_of(parts, differences)


def unpack(wheels: str | None, folder: str) -> str:
    """The wheels' packages in `folder`, which is returned; "" where there are none."""
    if wheels is None:
        return ""
    found = sorted(Path(wheels).glob("*.whl"))
    if not found:
        raise SystemExit(f"--wheels: received {wheels}, which has no *.whl in it")
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    sys.path.append(folder)
    return folder


def missing() -> dict[str, str]:
    """Contestant -> why it cannot run here."""
    why = why_no_trl() or ("" if find_spec("datasets") else "datasets is not installed")
    return {"trl": why} if why else {}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_device_arguments(parser)
    parser.add_argument("--small", action=argparse.BooleanOptionalAction, help="few layers")
    parser.add_argument("--cases", nargs="*", metavar="CASE", help=", ".join(c.name for c in CASES))
    parser.add_argument("--rows", type=int, default=2, help="of the batch")
    parser.add_argument("--row-tokens", type=int, default=2048, help="of text, and of images")
    parser.add_argument("--learned-percent", type=int, default=30, help="of a row's text")
    parser.add_argument("--images-per-row", type=int, default=2, help="in the cases with images")
    parser.add_argument("--soft-tokens", type=int, default=280, help="of an image")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=20, help="timed, of each process")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before these")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each contestant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-seconds", type=float, default=0.0, help="0: none")
    parser.add_argument("--wheels", metavar="FOLDER", help="packages to unpack for this run")
    # For the processes that this script starts.
    parser.add_argument("--part", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    options = parse_for_device(parser, "real_sizes")
    if options.device == "cpu" and options.output == "real_sizes":
        options.output = "real_sizes_cpu"
    if options.small is None:
        options.small = options.device == "cpu"
    if options.warm_up < 1:
        parser.error("--warm-up: the first step has no optimizer state yet; at least 1")
    known = {case.name: case for case in cases_of(options.small)}
    for name in options.cases or ():
        if name not in known:
            parser.error(f"--cases: received {name}; there are {', '.join(known)}")
    options.cases = [known[name] for name in options.cases or known]
    return options


def main() -> None:
    """Measure every case that there is time for."""
    options = parse()
    deadline = Deadline(options.limit_seconds)
    if options.part:
        torch.set_num_threads(options.threads)
        print(json.dumps(run_part(options, options.cases[0])))
        return
    with tempfile.TemporaryDirectory(prefix="gemtune-wheels-") as folder:
        packages = unpack(options.wheels, folder)
        left_out = missing()
        names = [name for name in CONTESTANTS if name not in left_out]
        result = describe(typed_command(__file__)) | {
            "settings": {name: getattr(options, name) for name in SETTINGS},
            "bounds": dict(zip(("loss", "gradients"), BOUNDS[options.dtype], strict=True)),
            "contestants": {name: each.text for name, each in CONTESTANTS.items()},
            "peers": {p: version(p) for p in ("trl", "peft", "accelerate") if find_spec(p)},
            "not_measured": left_out,
            "cases": {},
        }
        for number, case in enumerate(options.cases):
            try:
                found = measure(options, case, number, names, packages, deadline)
            except OutOfTimeError:
                found = {"not_measured": NO_TIME}
            result["cases"][case.name] = found
            write_result(options.output, result)
    finish(options.output, result)


if __name__ == "__main__":
    main()
