"""Run tasks of EleutherAI's lm-evaluation-harness on a model that a run has exported:

    pip install 'gemtune[lm-eval]'
    python scripts/evaluate_harness.py model=runs/NAME tasks=arc_easy,hellaswag
    python scripts/evaluate_harness.py model=runs/NAME/model tasks=mine include=my_tasks limit=50

Keys (key=value):
    model           folder of a model, or of a run
    tasks           names, separated by commas
    include         folder with YAML tasks of your own, beside those of the harness
    output          file for the results, JSON (default: harness.json beside the model)
    limit           only the first documents of each task (default: all)
    shots           examples before each question (default: the task's own)
    batch_size      documents of a forward pass (default: 1)
    device          cuda, cpu, ... (default: a GPU where there is one)
    dtype           float32, bfloat16, ... (default: auto, as it was saved)
    chat_template   true: questions go through the model's chat template (default: false)

The model is read by stock transformers, through the harness's own interface to it (HFLM), without
gemtune's patches. Tasks of the harness fetch their data from the hub; a local task reads files.
A task's YAML can call Python beside it: include only folders that you trust. The exit status is 2
where a key is refused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "src"))

from gemtune.errors import ConfigError, UserError
from gemtune.options import did_you_mean
from gemtune.run_files import MODEL_FOLDER

OUTPUT_FILE = "harness.json"


@dataclass
class Keys:
    """What the command line may say; texts, as they were given."""

    model: str = ""
    tasks: str = ""
    include: str = ""
    output: str = ""
    limit: str = ""
    shots: str = ""
    batch_size: str = "1"
    device: str = ""
    dtype: str = "auto"
    chat_template: str = "false"


def read_keys(arguments: Sequence[str]) -> Keys:
    """The arguments, each `key=value`.

    Raises:
        ConfigError: another key, no value, or no model or tasks.
    """
    names = [field.name for field in fields(Keys)]
    given: dict[str, str] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name not in names or not value:
            raise ConfigError(
                f"{argument} is not one of the keys.{did_you_mean(name, names)} Give KEY=VALUE "
                f"with one of {', '.join(names)}."
            )
        given[name] = value
    keys = Keys(**given)
    for name in ("model", "tasks"):
        if not getattr(keys, name):
            raise ConfigError(f"{name} is not set: model=runs/NAME tasks=NAME[,NAME ...]")
    if keys.chat_template not in ("true", "false"):
        raise ConfigError(f"chat_template={keys.chat_template} must be true or false.")
    return keys


def whole_number(name: str, text: str) -> int | None:
    """The number, at least 0; None for an empty text."""
    if not text:
        return None
    if not text.isdecimal():
        raise ConfigError(f"{name}={text} must be a whole number.")
    return int(text)


def model_folder(text: str) -> Path:
    """The folder of the exported model that the text names, by itself or by its run."""
    given = Path(text).expanduser()
    for folder in (given / MODEL_FOLDER, given):
        if (folder / "config.json").is_file():
            return folder
    raise ConfigError(
        f"model={text} holds no exported model (no config.json). Give runs/NAME of a finished run, "
        "or a folder that transformers reads."
    )


def evaluate(keys: Keys, folder: Path) -> dict[str, Any]:
    """The results of all tasks, as the harness returns them, without its samples.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
    """
    limit, shots = whole_number("limit", keys.limit), whole_number("shots", keys.shots)
    batch_size = whole_number("batch_size", keys.batch_size) or 1
    include = Path(keys.include).expanduser() if keys.include else None
    if include is not None and not include.is_dir():
        raise ConfigError(f"include={keys.include} is not a folder.")
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"lm-evaluation-harness is not installed ({error}): pip install 'gemtune[lm-eval]'"
        ) from error
    import torch

    tasks = keys.tasks.split(",")
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise ConfigError(
            f"tasks: the harness has no {', '.join(unknown)}."
            f"{did_you_mean(unknown[0], manager.all_tasks)} `lm-eval ls tasks` lists them; "
            "include=FOLDER adds your own."
        )
    model = HFLM(
        pretrained=str(folder),
        device=keys.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=keys.dtype,
        batch_size=batch_size,
        add_bos_token=True,  # Gemma never saw a text without it, and not every tokenizer adds it
    )
    found = simple_evaluate(
        model=model,
        tasks=tasks,
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=keys.chat_template == "true",
        log_samples=False,
    )
    return dict(found or {})


def lines_of(results: dict[str, Any]) -> list[str]:
    """`task  metric  value` of every figure."""
    lines = []
    for task, figures in results.get("results", {}).items():
        for name, value in figures.items():
            if isinstance(value, float) and "stderr" not in name:
                lines.append(f"{task:<24} {name.partition(',')[0]:<20} {value:.4f}")
    return lines


def run(arguments: Sequence[str]) -> int:
    """Evaluate, print the figures, write the file; 0."""
    keys = read_keys(arguments)
    folder = model_folder(keys.model)
    output = Path(keys.output).expanduser() if keys.output else folder.parent / OUTPUT_FILE
    if not output.parent.is_dir():
        raise ConfigError(f"output={output}: there is no folder {output.parent}.")
    results = evaluate(keys, folder)
    print("\n".join(lines_of(results)))
    # What JSON has no word for (functions of a task, dtypes) as text.
    output.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    print(output)
    return 0


def main() -> int:
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return 0
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
