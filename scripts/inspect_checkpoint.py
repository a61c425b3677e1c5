"""Say what a checkpoint is, whether every bit of it is what was written, and what would resume.

    python scripts/inspect_checkpoint.py runs/NAME                  # all of a run
    python scripts/inspect_checkpoint.py runs/NAME/checkpoints/step_00000150
    python scripts/inspect_checkpoint.py runs/NAME --json

Changes nothing, and executes nothing of what it reads. Exit status: 0 if a start would go on from
something here, 1 if nothing here verifies, 2 if the path holds no checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "src"))

from gemtune.checkpoint import CheckpointFolder
from gemtune.checkpoint.disk import as_size
from gemtune.checkpoint.folder import evaluation_of
from gemtune.checkpoint.manifest import is_complete, read_manifest, verify
from gemtune.checkpoint.state import read_document
from gemtune.checkpoint.tensors import read_index
from gemtune.errors import CheckpointError


def find(path: Path) -> list[Path]:
    """The checkpoints that the path names, newest first, unfinished and damaged ones included."""
    if is_complete(path) or path.name.startswith(("step_", ".staging-", "damaged-")):
        return [path] if path.is_dir() else []
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not folder.is_dir():
        return []
    others = [*folder.glob("damaged-step_*"), *folder.glob(".staging-step_*")]
    unmarked = [p for p in folder.glob("step_*") if not is_complete(p)]
    return [*CheckpointFolder(folder).committed()[::-1], *sorted(unmarked), *sorted(others)]


def inspect(checkpoint: Path) -> dict[str, Any]:
    """All there is to say of one; reads every byte of it."""
    report: dict[str, Any] = {"path": str(checkpoint), "complete": is_complete(checkpoint)}
    report["problems"] = verify(checkpoint) if report["complete"] else ["it was never finished"]
    report["set_aside"] = checkpoint.name.startswith("damaged-")
    report["verifies"] = not report["problems"]
    try:
        report["bytes"] = sum(entry["bytes"] for entry in read_manifest(checkpoint).values())
        report |= {
            key: value for key, value in read_document(checkpoint).items() if key != "config"
        }
        report["evaluation"] = evaluation_of(checkpoint)
        report["eval_loss"] = report["evaluation"].get("eval/loss")
        report["tensors"] = count_tensors(checkpoint)
    except (ValueError, CheckpointError) as error:
        report["unreadable"] = str(error)
    return report


def count_tensors(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Kind ("model", "optimizer") -> how many tensors, values, and of which types."""
    found: dict[str, dict[str, Any]] = {}
    for key, entry in read_index(checkpoint).state_dict_metadata.items():
        kind = found.setdefault(key.split("|")[0], {"tensors": 0, "values": 0, "dtypes": []})
        kind["tensors"] += 1
        kind["values"] += entry.size.numel()
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        kind["dtypes"] = sorted({*kind["dtypes"], dtype})
    return found


def lines_of(report: dict[str, Any]) -> list[str]:
    """The report for a person."""
    path = Path(report["path"])
    verdict = "verifies" if report["verifies"] else "DOES NOT VERIFY"
    if not report["complete"]:
        verdict = "unfinished: the next save deletes it"
    lines = [f"{path.name}: {verdict}"]
    lines += [f"  problem       {problem}" for problem in report["problems"] if report["complete"]]
    if "state" not in report:
        return [*lines, f"  unreadable    {report.get('unreadable', '')}"]
    state = report["state"]
    versions = report.get("versions", {})
    git = report.get("git")
    rows = [
        ("step", f"{state['step']:,}, saved {report['saved_at']}, {as_size(report['bytes'])}"),
        ("run", f"{state['run_id']}, {state['tokens_seen']:,} tokens seen"),
        ("processes", f"{report['world_size']} wrote it; any number can go on from it"),
        ("eval/loss", "unknown" if report["eval_loss"] is None else f"{report['eval_loss']:.4f}"),
        *(
            (name, f"{value:.4f}")
            for name, value in report["evaluation"].items()
            if name != "eval/loss"
        ),
        *_best_rows(state),
        *(
            (kind, f"{t['tensors']:,} tensors, {t['values']:,} values, {', '.join(t['dtypes'])}")
            for kind, t in report["tensors"].items()
        ),
        ("patches", ", ".join(p["name"] for p in report.get("patches", [])) or "none"),
        ("versions", ", ".join(f"{name} {v}" for name, v in versions.items() if v)),
        ("git", f"{git['commit'][:12]}{', with changes' * git['changed']}" if git else "unknown"),
    ]
    return [*lines, *(f"  {name:<13} {text}" for name, text in rows)]


def _best_rows(state: dict[str, Any]) -> list[tuple[str, str]]:
    """What the run held for its best when it wrote this, and whether it had ended early."""
    rows = []
    if state.get("best_step") is not None:
        best = f"step {state['best_step']:,}, {state['best_metric']} {state['best_value']:.4f}"
        rows.append(("best", f"{best} (the {state['best_mode']}imum until then)"))
    if state.get("stopped_early"):
        rows.append(("stopped early", state["stopped_early"]))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("path", type=Path, help="a run folder, or one of its checkpoints")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    options = parser.parse_args()
    reports = [inspect(checkpoint) for checkpoint in find(options.path)]
    if not reports:
        print(
            f"error: {options.path} holds no checkpoint. Give runs/NAME, or one of "
            "runs/NAME/checkpoints/step_*.",
            file=sys.stderr,
        )
        return 2
    resumable = [r for r in reports if r["verifies"] and "state" in r and not r["set_aside"]]
    resumes = resumable[0]["path"] if resumable else None
    if options.json:
        print(json.dumps({"resumes": resumes, "checkpoints": reports}, indent=1))
    else:
        for report in reports:
            print("\n".join(lines_of(report)) + "\n")
        print(f"A start would go on from: {resumes or 'none of these'}")
    return 0 if resumes else 1


if __name__ == "__main__":
    sys.exit(main())
