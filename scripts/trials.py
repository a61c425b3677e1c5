"""The trials of scripts/sweep.py as processes: names, devices, signals, and what became of them."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gemtune.exit_codes import INTERRUPTED, PREEMPTED

MAX_NAME_CHARACTERS = 120
POLL_SECONDS = 0.1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class SweepError(Exception):
    """Why the sweep cannot start, in words for the person who started it."""


@dataclass
class Trial:
    """One configuration: its run folder, and what became of it in this sweep."""

    name: str
    choices: list[str]
    """The swept keys, `key=value`."""
    overrides: list[str]
    """All arguments of train.py."""
    folder: Path
    status: str = field(init=False)
    """finished, to go on, or new; then running, finished, failed or stopped."""
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.is_finished():
            self.status = "finished"
        else:
            self.status = "to go on" if (self.folder / "checkpoints").exists() else "new"

    def is_finished(self) -> bool:
        """Whether everything was done: the model is exported last."""
        return (self.folder / "model").exists()

    def result(self, metric: str) -> tuple[float | None, int | None]:
        """(value, step) of the last record that has the metric as a finite number."""
        path = self.folder / "metrics.jsonl"
        found: tuple[float | None, int | None] = (None, None)
        if not path.is_file():
            return found
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the end of a run that was cut short
                continue
            value = record.get(metric)
            if isinstance(value, int | float) and math.isfinite(value):
                found = (value, record.get("step"))
        return found


def trial_name(run_name: str, choices: Sequence[str]) -> str:
    """`RUN-lr_0.0001-max_steps_10`: the same for the same values, another one for others."""
    keys = [choice.partition("=")[0] for choice in choices]
    lasts = [re.split(r"[./@]", key)[-1] for key in keys]
    parts = []
    for key, last, choice in zip(keys, lasts, choices, strict=True):
        parts.append(f"{last if lasts.count(last) == 1 else key}_{choice.partition('=')[2]}")
    label = "-".join(parts)
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", label).strip("_")
    name = f"{run_name}-{plain}"
    if plain == label and len(name) <= MAX_NAME_CHARACTERS:
        return name
    # What was left out could be all that differs.
    digest = hashlib.sha256("\n".join(choices).encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_CHARACTERS - 9]}-{digest}"


def processes_of(launch: str) -> int:
    """How many processes `accelerate launch` with these options starts on this machine."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    parser.add_argument("--config_file", "--config-file", type=Path)
    options, _ = parser.parse_known_args(shlex.split(launch))
    if options.num_processes is not None:
        return options.num_processes
    if options.config_file is None:
        return max(1, len(visible_gpus()))
    if not options.config_file.is_file():
        raise SweepError(f"sweep.launch={launch}: there is no file {options.config_file}.")
    found = re.search(r"^num_processes: *(\d+)", options.config_file.read_text(), re.MULTILINE)
    if found is None:
        raise SweepError(
            f"sweep.launch={launch}: {options.config_file} has no num_processes. Give it: "
            f"sweep.launch='{launch} --num_processes 8'."
        )
    return int(found[1])


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    if named is None:
        return [str(index) for index in range(count)]
    return [name.strip() for name in named.split(",") if name.strip()][:count]


def gpu_slices(jobs: int, processes: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each job; None leaves it as it is.

    Raises:
        SweepError: several jobs that would share a GPU.
    """
    gpus = visible_gpus() if jobs > 1 else []
    if not gpus:
        return [None] * jobs
    if jobs * processes > len(gpus):
        raise SweepError(
            f"sweep.jobs={jobs} trials of {processes} process{'es' if processes > 1 else ''} need "
            f"{jobs * processes} GPUs, and there are {len(gpus)}. At most "
            f"sweep.jobs={max(1, len(gpus) // processes)} fits."
        )
    return [",".join(gpus[job * processes : (job + 1) * processes]) for job in range(jobs)]


class TrialRunner:
    """Starts trials, a few at a time, and passes a request to stop on to them."""

    def __init__(self, launch: str, program: Path, slices: Sequence[str | None]) -> None:
        self.launch = shlex.split(launch)
        self.program = program
        self.slices = slices
        self.stopped_by = 0
        """The first signal that asked to stop, or 0."""
        self._running: dict[int, tuple[Trial, subprocess.Popen, float]] = {}

    def shown(self, trial: Trial) -> str:
        """The command as a person would type it."""
        return shlex.join(["accelerate", "launch", *self._rest(trial)])

    def _rest(self, trial: Trial) -> list[str]:
        return [*self.launch, str(self.program), *trial.overrides]

    def run(self, trials: Sequence[Trial], jobs: int, after_each: Callable[[], None]) -> int:
        """Run what is not finished. 0, 1 (a trial failed), 130 or 75 (asked to stop)."""
        before = {number: signal.signal(number, self._stop) for number in STOP_SIGNALS}
        waiting = [trial for trial in trials if trial.status != "finished"]
        for trial in trials:
            if trial.status == "finished":
                print(f"finished before: {trial.name}", flush=True)
        try:
            while self._running or (waiting and not self.stopped_by):
                while waiting and len(self._running) < jobs and not self.stopped_by:
                    self._start(waiting.pop(0), len(trials))
                time.sleep(POLL_SECONDS)
                if self._collect():
                    after_each()
        finally:
            self._kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        after_each()
        if self.stopped_by:
            print(f"stopped; {len(waiting)} trials were not started. The same command goes on.")
            return INTERRUPTED if self.stopped_by == signal.SIGINT else PREEMPTED
        return 1 if any(trial.status == "failed" for trial in trials) else 0

    def _start(self, trial: Trial, total: int) -> None:
        slot = next(slot for slot in range(len(self.slices)) if slot not in self._running)
        environment = dict(os.environ)
        # The launcher would kill ranks that save for longer than 30 s.
        environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
        if (devices := self.slices[slot]) is not None:
            environment["CUDA_VISIBLE_DEVICES"] = devices
        log = None
        where = ""
        if len(self.slices) > 1:  # two progress bars in one terminal
            trial.folder.parent.mkdir(parents=True, exist_ok=True)
            path = trial.folder.with_name(f"{trial.folder.name}.log")
            log = path.open("a")
            where = f" (output: {path})"
        print(f"{trial.status} -> running: {trial.name}{where}", flush=True)
        # In a session of its own: Ctrl-C reaches it once, from here. The launcher ignores it (see
        # the Makefile), and so does a process until train.py answers to it.
        process = subprocess.Popen(
            [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *self._rest(trial)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT if log else None,
            start_new_session=True,
            preexec_fn=_ignore_interrupt,
        )
        if log:
            log.close()
        trial.status = "running"
        self._running[slot] = (trial, process, time.monotonic())
        if self.stopped_by:  # just now, and it is not known to the handler yet
            _signal_group(process, signal.SIGKILL)

    def _collect(self) -> bool:
        """Take note of trials that ended; whether one did."""
        ended = {s: entry for s, entry in self._running.items() if entry[1].poll() is not None}
        for slot, (trial, process, started) in ended.items():
            del self._running[slot]
            trial.seconds = round(time.monotonic() - started, 1)
            if process.returncode == 0 and trial.is_finished():
                trial.status = "finished"
            elif self.stopped_by:
                trial.status = "stopped"
            else:
                trial.status = "failed"
            print(f"{trial.status}: {trial.name} ({trial.seconds} s)", flush=True)
        return bool(ended)

    def _stop(self, number: int, _: Any) -> None:
        """Ctrl-C to the trials, each time: the first one lets them save, a second one not."""
        if not self.stopped_by:
            self.stopped_by = number
            print("\nstopping: running trials save first", flush=True)
        elif number != signal.SIGINT:
            return
        for _, process, _ in self._running.values():
            # A launcher that has started nothing yet ignores Ctrl-C, and there is nothing to save.
            has_ranks = process.poll() is None and psutil.Process(process.pid).children()
            _signal_group(process, signal.SIGINT if has_ranks else signal.SIGKILL)

    def _kill(self) -> None:
        for _, process, _ in self._running.values():  # left by an exception
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen, number: int) -> None:
    if process.poll() is None:
        os.killpg(process.pid, number)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
