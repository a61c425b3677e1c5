"""Time and peak memory of the LM-head loss, forward and backward.

    python benchmarks/linear_cross_entropy.py                      # about 30 minutes
    python benchmarks/linear_cross_entropy.py --repetitions 1 --no-memory      # a trial
    python benchmarks/linear_cross_entropy.py --device cuda --dtype bfloat16 \\
        --rows 8192 --hidden 1536 --vocabulary 262144

Every contestant gets the same hidden states, head weight and labels. `matmuls` is the lower bound:
the products that are needed (three; two when the head is frozen) on the rows that have a label,
into memory that is there already. Writes benchmarks/results/linear_cross_entropy.json, or
linear_cross_entropy_cuda.json; the ratios in it are taken within a round, in which every contestant
runs once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from importlib.metadata import version
from typing import Any

import torch
from environment import write_result
from lm_head_contestants import (
    CONTESTANTS,
    LOWER_BOUND,
    PACKAGES,
    Case,
    contestant,
    lower_bound,
    not_measured,
)
from measure import (
    MIB,
    add_arguments,
    add_device_arguments,
    begin,
    finish,
    parse_for_device,
    peak_in_new_process,
    peak_on_cuda_mib,
    print_peak,
    ratios,
    spread,
    time_in_turn,
)
from torch import Tensor

IGNORED_PERCENT = (0, 50, 80, 95)
# The largest relative difference from gemtune, of the loss and of a gradient. Those who round the
# logits, or sum the head's gradient, in bfloat16 are up to 2e-2 away; to leave the slope of the cap
# out of the gradient would be 3.4e-2 or more.
AGREEMENT = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (5e-3, 3e-2)}


def make_case(options: argparse.Namespace, ignored_percent: int, frozen: bool) -> Case:
    """The same numbers for every contestant and in every process."""
    generator = torch.Generator().manual_seed(0)
    new = functools.partial(torch.randn, generator=generator)
    place = functools.partial(Tensor.to, device=options.device, dtype=getattr(torch, options.dtype))
    hidden = place(new(options.rows, options.hidden)).requires_grad_()
    # Logits of a standard deviation of 3, so that the cap bends them.
    weight = new(options.vocabulary, options.hidden).mul_(3 / options.hidden**0.5)
    weight = place(weight).requires_grad_(not frozen)
    labels = torch.randint(options.vocabulary, (options.rows,), generator=generator)
    order = torch.randperm(options.rows, generator=generator)
    labels[order[: options.rows * ignored_percent // 100]] = -100
    return Case(hidden, weight, labels.to(options.device), options.softcap)


def check_agreement(case: Case, names: list[str]) -> dict[str, dict[str, float]]:
    """Name -> relative differences of loss and gradients from gemtune, with the cap or without.

    Stops where they are too large. Those that do not fit into the memory of the GPU are left out.
    """
    references: dict[bool, dict[str, Tensor]] = {}
    differences: dict[str, dict[str, float]] = {}
    for name in names:
        case.drop_gradients()
        try:
            found = outcome(name, case)
        except torch.OutOfMemoryError:
            if name.startswith("gemtune"):
                raise
            continue
        reference = references.setdefault(name.endswith("no_cap"), found)
        differences[name] = compare_with(reference, found, name)
    case.drop_gradients()
    return differences


def outcome(name: str, case: Case) -> dict[str, Tensor]:
    """Loss and gradients of one contestant."""
    loss = CONTESTANTS[name][0](case)
    loss.backward()
    found = {"loss": loss.detach(), "grad_hidden": case.hidden.grad, "grad_head": case.weight.grad}
    return {what: tensor for what, tensor in found.items() if tensor is not None}


def compare_with(
    reference: dict[str, Tensor], found: dict[str, Tensor], name: str
) -> dict[str, float]:
    """Relative differences in norm; stops where one is too large, or a gradient is not there."""
    if found.keys() != reference.keys():
        raise SystemExit(f"{name}: gives {', '.join(found)}; gemtune gives {', '.join(reference)}")
    dtype = found["grad_hidden"].dtype
    differences = {}
    for what, tensor in found.items():
        expected = reference[what].float()
        differences[what] = ((tensor.float() - expected).norm() / expected.norm()).item()
        bound = AGREEMENT[dtype][what != "loss"]
        # torch adds up the losses of its chunks in bfloat16, which can move the sum by a tenth.
        coarse = what == "loss" and tensor.dtype == torch.bfloat16
        if not coarse and not differences[what] <= bound:
            raise SystemExit(
                f"{name}: {what} differs from gemtune's by {differences[what]:.1e} of the norm; "
                f"{bound:.0e} is allowed in {dtype}"
            )
    return differences


def measure(options: argparse.Namespace, ignored_percent: int, frozen: bool) -> dict[str, Any]:
    """All contestants on one case."""
    case = make_case(options, ignored_percent, frozen)
    names = available(options.device)
    differences = check_agreement(case, names)
    runs = {name: contestant(name, case) for name in differences}
    runs[LOWER_BOUND] = lower_bound(case)
    wait = torch.cuda.synchronize if options.device == "cuda" else lambda: None
    seconds = time_in_turn(runs, options.repetitions, case.drop_gradients, wait)
    rows = {}
    for name, run in runs.items():
        rows[name] = {
            "seconds": spread(seconds[name]),
            "ratio_to_matmuls": spread(ratios(seconds, name, LOWER_BOUND)),
            "ratio_to_gemtune": spread(ratios(seconds, name, "gemtune")),
            "peak_mib": None,
        }
        if name == LOWER_BOUND:
            continue
        rows[name]["differences"] = differences[name]
        if options.memory and options.device == "cuda":
            rows[name]["peak_mib"] = peak_on_cuda_mib(run)
            case.drop_gradients()
        elif options.memory:
            rows[name]["peak_mib"] = peak(options, name, ignored_percent, frozen)
    gradients = case.hidden.numel() + (0 if frozen else case.weight.numel())
    return {
        "ignored_percent": ignored_percent,
        "frozen_head": frozen,
        "gradients_mib": gradients * case.hidden.element_size() / MIB,
        "rows": rows,
        "out_of_memory": [name for name in names if name not in rows],
    }


def available(device: str) -> list[str]:
    """The contestants that can run here."""
    return [name for name in CONTESTANTS if name not in not_measured(device)]


def peak(options: argparse.Namespace, name: str, ignored_percent: int, frozen: bool):
    """Of one contestant on the CPU, in a new process."""
    sizes = ("rows", "hidden", "vocabulary", "softcap", "threads", "dtype")
    arguments = [f"--{size}={getattr(options, size)}" for size in sizes]
    arguments += ["--peak-of", name, "--ignored", str(ignored_percent)]
    return peak_in_new_process(__file__, *arguments, *(["--frozen"] if frozen else []))


def report_peak(options: argparse.Namespace) -> None:
    """Behind `peak`: a small call first, so that what a first call loads is there before."""
    small = argparse.Namespace(**vars(options) | {"rows": 8, "vocabulary": 64})
    contestant(options.peak_of, make_case(small, 0, options.frozen))()
    case = make_case(options, options.ignored[0], options.frozen)
    print_peak(contestant(options.peak_of, case))


def print_table(case: dict[str, Any]) -> None:
    """The case as it was measured, for the terminal."""
    head = "frozen" if case["frozen_head"] else "full"
    print(f"\n{case['ignored_percent']}% of the labels ignored, {head} head")
    print(f"{'':22}{'ms':>8}{'min-max':>14}{'/ matmuls':>11}{'/ gemtune':>11}{'peak MiB':>10}")
    for name, row in case["rows"].items():
        seconds = row["seconds"]
        limits = f"{seconds['min'] * 1e3:.0f}-{seconds['max'] * 1e3:.0f}"
        peak_mib = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        print(
            f"{name:22}{seconds['median'] * 1e3:8.0f}{limits:>14}"
            f"{row['ratio_to_matmuls']['median']:11.2f}{row['ratio_to_gemtune']['median']:11.2f}"
            f"{peak_mib:>10}",
            flush=True,
        )
    for name in case["out_of_memory"]:
        print(f"{name:22}out of memory")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--softcap", type=float, default=30.0)
    add_device_arguments(parser)
    add_arguments(parser, CONTESTANTS, repetitions=7)
    parser.add_argument("--ignored", type=int, nargs="+", default=IGNORED_PERCENT, metavar="%")
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="peak memory too"
    )
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    return parse_for_device(parser, "linear_cross_entropy")


def main() -> None:
    """Measure every share of ignored labels, with a full and with a frozen head."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return report_peak(options)
    names = available(options.device)
    sizes = ("rows", "hidden", "vocabulary", "softcap", "device")
    result = begin(__file__, options, sizes, {name: CONTESTANTS[name] for name in names})
    result["settings"]["dtype"] = options.dtype
    result["peers"] = {
        PACKAGES[name]: version(PACKAGES[name]) for name in names if name in PACKAGES
    }
    result["contestants"][LOWER_BOUND] = "the matmuls that are needed, on the rows with a label"
    result["not_measured"] = not_measured(options.device)
    result["cases"] = []
    for frozen, ignored_percent in itertools.product((False, True), options.ignored):
        result["cases"].append(measure(options, ignored_percent, frozen))
        print_table(result["cases"][-1])
        write_result(options.output, result)
    print("\n".join(["", *result["not_measured"].values()]))
    return finish(options.output, result)


if __name__ == "__main__":
    main()
