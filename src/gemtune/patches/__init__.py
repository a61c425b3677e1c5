"""Exact savings for Gemma 4, applied to one model instance and undone again.

    from gemtune.patches import apply
    report = apply(model)          # or apply(model, ["linear_cross_entropy"])
    print(report)                  # one line a patch: applied, upstream, not applicable
    report.undo()

Needs torch and transformers only. Parameters and `state_dict` keys stay as they were.
"""

from gemtune.patches.base import Edit, Patch, PatchReport, PatchRow, Plan, Relocation, Wrap
from gemtune.patches.catalogue import available, default, resolve
from gemtune.patches.stage import apply

__all__ = [
    "Edit",
    "Patch",
    "PatchReport",
    "PatchRow",
    "Plan",
    "Relocation",
    "Wrap",
    "apply",
    "available",
    "default",
    "resolve",
]
