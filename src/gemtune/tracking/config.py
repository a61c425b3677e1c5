"""The keys of `tracker`, and what follows from them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gemtune.errors import ConfigError
from gemtune.options import option, require_choice, require_range


@dataclass
class TrackerConfig:
    """A dashboard beside metrics.jsonl."""

    name: str = option("wandb", "wandb, trackio (local, no account) or none")
    project: str = option("gemtune", "project in the dashboard")
    entity: str | None = option(None, "wandb team or user; null: your default")
    preview_rows: int = option(4, "rows of the data to show there at the start; 0: none")
    mode: str = option("auto", "wandb: auto (online where a key is found), online or offline")

    def __post_init__(self) -> None:
        require_choice("tracker.name", self.name, ["wandb", "trackio", "none"])
        require_range("tracker.preview_rows", self.preview_rows, at_least=0)
        require_choice("tracker.mode", self.mode, ["auto", "online", "offline"])


def wandb_mode(config: TrackerConfig) -> str:
    """`tracker.mode`; where that is auto, WANDB_MODE, else online only where a key is found.

    Raises:
        ConfigError: online was asked for, and there is no key.
    """
    mode = config.mode
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_wandb_key() else "offline")
    if mode == "online" and not has_wandb_key():
        raise ConfigError(
            "wandb online (tracker.mode or WANDB_MODE) needs a key, and there is none in "
            "WANDB_API_KEY or ~/.netrc. Run `wandb login`, or use tracker.mode=offline."
        )
    return mode


def has_wandb_key() -> bool:
    """Whether there is one in the environment or in ~/.netrc, where `wandb login` leaves it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
