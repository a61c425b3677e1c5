"""What a patch is, the journal through which every edit goes, and the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import nn

from gemtune.errors import PatchError

APPLIED = "applied"
UPSTREAM = "upstream"
NOT_APPLICABLE = "not applicable"

REPORT_ATTRIBUTE = "_gemtune_patch_report"


@dataclass(frozen=True)
class Edit:
    """One attribute of one module instance that gets a new value.

    `value` should be a `types.MethodType` bound to `owner` when it is a method: `copy.deepcopy`
    then binds the copy to the copied module.
    """

    owner: nn.Module
    attribute: str
    value: Any
    site: str
    """Where it is, as a dotted path from the model."""


@dataclass(frozen=True)
class Plan:
    """What a patch would do to this model: its edits, or why there are none."""

    status: str
    reason: str = ""
    edits: tuple[Edit, ...] = ()


class Patch(Protocol):
    """A patch is a dataclass whose fields are its options.

    `plan` looks and changes nothing. It raises `PatchError` when the model should match and does
    not, so that an unknown transformers release is never patched silently wrong.
    """

    name: ClassVar[str]

    def plan(self, model: nn.Module) -> Plan: ...


@dataclass(frozen=True)
class PatchRow:
    """One line of the report."""

    name: str
    status: str
    reason: str
    sites: tuple[str, ...]


@dataclass
class Journal:
    """Edits in the order in which they were made, with what stood there before."""

    _entries: list[tuple[Edit, bool, Any]] = field(default_factory=list)

    def write(self, edit: Edit) -> None:
        instance = vars(edit.owner)
        was_set = edit.attribute in instance
        self._entries.append((edit, was_set, instance.get(edit.attribute)))
        instance[edit.attribute] = edit.value

    def undo(self) -> None:
        # Every entry is checked before the first is reversed: an undo is whole or not at all.
        for edit, _, _ in self._entries:
            if vars(edit.owner).get(edit.attribute) is not edit.value:
                raise PatchError(
                    f"{edit.site}.{edit.attribute} was changed by someone else after the patch; "
                    "undo that change first (accelerate: accelerator.unwrap_model)."
                )
        while self._entries:
            edit, was_set, before = self._entries.pop()
            if was_set:
                vars(edit.owner)[edit.attribute] = before
            else:
                del vars(edit.owner)[edit.attribute]


@dataclass
class PatchReport:
    """What each patch did. Prints as a table; `undo()` puts the model back as it was."""

    rows: list[PatchRow]
    model: nn.Module | None = None
    """None once the patches were undone."""
    journal: Journal = field(default_factory=Journal, repr=False)

    def undo(self) -> None:
        """Reverse every edit, last first. A second call raises `PatchError`."""
        if self.model is None:
            raise PatchError("These patches were undone already.")
        self.journal.undo()
        delattr(self.model, REPORT_ATTRIBUTE)
        self.model = None

    def as_dict(self) -> list[dict[str, Any]]:
        """The rows as plain values, for JSON and trackers."""
        return [
            {"name": r.name, "status": r.status, "reason": r.reason, "sites": list(r.sites)}
            for r in self.rows
        ]

    def __str__(self) -> str:
        if not self.rows:
            return "no patches"
        cells = [("patch", "status", "sites", "why")] + [
            (r.name, r.status, str(len(r.sites)), r.reason) for r in self.rows
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in cells
        )

    def __deepcopy__(self, memo: dict) -> PatchReport:
        # A deep copy of the model is patched as well, but its edits are not in this journal.
        return PatchReport(list(self.rows))
