"""What linear_cross_entropy does not do: needless matmuls, large tensors, work before refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gemtune.losses import linear_cross_entropy
from gemtune.losses.tiles import rows_per_chunk

IGNORE = -100


def problem(num_rows=37, hidden_size=13, vocab_size=101, ignored=0.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_rows, hidden_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocab_size, (num_rows,), generator=generator)
    labels[: round(num_rows * ignored)] = IGNORE
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


class Recorder(TorchDispatchMode):
    """Counts multiplications of matmuls, notes their rows, and the largest new float tensor."""

    def __init__(self):
        super().__init__()
        self.multiplications = 0
        self.largest = 0
        self.num_matmuls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:] if name == "mm" else args[1:3]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
            self.num_matmuls += 1
        assert name not in ("bmm", "baddbmm", "dot", "mv", "linear"), f"uncounted matmul {name}"
        if isinstance(result, torch.Tensor) and result.is_floating_point():
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_gradients_one_matmul(mode, reduction):
    hidden, weight, labels = problem(ignored=0.5)
    num_valid = int((labels != IGNORE).sum())
    with mode(), Recorder() as recorder:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, chunk_bytes=3000)
    assert not loss.requires_grad
    assert recorder.multiplications == num_valid * weight.numel()
    expected = F.cross_entropy(hidden @ weight.T, labels, reduction="sum")
    expected = expected if reduction == "none" else expected / num_valid
    torch.testing.assert_close(loss.sum(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("reduction", "trains", "expected"),
    [
        ("mean", (True, True), 3),
        ("mean", (True, False), 2),
        ("mean", (False, True), 2),
        ("mean", (False, False), 1),
        ("none", (True, True), 4),
    ],
)
def test_only_needed_matmuls_over_supervised_rows(reduction, trains, expected, dtype):
    hidden, weight, labels = problem(200, 16, 499, ignored=0.8, dtype=dtype)
    hidden.requires_grad_(trains[0])
    weight.requires_grad_(trains[1])
    with Recorder() as recorder:
        loss, _ = linear_cross_entropy(
            hidden,
            weight,
            labels,
            reduction=reduction,
            softcap=30.0,
            metrics=True,
            chunk_bytes=499 * 4 * 8,
        )
        if any(trains):
            loss.sum().backward()
    assert recorder.multiplications == expected * 40 * weight.numel()
    assert recorder.num_matmuls == expected * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_exceeds_the_budget(dtype, monkeypatch):
    monkeypatch.setattr("gemtune.losses.budgets.CPU_TILE_BYTES", 1 << 14)
    hidden, weight, labels = problem(400, 8, 2003, ignored=0.5, dtype=dtype)
    chunk_bytes = 2003 * 4 * 16
    with Recorder() as recorder:
        loss, _ = linear_cross_entropy(
            hidden, weight, labels, softcap=30.0, chunk_bytes=chunk_bytes, metrics=True
        )
        loss.backward()
    assert chunk_bytes > 4 * weight.numel()
    assert 0 < recorder.largest <= chunk_bytes


def test_chunks_are_even_and_within_budget():
    for num_rows in (0, 1, 99, 100, 101, 1000):
        rows = rows_per_chunk(num_rows, vocab_size=10, itemsize=4, chunk_bytes=4000)
        assert 1 <= rows <= 100
        assert -(-num_rows // rows) == -(-num_rows // 100)
    assert rows_per_chunk(5, vocab_size=10, itemsize=4, chunk_bytes=1) == 1
    assert rows_per_chunk(101, vocab_size=10, itemsize=4, chunk_bytes=4000) == 51


def test_widened_weight_slices_join(monkeypatch):
    hidden, weight, labels = problem(dtype=torch.bfloat16)
    results = []
    for slice_bytes in (1 << 24, 13 * 4 * 10):
        monkeypatch.setattr("gemtune.losses.tiles.WIDENED_WEIGHT_BYTES", slice_bytes)
        loss = linear_cross_entropy(hidden, weight, labels, softcap=30.0)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    for whole, sliced in zip(*results, strict=True):
        torch.testing.assert_close(sliced.float(), whole.float(), rtol=8e-3, atol=1e-6)


REFUSALS = {
    "hidden_size": (ValueError, "hidden.*last dimensions", {"hidden": torch.zeros(4, 5)}),
    "weight_dim": (ValueError, "weight.*shape", {"weight": torch.zeros(3)}),
    "empty_vocabulary": (ValueError, "weight.*shape", {"weight": torch.zeros(0, 3)}),
    "labels_shape": (ValueError, "labels.*Shift", {"labels": torch.zeros(5, dtype=torch.long)}),
    "device": (ValueError, "devices", {"labels": torch.zeros(4, dtype=torch.long, device="meta")}),
    "not_a_tensor": (TypeError, "labels.*torch.Tensor", {"labels": [1, 2, 3, 4]}),
    "mismatch": (TypeError, "must be equal", {"weight": torch.zeros(7, 3, dtype=torch.bfloat16)}),
    "integer_hidden": (TypeError, "hidden.*int64", {"hidden": torch.zeros(4, 3).long()}),
    "complex_weight": (TypeError, "weight.*complex", {"weight": torch.zeros(7, 3).cfloat()}),
    "float_labels": (TypeError, "labels.*float32", {"labels": torch.zeros(4)}),
    "bool_labels": (TypeError, "labels.*bool", {"labels": torch.ones(4, dtype=torch.bool)}),
    "label_large": (ValueError, r"\[7\].*0 to 6", {"labels": torch.tensor([0, 7, 1, -100])}),
    "label_negative": (
        ValueError,
        r"\[-1\].*ignore_index",
        {"labels": torch.tensor([0, -1, 1, 2])},
    ),
    "old_ignore": (
        ValueError,
        r"\[-100\]",
        {"labels": torch.tensor([0, -100, 1, 2]), "ignore_index": -1},
    ),
    "reduction": (ValueError, "reduction.*'avg'.*'mean'", {"reduction": "avg"}),
    "softcap_zero": (ValueError, "softcap.*None", {"softcap": 0.0}),
    "softcap_negative": (ValueError, "softcap.*None", {"softcap": -30.0}),
    "softcap_infinite": (ValueError, "softcap.*None", {"softcap": float("inf")}),
    "softcap_nan": (ValueError, "softcap.*None", {"softcap": float("nan")}),
    "smoothing_one": (ValueError, "label_smoothing", {"label_smoothing": 1.0}),
    "smoothing_negative": (ValueError, "label_smoothing", {"label_smoothing": -0.1}),
    "z_loss": (ValueError, "z_loss_weight", {"z_loss_weight": -1e-4}),
    "chunk_zero": (ValueError, "chunk_bytes", {"chunk_bytes": 0}),
    "chunk_negative": (ValueError, "chunk_bytes", {"chunk_bytes": -5}),
    "chunk_float": (ValueError, "chunk_bytes", {"chunk_bytes": 1e9}),
    "items_zero": (ValueError, "num_items.*positive", {"num_items": 0}),
    "items_negative": (ValueError, "num_items.*positive", {"num_items": torch.tensor(-3)}),
    "items_vector": (TypeError, r"num_items.*\[2\]", {"num_items": torch.tensor([3, 4])}),
    "items_float": (TypeError, "num_items.*float", {"num_items": 3.5}),
    "items_per_token": (ValueError, "num_items.*'none'", {"num_items": 3, "reduction": "none"}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_come_before_any_matmul(case):
    error, message, changed = REFUSALS[case]
    arguments = {
        "hidden": torch.ones(4, 3),
        "weight": torch.ones(7, 3),
        "labels": torch.tensor([0, 6, 2, -100]),
    }
    linear_cross_entropy(**arguments)
    with Recorder() as recorder, pytest.raises(error, match=message):
        linear_cross_entropy(**(arguments | changed))
    assert recorder.num_matmuls == 0


@pytest.mark.parametrize("name", ["hidden", "labels"])
def test_dtensor_is_refused_but_for_the_weight(name):
    """A sharded weight is allowed: see tests/distributed/test_sharded_loss.py."""

    class Sharded(torch.Tensor):
        device_mesh = None

    arguments = dict(zip(("hidden", "weight", "labels"), problem(), strict=True))
    arguments[name] = arguments[name].detach().as_subclass(Sharded)
    with pytest.raises(TypeError, match=rf"{name}: received a DTensor.*to_local"):
        linear_cross_entropy(**arguments)


def test_mismatched_float64_is_refused_under_autocast_too():
    hidden, weight, labels = problem()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="must be equal"):
        linear_cross_entropy(hidden.float(), weight, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(hidden, weight, labels).dtype == torch.float64


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_half_gradients_share_the_buffer_of_the_logits(softcap, monkeypatch):
    """The layout used on CUDA, with its half-to-float32 matmuls emulated on the CPU."""

    def emulated(out, a, b, *, alpha=1.0, keep=False):
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        out.copy_(alpha * (a.double() @ b.double()) + (out.double() if keep else 0.0))

    hidden, weight, labels = problem(512, 64, 997, ignored=0.25, dtype=torch.bfloat16)
    # Leaves in float64, or autograd would round the reference.
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    logits = exact[0] @ exact[1].T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    expected = F.cross_entropy(logits, labels)
    exact_grads = torch.autograd.grad(expected, exact)

    monkeypatch.setattr("gemtune.losses.tiles.mixed_matmul_support", lambda *_: (True, True))
    monkeypatch.setattr("gemtune.losses.tiles.multiply_into", emulated)
    monkeypatch.setattr("gemtune.losses.budgets.CPU_TILE_BYTES", 997 * 4 * 7)
    for num_chunks in (1, 4):
        loss = linear_cross_entropy(
            hidden, weight, labels, softcap=softcap, chunk_bytes=997 * 4 * (384 // num_chunks)
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        grads = torch.autograd.grad(loss, (hidden, weight))
        for ours, theirs in zip(grads, exact_grads, strict=True):
            assert (ours.double() - theirs).norm() <= 2.6e-3 * theirs.norm()
