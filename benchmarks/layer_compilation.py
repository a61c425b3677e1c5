"""Decoder layers compiled one by one (torch.compile) against the same layers run as they are.

    python benchmarks/layer_compilation.py                 # CPU, 10 minutes; needs a C++ compiler
    python benchmarks/layer_compilation.py --checkpointing

Two models with the same weights and the patches of a run, one of them with compiled decoder layers.
Lengths and shares of labels differ from batch to batch, so that a graph which holds for one length
only would be made again. Times are of the processor (time.process_time) on one thread: what else
the machine does is not in them; ratios are taken within a round. The first pass over the batches,
which compiles, counts by itself, with an empty cache of inductor and the compiler's own time.
Gradients of every batch are compared. Writes benchmarks/results/layer_compilation.json.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import torch
import torch._dynamo as dynamo
from compiled_layers import compile_layers
from environment import write_result
from measure import add_arguments, begin, finish, ratios, spread, time_in_turn
from models import BATCHES, batch
from settings import SIZES, Settings
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache
from torch.profiler import ProfilerActivity, profile
from workbench import Outcome, Workbench, bounds, errors, refuse_wrong

from gemtune.models import PARTS
from gemtune.patches import apply

EAGER, COMPILED = "eager", "compiled"
CONTESTANTS = {
    EAGER: (lambda model: None, "layers as they are"),
    COMPILED: (compile_layers, "each decoder layer a graph of `torch.compile` (inductor)"),
}
NAMED = ("size", "rows", "text_tokens", "training", "checkpointing")
# Of each batch: tokens of a row beside `--text-tokens`, and the percentage of them that is learned.
# Of the last batch all is: the layers that share keys and values then run at every position.
BATCH_KINDS = ((0, 50), (-64, 20), (51, 100))
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
PROFILED = 5  # steps of each, to tell products from the rest


def workbench(options: argparse.Namespace, name: str) -> Workbench:
    """A model of its own for each contestant, from the same seed."""
    bench = Workbench(
        Settings(
            size=options.size,
            device="cpu",
            dtype="float32",
            training=options.training,
            checkpointing=options.checkpointing,
            rows=options.rows,
            text_tokens=options.text_tokens,
            images_per_row=0,
            soft_tokens=BATCHES[options.size]["soft_tokens"],
            threads=options.threads,
            frozen=list(PARTS) if options.training == "lora" else ["ple", "vision"],
        )
    )
    apply(bench.model)
    CONTESTANTS[name][0](bench.model)
    return bench


def batches(bench: Workbench, text_tokens: int) -> list[dict[str, Tensor]]:
    """One for each of BATCH_KINDS."""
    found = []
    for more, percent in BATCH_KINDS:
        bench.settings.text_tokens = text_tokens + more
        bench.settings.supervised_percent = percent
        found.append(batch(bench.model, bench.settings, bench.device))
    return found


def first_pass(bench: Workbench, inputs: list[dict[str, Tensor]]) -> tuple[float, list[Outcome]]:
    """Processor seconds of the first step with each batch, and what they computed."""
    seconds, outcomes = 0.0, []
    for bench.inputs in inputs:
        bench.tidy()
        before = os.times()
        loss = bench.step()
        after = os.times()
        seconds += sum(after[:4]) - sum(before[:4])  # children's too: a compiler is one
        outcomes.append(Outcome(float(loss), bench.sampled_gradients()))
    return seconds, outcomes


def one_pass(bench: Workbench, inputs: list[dict[str, Tensor]]) -> None:
    """A step with each batch."""
    for bench.inputs in inputs:
        bench.model.zero_grad(set_to_none=True)
        bench.step()


def operations(bench: Workbench) -> tuple[float, float]:
    """Seconds of a step's operations: products of matrices, which no graph shortens; all others."""
    bench.tidy()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        bench.step()
    bench.tidy()
    rows = found.key_averages()
    products = sum(row.self_cpu_time_total for row in rows if row.key in PRODUCTS)
    return products / 1e6, sum(row.self_cpu_time_total for row in rows) / 1e6 - products / 1e6


def shares(benches: dict[str, Workbench]) -> dict[str, Any]:
    """Of a step of the layers as they are: what products of matrices take, what graphs can save.

    Products are most of a step, and their time moves by more from step to step than graphs can
    save; so the other operations are told apart, in a few steps of each in turn.
    """
    products, saved = [], []
    for _ in range(PROFILED):
        found = {name: operations(bench) for name, bench in benches.items()}
        whole = sum(found[EAGER])
        products.append(found[EAGER][0] / whole)
        saved.append((found[EAGER][1] - found[COMPILED][1]) / whole)
    return {"product_share": spread(products), "saved_share": spread(saved)}


def graphs() -> dict[str, int]:
    """Counted by torch: graphs that were made, and breaks in what should be one."""
    return {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def compare_outcomes(outcomes: dict[str, list[Outcome]]) -> tuple[float, float]:
    """The largest errors of the compiled layers over all batches; SystemExit above the bounds."""
    pairs = zip(outcomes[COMPILED], outcomes[EAGER], strict=True)
    found = [errors(compiled, eager) for compiled, eager in pairs]
    worst = max(loss for loss, _ in found), max(gradients for _, gradients in found)
    refuse_wrong(COMPILED, worst, bounds("float32", (0.0, 0.0)))
    return worst


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The first pass of each, then rounds in turn."""
    benches = {name: workbench(options, name) for name in CONTESTANTS}
    inputs = batches(benches[EAGER], options.text_tokens)
    rows: dict[str, Any] = {}
    outcomes: dict[str, list[Outcome]] = {}
    for name, bench in benches.items():
        first, outcomes[name] = first_pass(bench, inputs)
        rows[name] = {"first_pass_seconds": first}
        print(f"{name}: the first pass took {first:.0f} s", flush=True)
    rows[COMPILED] |= {"errors": compare_outcomes(outcomes), **graphs()}
    seconds = time_in_turn(
        {name: lambda bench=bench: one_pass(bench, inputs) for name, bench in benches.items()},
        options.repetitions,
        lambda: [bench.tidy() for bench in benches.values()],
        clock=time.process_time,
    )
    rows[COMPILED]["graphs_after_rounds"] = graphs()["graphs"]
    for name, row in rows.items():
        row["seconds"] = spread([value / len(inputs) for value in seconds[name]])
    for bench in benches.values():
        bench.inputs = inputs[0]
    return {"rows": rows, "ratio": spread(ratios(seconds, COMPILED, EAGER)), **shares(benches)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="e2b_small")
    parser.add_argument("--training", choices=("full", "lora"), default="full")
    parser.add_argument("--checkpointing", action="store_true", help="recompute each layer")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--text-tokens", type=int, default=128, help="of a row of the first batch")
    parser.add_argument("--output", default="layer_compilation", help="the JSON without .json")
    add_arguments(parser, CONTESTANTS, repetitions=5)
    options = parser.parse_args()
    if options.text_tokens + min(more for more, _ in BATCH_KINDS) < 1:
        parser.error("--text-tokens: batches of up to 64 tokens less are made; use at least 65")
    return options


def main() -> None:
    """Measure, and say in a line what came out."""
    options = parse()
    torch.set_num_threads(options.threads)
    # Else one graph too many for one function (of 8) is an error: lengths and labels make more.
    dynamo.config.recompile_limit = 64
    inductor.compile_threads = 1  # in this process, whose time is counted
    result = begin(__file__, options, NAMED, CONTESTANTS)
    kinds = ((options.text_tokens + more, percent) for more, percent in BATCH_KINDS)
    result["settings"]["batches"] = [list(kind) for kind in kinds]
    with fresh_cache():
        result |= measure(options)
    eager, compiled = (result["rows"][name]["seconds"]["median"] for name in CONTESTANTS)
    print(
        f"{eager:.2f} -> {compiled:.2f} s a step, {result['ratio']['median']:.3f} of the time; "
        f"{result['rows'][COMPILED]['graphs']} graphs; products of matrices take "
        f"{result['product_share']['median']:.0%} of it, graphs save "
        f"{result['saved_share']['median']:.1%} in the rest",
        flush=True,
    )
    write_result(options.output, result)
    return finish(options.output, result)


if __name__ == "__main__":
    main()
