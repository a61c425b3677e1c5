"""AlphaFold3's relative position encoding, forward and backward on the CPU: one-hots and lookups.

    python benchmarks/relative_position_lookup.py                  # about 5 minutes

The one-hots are made as Protenix makes them, and the three lookups as PXDesign does since
PXDesign#17. The gradient that goes back is the encoding itself, so that it takes no memory of its
own. With many tokens only what fits `--limit-gib` is measured; what the one-hots take is computed
for every number of tokens. Writes benchmarks/results/relative_position_lookup.json.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from environment import GIB, write_result
from measure import MIB, add_arguments, begin, compare, finish, print_peak
from torch import Tensor, nn

from gemtune import patches

SIZES = ("tokens", "r_max", "s_max", "hidden")


class RelativePositionEncoding(nn.Module):
    """What the patch looks for; computes with one-hots, in the tensors that Protenix makes."""

    def __init__(self, r_max: int, s_max: int, c_z: int) -> None:
        super().__init__()
        self.r_max, self.s_max, self.c_z = r_max, s_max, c_z
        self.linear_no_bias = nn.Linear(4 * r_max + 2 * s_max + 7, c_z, bias=False)

    def forward(self, input_feature_dict: dict[str, Tensor]) -> Tensor:
        residue, token, chain, same_entity = bins(input_feature_dict, self.r_max, self.s_max)
        residue_one_hot = F.one_hot(residue, 2 * self.r_max + 2)
        token_one_hot = F.one_hot(token, 2 * self.r_max + 2)
        chain_one_hot = F.one_hot(chain, 2 * self.s_max + 2)
        parts = [residue_one_hot, token_one_hot, same_entity.unsqueeze(-1), chain_one_hot]
        return self.linear_no_bias(torch.cat(parts, dim=-1).float())


def bins(features: dict[str, Tensor], r_max: int, s_max: int) -> tuple[Tensor, ...]:
    """Distances of residue, token and chain, and whether the entity is one: int64 [N, N] each."""

    def equal(name: str) -> Tensor:
        return (features[name][:, None] == features[name][None]).long()

    def distance(name: str, limit: int, counts: Tensor) -> Tensor:
        clipped = (features[name][:, None] - features[name][None] + limit).clip(0, 2 * limit)
        return clipped * counts + (1 - counts) * (2 * limit + 1)

    chain, entity = equal("asym_id"), equal("entity_id")
    by_residue = distance("residue_index", r_max, chain)
    by_token = distance("token_index", r_max, chain * equal("residue_index"))
    return by_residue, by_token, distance("sym_id", s_max, entity), entity


class Case(NamedTuple):
    """Features [N] each; the module as it is, and the patched one with the same weight."""

    features: dict[str, Tensor]
    stock: RelativePositionEncoding
    patched: RelativePositionEncoding

    def drop_gradients(self) -> None:
        self.stock.linear_no_bias.weight.grad = None


def make_case(options: argparse.Namespace) -> Case:
    """Four chains, two copies of each of two entities; every fourth residue has three tokens."""
    torch.manual_seed(0)
    token = torch.arange(options.tokens)
    chain = token * 4 // options.tokens
    features = {
        "asym_id": chain,
        "entity_id": chain // 2,
        "sym_id": chain % 2,
        "residue_index": token // 6 * 4 + (token % 6).clamp(max=3),
        "token_index": token,
    }
    sizes = (options.r_max, options.s_max, options.hidden)
    stock, patched = RelativePositionEncoding(*sizes), RelativePositionEncoding(*sizes)
    patched.linear_no_bias.weight = stock.linear_no_bias.weight
    patches.apply(patched, ["relative_position_lookup"])
    return Case(features, stock, patched)


def encode_one_hot(case: Case) -> Tensor:
    return case.stock(case.features)


def encode_copies(case: Case) -> Tensor:
    """A table of its own for each distance, and a new sum for each."""
    r_max, s_max = case.stock.r_max, case.stock.s_max
    residue, token, chain, same_entity = bins(case.features, r_max, s_max)
    rows = case.stock.linear_no_bias.weight.t().float()
    sizes = (2 * r_max + 2, 2 * r_max + 2, 1, 2 * s_max + 2)
    by_residue, by_token, by_entity, by_chain = rows.split(sizes)
    encoding = by_residue[residue]
    encoding = encoding + by_token[token]
    encoding = encoding + same_entity.unsqueeze(-1).float() * by_entity[0]
    return encoding + by_chain[chain]


def encode_lookup(case: Case) -> Tensor:
    return case.patched(case.features)


CONTESTANTS = {
    "one_hot": (encode_one_hot, "one-hots x weight, as in Protenix"),
    "copies": (encode_copies, "three lookups, as in PXDesign since PXDesign#17"),
    "lookup": (encode_lookup, "the patch relative_position_lookup"),
}


def run(name: str, case: Case) -> Tensor:
    """Forward and backward; the encoding."""
    encoding = CONTESTANTS[name][0](case)
    encoding.backward(encoding.detach())
    return encoding


def computed_gib(name: str, options: argparse.Namespace) -> float:
    """What is alive at the peak, in GiB, indices aside."""
    one_hot = 4 * options.r_max + 2 * options.s_max + 7
    numbers = {
        # The int64 one-hots, the int64 tensor that joins them, and its copy in float32.
        "one_hot": one_hot * (8 + 8 + 4),
        # A sum, what is added to it, and the new sum.
        "copies": 3 * options.hidden * 4,
        "lookup": options.hidden * 4,
    }
    return numbers[name] * options.tokens**2 / GIB


def check_agreement(case: Case) -> None:
    """Stop unless all have the same encoding and the same gradient, but for rounding."""
    found = {}
    for name in CONTESTANTS:
        case.drop_gradients()
        found[name] = (run(name, case).detach(), case.stock.linear_no_bias.weight.grad)
    case.drop_gradients()
    for name in CONTESTANTS:
        for a, b in zip(found[name], found["lookup"], strict=True):
            error = ((a - b).norm() / b.norm()).item()
            # Three lookups add up their gradient in one float32 sum for each row.
            if error > (1e-3 if name == "copies" else 1e-5):
                raise SystemExit(f"{name} and lookup differ by {error:.1e} of the norm")


def report_peak(options: argparse.Namespace) -> None:
    """In a process of its own: a small call first, for what a first call loads."""
    run(options.peak_of, make_case(argparse.Namespace(**vars(options) | {"tokens": 100})))
    print_peak(functools.partial(run, options.peak_of, make_case(options)))


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The contestants that fit, with one number of tokens."""
    print(f"{options.tokens} tokens", flush=True)
    case = make_case(options)
    computed = {name: computed_gib(name, options) for name in CONTESTANTS}
    names = [name for name in CONTESTANTS if computed[name] <= options.limit_gib]
    runs = {name: functools.partial(run, name, case) for name in names}
    return {
        "tokens": options.tokens,
        "rows": compare(__file__, runs, options, SIZES, case.drop_gradients),
        "computed_mib": {name: gib * GIB / MIB for name, gib in computed.items()},
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[500, 2000, 4000])
    parser.add_argument("--r-max", type=int, default=32)
    parser.add_argument("--s-max", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--limit-gib", type=float, default=11.0, help="measure what takes less")
    add_arguments(parser, CONTESTANTS, repetitions=5)
    return parser.parse_args()


def main() -> None:
    """Measure each number of tokens, compute, write."""
    options = parse()
    torch.set_num_threads(options.threads)
    each = [argparse.Namespace(**vars(options) | {"tokens": number}) for number in options.tokens]
    if options.peak_of:
        return report_peak(each[0])
    check_agreement(make_case(argparse.Namespace(**vars(options) | {"tokens": 300})))
    result = begin(__file__, options, SIZES, CONTESTANTS)
    result["cases"] = []
    for one in each:
        result["cases"].append(measure(one))
        write_result("relative_position_lookup", result)
    return finish("relative_position_lookup", result)


if __name__ == "__main__":
    main()
