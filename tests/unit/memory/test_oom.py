"""The report of an out-of-memory error: which errors it takes, and what it says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemtune.errors import TrainingError
from gemtune.memory.oom import (
    Place,
    RunFacts,
    advice,
    is_out_of_memory,
    message,
    remove_reports,
    report_text,
    reported_when_out_of_memory,
)

PLAN = {
    "peak_bytes": 3 << 30,
    "phase": "backward",
    "batch": "2 rows, 4,096 tokens",
    "phases": {
        "forward": {"peak_bytes": 2 << 30, "by_kind": {}, "by_module": {}},
        "backward": {
            "peak_bytes": 3 << 30,
            "by_kind": {"parameters": 1 << 30, "forward": 2 << 30, "inputs": 0},
            "by_module": {"layers.*.mlp": 1 << 30, "layers.*": 1 << 29},
        },
    },
    "proposals": [
        {
            "overrides": ["patches=[a]"], "cost": "none",
            "peak_bytes": 3 << 30, "fits": False, "saves": False,
        },
        {
            "overrides": ["model.gradient_checkpointing=true"], "cost": "1/3 more time",
            "peak_bytes": 1 << 30, "fits": True, "saves": True,
        },
    ],
}  # fmt: skip
FACTS = RunFacts(
    checkpoint="runs/a/checkpoints/step_00000016",
    advice=["this", "then that"],
    plan_command="python scripts/plan_memory.py model=e2b",
    holdings=lambda: {"weights of layers.*": 5 << 29, "tensors of 3 float32": 12},
)
PLACE = Place(
    rank=3,
    step=17,
    phase="backward of micro-batch 2 of 4",
    rows=["chat.jsonl line 5", "chat.jsonl line 9"],
    shapes={"input_ids": [2, 2048], "pixel_values": [3, 2520, 768]},
    num_tokens=3071,
    peaks_gib={"forward": 1.5, "loss": float("nan"), "backward": 2.25},
    device=torch.device("cpu"),
    source="the meter",
    facts=FACTS,
)


def real_cpu_error() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    return raised.value


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (real_cpu_error(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyError("x"), False),
    ],
)
def test_which_errors(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_what_it_says() -> None:
    with pytest.raises(TrainingError) as raised, reported_when_out_of_memory(lambda: PLACE):
        torch.empty(1 << 60)
    lines = str(raised.value).splitlines()
    assert lines[0] == "out of memory on rank 3 in step 17, phase backward of micro-batch 2 of 4"
    assert "can't allocate memory" in lines[1]
    assert lines[2].endswith(
        "2 rows, 3071 tokens; input_ids [2, 2048], pixel_values [3, 2520, 768]"
    )
    assert lines[3] == "  rows: chat.jsonl line 5; chat.jsonl line 9"
    assert "GiB resident now" in lines[4]
    assert lines[5].endswith("GiB: forward 1.50, backward 2.25 (the meter)")
    assert lines[6].endswith("The newest checkpoint is runs/a/checkpoints/step_00000016.")
    assert lines[-2:] == ["  1. this", "  2. then that"]
    assert message(PLACE, MemoryError()).splitlines()[1] == "  MemoryError"
    anew = message(replace(PLACE, facts=RunFacts()), MemoryError())
    assert "There is no checkpoint yet." in anew


def test_many_rows_are_in_the_report_only() -> None:
    rows = [f"line {number}" for number in range(32)]
    said = message(replace(PLACE, rows=rows), MemoryError())
    assert "  rows: line 0; line 1; line 2; line 3; 28 more\n" in said
    text = report_text(replace(PLACE, rows=rows, facts=RunFacts()), MemoryError())
    assert all(f"- line {number}\n" in text for number in range(32))
    assert "There is no checkpoint yet" in text and "There is no plan" in text


def test_the_plan_takes_the_place_of_general_advice() -> None:
    planned = replace(PLACE, facts=replace(FACTS, plan=PLAN))
    said = message(planned, MemoryError())
    assert "  planned: 3.00 GiB of tensors, in backward" in said
    # Only what saves anything.
    assert said.splitlines()[-1] == (
        "  1. model.gradient_checkpointing=true: 1.00 GiB planned, fits (1/3 more time)"
    )
    nothing = replace(planned, facts=replace(FACTS, plan=PLAN | {"proposals": []}))
    assert message(nothing, MemoryError()).endswith("  1. this\n  2. then that")


def test_the_report_on_disk(tmp_path: Path) -> None:
    place = replace(PLACE, facts=replace(FACTS, plan=PLAN, folder=tmp_path))
    for rank, name in ((3, "oom.md"), (5, "oom_rank_5.md")):
        with (
            pytest.raises(TrainingError) as raised,
            reported_when_out_of_memory(lambda rank=rank: replace(place, rank=rank)),
        ):
            torch.empty(1 << 60)
        assert str(raised.value).splitlines()[-1] == f"All of it: {tmp_path / name}"
    text = (tmp_path / "oom.md").read_text()
    assert text.startswith("# Out of memory on rank 3 in step 17, backward of micro-batch 2 of 4\n")
    for part in (
        "| `pixel_values` | [3, 2520, 768] |",
        "- chat.jsonl line 9",
        "| `layers.*` | 512.0 MiB |",
        "| forward | 1.50 GiB | 2.00 GiB |",
        "| loss | not reached |  |",
        "| backward | 2.25 GiB | 3.00 GiB |",
        "| weights of layers.* | 2.50 GiB |",
        "| `layers.*.mlp` | 1.00 GiB |",
        "| parameters | 1.00 GiB |",
        "1. model.gradient_checkpointing=true: 1.00 GiB planned, fits (1/3 more time)",
        "    python scripts/plan_memory.py model=e2b",
        "`runs/a/checkpoints/step_00000016`",
    ):
        assert part in text, part
    assert "| inputs |" not in text
    remove_reports(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails() -> dict[str, int]:
        raise MemoryError

    facts = replace(FACTS, folder=tmp_path, holdings=fails)
    with (
        pytest.raises(TrainingError, match="out of memory on rank 3"),
        reported_when_out_of_memory(lambda: replace(PLACE, facts=facts)),
    ):
        torch.empty(1 << 60)
    assert "gemtune, rank 3: no oom.md: MemoryError()" in capsys.readouterr().out


def test_another_error_is_left_alone() -> None:
    error = RuntimeError("shapes")
    with pytest.raises(RuntimeError) as raised, reported_when_out_of_memory(lambda: PLACE):
        raise error
    assert raised.value is error


def test_advice_depends_on_what_is_on() -> None:
    settings = {
        "micro_batch_size": 4,
        "max_length": 2048,
        "gradient_checkpointing": False,
        "recomputes_all": True,
        "patches_off": ["rms_norm"],
        "adapter": False,
        "world_size": 2,
        "sharded": False,
        "mixed_precision": False,
        "state_on_gpu": True,
    }
    all_of_it = advice(**settings)
    starts = ("loop.micro", "model.gradient", "patches", "optim.offload", "parallel=fsdp2")
    starts += ("data.max", "recipe=")
    assert all(line.startswith(start) for line, start in zip(all_of_it, starts, strict=True))
    assert "loop.micro_batch_size=2 (now 4)" in all_of_it[0]
    done = settings | {
        "micro_batch_size": 1,
        "gradient_checkpointing": True,
        "patches_off": [],
        "adapter": True,
        "sharded": True,
    }
    assert [line.split()[0] for line in advice(**done)] == ["data.max_length"]
    some = advice(**done | {"recomputes_all": False})
    assert some[0].startswith("without model.recomputed_layers:") and len(some) == 2
