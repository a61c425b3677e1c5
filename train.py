"""The entry point: `accelerate launch train.py recipe=gemma4_sft [group=choice] [key=value]`."""

import os
import sys
from pathlib import Path
from typing import NoReturn

from gemtune import exit_codes, signals

# Also when started with Ctrl-C ignored (the Makefile does), and while the rest is imported.
signals.install()
signals.follow_launcher()
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us, and are shown below

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from gemtune.composition import explain, with_unchecked_keys
from gemtune.config import describe_fields, find_recipe, typed
from gemtune.errors import UserError

# Hydra puts values in the place of $NAME in its help; a dollar in a text of ours is one.
OmegaConf.register_new_resolver("gemtune_fields", lambda: describe_fields().replace("$", "$$"))


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    """Check the whole configuration, then hand it to the recipe."""
    try:
        config = typed(composed)
        sys.exit(find_recipe(config)(config))
    except UserError as error:
        refuse(error)


def refuse(reason: object) -> NoReturn:
    """One message instead of a traceback."""
    rank = os.environ.get("RANK", "0")
    print(f"error{f' (rank {rank})' if rank != '0' else ''}: {reason}", file=sys.stderr, flush=True)
    sys.exit(exit_codes.REFUSED)


if __name__ == "__main__":
    try:
        sys.argv[1:] = with_unchecked_keys(sys.argv[1:])
        main()
    except UserError as error:
        refuse(error)
    except HydraException as error:
        refuse(explain(str(error), Path(__file__).parent / "configs"))
    except KeyboardInterrupt:
        sys.exit(exit_codes.INTERRUPTED)
