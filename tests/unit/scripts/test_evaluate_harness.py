"""scripts/evaluate_harness.py: an exported model on a local task, against the model itself."""

from __future__ import annotations

import functools
import json
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration

from gemtune.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "evaluate_harness.py"
ROWS = [
    {"question": "What is the sum of", "answer": "3 and 4"},
    {"question": "The digit is", "answer": "seven"},
    {"question": "Read the digits", "answer": "one two"},
]
TASK = """
task: gemtune_sentences
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: " {{{{answer}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
"""

Run = Callable[[list[str]], int]


@pytest.fixture
def run() -> Run:
    return runpy.run_path(str(SCRIPT))["run"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with one task, which reads a file."""
    data, folder = tmp_path / "rows.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder.mkdir()
    (folder / "sentences.yaml").write_text(TASK.format(data=data))
    return folder


def perplexity(model_folder: Path) -> float:
    """exp of the mean negative log-likelihood of the answers, by stock transformers."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = Gemma4ForConditionalGeneration.from_pretrained(model_folder).eval()
    total = 0.0
    for row in ROWS:
        context = [tokenizer.bos_token_id]
        context += tokenizer.encode(row["question"], add_special_tokens=False)
        whole = tokenizer.encode(f"{row['question']} {row['answer']}", add_special_tokens=False)
        ids = torch.tensor([[tokenizer.bos_token_id, *whole]])
        with torch.no_grad():
            scores = model(input_ids=ids).logits.log_softmax(-1)
        for at in range(len(context), ids.shape[1]):
            total += float(scores[0, at - 1, ids[0, at]])
    return math.exp(-total / len(ROWS))


def test_a_local_task(
    run: Run,
    tasks: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    pytest.importorskip("lm_eval", reason="not installed: pip install 'gemtune[lm-eval]'")
    import datasets
    import lm_eval.tasks as harness

    # Without its own 14,000 tasks, which take it seconds to list.
    manager = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", manager)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    output = tmp_path / "results.json"
    keys = [f"model={tiny_checkpoint}", "tasks=gemtune_sentences", f"include={tasks}"]
    assert run([*keys, f"output={output}", "device=cpu", "batch_size=2"]) == 0
    found = json.loads(output.read_text())["results"]["gemtune_sentences"]["perplexity,none"]
    assert found == pytest.approx(perplexity(tiny_checkpoint), rel=1e-4)
    assert f"perplexity           {found:.4f}" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"has no gemtune_sentence\. Did you mean 'gemtune_sent"):
        run([*keys, "tasks=gemtune_sentence"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["model=x", "taks=y"], r"taks=y is not one of the keys\. Did you mean 'tasks'\?"),
        (["model=x"], r"tasks is not set: model=runs/NAME tasks=NAME"),
        (["tasks=x"], r"model is not set"),
        (["model={here}", "tasks=y"], r"holds no exported model \(no config\.json\)"),
        (["model={model}", "tasks=y", "limit=some"], r"limit=some must be a whole number"),
        (["model={model}", "tasks=y", "include={here}/no"], r"include=.* is not a folder"),
        (["model={model}", "tasks=y", "output={here}/no/r.json"], r"there is no folder"),
        (["model={model}", "tasks=y", "chat_template=yes"], r"must be true or false"),
    ],
)
def test_what_is_refused(run: Run, tmp_path: Path, keys: list[str], message: str) -> None:
    model = tmp_path / "run" / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=message):
        run([key.format(here=tmp_path, model=model.parent) for key in keys])
