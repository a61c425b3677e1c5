"""Time and peak memory of the LM-head loss, forward and backward, on the CPU.

    python benchmarks/linear_cross_entropy.py                      # about 20 minutes
    python benchmarks/linear_cross_entropy.py --repetitions 1 --no-memory      # a trial

Every contestant gets the same hidden states, head weight and labels. `matmuls` is the lower bound:
the products that are needed (three; two when the head is frozen) on the rows that have a label,
into memory that is there already. Writes benchmarks/results/linear_cross_entropy.json; the ratios
in it are taken within a round, in which every contestant runs once.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from environment import write_result
from measure import (
    MIB,
    add_arguments,
    begin,
    finish,
    peak_in_new_process,
    print_peak,
    ratios,
    spread,
    time_in_turn,
)
from torch import Tensor

from gemtune.losses import linear_cross_entropy

IGNORED_PERCENT = (0, 50, 80, 95)
LOWER_BOUND = "matmuls"
NOT_MEASURED = {
    "trl": "TRL: not measured",
    "liger": "Liger Kernel: not measured (Triton needs a GPU)",
}


class Case(NamedTuple):
    """Inputs of one comparison; the weight asks for a gradient unless the head is frozen."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    softcap: float

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_case(options: argparse.Namespace, ignored_percent: int, frozen: bool) -> Case:
    """The same numbers for every contestant and in every process."""
    generator = torch.Generator().manual_seed(0)
    new = functools.partial(torch.randn, generator=generator)
    hidden = new(options.rows, options.hidden).requires_grad_()
    # Logits of a standard deviation of 3, so that the cap bends them.
    weight = new(options.vocabulary, options.hidden).mul_(3 / options.hidden**0.5)
    labels = torch.randint(options.vocabulary, (options.rows,), generator=generator)
    order = torch.randperm(options.rows, generator=generator)
    labels[order[: options.rows * ignored_percent // 100]] = -100
    return Case(hidden, weight.requires_grad_(not frozen), labels, options.softcap)


def loss_gemtune(case: Case) -> Tensor:
    return linear_cross_entropy(case.hidden, case.weight, case.labels, softcap=case.softcap)


def loss_gemtune_no_cap(case: Case) -> Tensor:
    return linear_cross_entropy(case.hidden, case.weight, case.labels)


def loss_transformers(case: Case) -> Tensor:
    """modeling_gemma4 and loss_utils.ForCausalLMLoss, line by line."""
    logits = F.linear(case.hidden, case.weight)
    logits = logits / case.softcap
    logits = torch.tanh(logits)
    logits = logits * case.softcap
    logits = logits.float()
    return F.cross_entropy(logits, case.labels, ignore_index=-100)


def loss_transformers_dropped(case: Case) -> Tensor:
    kept = case.labels != -100
    return loss_transformers(case._replace(hidden=case.hidden[kept], labels=case.labels[kept]))


def loss_torch_no_cap(case: Case, **chunks: Any) -> Tensor:
    # Without options it makes the whole logits.
    options = torch.nn.LinearCrossEntropyOptions(**chunks)
    return F.linear_cross_entropy(case.hidden, case.weight, case.labels, options=options)


def loss_torch_512_no_cap(case: Case) -> Tensor:
    return loss_torch_no_cap(case, batch_chunk_size=512, chunking_method=None)


CONTESTANTS = {
    "gemtune": (loss_gemtune, "gemtune.losses.linear_cross_entropy"),
    "transformers": (
        loss_transformers,
        "the way of transformers: logits of all rows, cap, F.cross_entropy",
    ),
    "transformers_dropped": (loss_transformers_dropped, "the same on the rows that have a label"),
    "gemtune_no_cap": (
        loss_gemtune_no_cap,
        "gemtune.losses.linear_cross_entropy without the cap",
    ),
    "torch_no_cap": (
        loss_torch_no_cap,
        "torch.nn.functional.linear_cross_entropy, the chunks it chooses, without the cap",
    ),
    "torch_512_no_cap": (
        loss_torch_512_no_cap,
        "torch.nn.functional.linear_cross_entropy, chunks of 512 rows, without the cap",
    ),
}


def contestant(name: str, case: Case) -> Callable[[], object]:
    """Forward and backward of one contestant."""
    loss, _ = CONTESTANTS[name]
    return lambda: loss(case).backward()


def lower_bound(case: Case) -> Callable[[], object]:
    """The products that no way of computing these gradients can leave out."""
    rows = case.hidden.detach()[case.labels != -100]
    weight = case.weight.detach()
    logits = torch.empty(len(rows), len(weight))
    grad_rows, grad_weight = torch.empty_like(rows), torch.empty_like(weight)

    def multiply() -> None:
        torch.mm(rows, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_rows)
        if case.weight.requires_grad:
            torch.mm(logits.t(), rows, out=grad_weight)

    return multiply


def available() -> list[str]:
    """The contestants that this build of torch can run."""
    has_built_in = hasattr(F, "linear_cross_entropy") and hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    )
    return [name for name in CONTESTANTS if has_built_in or not name.startswith("torch")]


def check_agreement(case: Case, names: list[str]) -> None:
    """Stop unless those that compute the same thing have the same loss and gradients."""
    found: dict[str, list[Tensor | None]] = {}
    for name in names:
        case.drop_gradients()
        loss = CONTESTANTS[name][0](case)
        loss.backward()
        found[name] = [loss.detach(), case.hidden.grad, case.weight.grad]
    case.drop_gradients()
    for name in names:
        other = "gemtune_no_cap" if name.endswith("no_cap") else "gemtune"
        for a, b in zip(found[name], found[other], strict=True):
            if a is not None and b is not None:
                error = ((a - b).norm() / b.norm()).item()
                if error > 1e-4:
                    raise SystemExit(f"{name} and {other} differ by {error:.1e} of the norm")


def measure(options: argparse.Namespace, ignored_percent: int, frozen: bool) -> dict[str, Any]:
    """All contestants on one case."""
    case = make_case(options, ignored_percent, frozen)
    names = available()
    check_agreement(case, names)
    runs = {name: contestant(name, case) for name in names}
    runs[LOWER_BOUND] = lower_bound(case)
    seconds = time_in_turn(runs, options.repetitions, case.drop_gradients)
    rows = {}
    for name in runs:
        rows[name] = {
            "seconds": spread(seconds[name]),
            "ratio_to_matmuls": spread(ratios(seconds, name, LOWER_BOUND)),
            "ratio_to_gemtune": spread(ratios(seconds, name, "gemtune")),
            "peak_mib": None,
        }
        if name != LOWER_BOUND and options.memory:
            rows[name]["peak_mib"] = peak(options, name, ignored_percent, frozen)
    gradients = case.hidden.numel() + (0 if frozen else case.weight.numel())
    return {
        "ignored_percent": ignored_percent,
        "frozen_head": frozen,
        "gradients_mib": gradients * 4 / MIB,
        "rows": rows,
    }


def peak(options: argparse.Namespace, name: str, ignored_percent: int, frozen: bool):
    """Of one contestant, in a new process."""
    sizes = ("rows", "hidden", "vocabulary", "softcap", "threads")
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--softcap", type=float, default=30.0)
    add_arguments(parser, CONTESTANTS, repetitions=7)
    parser.add_argument("--ignored", type=int, nargs="+", default=IGNORED_PERCENT, metavar="%")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only")
    parser.add_argument("--output", default="linear_cross_entropy", help="name of the JSON file")
    parser.add_argument("--frozen", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every share of ignored labels, with a full and with a frozen head."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return report_peak(options)
    sizes = ("rows", "hidden", "vocabulary", "softcap")
    result = begin(__file__, options, sizes, CONTESTANTS)
    result["contestants"][LOWER_BOUND] = "the matmuls that are needed, on the rows with a label"
    result["not_measured"] = dict(NOT_MEASURED)
    if "torch_no_cap" not in available():
        text = "torch.nn.functional.linear_cross_entropy: not in this build of torch"
        result["not_measured"]["torch_no_cap"] = text
    result["cases"] = []
    for frozen, ignored_percent in itertools.product((False, True), options.ignored):
        result["cases"].append(measure(options, ignored_percent, frozen))
        print_table(result["cases"][-1])
        write_result(options.output, result)
    print("\n" + "\n".join(result["not_measured"].values()))
    return finish(options.output, result)


if __name__ == "__main__":
    main()
