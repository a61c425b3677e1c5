"""Answers that the model generates, shared between the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemtune.data import ChatDataset
from gemtune.runtime import Runtime


@dataclass
class Answer:
    """One generated answer beside the one expected."""

    where: str
    kind: str | None
    question: str
    expected: str
    generated: str

    @property
    def correct(self) -> bool:
        return self.generated == self.expected


def rounds_of_rank(
    runtime: Runtime, num_rows: int, batch_size: int
) -> Iterator[tuple[list[int], bool]]:
    """(rows of a batch, whether they count): this rank's share of the first `num_rows` rows.

    Where forwards are joint every rank gets as many batches, in excess ones that do not count.
    """
    shares = [range(rank, num_rows, runtime.world_size) for rank in range(runtime.world_size)]
    mine = shares[runtime.rank]
    for first in range(0, len(mine), batch_size):
        yield list(mine[first : first + batch_size]), True
    if runtime.is_sharded:
        # Rank 0 has the largest share.
        for _ in range(len(mine[::batch_size]), len(shares[0][::batch_size])):
            yield [0], False


@torch.no_grad()
def generate_answers(
    runtime: Runtime,
    model: nn.Module,
    dataset: ChatDataset,
    *,
    num_rows: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Answer the last turn of the first `num_rows` rows, greedily, shared between the ranks.

    On every rank all answers in the order of the rows. `model` is the unwrapped model; it is left
    in evaluation mode.
    """
    model.eval()
    tokenizer = dataset.encoder.tokenizer
    stop_ids = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn|>")]
    answers: list[tuple[int, Answer]] = []
    for rows, count in rounds_of_rank(runtime, num_rows, batch_size):
        prompts = [dataset.prompt(row) for row in rows]
        # Left padding: every answer begins at the same place.
        batch = dataset.batch([prompt for prompt, _ in prompts], padding_side="left")
        inputs = batch.to(runtime.device).inputs
        with runtime.accelerator.autocast():
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=stop_ids,
                pad_token_id=tokenizer.pad_token_id,
                # Ranks that are done go on for those that are not: their weights are needed.
                synced_gpus=runtime.is_sharded,
            )
        if not count:
            continue
        new_tokens = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
        for row, (prompt, expected), text in zip(rows, prompts, texts, strict=True):
            source_row = dataset.row(row)
            question = _question(source_row)
            kind = source_row.get("kind")
            answer = Answer(prompt.where, kind, question, expected, text.strip())
            answers.append((row, answer))
    return [answer for _, answer in sorted(runtime.collect(answers), key=lambda pair: pair[0])]


def _question(row: dict[str, Any]) -> str:
    """What the user said before the last answer."""
    roles = [message["role"] for message in row["messages"]]
    last_answer = len(roles) - 1 - roles[::-1].index("assistant")
    content = row["messages"][last_answer - 1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(
        part["text"] or "" if part["type"] == "text" else f"[{part['type']}]" for part in content
    )
