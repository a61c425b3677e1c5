"""Whether stock transformers, in a fresh process, computes what the training model did."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gemtune.errors import CheckpointError
from gemtune.export import stock_reader
from gemtune.export.probe import MESSAGES, Probe

Logits = Mapping[str, torch.Tensor]
"""Pass -> [S, V] float32."""

FLOAT32_BOUND = 1e-4
"""Two ways to the same float32 logits: some hundred roundings of 2^-24 in a row come to 1e-5 (most
that was measured on the small models of the tests: 1.4e-5)."""

BFLOAT16_BOUND = 0.5
"""Logits of rounded weights and of those before. Each weight is off by 2^-8 of itself at most, and
what that comes to is up to the model: 0.21 on the worst of the small ones, whose weights are nearly
random. A wrong tensor comes to 1 and more. That nothing but rounding happened is not for this bound
to say: merging is held to `FLOAT32_BOUND` before it, and loading to the bit after it."""


@dataclass(frozen=True)
class Expected:
    """What the exporting process computed, in float32."""

    probe: Probe
    trained: Logits
    """Of the training model."""
    rounded: Logits
    """The same of the weights that are written."""
    digests: Mapping[str, str]
    """Of those weights: see `stock_reader.digests`."""
    bound: float
    """Between the exported model and the training model: one of the two above."""
    base: Mapping[str, Any] | None = None
    """The stock model below an adapter: `where` from_pretrained finds it, and its `dtype`."""


@dataclass(frozen=True)
class Difference:
    """The worst position of a pass."""

    name: str
    position: int
    error: float
    """Root mean square of the differences over the vocabulary, over the logits' own spread."""


def difference(name: str, found: torch.Tensor, expected: torch.Tensor) -> Difference:
    """Where two [S, V] logits differ most, relative to their spread there."""
    spread = expected.double().std(dim=-1).clamp(min=1e-12)
    errors = (found.double() - expected.double()).square().mean(dim=-1).sqrt() / spread
    errors = errors.nan_to_num(nan=math.inf)
    position = int(errors.argmax())
    return Difference(name, position, float(errors[position]))


def require_same(probe: Probe, found: Logits, expected: Logits, what: str) -> None:
    """Raise CheckpointError where logits differ by more than rounding to float32 explains."""
    problems = []
    for name, logits in found.items():
        worst = difference(name, logits, expected[name])
        problems += _too_far(worst, FLOAT32_BOUND, what, probe)
    _refuse(problems)


def verify_export(folder: Path, expected: Expected) -> list[Difference]:
    """Load `folder` by stock transformers in a process of its own; the differences, pass by pass.

    Raises:
        CheckpointError: a weight, the tokenizer, the processor or a logit is not what it was.
    """
    with tempfile.TemporaryDirectory(prefix="gemtune-export-") as place:
        said, tensors = _ask(folder, expected, Path(place))
    probe = expected.probe
    problems = [*said["problems"], *_other_weights(said["digests"], expected.digests)]
    if said["ids"] != probe.ids:
        problems.append("the tokenizer and its template render a conversation to other ids")
    for name, value in probe.patches.items():
        if not torch.equal(tensors[f"patches|{name}"], value):
            problems.append(f"the image processor gives other {name}")
    found = []
    for name, trained in expected.trained.items():
        logits = tensors[f"logits|{name}"]
        written = difference(name, logits, expected.rounded[name])
        found.append(difference(name, logits, trained))
        problems += _too_far(written, FLOAT32_BOUND, "the weights that were written", probe)
        problems += _too_far(found[-1], expected.bound, "the training model", probe)
    _refuse(problems)
    return found


def _refuse(problems: list[str]) -> None:
    if problems:
        raise CheckpointError(
            "The exported model is not the one that was trained, so it was not put in its place:\n"
            + "\n".join(f"  {problem}" for problem in problems[:8])
        )


def _too_far(found: Difference, bound: float, what: str, probe: Probe) -> list[str]:
    if found.error <= bound:
        return []
    row = next(each for each in probe.passes if each.name == found.name)
    token = int(row.inputs["input_ids"][0, found.position])
    return [
        f"logits of the {found.name} row differ from {what} by {found.error:.2e} of their spread "
        f"at position {found.position} (token {token}); at most {bound:.2e} is allowed"
    ]


def _other_weights(found: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    other = sorted(name for name, digest in expected.items() if found.get(name) != digest)
    if not other:
        return []
    return [f"{len(other)} of {len(expected)} tensors load with other values, such as {other[0]}"]


def _ask(
    folder: Path, expected: Expected, place: Path
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    probe = expected.probe
    tensors = {} if probe.image is None else {"image": torch.from_numpy(probe.image)}
    for each in probe.passes:
        tensors |= {f"{each.name}|{name}": value for name, value in each.inputs.items()}
        tensors |= {f"{each.name}|route{i}": route for i, route in enumerate(each.routes)}
    # A tensor that several rows share is written for each.
    save_file({n: t.clone() for n, t in tensors.items()}, place / "request.safetensors")
    request = {
        "folder": str(folder.resolve()),
        "base": expected.base,
        "messages": MESSAGES,
        "passes": [{"name": each.name, "evenly": each.evenly} for each in probe.passes],
        "num_threads": torch.get_num_threads(),
    }
    (place / "request.json").write_text(json.dumps(request))
    # -P: the modules beside the script must not be found under plain names.
    command = [sys.executable, "-P", str(stock_reader.__file__), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        if done.returncode < 0:  # with nothing to say; -9 is the system, out of memory
            last = f"its process was ended by signal {-done.returncode}"
        raise CheckpointError(
            "Stock transformers cannot load what was written, so it was not put in its place: "
            f"{last}"
        )
    try:
        answer = json.loads((place / "answer.json").read_text())
        return answer, load_file(place / "answer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The check of the exported model gave no answer: {error}") from error
