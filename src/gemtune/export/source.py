"""The checkpoint that is to be exported: which one, and whether it is what was written."""

from __future__ import annotations

from pathlib import Path

from gemtune.checkpoint import CheckpointFolder
from gemtune.checkpoint.folder import is_checkpoint
from gemtune.checkpoint.manifest import verify
from gemtune.checkpoint.state import read_document
from gemtune.config import from_dict
from gemtune.errors import CheckpointError, ConfigError
from gemtune.run_files import CHECKPOINTS_FOLDER

RUNS = Path("runs")


def find_checkpoint(run: str, which: str) -> Path:
    """The checkpoint that the keys name, of which every byte is what was written.

    Args:
        run: a run's folder, or its name below runs/.
        which: newest, best, or the path of one.

    Raises:
        ConfigError: there is no such run.
        CheckpointError: no such checkpoint, or it is unfinished or damaged.
    """
    if which in ("newest", "best"):
        found = _of_run(_run_folder(run), which)
    else:
        found = Path(which).expanduser()
        if not found.is_dir() and run:
            found = _run_folder(run) / CHECKPOINTS_FOLDER / which
        if not found.is_dir():
            raise CheckpointError(
                f"checkpoint={which}: there is no such folder. Give newest, best, or the path of "
                "one, as in runs/NAME/checkpoints/step_00000100."
            )
        if not is_checkpoint(found):
            raise CheckpointError(
                f"checkpoint={which} was never finished (nothing in it is marked COMPLETE), or is "
                "no checkpoint. Give one that is: scripts/inspect_checkpoint.py lists them."
            )
    problems = verify(found)
    if problems:
        raise CheckpointError(
            f"{found} is damaged: {'; '.join(problems[:3])}. Export another one with "
            "checkpoint=PATH: scripts/inspect_checkpoint.py says which verify."
        )
    return found


def _run_folder(name: str) -> Path:
    given = Path(name).expanduser()
    places = [given, RUNS / given] if len(given.parts) == 1 else [given]
    for place in places:
        if (place / CHECKPOINTS_FOLDER).is_dir():
            return place
    looked = " and ".join(str(place) for place in places)
    raise ConfigError(
        f"run={name}: no run with checkpoints is there (looked at {looked}). Name a run below "
        "runs/, or give its folder."
    )


def _of_run(folder: Path, which: str) -> Path:
    committed = CheckpointFolder(folder / CHECKPOINTS_FOLDER).committed()
    if not committed:
        raise CheckpointError(
            f"{folder} has no finished checkpoint: the run ended before its first was complete. "
            "Run it again, with a smaller checkpoint.every_steps if need be."
        )
    if which == "newest":
        return committed[-1]
    judged = from_dict(read_document(committed[-1])["config"]).eval
    best = CheckpointFolder(folder / CHECKPOINTS_FOLDER).best(judged.best_metric, judged.mode)
    if best is None:
        raise CheckpointError(
            f"checkpoint=best: none of the {len(committed)} checkpoints of {folder} was saved at "
            f"the step of an evaluation, so that none has {judged.best_metric} to choose by. Use "
            "checkpoint=newest, or the path of one."
        )
    return best
