"""The upper layers at supervised positions against all positions: step time and peak memory.

    python benchmarks/supervised_positions.py                      # CPU, about 20 minutes
    python benchmarks/supervised_positions.py --device cuda --size e2b --dtype bfloat16

One model with random weights; rows of text of which the last 5 to 100 percent have labels. Both
contestants compute the loss without the logits of ignored positions (linear_cross_entropy); they
differ in where the layers that share keys and values run. Beside the time stands what the
operations allow: the multiplications of both, counted by torch's FlopCounterMode in the step that
is timed. Writes benchmarks/results/supervised_positions.json; ratios are taken within a round.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from environment import write_result
from measure import (
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
from models import BATCHES, batch
from settings import SIZES, Settings
from torch.utils.flop_counter import FlopCounterMode
from workbench import Outcome, Workbench, bounds, errors, refuse_wrong

from gemtune.models import PARTS
from gemtune.patches import apply

PERCENTS = (5, 10, 20, 50, 100)
FULL, AT_POSITIONS = "full", "supervised_positions"
CONTESTANTS = {
    FULL: (("linear_cross_entropy",), "every layer at every position"),
    AT_POSITIONS: (
        ("linear_cross_entropy", "supervised_positions"),
        "layers with shared keys and values at the positions whose label is learned",
    ),
}
NAMED = ("size", "rows", "text_tokens", "training", "checkpointing", "device")


def workbench(options: argparse.Namespace, name: str) -> Workbench:
    """A model of its own for each contestant, from the same seed, so that no time is patching."""
    settings = Settings(
        size=options.size,
        device=options.device,
        dtype=options.dtype,
        training=options.training,
        checkpointing=options.checkpointing,
        rows=options.rows,
        text_tokens=options.text_tokens,
        images_per_row=0,
        soft_tokens=BATCHES[options.size]["soft_tokens"],
        threads=options.threads,
        frozen=list(PARTS) if options.training == "lora" else ["ple", "vision"],
    )
    bench = Workbench(settings)
    apply(bench.model, CONTESTANTS[name][0])
    return bench


def take_labels(bench: Workbench, percent: int) -> None:
    """The batch with the last `percent` of each row labelled."""
    bench.settings.supervised_percent = percent
    bench.inputs = batch(bench.model, bench.settings, bench.device)


def counted_step(bench: Workbench) -> tuple[Outcome, int]:
    """What a step computes, and its multiplications."""
    bench.tidy()
    with FlopCounterMode(display=False) as counter:
        loss = bench.step()
    return Outcome(float(loss), bench.sampled_gradients()), counter.get_total_flops() // 2


def measure(
    benches: dict[str, Workbench], options: argparse.Namespace, percent: int
) -> dict[str, Any]:
    """Both contestants with one share of labels."""
    for bench in benches.values():
        take_labels(bench, percent)
    reference = benches[FULL].reference()
    rows: dict[str, Any] = {}
    allowed: tuple[float, float] | None = None
    for name, bench in benches.items():
        outcome, multiplications = counted_step(bench)
        found = errors(outcome, reference)
        allowed = allowed or bounds(options.dtype, found)
        refuse_wrong(name, found, allowed)
        rows[name] = {"multiplications": multiplications, "errors": found}
    seconds = time_in_turn(
        {name: bench.step for name, bench in benches.items()},
        options.repetitions,
        lambda: [bench.tidy() for bench in benches.values()],
        benches[FULL].wait,
    )
    for name, row in rows.items():
        row["seconds"] = spread(seconds[name])
        row["peak_mib"] = peak(benches[name], options, name, percent)
    labels = benches[FULL].inputs["labels"]
    return {
        "supervised_percent": percent,
        "supervised_tokens": int((labels[:, 1:] != -100).sum()),
        "rows": rows,
        "speedup": spread(ratios(seconds, FULL, AT_POSITIONS)),
        "speedup_allowed": rows[FULL]["multiplications"] / rows[AT_POSITIONS]["multiplications"],
    }


def peak(bench: Workbench, options: argparse.Namespace, name: str, percent: int) -> float | None:
    """Above the weights: on CUDA what tensors hold, on the CPU of a process of its own."""
    if options.device == "cuda":
        bench.tidy()
        found = peak_on_cuda_mib(bench.step)
        bench.tidy()
        return found
    sizes = ("size", "rows", "text_tokens", "training", "dtype", "threads")
    arguments = [f"--{key.replace('_', '-')}={getattr(options, key)}" for key in sizes]
    arguments += ["--peak-of", name, "--percents", str(percent)]
    return peak_in_new_process(
        __file__, *arguments, *(["--checkpointing"] if options.checkpointing else [])
    )


def report_peak(options: argparse.Namespace) -> None:
    """Behind `peak`."""
    bench = workbench(options, options.peak_of)
    take_labels(bench, options.percents[0])
    print_peak(bench.step)


def print_case(case: dict[str, Any]) -> None:
    """One line, as it was measured."""
    full, lean = case["rows"][FULL], case["rows"][AT_POSITIONS]
    print(
        f"{case['supervised_percent']:3}% supervised: {full['seconds']['median']:.2f} s -> "
        f"{lean['seconds']['median']:.2f} s, {case['speedup']['median']:.2f} times as fast "
        f"(operations allow {case['speedup_allowed']:.2f}), peak {full['peak_mib']} -> "
        f"{lean['peak_mib']} MiB",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="e2b_quarter")
    add_device_arguments(parser)
    parser.add_argument("--training", choices=("full", "lora"), default="full")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=512, help="of each row")
    parser.add_argument("--percents", type=int, nargs="+", default=PERCENTS, metavar="%")
    add_arguments(parser, CONTESTANTS, repetitions=3)
    return parse_for_device(parser, "supervised_positions")


def main() -> None:
    """Measure every share of labels."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return report_peak(options)
    result = begin(__file__, options, NAMED, CONTESTANTS)
    result["settings"]["dtype"] = options.dtype
    benches = {name: workbench(options, name) for name in CONTESTANTS}
    result["settings"]["parameters"] = sum(p.numel() for p in benches[FULL].model.parameters())
    result["cases"] = []
    for percent in options.percents:
        result["cases"].append(measure(benches, options, percent))
        print_case(result["cases"][-1])
        write_result(options.output, result)
    return finish(options.output, result)


if __name__ == "__main__":
    main()
