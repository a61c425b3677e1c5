"""How rows of one shape become ids: what is fixed is encoded once, only their texts row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemtune.data.rendering.control_tokens import ControlTokens
from gemtune.data.rendering.probes import Atom, Hole
from gemtune.data.rendering.spans import Piece
from gemtune.errors import DataError


@dataclass(frozen=True)
class Step:
    """One stretch of ids: fixed ones, those of a text, or an image."""

    message: int | None
    """The message that the model writes it as, None for what it is given."""
    ids: tuple[int, ...] = ()
    text: tuple[Atom, ...] = ()
    is_image: bool = False


@dataclass(frozen=True)
class Plan:
    """The steps of a shape, and the pieces they were made from."""

    steps: tuple[Step, ...]
    pieces: tuple[Piece, ...]
    num_images: int
    texts: tuple[str, ...] | None = None
    """What goes into its holes, where that is not the row's own texts."""


def make_plan(
    pieces: Sequence[Piece], control: ControlTokens, image: str, texts: tuple[str, ...] | None
) -> Plan:
    """Cut pieces at their control tokens, and encode what no row changes.

    What stands between two control tokens is encoded by itself, as the tokenizer does it, and so
    is what is learned: no token reaches across an edge of it.
    """
    steps: list[Step] = []
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
                steps += _step(pending, piece.message, control)
                pending = []
                if part == image:
                    steps.append(Step(None, is_image=True))
                else:
                    steps.append(Step(piece.message, (control.ids[part],)))
        steps += _step(pending, piece.message, control)
    merged: list[Step] = []
    for step in steps:
        if merged and step.ids and merged[-1].ids and merged[-1].message == step.message:
            step = Step(step.message, merged.pop().ids + step.ids)
        merged.append(step)
    num_images = sum(step.is_image for step in merged)
    return Plan(tuple(merged), tuple(pieces), num_images, texts)


def _step(atoms: list[Atom], message: int | None, control: ControlTokens) -> list[Step]:
    if not atoms:
        return []
    if any(isinstance(atom, Hole) for atom in atoms):
        return [Step(message, text=tuple(atoms))]
    fixed = "".join(atom for atom in atoms if isinstance(atom, str))
    return [Step(message, tuple(control.encode([fixed])[0]))]


def texts_to_encode(plan: Plan, texts: Sequence[str]) -> list[str]:
    """The texts of a row's steps in order, its own put in."""
    return [filled(step.text, texts) for step in plan.steps if step.text]


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
    images: Sequence[Sequence[int]],
    learned: frozenset[int] | None,
    where: str,
) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a row, and the stretches of them that are learned.

    Args:
        encoded: ids of `texts_to_encode`.
        images: ids that stand for each image.
        learned: messages whose text is learned; None: everything but images is.

    Raises:
        DataError: more or fewer images than the template rendered.
    """
    if plan.num_images != len(images):
        what = "dropped an image, so it is no template for images"
        if plan.num_images > len(images):
            what = "rendered extra images"
        raise DataError(f"{where}: the chat template {what}.")
    ids: list[int] = []
    runs: list[tuple[int, int]] = []
    texts, pictures = iter(encoded), iter(images)
    for step in plan.steps:
        begin = len(ids)
        if step.is_image:
            ids += next(pictures)
            continue
        ids += step.ids or next(texts)
        if learned is None or step.message in learned:
            if runs and runs[-1][1] == begin:
                runs[-1] = (runs[-1][0], len(ids))
            else:
                runs.append((begin, len(ids)))
    return ids, runs
