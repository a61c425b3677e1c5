"""Vision position embeddings, forward and backward on the CPU: one-hot x table, and lookups.

    python benchmarks/vision_position_lookup.py                    # about 3 minutes

The one-hot is written out as transformers 5.5 has it, and the lookup with copies as 5.10.1 and
later have it. Writes benchmarks/results/vision_position_lookup.json, and in it what the one-hot of
40 images takes: computed, not measured.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from environment import GIB
from measure import MIB, add_arguments, begin, compare, finish, print_peak
from torch import Tensor

from gemtune.patches.table_lookup import sum_of_table_lookups

COMPUTED_IMAGES = 40
GRID_WIDTH = 60
SIZES = ("images", "patches", "table", "hidden")


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


def embed_copies(case: Case) -> Tensor:
    """The same of transformers 5.10.1; every name in it keeps a tensor until the end."""
    clamped_positions = case.positions.clamp(min=0)
    x_emb = F.embedding(clamped_positions[..., 0], case.table[0])
    y_emb = F.embedding(clamped_positions[..., 1], case.table[1])
    position_embeddings = x_emb + y_emb
    padding_positions = (case.positions == -1).all(dim=-1)
    position_embeddings = torch.where(padding_positions.unsqueeze(-1), 0.0, position_embeddings)
    return position_embeddings  # noqa: RET504


def embed_lookup(case: Case) -> Tensor:
    """What the patch puts there."""
    indices = case.positions.clamp(min=0).unbind(-1)
    padding_positions = (case.positions == -1).all(dim=-1)
    return sum_of_table_lookups(case.table, indices, zero=padding_positions)


CONTESTANTS = {
    "one_hot": (embed_one_hot, "one-hot x table, as in transformers 5.5"),
    "copies": (embed_copies, "two lookups, as in transformers 5.10.1 and later"),
    "lookup": (embed_lookup, "the patch vision_position_lookup"),
}


def run(name: str, case: Case) -> Tensor:
    """Forward and backward; the embeddings."""
    embeddings = CONTESTANTS[name][0](case)
    embeddings.backward(case.gradient)
    return embeddings


def check_agreement(case: Case) -> None:
    """Stop unless all have the same embeddings and the same gradient, but for rounding."""
    found = {}
    for name in CONTESTANTS:
        case.drop_gradients()
        found[name] = (run(name, case).detach(), case.table.grad)
    case.drop_gradients()
    for name in CONTESTANTS:
        for a, b in zip(found[name], found["lookup"], strict=True):
            error = ((a - b).norm() / b.norm()).item()
            if error > 1e-5:
                raise SystemExit(f"{name} and lookup differ by {error:.1e} of the norm")


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
    """All contestants."""
    case = make_case(options)
    check_agreement(case)
    runs = {name: functools.partial(run, name, case) for name in CONTESTANTS}
    return compare(__file__, runs, options, SIZES, case.drop_gradients)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--patches", type=int, default=2520, help="of one image")
    parser.add_argument("--table", type=int, default=10240, help="rows of each of the two tables")
    parser.add_argument("--hidden", type=int, default=768)
    add_arguments(parser, CONTESTANTS, repetitions=5)
    return parser.parse_args()


def main() -> None:
    """Measure, compute, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        return report_peak(options)
    result = begin(__file__, options, SIZES, CONTESTANTS)
    result["rows"] = measure(options)
    result["gradient_mib"] = 2 * options.table * options.hidden * 4 / MIB
    result["computed_one_hot"] = one_hot_bytes(options, COMPUTED_IMAGES)
    return finish("vision_position_lookup", result)


if __name__ == "__main__":
    main()
