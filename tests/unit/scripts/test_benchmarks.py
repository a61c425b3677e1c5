"""BENCHMARKS.md says what the result files say; these name their setting, and no path of it."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[3]
RENDER = REPOSITORY / "benchmarks" / "render.py"
TABLES = [
    REPOSITORY / "benchmarks" / name
    for name in ("tables.py", "step_tables.py", "compilation_tables.py")
]
DOCUMENTS = ("BENCHMARKS.md", "README.md", "RELIABILITY.md")
RESULTS = sorted((REPOSITORY / "benchmarks" / "results").glob("*.json"))
Load = Callable[[str], Any]
TINY = ["--rows=48", "--hidden=16", "--vocabulary=160", "--repetitions=1", "--no-memory"]
HEADER = {"command", "date", "git_revision", "machine", "os", "python", "torch", "transformers"}


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)


def test_the_documents_are_up_to_date() -> None:
    done = run(RENDER, "--check")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Documents, results and renderer in a folder of their own."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for path in (RENDER, *TABLES, *RESULTS, *(REPOSITORY / name for name in DOCUMENTS)):
        (tmp_path / path.relative_to(REPOSITORY)).write_bytes(path.read_bytes())
    return tmp_path


def test_a_changed_result_is_noticed_and_written(copy: Path) -> None:
    path = copy / "benchmarks" / "results" / "default_run.json"
    result = json.loads(path.read_text())
    next(row for row in result["seeds"] if row["seed"] == 0)["exact_match"] = 0.123
    path.write_text(json.dumps(result))
    render = copy / "benchmarks" / "render.py"

    before = (copy / "BENCHMARKS.md").read_text()
    done = run(render, "--check")
    assert done.returncode == 1
    assert "BENCHMARKS.md and README.md" in done.stderr
    assert (copy / "BENCHMARKS.md").read_text() == before, "--check changes nothing"

    assert run(render).returncode == 0
    assert "| CPU, 0 | 12.3% |" in (copy / "BENCHMARKS.md").read_text()
    assert "-->12.3%<!--" in (copy / "README.md").read_text()
    assert run(render, "--check").returncode == 0


@pytest.mark.parametrize("name", ["linear_cross_entropy", "linear_cross_entropy_cuda"])
def test_without_a_result_the_table_says_not_measured(copy: Path, name: str) -> None:
    (copy / "benchmarks" / "results" / f"{name}.json").unlink(missing_ok=True)
    render = copy / "benchmarks" / "render.py"
    assert run(render).returncode == 0
    text = (copy / "BENCHMARKS.md").read_text()
    assert f"<!-- results: {name} -->\nnot measured\n<!-- /results -->" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_names_its_setting_and_no_path(path: Path) -> None:
    text = path.read_text()
    result = json.loads(text)
    assert result.keys() >= HEADER
    assert {"cpu", "num_cores", "ram_gib"} <= result["machine"].keys()
    places = (Path.home(), Path(tempfile.gettempdir()), Path(__file__).parents[3])
    assert not [place for place in places if f"{place}/" in text]


def test_a_command_says_neither_where_it_was_nor_where_its_result_went(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--device", "cuda", "--output", "/home/me/results/name", "--rows", "2"]
    monkeypatch.setattr(sys, "argv", ["/home/me/benchmarks/patches.py", *words])
    said = load("environment").typed_command("/home/me/benchmarks/patches.py")
    assert said == "python benchmarks/patches.py --device cuda --rows 2"


Compare = Callable[..., dict[str, Any]]


@pytest.fixture
def compare(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compare:
    """Runs benchmarks/linear_cross_entropy.py on tiny sizes; what it writes."""
    script = load("linear_cross_entropy")
    # The threads of this process are not for a test to set.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)

    def compare(*arguments: str) -> dict[str, Any]:
        command = ["benchmarks/linear_cross_entropy.py", *TINY, *arguments]
        monkeypatch.setattr(sys, "argv", [*command, f"--output={tmp_path / 'result'}"])
        script.main()
        return json.loads((tmp_path / "result.json").read_text())

    return compare


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_lm_head_comparison_has_its_peers(compare: Compare, load: Load, dtype: str) -> None:
    result = compare("--ignored", "0", "50", f"--dtype={dtype}")
    assert result["settings"]["dtype"] == dtype
    assert result["settings"]["device"] == "cpu"
    assert result["not_measured"]["liger"] == "Liger Kernel: not measured (needs a GPU with Triton)"
    assert len(result["cases"]) == 4, "two shares of ignored labels, full and frozen head"
    for case in result["cases"]:
        assert case["rows"].keys() == result["contestants"].keys()
        assert case["rows"]["trl"]["differences"].keys() == (
            {"loss", "grad_hidden"} | (set() if case["frozen_head"] else {"grad_head"})
        )
    text = load("tables").linear_cross_entropy(result)
    assert text.count("| `trl` |") == 4, "time and ratio, for each head"
    assert text.count("| Liger Kernel (needs a GPU with Triton) | not measured |") == 6
    assert f"- Peers: trl {result['peers']['trl']}" in text


def tiny_case(load: Load, frozen: bool = False, dtype: str = "float32") -> Any:
    sizes = {"rows": 48, "hidden": 16, "vocabulary": 160, "softcap": 30.0}
    options = argparse.Namespace(**sizes, device="cpu", dtype=dtype)
    return load("linear_cross_entropy").make_case(options, 50, frozen)


@pytest.mark.parametrize("frozen", [False, True])
def test_trl_and_gemtune_compute_the_same(load: Load, frozen: bool) -> None:
    case = tiny_case(load, frozen)
    found = load("linear_cross_entropy").check_agreement(case, ["gemtune", "trl", "transformers"])
    assert max(found["trl"].values()) < 1e-5
    assert max(found["transformers"].values()) < 1e-5


def loss_without_the_slope_of_the_cap(case: Any) -> torch.Tensor:
    """The right loss; its gradient is that of logits that the cap leaves alone."""
    logits = F.linear(case.hidden.float(), case.weight.float())
    capped = case.softcap * torch.tanh(logits / case.softcap)
    return F.cross_entropy(logits + (capped - logits).detach(), case.labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_contestant_that_computes_something_else_is_refused(
    load: Load, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    script = load("linear_cross_entropy")
    gemtune, _ = script.CONTESTANTS["gemtune"]
    faults = {
        "trl: loss differs": lambda case: gemtune(case) * 1.01,
        "trl: grad_hidden differs": loss_without_the_slope_of_the_cap,
        "trl: gives loss, grad_hidden; gemtune gives loss, grad_hidden, grad_head": (
            lambda case: gemtune(case._replace(weight=case.weight.detach()))
        ),
    }
    for message, fault in faults.items():
        monkeypatch.setitem(script.CONTESTANTS, "trl", (fault, ""))
        with pytest.raises(SystemExit, match=message):
            script.check_agreement(tiny_case(load, dtype=dtype), ["gemtune", "trl"])


def test_a_contestant_that_does_not_fit_says_so(
    compare: Compare, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(case: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(load("linear_cross_entropy").CONTESTANTS, "transformers", (too_large, "it"))
    result = compare("--ignored", "0")
    assert [case["out_of_memory"] for case in result["cases"]] == [["transformers"]] * 2
    text = load("tables").linear_cross_entropy(result)
    assert text.count("| `transformers` | out of memory |") == 6


def test_a_peer_that_cannot_run_says_why(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = load("lm_head_contestants")
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    assert contestants.not_measured("cpu")["trl"] == "TRL: not measured (trl is not installed)"
    needs_triton = "Liger Kernel: not measured (needs a GPU with Triton)"
    assert contestants.not_measured("cuda")["liger"] == needs_triton
    monkeypatch.setattr(contestants, "find_spec", lambda name: object())
    monkeypatch.setattr(contestants, "version", lambda name: "1.9.0")
    old = "TRL: not measured (trl 1.9.0 is installed; needs 1.16)"
    assert contestants.not_measured("cuda")["trl"] == old
    assert "liger" not in contestants.not_measured("cuda")
    assert contestants.not_measured("cpu")["liger"] == needs_triton


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a CUDA device")
def test_cuda_where_there_is_none_is_refused(
    compare: Compare, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare("--device=cuda")
    assert "--device: received cuda, but torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_lm_head_comparison_on_a_gpu(compare: Compare, load: Load) -> None:
    result = compare("--device=cuda", "--dtype=bfloat16", "--memory", "--ignored", "50")
    assert result["settings"]["device"] == "cuda"
    rows = result["cases"][0]["rows"]
    assert rows["gemtune"]["peak_mib"] >= 0
    assert ("liger" in rows) != ("liger" in result["not_measured"])
    assert "on the GPU" in load("tables").linear_cross_entropy(result)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_lower_bound_in_chunks_makes_the_same_products(
    load: Load, monkeypatch: pytest.MonkeyPatch, frozen: bool
) -> None:
    contestants, case = load("lm_head_contestants"), tiny_case(load, frozen)
    # 24 rows have a label: chunks of 7, and one of 3.
    monkeypatch.setattr(contestants, "LOWER_BOUND_LOGITS_BYTES", 7 * 160 * 4)
    multiply = contestants.lower_bound(case)
    multiply()
    grad_rows, grad_weight = multiply()
    rows, weight = case.hidden.detach()[case.labels != -100].double(), case.weight.detach().double()
    torch.testing.assert_close(grad_rows.double(), rows @ weight.t() @ weight, rtol=1e-4, atol=1e-3)
    if frozen:
        assert grad_weight is None
    else:
        expected = weight @ rows.t() @ rows
        torch.testing.assert_close(grad_weight.double(), expected, rtol=1e-4, atol=1e-3)


def test_the_time_ends_when_the_device_is_done(load: Load) -> None:
    events: list[str] = []
    run, between, wait = (
        functools.partial(events.append, what) for what in ("run", "between", "wait")
    )
    load("measure").time_in_turn({"one": run}, 1, between, wait)
    assert events == ["between", "wait", "run", "wait"] * 2 + ["between"]


def test_seconds_are_those_of_the_clock(load: Load) -> None:
    squares = (float(tick**2) for tick in range(99))
    seconds = load("measure").time_in_turn(
        {"one": lambda: None, "two": lambda: None}, 1, clock=lambda: next(squares)
    )
    # It was read once for each in the untimed round; then "two" begins.
    assert seconds == {"two": [3.0**2 - 2.0**2], "one": [5.0**2 - 4.0**2]}


def test_peaks_that_rise_are_found(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load("memory_plan")
    before = {"planned_mib": 100.0, "measured_mib": {"min": 110.0, "median": 112.0, "max": 115.0}}
    now = {"planned_mib": 103.1, "measured_mib": {"min": 118.0, "median": 125.0, "max": 130.0}}
    found = [plan.print_rise(*each) for each in plan.rises("tiny_full", now, before)]
    assert found == [True, False]  # 118 is within 3% of the 115 that were seen before
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "tiny_full planned: 103 MiB, FAILED: more than 3% above the committed 100 MiB"
    assert set(plan.GATE_CASES) < set(plan.CASES)
