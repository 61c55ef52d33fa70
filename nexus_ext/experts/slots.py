"""How an expert lies in a slot, and how many slots a budget buys.

Experts whose tensors are alike share a class of slots; sizes may differ between layers. Numbers in,
numbers out: no device, no engine.

Note [Where a tensor begins in its slot]
Direct reads land in place where file and memory agree about the place in a page. Experts of one
class mostly lie alike in their files, so each tensor begins as far behind a page boundary as it
does there. Where they do not, or where a weight would not be aligned, tensors are packed and reads
are staged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nexus_ext.checkpoint import ALIGNMENT, Extent, Group, Member
from nexus_ext.errors import BudgetError
from nexus_ext.experts.find import Expert, ExpertTensor
from nexus_ext.memory import format_bytes

__all__ = ["PAGE_BYTES", "SlotClass", "SlotPlan", "classes_of", "plan_slots", "smallest_budget"]

PAGE_BYTES = 4096
# One that computes, one that is read.
FEWEST_SLOTS = 2
# Slots that experts pass through without staying: enough that the disk always has its fill of
# requests, never so many that little is left to stay.
_PASSING_BYTES = 64 << 20
_MOST_PASSING = 0.25


@dataclass(frozen=True)
class SlotClass:
    """Experts whose tensors are alike.

    Attributes:
        keys: The experts' numbers, over all layers.
        groups: Where each one's bytes come from and go to, in the order of `keys`.
        slot_bytes: Of one slot; whole pages.
    """

    keys: tuple[int, ...]
    groups: tuple[Group, ...]
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        """With a slot for each."""
        return self.slot_bytes * len(self.keys)


@dataclass(frozen=True)
class SlotPlan:
    """Slots by class. `num_passing` of `num_slots` are for experts that do not stay."""

    budget_bytes: int
    num_slots: tuple[int, ...]
    num_passing: tuple[int, ...]
    slot_bytes: tuple[int, ...]
    num_experts: int

    @property
    def nbytes(self) -> int:
        """Of memory in use; never more than the budget."""
        return sum(n * size for n, size in zip(self.num_slots, self.slot_bytes, strict=True))

    @property
    def num_staying(self) -> int:
        """Experts that can stay."""
        return sum(self.num_slots) - sum(self.num_passing)

    def describe(self) -> str:
        """One line of the plan's table."""
        return (
            f"experts   {self.num_staying} of {self.num_experts} stay, {sum(self.num_passing)} "
            f"slots to pass through, {format_bytes(self.nbytes)}"
        )


def classes_of(experts: Sequence[Expert]) -> list[SlotClass]:
    """Sort experts, numbered as they come, into classes."""
    alike: dict[tuple[object, ...], list[int]] = {}
    for key, expert in enumerate(experts):
        kind = tuple(
            (t.name, t.dtype, t.shape, tuple(s.nbytes for s in t.sources)) for t in expert.tensors
        )
        alike.setdefault(kind, []).append(key)
    return [_class_of(keys, [experts[key] for key in keys]) for keys in alike.values()]


def _class_of(keys: list[int], experts: list[Expert]) -> SlotClass:
    phases = [
        _common_phase([expert.tensors[index] for expert in experts])
        for index in range(len(experts[0].tensors))
    ]
    offsets, end = [], 0
    for phase, tensor in zip(phases, experts[0].tensors, strict=True):
        # See Note [Where a tensor begins in its slot].
        begin = _up(end, ALIGNMENT) if phase is None else _up(end - phase, PAGE_BYTES) + phase
        offsets.append(begin)
        end = begin + _nbytes(tensor)
    slot_bytes = _up(end, PAGE_BYTES)
    groups = tuple(
        _group(f"expert {key}", expert, offsets, slot_bytes)
        for key, expert in zip(keys, experts, strict=True)
    )
    return SlotClass(tuple(keys), groups, slot_bytes)


def _common_phase(tensors: list[ExpertTensor]) -> int | None:
    phases = {tensor.sources[0].offset % PAGE_BYTES for tensor in tensors}
    phase = phases.pop()
    return None if phases or phase % ALIGNMENT else phase


def _group(name: str, expert: Expert, offsets: list[int], slot_bytes: int) -> Group:
    members: list[Member] = []
    extents: list[Extent] = []
    for tensor, offset in zip(expert.tensors, offsets, strict=True):
        members.append(Member(tensor.name, tensor.dtype, tensor.shape, offset, _nbytes(tensor)))
        extents += _extents(tensor, offset)
    return Group(name, tuple(members), tuple(extents), slot_bytes)


def _extents(tensor: ExpertTensor, offset: int) -> list[Extent]:
    """One for each piece of the file: sources that follow each other there, as gate and up mostly
    do, are one piece, which is one read and can be used where it is mapped.
    """
    found: list[Extent] = []
    for source in tensor.sources:
        last = found[-1] if found else None
        if last and (last.file, last.offset + last.nbytes) == (source.file, source.offset):
            found[-1] = replace(last, nbytes=last.nbytes + source.nbytes)
        else:
            found.append(Extent(source.file, source.offset, source.nbytes, offset))
        offset += source.nbytes
    return found


def _nbytes(tensor: ExpertTensor) -> int:
    return sum(source.nbytes for source in tensor.sources)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def plan_slots(classes: Sequence[SlotClass], budget_bytes: int) -> SlotPlan:
    """Divide a budget: all experts of a class, or the same share of each class.

    Raises:
        BudgetError: Less than two slots of a class; names the smallest budget that works.
    """
    floor = smallest_budget(classes)
    if budget_bytes < floor:
        raise BudgetError(
            f"expert_budget must hold two experts of each size, one that computes and one that is "
            f"read; got {budget_bytes} bytes, needed {floor} ({format_bytes(floor)}); give at "
            "least that"
        )
    share = min(1.0, (budget_bytes - floor) / max(1, sum(c.nbytes for c in classes) - floor))
    slots = [_num_slots(c, share) for c in classes]
    _spend_the_rest(classes, slots, budget_bytes)
    passing = [_num_passing(c, count) for c, count in zip(classes, slots, strict=True)]
    return SlotPlan(
        budget_bytes,
        tuple(slots),
        tuple(passing),
        tuple(c.slot_bytes for c in classes),
        sum(len(c.keys) for c in classes),
    )


def smallest_budget(classes: Sequence[SlotClass]) -> int:
    """Bytes below which nothing works."""
    return sum(min(FEWEST_SLOTS, len(c.keys)) * c.slot_bytes for c in classes)


def _num_slots(slot_class: SlotClass, share: float) -> int:
    fewest = min(FEWEST_SLOTS, len(slot_class.keys))
    return fewest + math.floor(share * (len(slot_class.keys) - fewest))


def _spend_the_rest(classes: Sequence[SlotClass], slots: list[int], budget_bytes: int) -> None:
    """What rounding left over buys whole slots, in turn."""
    left = budget_bytes - sum(n * c.slot_bytes for n, c in zip(slots, classes, strict=True))
    for index, slot_class in enumerate(classes):
        more = min(left // slot_class.slot_bytes, len(slot_class.keys) - slots[index])
        slots[index] += more
        left -= more * slot_class.slot_bytes


def _num_passing(slot_class: SlotClass, num_slots: int) -> int:
    """None where every expert stays."""
    if num_slots >= len(slot_class.keys):
        return 0
    wanted = max(FEWEST_SLOTS, math.ceil(_PASSING_BYTES / slot_class.slot_bytes))
    return max(FEWEST_SLOTS, min(wanted, int(num_slots * _MOST_PASSING)))
