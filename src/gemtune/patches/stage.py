"""Applying patches to a model: all planned first, then all or none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from gemtune.errors import PatchError
from gemtune.patches.base import REPORT_ATTRIBUTE, Patch, PatchReport, PatchRow, Plan
from gemtune.patches.catalogue import available, resolve


def apply(
    model: nn.Module, patches: Iterable[str | Patch] | Mapping[str, Patch] | None = None
) -> PatchReport:
    """Apply patches to one model instance, all or none of them.

    `patches` are names or `Patch` objects; None stands for every patch of `available()`. All
    patches are planned before anything changes; the class of no module is touched.

    Raises:
        PatchError: an unknown name, a model that is patched already, two patches that claim one
            attribute, or a patch that should match this model and does not.
    """
    if getattr(model, REPORT_ATTRIBUTE, None) is not None:
        raise PatchError("This model is patched already. Call .undo() of its report first.")
    chosen = available() if patches is None else patches
    if isinstance(chosen, Mapping):
        chosen = chosen.values()
    plans = {patch.name: patch.plan(model) for patch in map(resolve, chosen)}
    _refuse_conflicts(plans)

    report = PatchReport([], model)
    for name, plan in plans.items():
        for edit in plan.edits:
            report.journal.write(edit)
        sites = tuple(edit.site for edit in plan.edits)
        report.rows.append(PatchRow(name, plan.status, plan.reason, sites))
    vars(model)[REPORT_ATTRIBUTE] = report
    return report


def _refuse_conflicts(plans: Mapping[str, Plan]) -> None:
    claims: dict[tuple[int, str], str] = {}
    for name, plan in plans.items():
        for edit in plan.edits:
            other = claims.setdefault((id(edit.owner), edit.attribute), name)
            if other != name:
                raise PatchError(
                    f"{name} and {other} both change {edit.site}.{edit.attribute}. "
                    "Leave one of them out of patches=[...]."
                )
