"""How rows of one shape become ids: what is fixed is encoded once, only their texts row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.probes import Atom, Hole
from gemtune.data.rendering.spans import Piece
from gemtune.errors import DataError


class MediumIds(NamedTuple):
    """What stands for one medium: begin, its soft tokens, end. Of a video the same for every frame,
    with the time before it."""

    ids: Sequence[int]
    stamp: str = ""
    """The time before the first frame. It is encoded with the text that it follows."""
    stamp_ids: Sequence[int] = ()
    """The same by itself."""


class Span(NamedTuple):
    """Where the tokens of a medium are: [begin, end)."""

    kind: str
    begin: int
    end: int


@dataclass(frozen=True)
class Step:
    """One stretch of ids: fixed ones, those of a text, or a medium."""

    message: int | None
    """The message that the model writes it as, None for what it is given."""
    ids: tuple[int, ...] = ()
    text: tuple[Atom, ...] = ()
    medium: str | None = None
    video: int | None = None
    """The number of the video that follows a text, and whose first time ends it."""

    @property
    def has_text(self) -> bool:
        return bool(self.text) or self.video is not None


@dataclass(frozen=True)
class Plan:
    """The steps of a shape, and the pieces they were made from."""

    steps: tuple[Step, ...]
    pieces: tuple[Piece, ...]
    counts: Mapping[str, int]
    """Media of each kind."""


def make_plan(
    pieces: Sequence[Piece], control: ControlTokens, placeholders: Mapping[str, str]
) -> Plan:
    """Cut pieces at their control tokens, and encode what no row changes.

    What stands between two control tokens is encoded by itself, as the tokenizer does it, and so
    is what is learned: no token reaches across an edge of it.

    Args:
        placeholders: token that a template writes for a medium -> kind.
    """
    steps: list[Step] = []
    counts = dict.fromkeys(placeholders.values(), 0)
    for piece in pieces:
        pending: list[Atom] = []
        for atom in piece.atoms:
            if isinstance(atom, Hole):
                pending.append(atom)
                continue
            for number, part in enumerate(control.split(atom)):
                if number % 2 == 0:
                    pending += [part] if part else []
                    continue
                kind = placeholders.get(part)
                if kind == "video":
                    steps.append(Step(piece.message, text=tuple(pending), video=counts[kind]))
                else:
                    steps += _step(pending, piece.message, control)
                pending = []
                if kind is None:
                    steps.append(Step(piece.message, (control.ids[part],)))
                else:
                    steps.append(Step(None, medium=kind))
                    counts[kind] += 1
        steps += _step(pending, piece.message, control)
    merged: list[Step] = []
    for step in steps:
        if merged and step.ids and merged[-1].ids and merged[-1].message == step.message:
            step = Step(step.message, merged.pop().ids + step.ids)
        merged.append(step)
    return Plan(tuple(merged), tuple(pieces), counts)


def _step(atoms: list[Atom], message: int | None, control: ControlTokens) -> list[Step]:
    if not atoms:
        return []
    if any(isinstance(atom, Hole) for atom in atoms):
        return [Step(message, text=tuple(atoms))]
    fixed = "".join(atom for atom in atoms if isinstance(atom, str))
    return [Step(message, tuple(control.encode([fixed])[0]))]


def texts_to_encode(
    plan: Plan, texts: Sequence[str], videos: Sequence[MediumIds] = ()
) -> list[str]:
    """The texts of a row's steps in order, its own put in.

    A video too many for `videos` has no time here; `assemble` refuses the row.
    """
    encoded = []
    for step in plan.steps:
        if step.has_text:
            text = filled(step.text, texts)
            if step.video is not None and step.video < len(videos):
                text += videos[step.video].stamp
            encoded.append(text)
    return encoded


def filled(atoms: Sequence[Atom], texts: Sequence[str]) -> str:
    """Atoms as one text."""
    if len(atoms) == 1 and isinstance(atoms[0], Hole):
        return atoms[0].fill(texts[atoms[0].number])
    return "".join(
        atom if isinstance(atom, str) else atom.fill(texts[atom.number]) for atom in atoms
    )


def assemble(
    plan: Plan,
    encoded: Sequence[Sequence[int]],
    media: Mapping[str, Sequence[MediumIds]],
    learned: frozenset[int] | None,
    where: str,
) -> tuple[list[int], list[tuple[int, int]], list[Span]]:
    """The ids of a row, the stretches of them that are learned, and where its media are.

    Args:
        encoded: ids of `texts_to_encode`.
        media: of each kind, what stands for each medium.
        learned: messages whose text is learned; None: everything but media is.

    Raises:
        DataError: more or fewer media than the template rendered.
    """
    for kind, count in plan.counts.items():
        if count != len(media.get(kind, ())):
            dropped = f"dropped a medium ({kind}), so it is no template for it"
            what = dropped if count < len(media.get(kind, ())) else f"rendered extra media ({kind})"
            raise DataError(f"{where}: the chat template {what}.")
    ids: list[int] = []
    runs: list[tuple[int, int]] = []
    spans: list[Span] = []
    texts = iter(encoded)
    waiting = {kind: iter(several) for kind, several in media.items()}
    video_begin = 0
    for step in plan.steps:
        begin = len(ids)
        if step.medium is not None:
            ids += next(waiting[step.medium]).ids
            begin = video_begin if step.medium == "video" else begin
            spans.append(Span(step.medium, begin, len(ids)))
            continue
        ids += step.ids or next(texts)
        end = len(ids)
        if step.video is not None:
            end = video_begin = _begin_of_stamp(ids, begin, media["video"][step.video])
        if (learned is None or step.message in learned) and end > begin:
            if runs and runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], end)
            else:
                runs.append((begin, end))
    return ids, runs, spans


def _begin_of_stamp(ids: Sequence[int], begin: int, video: MediumIds) -> int:
    """Where in the ids of a text the time at its end begins, or the text if a token has both."""
    at = len(ids) - len(video.stamp_ids)
    return at if at >= begin and list(ids[at:]) == list(video.stamp_ids) else begin
