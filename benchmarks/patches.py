"""What each patch costs and saves: peak memory, bytes kept for the backward pass, step time.

    python scripts/benchmark.py suite=patches                      # CPU, 6 layers of E2B's widths
    python scripts/benchmark.py suite=patches size=e2b device=cuda
    python scripts/benchmark.py --help                             # every key

One model with random weights, one batch. Contestants: no patch, each patch alone, the default set,
all, and all but each. They must agree in loss and gradients, or nothing is written. Writes
patches_SIZE_DEVICE.json and, where matplotlib is installed, the same name .png.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import REPOSITORY, RESULTS, describe, write_result
from measure import MIB, peak_in_new_process, ratios, spread
from models import BATCHES
from settings import INTERNAL, Settings, parse
from tables import price_tables
from workbench import Outcome, Workbench, bounds, errors, refuse_wrong

from gemtune.errors import ConfigError, UserError
from gemtune.memory import PeakTracker
from gemtune.models import PARTS
from gemtune.patches import available, default, resolve
from gemtune.patches.base import APPLIED

ENTRY = REPOSITORY / "scripts" / "benchmark.py"
STARTED = time.perf_counter()
NONE, DEFAULT, ALL, ALL_BUT = "none", "default", "all", "all but "
MEASURED, NOT_MEASURED = "measured", "not measured"
Row = dict[str, Any]


class Contestant(NamedTuple):
    """A name, and the patches that it stands for."""

    name: str
    patches: tuple[str, ...]


def contestants(model: Any, chosen: list[str]) -> tuple[list[Contestant], list[Row]]:
    """The most important first; and a row for each patch that does nothing to this model."""
    names, left_out = [], []
    for name in chosen:
        plan = resolve(name).plan(model)
        if plan.status == APPLIED:
            names.append(name)
        else:
            left_out.append(empty_row(Contestant(name, (name,)), plan.status, plan.reason))
    none, everything = Contestant(NONE, ()), Contestant(ALL, tuple(names))
    alone = [Contestant(name, (name,)) for name in names]
    usual = Contestant(DEFAULT, tuple(n for n in names if n in default()))
    all_but = [Contestant(ALL_BUT + n, tuple(m for m in names if m != n)) for n in names]
    # One name for each set of patches: the first here.
    named: dict[tuple[str, ...], Contestant] = {}
    for contestant in [none, *alone, everything, usual, *all_but]:
        named.setdefault(contestant.patches, contestant)
    by_importance = [none, everything, *alone, usual, *all_but]
    return [c for c in by_importance if named[c.patches] is c], left_out


def empty_row(contestant: Contestant, status: str, reason: str) -> Row:
    keys = ("seconds", "ratio", "peak_mib", "peak_vs_none", "saved_mib", "saved_vs_none")
    row: Row = {"name": contestant.name, "patches": list(contestant.patches)}
    row |= {"status": status, "reason": reason} | dict.fromkeys(keys)
    return row | {"loss_error": None, "gradient_error": None}


class Suite:
    """The measurements, and the rows that they fill."""

    def __init__(self, bench: Workbench, words: list[str]) -> None:
        self.bench, self.settings, self.words = bench, bench.settings, words
        chosen = self.settings.patches or list(available())
        self.contestants, self.left_out = contestants(bench.model, chosen)
        reason = f"limit_seconds={self.settings.limit_seconds:g} was reached"
        self.rows = {c.name: empty_row(c, NOT_MEASURED, reason) for c in self.contestants}
        self.reference: Outcome | None = None
        self.bounds = (math.nan, math.nan)
        self.turn_seconds: dict[str, float] = {}
        self.rounds = 0

    def seconds_left(self) -> float:
        limit = self.settings.limit_seconds
        return limit - (time.perf_counter() - STARTED) if limit else math.inf

    def look_at_each(self) -> None:
        """Agreement, bytes kept and, on CUDA, the peak; and how long a turn takes."""
        on_cuda = self.bench.device.type == "cuda"
        if self.seconds_left() > 0:
            self.say("reference in float32")
            self.reference = self.bench.reference()
            if on_cuda:
                self.bench.step()  # what a first step loads
        for number, contestant in enumerate(self.contestants, 1):
            if self.seconds_left() <= 0:
                return
            self.say(f"{number}/{len(self.contestants)} {contestant.name}")
            row, start = self.rows[contestant.name], time.perf_counter()
            with self.bench.patched(*contestant):
                num_bytes, outcome = self.bench.saved_bytes()
                found = errors(outcome, self.reference)
                if contestant.name == NONE:
                    self.bounds = bounds(self.settings.dtype, found)
                refuse_wrong(contestant.name, found, self.bounds)
                row["loss_error"], row["gradient_error"] = found
                row["saved_mib"] = num_bytes / MIB
                if on_cuda:
                    row["peak_mib"] = self.bench.peak_mib()
            took = time.perf_counter() - start
            # A turn has two steps: so had this on CUDA, and one on the CPU.
            self.turn_seconds[contestant.name] = took if on_cuda else 2 * took
            row["status"], row["reason"] = MEASURED, ""

    def peak_of_each(self) -> None:
        """On the CPU, in a new process for each: what one keeps would be seen in the next."""
        if self.bench.device.type == "cuda":
            return
        for contestant in self.contestants:
            if self.seconds_left() <= 0:
                return
            self.say(f"peak memory of {contestant.name}")
            words = ["suite=patches", *self.words, f"peak_of={contestant.name}"]
            self.rows[contestant.name]["peak_mib"] = peak_in_new_process(str(ENTRY), *words)

    def time_each(self) -> None:
        """Rounds in which each contestant has a turn, each round beginning with another one."""
        taking_part = self.those_in_time()
        seconds: dict[str, list[float]] = {c.name: [] for c in taking_part}
        for turn in range(self.settings.repetitions):
            shift = turn % max(1, len(taking_part))
            found = {}
            for contestant in taking_part[shift:] + taking_part[:shift]:
                if self.seconds_left() <= 0:
                    break
                self.say(f"round {turn + 1}/{self.settings.repetitions}: {contestant.name}")
                found[contestant.name] = self.one_turn(contestant)
            if not found or len(found) < len(taking_part):
                break  # an unfinished round compares nothing
            for name, value in found.items():
                seconds[name].append(value)
            self.rounds += 1
        if self.rounds:
            for name, values in seconds.items():
                self.rows[name]["seconds"] = spread(values)
                self.rows[name]["ratio"] = spread(ratios(seconds, name, NONE))

    def those_in_time(self) -> list[Contestant]:
        """As many as can have all their rounds before the limit, the most important ones."""
        chosen, needed = [], 0.0
        for contestant in self.contestants:
            if contestant.name not in self.turn_seconds:
                break
            needed += self.turn_seconds[contestant.name] * self.settings.repetitions
            if needed > self.seconds_left():
                break
            chosen.append(contestant)
        return chosen

    def one_turn(self, contestant: Contestant) -> float:
        """Patch, an untimed step, a timed step, unpatch; seconds of the timed one."""
        bench = self.bench
        with bench.patched(*contestant):
            bench.step()
            bench.model.zero_grad(set_to_none=True)
            bench.wait()
            start = time.perf_counter()
            loss = bench.step()
            bench.wait()
            seconds = time.perf_counter() - start
        assert self.reference is not None
        error = abs(float(loss) - self.reference.loss) / abs(self.reference.loss)
        refuse_wrong(contestant.name, (error, 0.0), self.bounds)
        return seconds

    def result_rows(self) -> list[Row]:
        """All rows, with what is known only when all were measured."""
        none = self.rows[NONE]
        for row in self.rows.values():
            for key in ("peak", "saved"):
                if None not in (row[f"{key}_mib"], none[f"{key}_mib"]):
                    row[f"{key}_vs_none"] = round(row[f"{key}_mib"] - none[f"{key}_mib"], 2)
            missing = [key for key in ("peak_mib", "seconds") if row[key] is None]
            if row["status"] == MEASURED and missing and self.settings.limit_seconds:
                what = " and ".join(key.split("_")[0] for key in missing)
                limit = self.settings.limit_seconds
                row["reason"] = f"{what} not measured: limit_seconds={limit:g} was reached"
        return [*self.rows.values(), *self.left_out]

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - STARTED:4.0f} s] {text}", file=sys.stderr, flush=True)


def described(suite: Suite) -> dict[str, Any]:
    """The settings as they came out, and what they made."""
    bench, model = suite.bench, suite.bench.model
    known = dataclasses.asdict(suite.settings)
    known = {k: v for k, v in known.items() if k not in (*INTERNAL, "output", "patches")}
    mask, labels = bench.inputs["attention_mask"], bench.inputs["labels"]
    counts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "length": mask.shape[1],
        "tokens": int(mask.sum()),
        "supervised_tokens": int((labels != -100).sum()),
        "images": suite.settings.rows * suite.settings.images_per_row,
        "threads": torch.get_num_threads(),
        "rounds": suite.rounds,
        "peak_source": PeakTracker(bench.device).source,
    }
    loss, gradients = (None if math.isnan(bound) else bound for bound in suite.bounds)
    return known | counts | {"bounds": {"loss": loss, "gradients": gradients}}


def resolve_settings(settings: Settings) -> None:
    """Put in what stands behind "auto" and behind "as the size has it"."""
    has_cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not has_cuda:
        raise ConfigError("device=cuda: torch sees no CUDA device here. Take device=cpu.")
    if settings.device == "auto":
        settings.device = "cuda" if has_cuda else "cpu"
    if settings.dtype == "auto":
        settings.dtype = "bfloat16" if settings.device == "cuda" else "float32"
    for key, value in BATCHES[settings.size].items():
        if getattr(settings, key) == getattr(Settings(), key):
            setattr(settings, key, value)
    if settings.training == "lora":
        settings.frozen = list(PARTS)
    for name in settings.patches:
        resolve(name)  # an unknown one is refused before the model is built


def print_result(result: dict[str, Any]) -> None:
    for title, header, rows in price_tables(result):
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        print(f"\n{title}")
        for name, *cells in [header, *rows]:
            aligned = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            print("  ".join([name.ljust(widths[0]), *aligned]).rstrip())


def run(words: list[str]) -> None:
    """Everything that the words ask for."""
    settings = parse(words)
    resolve_settings(settings)
    if settings.peak_of:
        bench = Workbench(settings)
        found, _ = contestants(bench.model, settings.patches or list(available()))
        with bench.patched(*next(c for c in found if c.name == settings.peak_of)):
            return print(json.dumps({"peak_mib": bench.peak_mib()}))
    typed = [word for word in words if not word.startswith("output=")]
    command = shlex.join(["python", "scripts/benchmark.py", "suite=patches", *typed])
    result: dict[str, Any] = describe(command)
    suite = Suite(Workbench(settings), words)
    suite.look_at_each()
    suite.peak_of_each()
    suite.time_each()
    result |= {"settings": described(suite), "rows": suite.result_rows()}
    print_result(result)
    folder = Path(settings.output or os.environ.get("OUT") or RESULTS)
    path = write_result(f"patches_{settings.size}_{settings.device}", result, folder)
    print(f"\nwrote {path}")
    from chart import draw_file

    return print(draw_file(path))


def main() -> int:
    """The exit status."""
    words = [word for word in sys.argv[1:] if word != "suite=patches"]
    try:
        run(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
