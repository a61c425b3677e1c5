"""Applying patches to a model: all planned first, then all or none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import (
    REPORT_ATTRIBUTE,
    Edit,
    Patch,
    PatchReport,
    PatchRow,
    Plan,
    Relocation,
    Wrap,
)
from gemtune.patches.catalogue import default, resolve


def apply(
    model: nn.Module, patches: Iterable[str | Patch] | Mapping[str, Patch] | None = None
) -> PatchReport:
    """Apply patches to one model instance, all or none of them.

    `patches` are names or `Patch` objects; None stands for those of `default()`. All patches are
    planned before anything changes; the class of no module is touched.

    Raises:
        PatchError: an unknown name, a model that is patched already, two patches that claim one
            attribute, or a patch that should match this model and does not.
    """
    if getattr(model, REPORT_ATTRIBUTE, None) is not None:
        raise PatchError("This model is patched already. Call .undo() of its report first.")
    chosen = default() if patches is None else patches
    if isinstance(chosen, Mapping):
        chosen = chosen.values()
    plans = {patch.name: patch.plan(model) for patch in map(resolve, chosen)}
    _refuse_conflicts(plans)

    report = PatchReport([], model)
    # Wraps last, so that they go around a method that another patch replaces.
    changes = [change for plan in plans.values() for change in plan.changes]
    try:
        for change in sorted(changes, key=lambda change: isinstance(change, Wrap)):
            report.journal.make(change)
    except BaseException:
        report.journal.undo()
        raise
    for name, plan in plans.items():
        sites = tuple(dict.fromkeys(change.site for change in plan.changes))
        report.rows.append(PatchRow(name, plan.status, plan.reason, sites))
    vars(model)[REPORT_ATTRIBUTE] = report
    return report


def _refuse_conflicts(plans: Mapping[str, Plan]) -> None:
    claims: dict[tuple[int, str], str] = {}
    for name, plan in plans.items():
        for what, where in _claimed(plan):
            other = claims.setdefault(what, name)
            if other != name:
                raise PatchError(
                    f"{name} and {other} both change {where}. "
                    "Leave one of them out of patches=[...]."
                )


def _claimed(plan: Plan) -> Iterator[tuple[tuple[int, str], str]]:
    """What only one patch can have: an attribute to replace, the place of a tensor."""
    for change in plan.changes:
        if isinstance(change, Edit):
            yield (id(change.owner), change.attribute), f"{change.site}.{change.attribute}"
        elif isinstance(change, Relocation):
            for tensor in change.tensors:
                yield (id(tensor), "data"), f"where {change.site} is stored"
