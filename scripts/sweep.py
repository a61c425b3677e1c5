"""Try several configurations, each in a fresh `accelerate launch`:

    python scripts/sweep.py recipe=gemma4_sft optim.lr=1e-4,3e-4 'loop.max_steps=range(10,30,10)'

What train.py takes, and Hydra's sweep syntax: a,b or choice(a,b), range(start,stop,step), and
glob(*) for a group. Every combination is a trial with a run folder of its own, named after the
values that differ. All configurations are checked before the first trial starts. The same command
goes on: finished trials are skipped, the others resume. Ctrl-C lets the running trials save and
ends the sweep; a trial that fails is reported, and the others run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
# Of this checkout, installed or not; trials.py stands beside this file.
sys.path[:0] = [str(REPOSITORY / "src"), str(REPOSITORY)]

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from trials import SweepError, Trial, TrialRunner, gpu_slices, processes_of, trial_name

from gemtune.composition import explain, with_unchecked_keys
from gemtune.config import RunConfig, typed
from gemtune.errors import ConfigError, UserError
from gemtune.options import did_you_mean, option, require_choice, require_range
from gemtune.run_folder import resume_points

CONFIGS = REPOSITORY / "configs"
ONE_PROCESS = f"--config_file {CONFIGS / 'accelerate' / 'one_process.yml'}"
PREFIX = "sweep."


@dataclasses.dataclass
class SweepConfig:
    """The keys of the sweep itself."""

    launch: str = option(ONE_PROCESS, "options of `accelerate launch`, for each trial")
    jobs: int = option(1, "trials at a time; on GPUs each gets some for itself")
    metric: str = option("eval/loss", "key of metrics.jsonl to compare by: its last value")
    best: str = option("min", "min, or max: which values of the metric are better")
    output: str = option("", "write the results to this JSON file, after each trial")
    dry_run: bool = option(False, "check everything, print the commands, start nothing")

    def __post_init__(self) -> None:
        require_range("sweep.jobs", self.jobs, at_least=1)
        require_choice("sweep.best", self.best, ["min", "max"])


def own_keys(arguments: Sequence[str]) -> tuple[SweepConfig, list[str]]:
    """The keys that start with `sweep.` as values, and the arguments that are left."""
    values: dict[str, Any] = {}
    kinds = {field.name: type(field.default) for field in dataclasses.fields(SweepConfig)}
    for argument in arguments:
        if not argument.startswith(PREFIX):
            continue
        key, equals, value = argument.removeprefix(PREFIX).partition("=")
        if key not in kinds or not equals:
            raise ConfigError(
                f"{argument} is not a key of the sweep.{did_you_mean(key, kinds)} "
                f"Keys: {', '.join(PREFIX + name for name in kinds)}."
            )
        try:
            values[key] = (
                {"true": True, "false": False}[value.lower()]
                if kinds[key] is bool
                else kinds[key](value)
            )
        except (KeyError, ValueError):
            wanted = {bool: "true or false", int: "a whole number"}[kinds[key]]
            raise ConfigError(f"{argument}: {PREFIX}{key} wants {wanted}.") from None
    return SweepConfig(**values), [a for a in arguments if not a.startswith(PREFIX)]


def combinations(arguments: Sequence[str]) -> list[list[str]]:
    """One list for each trial: of every swept key its value, `key=value`.

    Needs an initialized Hydra, which knows the groups that glob() goes through.
    """
    loader = GlobalHydra.instance().config_loader()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(arguments))
    swept = [override for override in overrides if override.is_sweep_override()]
    for override in swept:
        key = override.key_or_group
        given = (override.input_line or "").lstrip("+")
        if override.is_interval_sweep():
            raise ConfigError(
                f"{given}: an interval has no list of values to go through. Give "
                f"values, {key}=1e-5,1e-4, or {key}=range(start,stop,step)."
            )
        if sum(other.key_or_group == key for other in overrides) > 1:
            raise ConfigError(f"{key} is given twice, and one of the two is swept. Leave one out.")
        if key in ("run.name", "run.dir"):
            raise ConfigError(f"{given}: each trial gets a run.name of its own.")
    if not swept:
        raise ConfigError(
            "no key has several values, so there is nothing to sweep. Give some: "
            "optim.lr=1e-4,3e-4. One configuration is trained by train.py."
        )
    (batch,) = BasicSweeper.split_arguments(swept, max_batch_size=None)
    return [[word.lstrip("+") for word in words] for words in batch]


def compose(arguments: Sequence[str]) -> RunConfig:
    """The configuration that train.py would make of these arguments."""
    return typed(hydra.compose("train", with_unchecked_keys(list(arguments))))


def plan(arguments: Sequence[str]) -> list[Trial]:
    """Every trial, with its configuration checked and its run folder looked at.

    Raises:
        UserError: a configuration that cannot run, or a folder that holds another run.
    """
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        several = combinations(with_unchecked_keys(list(arguments)))
        swept = {word.partition("=")[0] for word in several[0]}
        fixed = [word for word in arguments if word.partition("=")[0].lstrip("+") not in swept]
        trials = []
        for choices in several:
            try:
                name = trial_name(compose([*fixed, *choices]).run.name, choices)
                overrides = [word for word in fixed if not word.startswith("run.name=")]
                overrides += [*choices, f"run.name={name}"]
                config = compose(overrides)
                resume_points(config)
            except (UserError, HydraException) as error:
                said = explain(str(error), CONFIGS) if isinstance(error, HydraException) else error
                raise ConfigError(f"{' '.join(choices)}: {said}") from error
            trials.append(Trial(name, choices, overrides, config.run.folder))
    names = [trial.name for trial in trials]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"a value is given twice: {', '.join(sorted(twice))}. Leave one out.")
    return trials


def show_table(trials: Sequence[Trial], config: SweepConfig) -> None:
    """The trials, best first, and what became of each."""
    print(f"\n{config.metric:>12}  {'step':>6}  {'status':<11}  trial")
    for trial in ranked(trials, config):
        value, step = trial.result(config.metric)
        shown = "-" if value is None else f"{value:.6g}"
        print(f"{shown:>12}  {'-' if step is None else step:>6}  {trial.status:<11}  {trial.name}")


def ranked(trials: Sequence[Trial], config: SweepConfig) -> list[Trial]:
    """Best first; those without the metric last, in their order."""

    def place(trial: Trial) -> tuple[bool, float]:
        value, _ = trial.result(config.metric)
        if value is None:
            return True, 0.0
        return False, value if config.best == "min" else -value

    return sorted(trials, key=place)


def write_results(trials: Sequence[Trial], config: SweepConfig) -> None:
    """`sweep.output`, replaced in one step; best trial first."""
    if not config.output:
        return
    rows = []
    for trial in ranked(trials, config):
        value, step = trial.result(config.metric)
        rows.append(
            {
                "name": trial.name,
                "overrides": trial.choices,
                "status": trial.status,
                "value": value,
                "step": step,
                "seconds": trial.seconds,
                "run": str(trial.folder),
            }
        )
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}")
    staging.write_text(
        json.dumps({"metric": config.metric, "best": config.best, "trials": rows}, indent=1) + "\n"
    )
    staging.replace(path)


def show_help() -> None:
    print(__doc__)
    print("Keys of the sweep = default:\n")
    for field in dataclasses.fields(SweepConfig):
        default = str(field.default).lower() if field.type == "bool" else field.default
        print(f"  {PREFIX}{field.name} = {default}\n      {field.metadata['help']}")
    print("\nKeys of a trial: python train.py --help")


def sweep(arguments: Sequence[str]) -> int:
    """Run the trials; 0 if all are finished, 1 if one failed, 130 or 75 if told to stop."""
    config, rest = own_keys(arguments)
    slices = gpu_slices(config.jobs, processes_of(config.launch))
    trials = plan(rest)
    runner = TrialRunner(config.launch, REPOSITORY / "train.py", slices)
    if config.dry_run:
        for trial in trials:
            print(f"{trial.status:<9} {runner.shown(trial)}")
        print(f"{len(trials)} trials, nothing was started")
        return 0
    code = runner.run(trials, config.jobs, lambda: write_results(trials, config))
    show_table(trials, config)
    return code


def main() -> int:
    """The exit status."""
    if not sys.argv[1:] or {"-h", "--help"} & set(sys.argv[1:]):
        show_help()
        return 0
    try:
        return sweep(sys.argv[1:])
    except HydraException as error:
        print(f"error: {explain(str(error), CONFIGS)}", file=sys.stderr)
    except (UserError, SweepError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
