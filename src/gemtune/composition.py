"""What goes into Hydra, and plain words for what it says when a group or choice is missing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from gemtune.errors import ConfigError
from gemtune.options import did_you_mean

_KEY = re.compile(r"[a-z_]+(\.\w+)+=")
_NO_CHOICE = re.compile(r"Could not (?:find|load) '([\w/]+)/([^'/]+)'")
_MULTIRUN = re.compile(r"-m|--m\w*|\+*hydra\.mode=multirun", re.IGNORECASE)
_NO_GROUP = re.compile(r"Could not override '([^']+)'")


def with_unchecked_keys(arguments: list[str]) -> list[str]:
    """The command line with every `a.b=c` as `++a.b=c`, which Hydra takes as it is.

    YAML states choices only, so Hydra does not know the keys; `gemtune.config.typed` does, and
    names the nearest one when a key is misspelt.

    Raises:
        ConfigError: Hydra's multirun, in which one process would train one trial after the other.
    """
    if multirun := next(filter(_MULTIRUN.fullmatch, arguments), None):
        others = shlex.join(argument for argument in arguments if argument != multirun)
        raise ConfigError(
            f"{multirun}: train.py trains one configuration. A second one in the same process "
            "finds the process group and the memory of the first, and hangs on several devices. "
            f"Sweep with a process for each trial: python scripts/sweep.py {others}"
        )
    return [f"++{argument}" if _KEY.match(argument) else argument for argument in arguments]


def explain(message: str, config_dir: Path) -> str:
    """Hydra's message, or a shorter one that lists what there is and names the nearest.

    Args:
        message: text of a Hydra exception.
        config_dir: the folder with one folder per group.
    """
    if found := _NO_CHOICE.search(message):
        group, choice = found.groups()
        choices = sorted(path.stem for path in (config_dir / group).glob("*.yaml"))
        return (
            f"{group}={choice}: there is no such {group}.{did_you_mean(choice, choices)} "
            f"Choices: {', '.join(choices)}."
        )
    if found := _NO_GROUP.search(message):
        key = found.group(1)
        groups = sorted({path.parent.name for path in config_dir.glob("*/*.yaml")})
        return (
            f"{key}: there is no such group.{did_you_mean(key, groups)} "
            f"Groups: {', '.join(groups)}. Keys have a dot: optim.lr=1e-3."
        )
    # Of `optim.lr=1e-4,3e-4`: Hydra takes a comma for a sweep.
    message = message.replace(
        "add --multirun to your command line", "run scripts/sweep.py in the place of train.py"
    ).replace("'++", "'")
    return message.partition("\nConfig search path:")[0].rstrip()
