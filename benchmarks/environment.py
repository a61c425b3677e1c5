"""What a result was measured on: the header that every file in benchmarks/results shares."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gemtune  # nothing but its version: it imports nothing else

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
GIB = 2**30


def describe(command: str) -> dict[str, Any]:
    """Machine, versions, revision, date and command.

    torch is asked for its version without importing it: a benchmark that measures its children must
    stay small, because a child begins as a copy of it.
    """
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "git_revision": _git_revision(),
        "machine": {
            "cpu": _cpu_model(),
            "num_cores": os.cpu_count(),
            "ram_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
            "load_before": round(os.getloadavg()[0], 2),
            **_gpu(),
        },
        "os": _operating_system(),
        "python": platform.python_version(),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "gemtune": gemtune.__version__,
    }


def typed_command(script: str) -> str:
    """The command line that started a script of this folder, without paths of it and its result."""
    words = sys.argv[1:]
    if "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write FOLDER/NAME.json whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    staging = path.with_suffix(".staging")
    staging.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    staging.replace(path)
    return path


def _git_revision() -> str:
    """The commit, with "+changes" where a tracked file differs from it; results do not count."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        revision = git("rev-parse", "--short=12", "HEAD")
        changed = git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks", ":!*.md"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}+changes" if changed else revision


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any]:
    """The GPU, where torch was imported and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {}
    gpu = torch.cuda.get_device_properties(0)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    memory_gib = round(gpu.total_memory / GIB, 1)
    return {
        "gpu": {
            "name": gpu.name,
            "memory_gib": memory_gib,
            "driver": driver,
            "cuda": torch.version.cuda,
        }
    }


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release().split('-')[0]}, {platform.machine()}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
