"""The keys of `suite=patches`: `key=value` words from the command line, checked and typed."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass

from gemtune.errors import ConfigError
from gemtune.options import did_you_mean, option, require_choice, require_range

SIZES = ("tiny", "e2b_small", "e4b_small", "e2b_quarter", "e2b", "e4b")
INTERNAL = ("peak_of",)  # for the processes that the suite starts itself
BY_SIZE = "0: as the size has it"


@dataclass
class Settings:
    """What is built, on what, and how often it runs."""

    size: str = option("e2b_small", f"the model: {', '.join(SIZES)}")
    device: str = option("auto", "auto, cpu or cuda; auto: cuda where there is one")
    dtype: str = option("auto", "float32, bfloat16; auto: bfloat16 on cuda, float32 on the cpu")
    training: str = option(
        "full", "full, or lora: every base weight frozen, adapters of rank 16 in each decoder layer"
    )
    frozen: list[str] = option(
        ["ple", "vision"], "parts that training=full leaves out: embeddings, ple, language, ..."
    )
    checkpointing: bool = option(False, "recompute each decoder layer in the backward pass")
    rows: int = option(0, f"of the batch; {BY_SIZE}")
    text_tokens: int = option(0, f"of each row, beside its images; {BY_SIZE}")
    images_per_row: int = option(-1, "images of mixed aspect ratios; -1: as the size has it")
    soft_tokens: int = option(0, f"budget of one image, 9 patches each; {BY_SIZE}")
    supervised_percent: int = option(50, "share of a row's text tokens that have a label")
    patches: list[str] = option([], "those that take part; empty: all that there are")
    repetitions: int = option(5, "rounds; every contestant has one timed step a round")
    threads: int = option(0, "of torch; 0: as many as torch chooses")
    limit_seconds: float = option(
        0.0, "no new measurement after so long; what is left says so; 0: no limit"
    )
    output: str = option("", "folder; empty: $OUT, else benchmarks/results")
    peak_of: str = option("", "one contestant's peak memory")

    def __post_init__(self) -> None:
        require_choice("size", self.size, SIZES)
        require_choice("device", self.device, ("auto", "cpu", "cuda"))
        require_choice("dtype", self.dtype, ("auto", "float32", "bfloat16"))
        require_choice("training", self.training, ("full", "lora"))
        for key in ("rows", "text_tokens", "soft_tokens", "threads", "limit_seconds"):
            require_range(key, getattr(self, key), at_least=0)
        require_range("images_per_row", self.images_per_row, at_least=-1)
        require_range("repetitions", self.repetitions, at_least=1)
        require_range("supervised_percent", self.supervised_percent, at_least=1)
        if self.supervised_percent > 100:
            raise ConfigError(
                f"supervised_percent={self.supervised_percent} is too large: it is a share in "
                "percent, at most 100."
            )


def parse(words: Sequence[str]) -> Settings:
    """Settings from `key=value` words.

    Raises:
        ConfigError: an unknown key, with the nearest one and the list; a value of a wrong type.
    """
    types = typing.get_type_hints(Settings)
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if key not in types:
            raise ConfigError(
                f"'{key}' is not a key of suite=patches.{did_you_mean(key, public_keys())} "
                f"Keys: {', '.join(public_keys())}."
            )
        if not equals:
            raise ConfigError(f"'{word}' has no value. Write it as {key}=VALUE.")
        values[key] = _typed(key, value, types[key])
    if values.get("training") == "lora" and "frozen" in values:
        raise ConfigError("training=lora freezes every base weight: leave frozen= out.")
    return Settings(**values)


def public_keys() -> list[str]:
    """Every key that a person may give."""
    return [f.name for f in dataclasses.fields(Settings) if f.name not in INTERNAL]


def help_text() -> str:
    """A line for each key: its default, and what it is."""
    known = {f.name: f for f in dataclasses.fields(Settings)}
    lines = []
    for key in public_keys():
        field = known[key]
        has_factory = field.default is dataclasses.MISSING
        default = field.default_factory() if has_factory else field.default
        shown = f"{key}={as_text(default)}"
        lines.append(f"  {shown:<22} {field.metadata['help']}")
    return "\n".join(lines)


def as_text(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _typed(key: str, value: str, wanted: type) -> object:
    if wanted is str:
        return value
    if wanted is bool:
        require_choice(key, value.lower(), ("true", "false"))
        return value.lower() == "true"
    if typing.get_origin(wanted) is list:
        return [word.strip() for word in value.strip("[]").split(",") if word.strip()]
    try:
        return wanted(value)
    except ValueError:
        article = "an integer" if wanted is int else "a number"
        raise ConfigError(f"{key}={value} is not {article}.") from None
