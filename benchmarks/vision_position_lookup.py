"""Vision position embeddings, forward and backward on the CPU: one-hot x table, and the lookup.

    python benchmarks/vision_position_lookup.py                    # about 3 minutes

The one-hot is written out as transformers 5.5 has it (5.10.1 and later look up as well). Writes
benchmarks/results/vision_position_lookup.json, and in it what the one-hot of 40 images takes:
computed, not measured.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from environment import GIB, REPOSITORY, describe, typed_command, write_result
from measure import MIB, peak_in_new_process, print_peak, ratios, spread, time_in_turn
from torch import Tensor

from gemtune.patches.table_lookup import sum_of_table_lookups

COMPUTED_IMAGES = 40
GRID_WIDTH = 60


class Case(NamedTuple):
    """table [2, rows, hidden]; positions [images, patches, 2], -1 for padding; upstream gradient"""

    table: Tensor
    positions: Tensor
    gradient: Tensor

    def drop_gradients(self) -> None:
        self.table.grad = None


def make_case(options: argparse.Namespace) -> Case:
    """Images of a grid 60 patches wide; the last twentieth of the patches is padding."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(2, options.table, options.hidden, generator=generator).requires_grad_()
    patch = torch.arange(options.patches)
    positions = torch.stack([patch % GRID_WIDTH, patch // GRID_WIDTH], dim=-1)
    positions[options.patches * 19 // 20 :] = -1
    positions = positions.expand(options.images, -1, -1).contiguous()
    shape = (options.images, options.patches, options.hidden)
    return Case(table, positions, torch.randn(shape, generator=generator))


def embed_one_hot(case: Case) -> Tensor:
    """`Gemma4VisionPatchEmbedder._position_embeddings` of transformers 5.5."""
    clamped_positions = case.positions.clamp(min=0)
    one_hot = F.one_hot(clamped_positions, num_classes=case.table.shape[1])
    one_hot = one_hot.permute(0, 2, 1, 3).to(case.table)
    position_embeddings = one_hot @ case.table
    position_embeddings = position_embeddings.sum(dim=1)
    padding_positions = (case.positions == -1).all(dim=-1)
    return torch.where(padding_positions.unsqueeze(-1), 0.0, position_embeddings)


def embed_lookup(case: Case) -> Tensor:
    """What the patch puts there."""
    position_embeddings = sum_of_table_lookups(case.table, case.positions.clamp(min=0))
    padding_positions = (case.positions == -1).all(dim=-1)
    return position_embeddings.masked_fill(padding_positions.unsqueeze(-1), 0.0)


CONTESTANTS = {
    "one_hot": (embed_one_hot, "one-hot x table, as in transformers 5.5"),
    "lookup": (embed_lookup, "the patch vision_position_lookup"),
}


def run(name: str, case: Case) -> Tensor:
    """Forward and backward; the embeddings."""
    embeddings = CONTESTANTS[name][0](case)
    embeddings.backward(case.gradient)
    return embeddings


def check_agreement(case: Case) -> None:
    """Stop unless both have the same embeddings and the same gradient, but for rounding."""
    found = {}
    for name in CONTESTANTS:
        case.drop_gradients()
        found[name] = (run(name, case).detach(), case.table.grad)
    case.drop_gradients()
    for a, b in zip(*found.values(), strict=True):
        error = ((a - b).norm() / b.norm()).item()
        if error > 1e-5:
            raise SystemExit(f"one-hot and lookup differ by {error:.1e} of the norm")


def one_hot_bytes(options: argparse.Namespace, num_images: int) -> dict[str, float]:
    """The one-hot in GiB: int64 as F.one_hot makes it, and its copy in bfloat16."""
    numbers = num_images * options.patches * 2 * options.table
    return {"images": num_images, "int64_gib": numbers * 8 / GIB, "bfloat16_gib": numbers * 2 / GIB}


def report_peak(options: argparse.Namespace) -> None:
    """In a process of its own: a small call first, for what a first call loads."""
    small = argparse.Namespace(**vars(options) | {"images": 1, "patches": 60, "table": 64})
    run(options.peak_of, make_case(small))
    print_peak(functools.partial(run, options.peak_of, make_case(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Both contestants."""
    case = make_case(options)
    check_agreement(case)
    runs = {name: functools.partial(run, name, case) for name in CONTESTANTS}
    seconds = time_in_turn(runs, options.repetitions, case.drop_gradients)
    sizes = ("images", "patches", "table", "hidden", "threads")
    arguments = [f"--{size}={getattr(options, size)}" for size in sizes]
    return {
        name: {
            "seconds": spread(seconds[name]),
            "ratio_to_lookup": spread(ratios(seconds, name, "lookup")),
            "peak_mib": peak_in_new_process(__file__, *arguments, "--peak-of", name),
        }
        for name in CONTESTANTS
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--patches", type=int, default=2520, help="of one image")
    parser.add_argument("--table", type=int, default=10240, help="rows of each of the two tables")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=5)
    # One contestant's peak, for the process that this script starts for it.
    parser.add_argument("--peak-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, compute, write, print."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return report_peak(options)
    result: dict[str, Any] = describe(typed_command(__file__))
    sizes = ("images", "patches", "table", "hidden", "threads", "repetitions")
    result["settings"] = {size: getattr(options, size) for size in sizes} | {"dtype": "float32"}
    result["contestants"] = {name: text for name, (_, text) in CONTESTANTS.items()}
    result["rows"] = measure(options)
    result["gradient_mib"] = 2 * options.table * options.hidden * 4 / MIB
    result["computed_one_hot"] = one_hot_bytes(options, COMPUTED_IMAGES)
    for name, row in result["rows"].items():
        seconds, ratio = row["seconds"], row["ratio_to_lookup"]["median"]
        print(
            f"{name:8} {seconds['median'] * 1e3:8.0f} ms "
            f"({seconds['min'] * 1e3:.0f}-{seconds['max'] * 1e3:.0f}), "
            f"{ratio:.1f} times the lookup, peak {row['peak_mib']:.0f} MiB"
        )
    path = write_result("vision_position_lookup", result)
    return print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
