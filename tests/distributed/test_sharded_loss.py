"""linear_cross_entropy with a sharded head, in processes, against one process without shards."""

from __future__ import annotations

import re
import socket
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from lm_head import IGNORE, assert_close, reference_logits, reference_losses, relative_error
from sharded_head import GATHER, NUM_PROCESSES, SLICES, Case, all_cases, data_of, run_rank
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.fx.experimental.proxy_tensor import make_fx

from gemtune.losses import linear_cross_entropy, sharded

pytestmark = pytest.mark.xdist_group("sharded_loss")

CASES = all_cases()
LIMIT_SECONDS = 150
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-6}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found; they are started once for the whole file."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (port, str(folder), beside_the_cases)
    processes = torch.multiprocessing.spawn(run_rank, arguments, nprocs=NUM_PROCESSES, join=False)
    deadline = time.monotonic() + LIMIT_SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:  # a rank waits for what another does not send
            for process in processes.processes:
                process.kill()
            pytest.fail(f"hangs: no end after {LIMIT_SECONDS} s")
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(NUM_PROCESSES)
    ]


def expected_of(case: Case) -> list[dict[str, Any]]:
    """The same by plain float64 PyTorch, with the gradients that an average over ranks has."""
    options = dict(case.options)
    options.pop("chunk_bytes", None)
    reduction = options.pop("reduction", "mean")
    num_items = options.pop("num_items", None)
    weight = data_of(case, 0)[1]
    rounded = torch.bfloat16 if case.autocast else case.dtype
    weight = weight.to(rounded).double().requires_grad_()
    expected, total = [], 0.0
    for rank in range(case.num_ranks):
        hidden, _, labels, tokens = data_of(case, rank)
        hidden = hidden.to(rounded).double().requires_grad_()
        rows = hidden + F.embedding(tokens, weight).sin() if case.tied else hidden
        losses = reference_losses(rows, weight, labels, **options)
        count = (labels != IGNORE).sum().clamp(min=1) if reduction == "mean" else 1
        loss = losses if reduction == "none" else losses.sum() / (num_items or count)
        total = total + (loss * case.factors[rank]).sum() / case.num_ranks
        expected.append({"loss": loss.detach(), "hidden": hidden})
        learned = labels != IGNORE
        logits = reference_logits(rows, weight, options.get("softcap"))[learned].detach()
        log_p = logits.log_softmax(-1)
        expected[-1]["metrics"] = (
            learned.sum(),
            (logits.argmax(-1) == labels[learned]).sum(),
            -(log_p.exp() * log_p).sum(),
            logits.logsumexp(-1).sum(),
        )
    total.backward()
    for of_rank in expected:
        of_rank["hidden"] = of_rank["hidden"].grad * case.num_ranks
        of_rank["weight"] = weight.grad
    return expected


@pytest.mark.parametrize("name", CASES)
def test_losses_metrics_and_gradients(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    exact = TOLERANCES.get(case.dtype, 1e-5)
    if case.autocast:
        exact = 1e-5
    for rank, expected in enumerate(expected_of(case)):
        found = ranks[rank][name]
        assert_close(found["loss"], expected["loss"], exact)
        if case.metrics[rank]:
            for ours, theirs in zip(found["metrics"], expected["metrics"], strict=True):
                assert_close(ours, theirs, exact)
            assert found["metrics"][:2] == expected["metrics"][:2]
        for tensor, trained in zip(("hidden", "weight"), case.trains, strict=True):
            if not trained:
                assert found[tensor] is None
            elif case.dtype.itemsize > 2:
                assert_close(found[tensor], expected[tensor], exact)
            else:
                # Gathered, gradients are rounded before they are added up over the ranks.
                rounding = torch.finfo(case.dtype).eps * (0.27 if case.way == SLICES else 0.7)
                if case.as_on_cuda:  # gradients of logits are rounded for the matmuls
                    rounding *= 1.5
                assert found[tensor].dtype == case.dtype
                assert relative_error(found[tensor], expected[tensor]) <= rounding


def test_ranks_with_different_factors_score_twice(ranks: list[dict[str, Any]]) -> None:
    for rank in range(3):
        for name in ("one factor", "factor of a rank without labels", "frozen head", "cap"):
            assert ranks[rank][f"slices on three: {name}"]["num_scored"] == 1
            assert ranks[rank][f"gather on three: {name}"]["num_scored"] == 0
        assert ranks[rank]["slices on three: factors"]["num_scored"] == 2
        assert ranks[rank]["slices on three: per token"]["num_scored"] == 0


def test_the_cheaper_way_is_taken(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["chosen: slices"]["sliced"] and ranks[1]["chosen: slices"]["sliced"]
    assert not ranks[0]["chosen: gather"]["sliced"]
    assert not any(found["chosen: gather on hsdp"]["sliced"] for found in ranks)
    assert sharded.slices_pay_off(8, 2048, 262_144)
    assert not sharded.slices_pay_off(8, 32_768, 262_144)
    assert not sharded.slices_pay_off(1, 2048, 262_144)


class Model(nn.Module):
    """Lookup, one layer, head and loss; the head is the embedding unless `tied` is off."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(101, 13, dtype=torch.float64)
        self.body = nn.Linear(13, 13, dtype=torch.float64)
        self.head = self.embedding if tied else nn.Linear(13, 101, bias=False, dtype=torch.float64)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.saw_dtensor = isinstance(self.head.weight, DTensor)
        rows = self.body(self.embedding(tokens)).sin()
        return linear_cross_entropy(rows, self.head.weight, labels, softcap=3.0, num_items=50)


# Name: whether it is tied, which unit of its own the head is in, the mesh.
MODELS = {
    "tied in the root": (True, None, "two"),
    "tied in a unit": (True, "embedding", "two"),
    "in the root": (False, None, "two"),
    "in a unit": (False, "head", "two"),
    "tied in a unit of three": (True, "embedding", "three"),
    "in a unit of HSDP": (False, "head", "hsdp"),
}


def gradients_of_model(
    name: str, way: bool, rank: int, mesh: DeviceMesh
) -> dict[str, torch.Tensor | bool]:
    tied, unit, mesh_name = MODELS[name]
    model = Model(tied)
    if unit is not None:
        fully_shard(getattr(model, unit), mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    _, _, labels, tokens = data_of(Case(mesh=mesh_name), rank)
    with mock.patch.object(sharded, "slices_pay_off", lambda *_: way):
        for _ in range(2):  # gradients accumulate
            model(tokens, labels).backward()
    return {n: p.grad.full_tensor() for n, p in model.named_parameters()} | {
        "saw_dtensor": model.saw_dtensor
    }


def beside_the_cases(rank: int, meshes: dict[str, DeviceMesh]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (_, _, mesh) in MODELS.items():
        for way in (SLICES, GATHER):
            if meshes[mesh].get_coordinate() is not None:
                found[f"{name}: {way}"] = gradients_of_model(name, way, rank, meshes[mesh])
    if rank < 2:
        with mock.patch.object(sharded, "slices_pay_off", lambda *_: SLICES):
            found["one backward"] = refusals_after_forward(meshes["two"])
            found["options"] = refusals_of_options(rank, meshes["two"])
            found["low rank"] = low_rank(rank, meshes["two"])
    found["layouts"] = refusals_before_anything_is_sent(rank, meshes)
    return found


def refusal(function: Any, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def refusals_after_forward(mesh: DeviceMesh) -> list[str]:
    hidden, weight, labels, _ = data_of(Case(), 0)
    hidden.requires_grad_()
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward(retain_graph=True)
    with torch.no_grad():
        again = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(again, loss) and not again.requires_grad
    return [
        refusal(loss.backward),
        refusal(
            torch.autograd.grad,
            linear_cross_entropy(hidden, weight, labels),
            hidden,
            create_graph=True,
        ),
    ]


def refusals_of_options(rank: int, mesh: DeviceMesh) -> list[str]:
    hidden, weight, labels, _ = data_of(Case(), rank)
    weight = distribute_tensor(weight, mesh, [Shard(0)])
    differing = {
        "softcap": [30.0, None],
        "label_smoothing": [0.1, 0.2],
        "z_loss_weight": [0.1, 0.2],
        "chunk_bytes": [1000, 2000],
    }
    found = [
        refusal(linear_cross_entropy, hidden, weight, labels, **{name: values[rank]})
        for name, values in differing.items()
    ]
    hidden.requires_grad_(rank == 0)
    return [*found, refusal(linear_cross_entropy, hidden, weight, labels)]


def low_rank(rank: int, mesh: DeviceMesh) -> dict[str, torch.Tensor]:
    """A LoRA on the head, sharded as the head is."""
    hidden, weight, labels, _ = data_of(Case(), rank)
    weight = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    low_weight = distribute_tensor(weight.full_tensor().detach()[:, :3], mesh, [Shard(0)])
    low_weight.requires_grad_()
    options = {"softcap": 3.0, "low_rank": (hidden[:, :3].cos(), low_weight)}
    linear_cross_entropy(hidden, weight, labels, **options).backward()
    return {"weight": weight.grad.full_tensor(), "low_weight": low_weight.grad.full_tensor()}


def refusals_before_anything_is_sent(rank: int, meshes: dict[str, DeviceMesh]) -> dict[str, str]:
    """Rank 3 alone calls: it would wait for the others if anything were sent."""
    hidden, weight, labels, _ = data_of(Case(rows=(4,) * 4, ignored=(0.0,) * 4), 0)
    hsdp = meshes["hsdp"]
    on_four = DeviceMesh("cpu", list(range(NUM_PROCESSES)))
    good = distribute_tensor(weight, on_four, [Shard(0)])
    calls = {
        "columns": (hidden, distribute_tensor(weight, on_four, [Shard(1)]), labels),
        "partial": (hidden, DTensor.from_local(weight, on_four, [Partial()]), labels),
        "twice": (hidden, distribute_tensor(weight, hsdp, [Shard(0), Shard(0)]), labels),
        "both": (hidden, distribute_tensor(weight, hsdp, [Shard(0), Shard(1)]), labels),
        "other order": (hidden, distribute_tensor(weight, hsdp, [Shard(0), Replicate()]), labels),
        "not of the mesh": (hidden, distribute_tensor(weight, meshes["two"], [Shard(0)]), labels),
        "own layout": (
            hidden,
            DTensor.from_local(
                weight[: 7 + rank], on_four, [Shard(0)], shape=weight.shape, stride=weight.stride()
            ),
            labels,
        ),
        "hidden": (distribute_tensor(hidden, on_four, [Shard(0)]), good, labels),
        "labels": (hidden, good, distribute_tensor(labels, on_four, [Shard(0)])),
        "transposed": (hidden[:, :2], good, labels),
        "stray": (hidden, good, labels + 101),
    }
    if rank != 3:
        return {}
    found = {name: refusal(linear_cross_entropy, *call) for name, call in calls.items()}
    found["low rank"] = refusal(
        linear_cross_entropy, hidden, weight, labels, low_rank=(calls["hidden"][0], weight)
    )
    found["traced"] = refusal(make_fx(lambda h: linear_cross_entropy(h, good, labels)), hidden)
    return found


LAYOUTS = {
    "columns": r"ValueError: weight: .*Shard\(dim=1\).*allowed are \[Shard\(dim=0\)\] or .*redistr",
    "partial": r"ValueError: weight: .*Partial.*allowed are",
    "twice": r"ValueError: weight: .*Shard\(dim=0\), .*allowed are",
    "both": r"ValueError: weight: .*Shard\(dim=0\), Shard\(dim=1\).*allowed are",
    "other order": r"ValueError: weight: .*Shard\(dim=0\), Replicate\(\).*allowed are",
    "not of the mesh": r"ValueError: weight: .*rank 3 does not belong.*Pass",
    "own layout": r"ValueError: weight: .*\[101, 13\] with \[10, 13\].*allowed is \[23, 13\].*Make",
    "hidden": r"TypeError: hidden: received a DTensor; only plain.*to_local\(\)",
    "labels": r"TypeError: labels: received a DTensor; only plain.*to_local\(\)",
    "low rank": r"TypeError: low_rank\[0\]: received a DTensor; only plain",
    "transposed": r"ValueError: hidden: .*\[101, 13\].*last dimensions",
    "stray": r"ValueError: labels: .*outside the vocabulary",
    "traced": r"TypeError: weight: .*torch.compile.*torch.compiler.disable",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_refusals_come_before_anything_is_sent(name: str, ranks: list[dict[str, Any]]) -> None:
    assert re.match(LAYOUTS[name], ranks[3]["layouts"][name]), ranks[3]["layouts"][name]


def test_options_that_differ_are_refused_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    wanted = [
        r"softcap.*\[30.0, 0.0\]",
        r"label_smoothing.*\[0.1, 0.2\]",
        r"z_loss_weight.*\[0.1, 0.2\]",
        r"chunk_bytes.*\[1000.0, 2000.0\]",
        r"hidden.requires_grad.*\[1.0, 0.0\]",
    ]
    for found in ranks[:2]:
        for pattern, message in zip(wanted, found["options"], strict=True):
            assert re.match(rf"ValueError: {pattern}.*on each rank", message), message


def test_one_backward_without_a_graph(ranks: list[dict[str, Any]]) -> None:
    for found in ranks[:2]:
        second, double = found["one backward"]
        assert re.match("RuntimeError: .*second backward", second), second
        assert re.match("RuntimeError: .*no second derivative", double), double


@pytest.mark.parametrize("way", [SLICES, GATHER], ids=["slices", "gather"])
@pytest.mark.parametrize("name", MODELS)
def test_fully_sharded_model(name: str, way: bool, ranks: list[dict[str, Any]]) -> None:
    tied, unit, mesh = MODELS[name]
    case = Case(mesh=mesh)
    model = Model(tied)
    for rank in range(case.num_ranks):
        _, _, labels, tokens = data_of(case, rank)
        rows = model.body(model.embedding(tokens)).sin()
        loss = reference_losses(rows, model.head.weight, labels, softcap=3.0).sum() / 50
        (2 * loss / case.num_ranks).backward()
    for rank in range(case.num_ranks):
        found = ranks[rank][f"{name}: {way}"]
        assert found.pop("saw_dtensor") == (unit is not None)
        for parameter_name, parameter in model.named_parameters():
            assert_close(found.pop(parameter_name), parameter.grad, 1e-10)
        assert not found


def test_low_rank_gathers_both_weights(ranks: list[dict[str, Any]]) -> None:
    weight = data_of(Case(), 0)[1]
    low_weight = weight[:, :3].clone().requires_grad_()
    weight.requires_grad_()
    for rank in range(2):
        hidden, _, labels, _ = data_of(Case(), rank)
        rows = torch.cat((hidden, hidden[:, :3].cos()), 1)
        losses = reference_losses(rows, torch.cat((weight, low_weight), 1), labels, 3.0)
        (losses.sum() / (labels != IGNORE).sum() / 2).backward()
    for found in ranks[:2]:
        assert_close(found["low rank"]["weight"], weight.grad, 1e-10)
        assert_close(found["low rank"]["low_weight"], low_weight.grad, 1e-10)
