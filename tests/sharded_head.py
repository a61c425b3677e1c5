"""Problems for the loss of a sharded head, and what four processes make of them.

Ranks 0 and 1 form one mesh, ranks 0 to 2 another, and all four HSDP's two by two. Each case runs on
one of them; its findings go to a file, and the test compares them with what one process computes.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lm_head import IGNORE
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from gemtune.losses import linear_cross_entropy, sharded, slices, tiles

NUM_PROCESSES = 4
HIDDEN_SIZE = 13
RANKS = {"two": [0, 1], "three": [0, 1, 2], "replicated": [0, 1, 2], "hsdp": [[0, 1], [2, 3]]}
PLACEMENTS = {"replicated": [Replicate()], "hsdp": [Replicate(), Shard(0)]}
SLICES, GATHER = True, False


@dataclass(frozen=True)
class Case:
    """One call on each rank of a mesh, and a backward with the rank's factor."""

    mesh: str = "two"
    way: bool | None = SLICES  # None: as the sizes have it
    vocab_size: int = 101
    rows: tuple[int, ...] = (23, 14, 19, 5)  # of each rank
    ignored: tuple[float, ...] = (0.3, 0.0, 0.6, 0.2)
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    factors: tuple[float, ...] = (1.0,) * NUM_PROCESSES
    trains: tuple[bool, bool] = (True, True)
    tied: bool = False  # hidden is looked up in the weight
    large: float = 1.0  # of the logits
    autocast: bool = False
    metrics: tuple[bool, ...] = (True,) * NUM_PROCESSES
    as_on_cuda: bool = False  # matmuls write float32 from half precision

    @property
    def num_ranks(self) -> int:
        return torch.tensor(RANKS[self.mesh]).numel()


EXTRAS = {
    "cap": {"softcap": 3.0},
    "no cap": {},
    "cap beyond the bound": {"softcap": 90.0},
    "smoothing and z loss": {"softcap": 3.0, "label_smoothing": 0.1, "z_loss_weight": 0.02},
    "both without a cap": {"label_smoothing": 0.1, "z_loss_weight": 0.02},
    "num_items": {"softcap": 3.0, "num_items": 77},
    "num_items in a tensor": {"num_items": torch.tensor(77), "reduction": "sum"},
    "sum": {"softcap": 3.0, "reduction": "sum"},
    # Of slices of 51 and 50 words (34 and 33), the budget has unequal numbers of rows.
    "small chunks": {"softcap": 3.0, "chunk_bytes": 8 * 50 * 4},
    "one row a chunk": {"chunk_bytes": 1},
}
FLOAT32 = {"dtype": torch.float32}
NO_LABELS = {"ignored": (1.0,) * 4}
VARIANTS = {
    "one rank has no labels": {"ignored": (0.3, 1.0, 0.5, 1.0)},
    "one rank has no rows": {"rows": (0, 14, 19, 5)},
    "no labels anywhere": NO_LABELS,
    "equal counts": {"rows": (9,) * 4, "ignored": (0.0,) * 4},
    "frozen head": {"trains": (True, False)},
    "frozen body": {"trains": (False, True)},
    "nothing trained": {"trains": (False, False)},
    "tied": {"tied": True},
    "factors": {"factors": (0.5, -2.0, 3.0, 0.0), "options": {"softcap": 3.0}},
    "one factor": {"factors": (0.5,) * 4},
    "factor of a rank without labels": {
        "factors": (0.5, 0.0, 0.5, 0.5),
        "ignored": (0.3, 1.0, 0.5, 0.1),
    },
    "saturated": {"large": 300.0, "options": {"softcap": 2.0}},
    "large": {"large": 300.0},
    "large, capped": {"large": 300.0, "options": {"softcap": 200.0}},
    "large, capped, float32": FLOAT32 | {"large": 300.0, "options": {"softcap": 90.0}},
    "large, without metrics, float32": FLOAT32
    | {"large": 300.0, "metrics": (False,) * 4, "options": {"softcap": 90.0}},
    "metrics on one rank": {"metrics": (True, False, False, False)},
    "without metrics": {"metrics": (False,) * 4, "options": {"softcap": 3.0}},
    "without metrics or cap": {"metrics": (False,) * 4},
    "two words": {"vocab_size": 2, "options": {"softcap": 3.0}},
    "two words without a cap": {"vocab_size": 2, "options": {"label_smoothing": 0.1}},
    "two words in bfloat16": {"vocab_size": 2, "dtype": torch.bfloat16},
    "bfloat16": {"dtype": torch.bfloat16, "options": {"softcap": 30.0}},
    "bfloat16 as on CUDA": {"dtype": torch.bfloat16, "as_on_cuda": True, "options": EXTRAS["cap"]},
    "two words as on CUDA": {"vocab_size": 2, "dtype": torch.bfloat16, "as_on_cuda": True},
    "float16": {"dtype": torch.float16, "options": {"softcap": 30.0}},
    "autocast": FLOAT32 | {"autocast": True, "options": {"softcap": 30.0}},
}


def all_cases() -> dict[str, Case]:
    cases = {}
    for mesh in ("two", "three"):
        for way in (SLICES, GATHER):
            where = f"{'slices' if way else 'gather'} on {mesh}"
            base = Case(mesh=mesh, way=way)
            for name, options in EXTRAS.items():
                cases[f"{where}: {name}"] = replace(base, options=options)
                cases[f"{where}: {name}, float32"] = replace(base, options=options, **FLOAT32)
            for name, changed in VARIANTS.items():
                cases[f"{where}: {name}"] = replace(base, **changed)
            cases[f"{where}: per token"] = replace(base, options={"reduction": "none"})
    for name in ("cap", "smoothing and z loss", "sum"):
        cases[f"replicated: {name}"] = Case(mesh="replicated", options=EXTRAS[name])
        for way in (SLICES, GATHER):
            where = f"{'slices' if way else 'gather'} on hsdp"
            cases[f"{where}: {name}"] = Case(mesh="hsdp", way=way, options=EXTRAS[name])
    for name in ("one rank has no labels", "no labels anywhere", "factors", "tied", "bfloat16"):
        cases[f"slices on hsdp: {name}"] = Case(mesh="hsdp", **VARIANTS[name])
    few, many = (20, 21, 20, 20), (40, 61, 40, 60)
    all_learned = {"way": None, "ignored": (0.0,) * 4}
    cases["chosen: slices"] = Case(rows=few, **all_learned)
    cases["chosen: gather"] = Case(rows=many, **all_learned)
    # The pairs of ranks must choose alike.
    cases["chosen: gather on hsdp"] = Case(rows=few[:2] + many[2:], mesh="hsdp", **all_learned)
    return cases


def data_of(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows, weight (the same on each rank), labels and tokens to look up."""
    generator = torch.Generator().manual_seed(99)
    weight = torch.randn(case.vocab_size, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    generator.manual_seed(rank)
    num_rows = case.rows[rank]
    hidden = torch.randn(num_rows, HIDDEN_SIZE, generator=generator, dtype=torch.float64)
    labels = torch.randint(case.vocab_size, (num_rows,), generator=generator)
    tokens = torch.randint(case.vocab_size, (num_rows,), generator=generator)
    labels[
        torch.randperm(num_rows, generator=generator)[: round(num_rows * case.ignored[rank])]
    ] = IGNORE
    return (hidden * case.large).to(case.dtype), weight.to(case.dtype), labels, tokens


def multiply_as_on_cuda(out, a, b, *, alpha=1.0, keep=False):
    assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    out.copy_(alpha * (a.double() @ b.double()) + (out.double() if keep else 0.0))


def run_case(case: Case, rank: int, mesh: DeviceMesh) -> dict[str, Any]:
    """The findings of one rank."""
    hidden, weight, labels, tokens = data_of(case, rank)
    hidden.requires_grad_(case.trains[0])
    placements = PLACEMENTS.get(case.mesh, [Shard(0)])
    weight = distribute_tensor(weight, mesh, placements).requires_grad_(case.trains[1])
    rows = hidden
    if case.tied:
        whole = weight.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)
        rows = F.embedding(tokens, whole).sin() + hidden
    num_scored = num_sliced = 0

    def score(*args: Any) -> Any:
        nonlocal num_scored
        num_scored += 1
        return original_score(*args)

    def slices_pay_off(*sizes: int) -> bool:
        nonlocal num_sliced
        num_sliced = original_choice(*sizes) if case.way is None else case.way
        return num_sliced

    original_score, original_choice = slices.score, sharded.slices_pay_off
    with contextlib.ExitStack() as changes:
        changes.enter_context(mock.patch.object(slices, "score", score))
        changes.enter_context(mock.patch.object(sharded, "slices_pay_off", slices_pay_off))
        if case.autocast:
            changes.enter_context(torch.autocast("cpu", torch.bfloat16))
        if case.as_on_cuda:
            changes.enter_context(
                mock.patch.object(tiles, "mixed_matmul_support", lambda *_: (True, True))
            )
            changes.enter_context(mock.patch.object(tiles, "multiply_into", multiply_as_on_cuda))
        found = linear_cross_entropy(
            rows, weight, labels, metrics=case.metrics[rank], **case.options
        )
        loss, metrics = found if case.metrics[rank] else (found, None)
        if loss.requires_grad:
            (loss * case.factors[rank]).sum().backward()
    grad_weight = None
    if weight.grad is not None:
        assert weight.grad.placements == tuple(placements)
        assert weight.grad.to_local().shape == weight.to_local().shape
        grad_weight = weight.grad.full_tensor()
    return {
        "loss": loss.detach(),
        "metrics": metrics,
        "hidden": hidden.grad,
        "weight": grad_weight,
        "num_scored": num_scored,
        "sliced": bool(num_sliced),
    }


def run_rank(rank: int, port: int, folder: str, others: Any) -> None:
    """All cases, then `others(rank, meshes)`; findings go to a file of this rank."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=NUM_PROCESSES)
    meshes = {}
    for name, ranks in RANKS.items():
        names = ("replicas", "shards") if name == "hsdp" else ("shards",)
        meshes[name] = DeviceMesh("cpu", ranks, mesh_dim_names=names)
    found: dict[str, Any] = {}
    for name, case in all_cases().items():
        if rank < case.num_ranks:
            try:
                found[name] = run_case(case, rank, meshes[case.mesh])
            except Exception as error:
                raise RuntimeError(f"case {name!r}") from error
    found |= others(rank, meshes)
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
