"""What a patch is, the journal through which every edit goes, and the report."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, ClassVar, Protocol

import torch
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
class Wrap:
    """A method of one module instance that gets something around it.

    `around(self, inner, *args, **kwargs)` is called in its place; `inner` is the method as it was,
    already bound. Several patches may wrap one method, also one that another patch replaced.
    `around` must find what it works with through `self`, so that a deep copy works on itself.
    """

    owner: nn.Module
    attribute: str
    around: Callable[..., Any]
    site: str


@dataclass(frozen=True)
class Relocation:
    """Parameters and buffers whose values move to other memory. They stay the same objects.

    `move` gets the present values of all `tensors`, in their order, and returns the moved ones.
    Undoing copies the values, as they are then, to ordinary memory on the device they came from.
    """

    tensors: tuple[torch.Tensor, ...]
    move: Callable[[list[torch.Tensor]], list[torch.Tensor]]
    site: str


Change = Edit | Wrap | Relocation


@dataclass(frozen=True)
class Plan:
    """What a patch would do to this model: its changes, or why there are none."""

    status: str
    reason: str = ""
    changes: tuple[Change, ...] = ()


class Patch(Protocol):
    """A patch is a dataclass whose fields are its options.

    `plan` looks and changes nothing. It raises `PatchError` when the model should match and does
    not, so that an unknown transformers release is never patched silently wrong.
    """

    name: ClassVar[str]

    def plan(self, model: nn.Module) -> Plan: ...


def modules_of_class(model: nn.Module, *names: str) -> list[tuple[str, nn.Module]]:
    """(dotted path, module) of every module whose class has one of these names, `model` included.

    By name, because a patch is found without importing what it patches, and because a class of
    another release or another library is another object.
    """
    return [(path, m) for path, m in model.named_modules() if type(m).__name__ in names]


@dataclass(frozen=True)
class PatchRow:
    """One line of the report."""

    name: str
    status: str
    reason: str
    sites: tuple[str, ...]


@dataclass
class _Entry:
    """An attribute that was written, and what stood there before."""

    edit: Edit
    was_set: bool
    before: Any

    def is_ours(self) -> bool:
        return vars(self.edit.owner).get(self.edit.attribute) is self.edit.value

    def reverse(self) -> None:
        instance = vars(self.edit.owner)
        if self.was_set:
            instance[self.edit.attribute] = self.before
        else:
            del instance[self.edit.attribute]


@dataclass
class _Moved:
    """Tensors that were moved, and the devices they came from."""

    tensors: tuple[torch.Tensor, ...]
    devices: list[torch.device]

    def reverse(self) -> None:
        for tensor, device in zip(self.tensors, self.devices, strict=True):
            tensor.data = tensor.data.to(device, copy=True)


@dataclass
class Journal:
    """Changes in the order in which they were made, with what stood there before."""

    _entries: list[_Entry | _Moved] = field(default_factory=list)

    def make(self, change: Change) -> None:
        if isinstance(change, Relocation):
            self._relocate(change)
        elif isinstance(change, Wrap):
            self._write(_as_edit(change))
        else:
            # Every edit is made before the first wrap, and no two edits meet.
            if change.attribute in vars(change.owner) and hasattr(
                type(change.owner), change.attribute
            ):
                raise _replaced_before(change)
            self._write(change)

    def _write(self, edit: Edit) -> None:
        instance = vars(edit.owner)
        was_set = edit.attribute in instance
        self._entries.append(_Entry(edit, was_set, instance.get(edit.attribute)))
        instance[edit.attribute] = edit.value

    def _relocate(self, change: Relocation) -> None:
        devices = [tensor.device for tensor in change.tensors]
        moved = change.move([tensor.data for tensor in change.tensors])
        for tensor, values in zip(change.tensors, moved, strict=True):
            tensor.data = values
        self._entries.append(_Moved(change.tensors, devices))

    def undo(self) -> None:
        # Every entry is checked before the first is reversed: an undo is whole or not at all.
        # Of several entries for one attribute only the newest can still be in place.
        newest: dict[tuple[int, str], _Entry] = {
            (id(entry.edit.owner), entry.edit.attribute): entry
            for entry in self._entries
            if isinstance(entry, _Entry)
        }
        for entry in newest.values():
            if not entry.is_ours():
                raise PatchError(
                    f"{entry.edit.site}.{entry.edit.attribute} was changed by someone else after "
                    "the patch; undo that change first (accelerate: accelerator.unwrap_model)."
                )
        while self._entries:
            self._entries.pop().reverse()


def _replaced_before(change: Edit | Wrap) -> PatchError:
    return PatchError(
        f"{change.site}.{change.attribute} was replaced by someone else before the patch. Apply "
        "patches before anything else changes the model, and before a trainer gets it."
    )


def _as_edit(wrap: Wrap) -> Edit:
    """The edit that puts `wrap.around` over the method as it is now."""
    current = vars(wrap.owner).get(wrap.attribute)
    inner: Callable[..., Any]
    if current is None:
        inner = _method_of_class(type(wrap.owner), wrap.attribute)
    elif isinstance(current, MethodType):
        inner = current.__func__
    else:
        raise _replaced_before(wrap)
    around = wrap.around

    # Bound late: a deep copy of the module calls `inner` on itself.
    @functools.wraps(inner)
    def wrapped(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(self, functools.partial(inner, self), *args, **kwargs)

    return Edit(wrap.owner, wrap.attribute, MethodType(wrapped, wrap.owner), wrap.site)


def _method_of_class(owner: type, name: str) -> Callable[..., Any]:
    """The method of the class that an instance has when it is called, which FSDP2 changes.

    transformers 5.23 recomputes a layer by the outermost `forward` of its class, and by no other.
    """

    @functools.wraps(getattr(owner, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return getattr(type(self), name)(self, *args, **kwargs)

    return method


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
        # A deep copy of the model is patched as well, but its changes are not in this journal.
        return PatchReport(list(self.rows))
