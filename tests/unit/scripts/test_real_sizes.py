"""Contestants train the same, one that does not is refused, and figures are put together right."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Gemma4Config

from gemtune.models import Processing

REPOSITORY = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
NUM_STEPS = 3

Load = Callable[[str], Any]


def tiny_task(
    load: Load, contestant: str, training: str, content: str, labels_moved: bool = False
) -> Any:
    """Three steps on two rows of the tiny model, ready to be made."""
    sizes = load("real_sizes")
    options = SimpleNamespace(
        dtype="float32", rows=2, row_tokens=64, learned_percent=30, images_per_row=2,
        soft_tokens=12, checkpointing=True, device="cpu",
    )  # fmt: skip
    case = sizes.Case("tiny", training, content)
    config = sizes.configuration(options, case, contestant)
    processing = Processing(
        None, None, Gemma4Config.from_dict(sizes.shape("tiny")), str(sizes.SHAPES), {}, None, {}
    )
    base = load("session").build_base(config, processing, CPU)
    batch = sizes.make_batch(options, case, base)
    if labels_moved:
        batch["labels"] = batch["labels"].roll(-1, dims=1)
    return load("whole_steps").Task(config, base, batch, CPU, NUM_STEPS)


def first_steps(load: Load, training: str, content: str, *names: str) -> dict[str, Any]:
    """Contestant -> its task, all steps made."""
    contestants = load("whole_steps").CONTESTANTS
    tasks = {name: tiny_task(load, name, training, content) for name in names}
    for name, task in tasks.items():
        contestants[name].run(task)
    return tasks


@pytest.mark.usefixtures("new_runtime")
@pytest.mark.parametrize("content", ["text", "images"])
@pytest.mark.parametrize("training", ["full", "lora"])
def test_all_contestants_make_the_same_steps(load: Load, training: str, content: str) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: it is not compared")
    names = tuple(load("whole_steps").CONTESTANTS)
    tasks = first_steps(load, training, content, *names)
    comparison = load("step_comparison")
    first = {name: task.recorder.first for name, task in tasks.items()}
    assert comparison.refuse_disagreement("tiny", first, "float32").keys() == set(names)
    expected = [float(loss) for loss in tasks["transformers"].recorder.losses]
    assert len(set(expected)) == NUM_STEPS, "each step trains"
    for name, task in tasks.items():
        recorder = task.recorder
        assert [float(x) for x in recorder.losses] == pytest.approx(expected, rel=1e-4), name
        assert len(recorder.seconds) == len(recorder.peaks_gib) == NUM_STEPS
        assert min(recorder.seconds) > 0 and min(recorder.peaks_gib) > 0.1
    trained = {name: set(outcome.gradients) for name, outcome in first.items()}
    assert all(found == trained["transformers"] for found in trained.values())
    assert len(trained["gemtune"]) > 10


@pytest.mark.usefixtures("new_runtime")
def test_a_contestant_with_other_labels_is_refused(load: Load) -> None:
    tasks = first_steps(load, "lora", "text", "transformers")
    wrong = tiny_task(load, "gemtune", "lora", "text", labels_moved=True)
    load("whole_steps").CONTESTANTS["gemtune"].run(wrong)
    first = {"transformers": tasks["transformers"].recorder.first, "gemtune": wrong.recorder.first}
    comparison = load("step_comparison")
    # In bfloat16, whose bound is the wider one, it is the gradients that tell.
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(SystemExit, match="case: gemtune does not train what the others train"):
            comparison.refuse_disagreement("case", first, dtype)


def test_a_contestant_that_trains_other_parameters_is_refused(load: Load) -> None:
    comparison, outcome = load("step_comparison"), load("workbench").Outcome
    same = {"a": torch.ones(3)}
    first = {"transformers": outcome(2.0, same), "gemtune": outcome(2.0, same | {"b": same["a"]})}
    with pytest.raises(SystemExit, match="its gradients by inf"):
        comparison.refuse_disagreement("case", first, "bfloat16")
    first["gemtune"] = outcome(math.nan, same)
    with pytest.raises(SystemExit, match="its loss differs by nan"):
        comparison.refuse_disagreement("case", first, "bfloat16")


def part(*seconds: float, peak: float = 1.0) -> dict[str, Any]:
    batch = {"tokens": 100, "supervised_tokens": 30, "images": 0}
    found = {"seconds": list(seconds), "peak_gib": peak, "reserved_gib": peak + 1}
    return found | {"losses": [3.0], "batch": batch, "parameters": 9, "trained_parameters": 4}


def test_times_are_medians_and_ratios_are_taken_within_a_round(load: Load) -> None:
    parts = {
        "transformers": [part(2.0, 2.0, 9.0), part(4.0, 4.0, 4.0)],
        "gemtune": [part(1.0, 1.0, 1.0), part(1.0, 1.0, 9.0, peak=2.0)],
        "trl": [part(1.0), {"out_of_memory": True}],
    }
    differences = {name: {"loss": 0.0, "gradients": 0.0} for name in parts}
    case = load("step_comparison").case_of(parts, differences)
    assert case["rounds"] == 2 and case["batch"]["tokens"] == 100
    row = case["rows"]["gemtune"]
    assert row["seconds"] == {"median": 1.0, "min": 1.0, "max": 9.0}
    assert row["tokens_per_second"] == 100
    assert row["ratio"] == {"median": 0.375, "min": 0.25, "max": 0.5}
    assert row["peak_gib"] == {"median": 1.5, "min": 1.0, "max": 2.0}
    assert case["rows"]["trl"] == {"out_of_memory": True}


def test_where_the_reference_does_not_fit_there_are_no_ratios(load: Load) -> None:
    parts = {"transformers": [{"out_of_memory": True}], "gemtune": [part(1.0)]}
    case = load("step_comparison").case_of(parts, {"gemtune": {"loss": 0.0, "gradients": 0.0}})
    assert "ratio" not in case["rows"]["gemtune"]
    nothing = load("step_comparison").case_of({"gemtune": [{"out_of_memory": True}]}, {})
    assert nothing == {"rounds": 1, "rows": {"gemtune": {"out_of_memory": True}}}


def result_of(cases: dict[str, Any], **more: Any) -> dict[str, Any]:
    machine = {"cpu": "C", "num_cores": 2, "ram_gib": 8, "load_before": 0.1}
    head = dict.fromkeys(("command", "os", "python", "torch", "transformers", "gemtune"), "x")
    head |= {"git_revision": "r", "date": "d", "machine": machine}
    settings = {"checkpointing": True, "device": "cuda", "dtype": "bfloat16", "threads": 1}
    settings |= {"steps": 20, "warm_up": 3, "rows": 2, "row_tokens": 2048, "learned_percent": 30}
    contestants = {"transformers": "stock", "trl": "TRL", "gemtune": "ours"}
    bounds = {"loss": 2e-3, "gradients": 0.5}
    result = {"settings": settings, "contestants": contestants, "bounds": bounds, "peers": {}}
    return head | result | {"not_measured": {}, "cases": cases} | more


def test_the_table_says_what_was_not_measured_and_why(load: Load) -> None:
    parts = {"transformers": [{"out_of_memory": True}], "gemtune": [part(0.5)]}
    case = load("step_comparison").case_of(parts, {"gemtune": {"loss": 0.0, "gradients": 0.0}})
    late = {"not_measured": load("child_process").NO_TIME}
    text = load("step_tables").real_sizes(
        result_of(
            {"e2b_full_text": case, "e4b_lora_text": late},
            not_measured={"trl": "trl is not installed"},
        )
    )
    assert "| stock | out of memory |" in text
    assert "| TRL (trl is not installed) | not measured |" in text
    assert "| ours | 500 (500–500) | 200 |  | 1.00 (1.00–1.00) | 2.00 (2.00–2.00) |" in text
    assert "**`e4b_lora_text`**: not measured (the time limit was reached)" in text


def test_a_process_has_until_the_deadline_and_a_failed_one_is_quoted(
    load: Load, tmp_path: Path
) -> None:
    child = load("child_process")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, time\nprint('noise')\n"
        "if sys.argv[1] == 'wait': time.sleep(60)\n"
        "if sys.argv[1] == 'fail': sys.exit('no such thing')\n"
        "print('{\"found\": 1}')\n"
    )

    def found(word: str, seconds: float) -> Any:
        deadline = child.Deadline(seconds)
        return child.found_by(str(script), word, environment={}, deadline=deadline)

    assert found("work", 0) == found("work", 60) == {"found": 1}
    with pytest.raises(child.OutOfTimeError):
        found("wait", 1.0)
    with pytest.raises(SystemExit, match="no such thing"):
        found("fail", 0)
    with pytest.raises(child.OutOfTimeError):  # before it begins
        child.Deadline(-1.0).seconds_left()


def test_wheels_are_unpacked_and_an_empty_folder_is_refused(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = load("real_sizes")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert sizes.unpack(None, str(tmp_path)) == ""
    with pytest.raises(SystemExit, match="which has no"):
        sizes.unpack(str(tmp_path), str(tmp_path))
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried/__init__.py", "")
    folder = tmp_path / "site"
    assert sizes.unpack(str(tmp_path), str(folder)) == str(folder)
    assert (folder / "carried" / "__init__.py").exists() and str(folder) in sys.path


# A machine with a GPU may have no more than this.
WITHOUT = ("hydra", "omegaconf", "datasets", "trl", "wandb", "trackio")
BARE = f"""
import sys
for name in {WITHOUT!r}:
    sys.modules[name] = None  # an import of it fails
sys.path[:0] = ["benchmarks", "src"]
sys.argv = ["real_sizes.py"]
import torch
from transformers import Gemma4Config
import memory_plan_cuda
import real_sizes
from session import build_base
from whole_steps import CONTESTANTS, Task
from gemtune.models import Processing
torch.set_num_threads(1)
assert real_sizes.missing() == {{"trl": "trl is not installed"}}, real_sizes.missing()
options = real_sizes.parse()
options.row_tokens, options.soft_tokens = 64, 12
case = real_sizes.Case("tiny", "lora", "text")
config = real_sizes.configuration(options, case, "gemtune")
shape = Gemma4Config.from_dict(real_sizes.shape("tiny"))
processing = Processing(None, None, shape, str(real_sizes.SHAPES), {{}}, None, {{}})
device = torch.device("cpu")
base = build_base(config, processing, device)
task = Task(config, base, real_sizes.make_batch(options, case, base), device, 2)
CONTESTANTS["gemtune"].run(task)
plan = memory_plan_cuda.Case("bundled:tiny", "lora", 64)
assert memory_plan_cuda.plan(plan, "cuda")["gib"]["backward"] > 0
print("losses", *map(float, task.recorder.losses))
"""


def test_it_runs_where_neither_hydra_nor_omegaconf_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE],
        cwd=REPOSITORY,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()[-1].split()) == 3
