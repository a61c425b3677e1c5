"""Measure the default run: wall time, peak memory of the process, and what the model learned.

    python benchmarks/default_run.py                    # seeds 0, 1 and 2, about 3 minutes each
    python benchmarks/default_run.py --seeds 0 --no-picture

Starts `accelerate launch train.py recipe=gemma4_sft` as committed, without a dashboard and without
your own configs/local, on the CPU, once for each seed. Writes benchmarks/results/default_run.json
after each seed, and the picture of the first seed's run beside it (needs matplotlib).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from environment import GIB, REPOSITORY, RESULTS, describe, write_result

# The file keeps the reader's own accelerate configuration out of the measurement.
LAUNCH = ("--quiet", "--config_file", "configs/accelerate/one_process.yml")
EXACT_MATCH = "eval/exact_match"


def arguments(seed: int | str, folder: Path | str) -> list[str]:
    """The command behind `python`."""
    chosen = [
        "train.py",
        "recipe=gemma4_sft",
        f"run.seed={seed}",
        f"run.dir={folder}",
        "tracker=none",
    ]
    if (REPOSITORY / "configs" / "local").is_dir():
        chosen.append("local=absent")
    return ["-m", "accelerate.commands.launch", *LAUNCH, *chosen]


def environment() -> dict[str, str]:
    """No GPU, and as many threads as accelerate chooses by itself."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return kept | {"CUDA_VISIBLE_DEVICES": ""}


def run_once(seed: int, folder: Path) -> tuple[float, float]:
    """(wall seconds, GiB): the peak is that of the largest process of the run, as in `time -v`."""
    log = folder / "output.log"
    with log.open("wb") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments(seed, folder)],
            cwd=REPOSITORY,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"seed {seed}: the run ended with status {process.returncode}\n{tail}")
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, usage.ru_maxrss * unit / GIB


def read_metrics(folder: Path) -> dict[str, Any]:
    """The figures of a finished run, from its metrics.jsonl."""
    paths = list(folder.glob("*/metrics.jsonl"))
    if len(paths) != 1:
        raise SystemExit(f"expected one metrics.jsonl below the run.dir, found {len(paths)}")
    records = [json.loads(line) for line in paths[0].read_text(encoding="utf-8").splitlines()]
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    last = records[-1]
    prefix = f"{EXACT_MATCH}_"
    answers = (paths[0].parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [record for record in records if "train/step_seconds" in record]
    speeds = [record["train/tokens_per_second"] for record in trained]
    return {
        "num_steps": last["step"],
        "num_answers": len(answers),
        "exact_match": last[EXACT_MATCH],
        "exact_match_by_kind": {
            key.removeprefix(prefix): value for key, value in last.items() if key.startswith(prefix)
        },
        "eval_loss_first": losses[0],
        "eval_loss_last": losses[-1],
        "training_seconds": round(sum(record["train/step_seconds"] for record in trained), 1),
        "tokens_per_second_median": round(statistics.median(speeds)),
    }


def draw(folder: Path) -> None:
    """The run's picture; what went wrong is printed, and the measurement stands."""
    run = next(folder.glob("*/metrics.jsonl")).parent
    script = REPOSITORY / "scripts" / "plot_run.py"
    picture = RESULTS / "default_run.png"
    subprocess.run([sys.executable, str(script), str(run), "-o", str(picture)], check=False)


def main() -> None:
    """Measure each seed in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--no-picture", action="store_true", help="leave default_run.png as it is")
    options = parser.parse_args()
    result: dict[str, Any] = describe("python " + " ".join(arguments("K", "TMP")))
    result["seeds"] = []
    for number, seed in enumerate(options.seeds):
        with tempfile.TemporaryDirectory(prefix="gemtune-default-run-") as temporary:
            folder = Path(temporary)
            seconds, peak_gib = run_once(seed, folder)
            measured = {"wall_seconds": round(seconds, 1), "peak_rss_gib": round(peak_gib, 3)}
            row = {"seed": seed, **measured, **read_metrics(folder)}
            if number == 0 and not options.no_picture:
                draw(folder)
        result["seeds"].append(row)
        path = write_result("default_run", result)
        print(
            f"seed {seed}: exact match {row['exact_match']:.1%}, eval/loss "
            f"{row['eval_loss_first']:.2f} -> {row['eval_loss_last']:.4f}, "
            f"{seconds:.0f} s, {peak_gib:.2f} GiB",
            flush=True,
        )
    print(f"wrote {path.relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main()
