"""README.md of an exported folder: what it is, how it was trained, and how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import gemtune
from gemtune.adapters import Lora, Qlora
from gemtune.adapters.libraries import in_words
from gemtune.config import RunConfig
from gemtune.export.verification import Difference
from gemtune.run_files import METRICS_FILE, START_FILE

_LOAD = {
    "merged": """from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

model = Gemma4ForConditionalGeneration.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
    "adapter": """from peft import PeftModel
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

base = Gemma4ForConditionalGeneration.from_pretrained("{base}", dtype="{dtype}")
model = PeftModel.from_pretrained(base, "FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")""",
}


def model_card(
    config: RunConfig,
    run_dir: Path,
    *,
    step: int,
    kind: str = "merged",
    gaps: Sequence[Difference] = (),
) -> str:
    """The card as Markdown with YAML in front, without a path of the machine.

    Args:
        run_dir: counts of rows, patches and metrics are read from its files, as far as they are
            there.
        step: of the weights: the newest figures up to it are theirs.
        kind: merged or adapter.
        gaps: of an adapter that was learned on a base in few bits: logits on the base in its own
            precision and in the training.
    """
    start = _read_object(run_dir / START_FILE)
    base = public_name(config.model.path)
    sections = [
        f"# {config.run.name}",
        _what_it_is(config, base, step, kind),
        _section(
            "Load", f"```python\n{_LOAD[kind].format(base=base, dtype=config.model.dtype)}\n```"
        ),
        _section("Base in few bits", _few_bits(config, kind, gaps)),
        _section("Data", _table(_data_rows(config, start))),
        _section("Metrics", _table(_metric_rows(run_dir / METRICS_FILE, step))),
        _section("Hyper-parameters", _table(_hyper_parameters(config))),
        _section("Patches of the training", _table(_patch_rows(config, start))),
        _section("Licence", _licence(config, base)),
    ]
    front = yaml.safe_dump(_front_matter(config, base, kind), sort_keys=False)
    return f"---\n{front}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def public_name(path: str) -> str:
    """A hub id or `bundled:` as it is; of a file or folder the name, without where it lies."""
    is_place = path.startswith(("/", ".", "~")) or Path(path).suffix or Path(path).exists()
    return Path(path).name if is_place and "://" not in path else path


def _front_matter(config: RunConfig, base: str, kind: str) -> dict[str, Any]:
    front: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers"}
    if base.count("/") == 1:  # the hub refuses what is no id
        front["base_model"] = base
        front["base_model_relation"] = "adapter" if kind == "adapter" else "finetune"
    tags = ["gemma4", "gemtune"]
    if isinstance(config.adapter, Lora):
        tags.append(config.adapter.name.lower())
    return front | {"tags": tags, "pipeline_tag": "image-text-to-text"}


def _what_it_is(config: RunConfig, base: str, step: int, kind: str) -> str:
    start = f"built from seed {config.run.seed}" if config.model.weights == "random" else base
    adapter = config.adapter
    how = f"{adapter.name} of rank {adapter.rank}" if isinstance(adapter, Lora) else "full training"
    form = "The adapter alone" if kind == "adapter" else "The whole model"
    return (
        f"A Gemma 4 ({config.model.name}, {start}) after {step:,} steps of supervised fine-tuning "
        f"by gemtune {gemtune.__version__}: {how}. {form}."
    )


def _few_bits(config: RunConfig, kind: str, gaps: Sequence[Difference]) -> str:
    if not isinstance(config.adapter, Qlora):
        return ""
    few = f"its language layers had their linear weights in {in_words(config.adapter.quantization)}"
    if kind == "merged":
        return (
            f"In training {few}. This folder has the values that those bits stood for, with the "
            "update added."
        )
    measured = ", ".join(f"{gap.name} {gap.error:.2g}" for gap in gaps)
    how_far = "By how much was not measured."
    if measured:
        how_far = f"Logits do, by this part of their spread at the worst position: {measured}."
    return (
        f"The adapter was learned on a quantised base: {few}. Loaded as above it is on the base in "
        f"{config.model.dtype}, so that what comes out differs from what was trained. {how_far} "
        "The export with kind=merged has the values that it was learned on."
    )


def _data_rows(config: RunConfig, start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data = config.data
    paths = [part.get("path") for part in data.mix] if data.mix else [data.path]
    yield "data", f"{data.name}: " + ", ".join(public_name(str(path)) for path in paths if path)
    if data.eval_path:
        yield "judged by", public_name(data.eval_path)
    label = ""
    for given, text in _pairs(start.get("summary")):
        label = given or label
        if label == "data":
            # Whatever it is called by: only the counts are wanted here.
            yield "", text.removeprefix(f"{data.name}: ")


def _metric_rows(path: Path, step: int) -> Iterator[tuple[str, str]]:
    """The newest of each name, up to the step of the weights."""
    found: dict[str, tuple[float, int]] = {}
    for record in _records(path):
        at = record.get("step")
        if not isinstance(at, int) or at > step:
            continue
        for name, value in record.items():
            if name.startswith(("eval/", "train/loss")) and isinstance(value, int | float):
                found[name] = (float(value), at)
    for name, (value, at) in sorted(found.items()):
        yield name, f"{value:.4g} (step {at:,})"


def _hyper_parameters(config: RunConfig) -> Iterator[tuple[str, str]]:
    values = config.as_dict()
    for section in ("adapter", "optim", "schedule"):
        for key, value in values[section].items():
            if not key.startswith("_"):
                yield f"{section}.{key}", _plain(value)
    for key in ("max_steps", "max_epochs", "global_batch_size", "clip_norm", "max_grad_norm"):
        if key in values["loop"]:
            yield f"loop.{key}", _plain(values["loop"][key])
    for key in ("max_length", "packing", "learn"):
        yield f"data.{key}", _plain(values["data"][key])
    for key in ("dtype", "freeze"):
        yield f"model.{key}", _plain(values["model"][key])
    yield "parallel.mixed_precision", _plain(values["parallel"].get("mixed_precision"))
    yield "run.seed", _plain(values["run"]["seed"])


def _patch_rows(config: RunConfig, start: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    told = start.get("patches")
    if isinstance(told, list) and told:
        for row in told:
            yield str(row.get("name")), f"{row.get('status')}: {row.get('reason')}"
    else:
        for name in config.patches:
            yield name, "chosen"


def _licence(config: RunConfig, base: str) -> str:
    if config.model.weights == "random":
        return "The weights are of no published model: they were trained from a seed."
    return (
        f"These weights derive from {base}: the licence of that model applies to them, with the "
        "terms and the prohibited uses that Google publishes for Gemma "
        "(https://ai.google.dev/gemma/terms). Read them on the page of the base model before you "
        "pass this one on. The licence of the data is for its owner to state."
    )


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(rows: Iterator[tuple[str, str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return ""
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in cells)])


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(value: Any) -> Iterator[tuple[str, str]]:
    for pair in value if isinstance(value, list) else []:
        if isinstance(pair, list) and len(pair) == 2:
            yield str(pair[0]), str(pair[1])


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut by a crash
        if isinstance(record, dict):
            yield record
