"""Rows a second from a JSONL file to ids and labels: gemtune's preparation beside TRL's.

    python benchmarks/data_preparation.py                     # about 4 minutes
    python benchmarks/data_preparation.py --rows 1000 --repetitions 1     # a trial

Each contestant reads the same file of short conversations (one question, one answer) and leaves
prepared rows on disk, in one process and with one thread, nothing taken from a cache; TRL's is
`SFTTrainer._prepare_dataset`. Two templates: the one that E2B ships (TRL has it), and a small one
with `{% generation %}` marks, so that TRL can mask what is not the answer (no released Gemma 4
template has them); there ids and labels of both are compared, row by row. Writes
benchmarks/results/data_preparation.json. A row counts by processor time of the process and its
children, so that other work on the machine counts less.
"""

from __future__ import annotations

import argparse
import copy
import importlib.resources
import importlib.util
import json
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import datasets
import torch
from measure import add_arguments, begin, finish, ratios, spread
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4ImageProcessorPil, Gemma4TextConfig

from gemtune.data import ChatEncoder
from gemtune.data.media.images import ImageEncoder
from gemtune.data.preparation.cache import Preparation
from gemtune.data.sources.source import read_source

TINY = Path(str(importlib.resources.files("gemtune"))) / "assets" / "tiny"
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|turn>' ~ ('model' if m.role == 'assistant' else "
    "m.role) ~ '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}"
    "{{ '<turn|>' }}{% endgeneration %}{% else %}{{ m.content | trim }}{{ '<turn|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)
CONTESTANTS: dict[str, tuple[None, str]] = {
    "gemtune": (None, "gemtune, template of E2B: answers learned"),
    "trl": (None, "TRL, template of E2B: everything learned (it has no marks to mask by)"),
    "gemtune_marked": (None, "gemtune, small template with marks: answers learned"),
    "trl_marked": (None, "TRL with assistant_only_loss, small template with marks"),
}
WORDS = (TINY.parents[1] / "assets" / "digits" / "README.md").read_text(encoding="utf-8").split()


def write_rows(path: Path, number: int) -> dict[str, float]:
    """Questions and answers of a few words each, no two rows alike; mean characters of a row."""
    chosen = random.Random(0)
    characters = 0
    with path.open("w", encoding="utf-8") as file:
        for row in range(number):
            question = f"{row}: " + " ".join(chosen.choices(WORDS, k=chosen.randint(4, 12)))
            answer = " ".join(chosen.choices(WORDS, k=chosen.randint(2, 16)))
            messages = [
                {"role": "user", "content": question + "?"},
                {"role": "assistant", "content": answer + "."},
            ]
            characters += len(question) + len(answer)
            file.write(json.dumps({"messages": messages}) + "\n")
    return {"characters_per_row": round(characters / number, 1)}


def released_template() -> str:
    """The newest of E2B's that TRL has."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.origin is not None
    folder = Path(found.origin).parent / "chat_templates"
    return (folder / "gemma4_v5.jinja").read_text(encoding="utf-8")


def with_template(template: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = template
    return tokenizer


def gemtune(path: Path, tokenizer: Any, folder: Path) -> Any:
    """Prepared rows of the file, in `folder`."""
    source = read_source(str(path), "train", "data.path")
    images = ImageEncoder(Gemma4ImageProcessorPil.from_pretrained(TINY), source.media_root)
    encoder = ChatEncoder(tokenizer, images, max_length=2048)
    return Preparation(str(folder), num_processes=1).rows(source, encoder, len(source.rows))


class TrlPreparation:
    """The preparation of a real SFTTrainer around a model of one small layer."""

    def __init__(self, tokenizer: Any, assistant_only_loss: bool, folder: Path) -> None:
        from trl import SFTConfig, SFTTrainer

        text = Gemma4TextConfig(
            vocab_size=640, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=1, num_key_value_heads=1, head_dim=16, global_head_dim=16,
            hidden_size_per_layer_input=0, num_kv_shared_layers=0,
        )  # fmt: skip
        turn = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        self._tokenizer = tokenizer
        self._config = SFTConfig(
            output_dir=str(folder / "out"),
            assistant_only_loss=assistant_only_loss,
            max_length=2048,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        self._trainer = SFTTrainer(
            model=Gemma4ForCausalLM(text),
            args=self._config,
            train_dataset=datasets.Dataset.from_list([{"messages": list(turn)}]),
            processing_class=tokenizer,
        )

    def prepare(self, path: Path, folder: Path) -> Any:
        rows = datasets.load_dataset(
            "json", data_files=str(path), split="train", cache_dir=str(folder)
        )
        return self._trainer._prepare_dataset(
            rows, self._tokenizer, self._config, False, None, "train"
        )


def compare_rows(ours: Any, theirs: Any) -> int:
    """Rows whose ids and labels are the same in both; all of them, or it ends here."""
    for row in range(len(ours)):
        ids = ours.ids(row).tolist()
        labels = [-100] * len(ids)
        for begins, ends in ours.runs(row).tolist():
            labels[begins:ends] = ids[begins:ends]
        if ids != theirs[row]["input_ids"] or labels != theirs[row]["labels"]:
            raise SystemExit(f"row {row} differs: {ids} {labels} {theirs[row]}")
    return len(ours)


def measure(
    runs: dict[str, Callable[[Path], Any]], repetitions: int, parent: Path
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Any]]:
    """Name -> processor seconds, seconds, rows of the last round; the first is not timed."""
    names = list(runs)
    processor: dict[str, list[float]] = {name: [] for name in names}
    wall: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, Any] = {}
    for turn in range(repetitions + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            last.pop(name, None)
            folder = parent / name
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            start, spent = time.perf_counter(), sum(os.times()[:4])
            last[name] = runs[name](folder)
            if turn:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(sum(os.times()[:4]) - spent)
    return processor, wall, last


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--folder", help="where to; default: a folder of its own in $TMPDIR")
    add_arguments(parser, CONTESTANTS, repetitions=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    datasets.disable_caching()
    datasets.disable_progress_bars()
    result = begin(__file__, options, ("rows",), CONTESTANTS)
    result |= {name: version(name) for name in ("trl", "datasets", "tokenizers", "jinja2")}
    with tempfile.TemporaryDirectory(prefix="gemtune-rows-", dir=options.folder) as name:
        parent = Path(name)
        path = parent / "rows.jsonl"
        result["settings"] |= write_rows(path, options.rows)
        stock, marked = with_template(released_template()), with_template(MARKED)
        trl = TrlPreparation(copy.deepcopy(stock), False, parent)
        trl_marked = TrlPreparation(copy.deepcopy(marked), True, parent)
        runs: dict[str, Callable[[Path], Any]] = {
            "gemtune": lambda folder: gemtune(path, stock, folder),
            "trl": lambda folder: trl.prepare(path, folder),
            "gemtune_marked": lambda folder: gemtune(path, marked, folder),
            "trl_marked": lambda folder: trl_marked.prepare(path, folder),
        }
        processor, wall, last = measure(runs, options.repetitions, parent)
        same = compare_rows(last["gemtune_marked"], last["trl_marked"])
        result["settings"] |= {
            "tokens_per_row": round(float(last["gemtune"].lengths.mean()), 1),
            "rows_compared": same,
        }
        last.clear()
    rows = result["rows"] = {}
    for name in runs:
        other = "trl_marked" if name.endswith("_marked") else "trl"
        rows[name] = {
            "rows_per_processor_second": spread([options.rows / s for s in processor[name]]),
            "rows_per_second": spread([options.rows / s for s in wall[name]]),
            "ratio_to_trl": spread([1 / ratio for ratio in ratios(processor, name, other)]),
        }
        print(
            f"{name:16} {rows[name]['rows_per_processor_second']['median']:8,.0f} rows a second of "
            f"processor time, {rows[name]['ratio_to_trl']['median']:.1f} times TRL"
        )
    finish("data_preparation", result)


if __name__ == "__main__":
    main()
