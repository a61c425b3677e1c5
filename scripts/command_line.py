"""What scripts share that take the keys of train.py and some of their own."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.errors import HydraException

from gemtune.composition import explain, with_unchecked_keys
from gemtune.config import RunConfig, typed
from gemtune.errors import ConfigError, UserError
from gemtune.options import did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent / "configs"

Own = TypeVar("Own")


def own_keys(prefix: str, kind: type[Own], arguments: Sequence[str]) -> tuple[Own, list[str]]:
    """The keys `prefix.NAME=VALUE` as a `kind`, and the arguments that are left.

    Args:
        prefix: "" where the script has no other keys: they are `NAME=VALUE` then.
        kind: a dataclass with a default for each field.

    Raises:
        ConfigError: a key that it does not have, or a value of another type.
    """
    hints = typing.get_type_hints(kind)
    fields = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    start = f"{prefix}." if prefix else ""
    for argument in arguments:
        if not argument.startswith(start):
            continue
        key, equals, value = argument.removeprefix(start).partition("=")
        if key not in fields or not equals:
            owner = f"the {prefix}" if prefix else "this script"
            raise ConfigError(
                f"{argument} is not a key of {owner}.{did_you_mean(key, fields)} "
                f"Keys: {', '.join(f'{start}{name}' for name in fields)}."
            )
        values[key] = _read(hints[key], value, argument, f"{start}{key}")
    return kind(**values), [a for a in arguments if not a.startswith(start)]


def _read(hint: Any, text: str, argument: str, key: str) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text.lower() == "null":
        return None
    if bool in kinds:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{argument}: {key} wants true or false.")
    for kind, words in ((int, "a whole number"), (float, "a number")):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                raise ConfigError(f"{argument}: {key} wants {words}.") from None
    return text


def compose(arguments: Sequence[str]) -> RunConfig:
    """The configuration that train.py would make of these arguments."""
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return typed(hydra.compose("train", with_unchecked_keys(list(arguments))))


def finish(help_text: str, run: Callable[[Sequence[str]], int]) -> int:
    """Run a script with the arguments of the command line; its exit status. 2: refused."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text)
        return 0
    try:
        return run(sys.argv[1:])
    except HydraException as error:
        print(f"error: {explain(str(error), CONFIGS)}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    return 2
