"""The configuration of a run as typed values. The only module that knows OmegaConf."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    ValidationError,
)

from gemtune.adapters import Adapter, Lora, Qlora
from gemtune.checkpoint.config import CheckpointConfig
from gemtune.data import DataConfig
from gemtune.errors import ConfigError
from gemtune.evaluation import EvalConfig
from gemtune.loop_config import LoopConfig
from gemtune.memory import MemoryConfig
from gemtune.models import ModelConfig
from gemtune.optim import AdamW, Muon, Schedule
from gemtune.options import did_you_mean, option
from gemtune.parallel import FSDP2, ParallelConfig
from gemtune.patches.catalogue import available, patch_class
from gemtune.runtime import RunSettings
from gemtune.tracking import TrackerConfig

# `_target_` chooses a dataclass; nothing outside this namespace is ever imported for it.
_TARGET = "_target_"
_ALLOWED_TARGETS = "gemtune."
_ALLOWED_RECIPES = "recipes."


@dataclasses.dataclass
class RecipeConfig:
    """The method: which function runs the stages."""

    name: str = option("gemma4_sft", "short name, part of the default run name")
    run: str = option("recipes.gemma4_sft.run", "dotted path of the function, below recipes.")

    def __post_init__(self) -> None:
        if not self.run.startswith(_ALLOWED_RECIPES) or self.run.count(".") < 2:
            raise ConfigError(
                f"recipe.run={self.run} must name a function below '{_ALLOWED_RECIPES}', such as "
                "recipes.gemma4_sft.run."
            )


@dataclasses.dataclass
class RunConfig:
    """Everything that decides a run."""

    recipe: RecipeConfig
    run: RunSettings
    model: ModelConfig
    data: DataConfig
    patches: dict[str, Any]
    adapter: Adapter
    optim: AdamW
    schedule: Schedule
    loop: LoopConfig
    eval: EvalConfig
    parallel: ParallelConfig
    checkpoint: CheckpointConfig
    memory: MemoryConfig
    tracker: TrackerConfig

    def as_dict(self) -> dict[str, Any]:
        """Plain values, every default included; `from_dict` makes the same configuration of them.

        A section that is more than its declared class says so: LoRA and rsLoRA have the same keys.
        """
        values = dataclasses.asdict(self)
        for name, declared in typing.get_type_hints(RunConfig).items():
            kind = type(getattr(self, name))
            if name != "patches" and kind is not declared:
                values[name] = {_TARGET: f"{kind.__module__}.{kind.__qualname__}", **values[name]}
        return values


def typed(config: DictConfig) -> RunConfig:
    """The composed configuration as dataclasses; no OmegaConf object is left.

    Raises:
        ConfigError: a key that no dataclass has, a value of the wrong type, a missing value, or a
            combination that cannot run; with the full key and the nearest valid one.
    """
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (InterpolationResolutionError, MissingMandatoryValue) as error:
        raise ConfigError(f"{error.full_key}: {_first_line(error)}") from error
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    sections = typing.get_type_hints(RunConfig)
    for key in plain:
        if key not in sections:
            raise ConfigError(
                f"{key} is not a section of the configuration.{did_you_mean(key, sections)} "
                f"Sections: {', '.join(sections)}."
            )
    values = {
        name: _patches(plain.get(name) or {})
        if name == "patches"
        else _section(name, declared, plain.get(name) or {})
        for name, declared in sections.items()
    }
    run_config = RunConfig(**values)
    run_config.model.resolve_dtype(frozen=type(run_config.adapter) is not Adapter)
    _check_combinations(run_config)
    return run_config


def from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that `RunConfig.as_dict` made these values of.

    Raises:
        ConfigError: as `typed`; or an adapter of unknown kind, as gemtune once wrote it.
    """
    adapter = values.get("adapter")
    if isinstance(adapter, Mapping) and adapter and _TARGET not in adapter:
        raise ConfigError(
            "The configuration has an adapter and does not say of which kind: an older gemtune "
            "wrote it. Resume the run once with its command, which writes it anew, and then go on."
        )
    return typed(OmegaConf.create(dict(values), flags={"allow_objects": False}))


def _section(key: str, declared: type, values: Any) -> Any:
    """One section as an instance of its dataclass, or of the subclass that `_target_` names."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{key}={values!r} is a section of keys, not a value.")
    values = dict(values)
    cls = _target_class(key, values.pop(_TARGET), declared) if _TARGET in values else declared
    return _build(key, cls, values)


def _build(key: str, cls: type, values: Mapping[str, Any]) -> Any:
    fields = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in fields:
            raise ConfigError(
                f"{key}.{name} is not a field of {cls.__name__}.{did_you_mean(str(name), fields)} "
                f"Fields: {', '.join(fields) or 'none'}."
            )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(cls), dict(values))
        return OmegaConf.to_object(merged)
    except (ValidationError, ConfigKeyError) as error:
        name = error.full_key or error.key
        wanted = next((f.type for f in dataclasses.fields(cls) if f.name == name), "another type")
        raise ConfigError(
            f"{key}.{name}={values.get(name)!r} has the wrong type: {cls.__name__} wants {wanted}."
        ) from error


def _target_class(key: str, target: Any, declared: type) -> type:
    """The dataclass of a `_target_`, which must be of this package and of the declared kind."""
    refused = ConfigError(
        f"{key}.{_TARGET}={target} is not allowed: it must name a dataclass below "
        f"'{_ALLOWED_TARGETS}' that is a {declared.__name__}."
    )
    if not isinstance(target, str) or not target.startswith(_ALLOWED_TARGETS):
        raise refused
    module_name, _, name = target.rpartition(".")
    try:
        found = vars(importlib.import_module(module_name)).get(name)
    except ImportError:
        raise refused from None
    if not isinstance(found, type) or not issubclass(found, declared):
        raise refused
    return found


def _patches(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> patch with its options."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"patches={values!r}: give names, patches=[{','.join(available())}].")
    for name in values:
        if name not in available():
            raise ConfigError(
                f"patches.{name}: there is no such patch.{did_you_mean(str(name), available())} "
                f"Patches: {', '.join(available())}."
            )
    return {
        name: _build(f"patches.{name}", patch_class(name), options or {})
        for name, options in values.items()
    }


def _check_combinations(config: RunConfig) -> None:
    warmup, steps = config.schedule.warmup_steps, config.loop.max_steps
    if warmup and steps is not None and warmup >= steps:
        raise ConfigError(
            f"schedule.warmup_steps={warmup} leaves no step of loop.max_steps={steps} after it."
        )
    config.eval.check_cadence(
        config.loop.eval_every_steps,
        config.data.eval_generate_rows,
        counts_tokens=not {"linear_cross_entropy", "supervised_positions"}.isdisjoint(
            config.patches
        ),
    )
    if isinstance(config.adapter, Qlora) and config.parallel.strategy == FSDP2:
        raise ConfigError(
            "adapter=qlora cannot be used with parallel=fsdp2: no rank could put weights "
            "in few bits together again from shares. Use parallel=ddp, where each process holds "
            "the base, or adapter=lora."
        )
    factors_alone = isinstance(config.adapter, Lora) and not config.adapter.also_train
    if isinstance(config.optim, Muon) and factors_alone:
        raise ConfigError(
            "optim=muon under an adapter has no matrix to step: factors of adapters are stepped by "
            "AdamW. Use optim=adamw, or train matrices in full: adapter.also_train=[projector]."
        )
    if not config.model.audio_tower:
        _refuse_uses_of_audio(config)
    for part in config.optim.part_lrs:
        if part in config.model.freeze and type(config.adapter) is Adapter:
            frozen = ",".join(config.model.freeze)
            raise ConfigError(
                f"optim.part_lrs.{part} is the rate of a part that model.freeze=[{frozen}] takes "
                "out of training. Leave out one of the two."
            )


def _refuse_uses_of_audio(config: RunConfig) -> None:
    """model.freeze may name the part: what is not there is not trained either."""
    parts = config.adapter.parts if isinstance(config.adapter, Lora) else []
    uses = [f"adapter.parts=[{','.join(parts)}]"] * ("audio" in parts)
    uses += [f"optim.part_lrs.{k}={v:g}" for k, v in config.optim.part_lrs.items() if k == "audio"]
    if uses:
        raise ConfigError(
            f"{uses[0]} trains the audio tower, which model.audio_tower=false leaves out. Load it "
            "with model.audio_tower=true, or take 'audio' away there."
        )


def find_recipe(config: RunConfig) -> Callable[[RunConfig], int]:
    """The function that `recipe.run` names: takes the configuration, returns an exit status."""
    module_name, _, name = config.recipe.run.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"recipe.run={config.recipe.run} cannot be imported: {error}") from error


def save_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write plain values as YAML, replacing the file in one step."""
    staging = path.with_suffix(".staging")
    staging.write_text(OmegaConf.to_yaml(OmegaConf.create(dict(values))))
    staging.replace(path)


def describe_fields() -> str:
    """Every key with its default and meaning, for `train.py --help`."""
    lines: list[str] = []
    for section, declared in typing.get_type_hints(RunConfig).items():
        if section == "patches":
            for cls in map(patch_class, available()):
                lines += _describe(f"patches.{cls.name}", cls, shared=None)
        else:
            lines += _describe_kinds(section, declared, None)
    return "\n".join(lines)


def _describe_kinds(section: str, cls: type, parent: type | None) -> Iterator[str]:
    """A dataclass, then what each of its subclasses has more than it."""
    yield from _describe(section, cls, shared=parent)
    for kind in cls.__subclasses__():
        yield from _describe_kinds(section, kind, cls)


def _describe(prefix: str, cls: type, shared: type | None) -> Iterator[str]:
    known = {f.name for f in dataclasses.fields(shared)} if dataclasses.is_dataclass(shared) else ()
    for field in dataclasses.fields(cls):
        if field.name in known:
            continue
        default = (
            field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
        )
        shown = "null" if default is None else str(default)
        yield f"  {prefix}.{field.name} = {shown}\n      {field.metadata.get('help', '')}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
