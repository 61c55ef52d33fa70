"""Where experts are and how they get there: the join of files, engine and slots.

    key ──place(slot)──▶ engine ──collect──▶ tensors(key, slot)

Owns one native engine and the memory of the slots. It decides nothing: who comes, where to and who
leaves is `nexus_ext.experts.cache`'s to say.

Note [Mapped experts]
In mode "mmap" an expert whose tensors each lie in one piece of the file, and are aligned there, is
not copied: its tensors are views of the mapped pages. Placing it brings the pages in, evicting it
lets them go (if they are not to stay). A slot is then a place in the accounts only.

Note [Experts on their way]
While the files are downloaded, nobody knows which experts come. Whoever is placed because a layer
needs him, or waited for, is asked for before all else; whoever is placed ahead, after all else that
is expected. The engine reads neither before his bytes were announced.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch

from nexus_ext.checkpoint import ALIGNMENT, Checkpoint, Entry, Extent, Group, Member
from nexus_ext.config import home_folder, poisons_freed_arenas
from nexus_ext.device import Device
from nexus_ext.digests import recorded_digests
from nexus_ext.engine import Engine, Faults
from nexus_ext.experts.slots import SlotClass, SlotPlan
from nexus_ext.gds import GdsServer
from nexus_ext.mode import Choice

__all__ = ["ExpertStore"]


class ExpertStore:
    """Every expert by its key, every slot by its number; numbers are those of all classes in turn.

    Attributes:
        class_of: The class of each key.
        slots_of: The slots of each class.
        num_views: Experts that are used where they are mapped.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        classes: Sequence[SlotClass],
        plan: SlotPlan,
        choice: Choice,
        device: Device,
        *,
        verify: str = "off",
        faults: Faults | None = None,
    ) -> None:
        """Open the files and take the memory. Loads nothing yet.

        Raises:
            BudgetError: A device has not got the memory.
            CheckpointChanged, ReadError: A file is not what it was.
        """
        self.device = device
        self.class_of = _class_of_keys(classes)
        self.slots_of = _slot_ranges(plan)
        self._checkpoint = checkpoint
        self._arrival = checkpoint.arrival
        self._hastened: set[int] = set()
        self._gds: GdsServer | None = None
        self._groups_of: list[list[int]] = [[] for _ in self.class_of]
        self._key_of: list[int] = []
        self._mapped: dict[int, dict[str, torch.Tensor]] = {}
        self._arenas: list[torch.Tensor] = []
        self.engine = Engine(
            checkpoint.files,
            choice.mode,
            device=device.name,
            poison=poisons_freed_arenas(),
            faults=faults,
            descriptors=() if checkpoint.arrival is None else checkpoint.arrival.descriptors,
        )
        try:
            self._attach(classes, plan, choice)
            if self._arrival is not None:
                self._arrival.join(self.engine)
            if verify != "off":
                self._verify(verify)
        except BaseException:
            self.close()
            raise

    @property
    def num_views(self) -> int:
        return len(self._mapped)

    def place(self, keys: Sequence[int], slots: Sequence[int], *, ahead: bool = False) -> None:
        """Begin to load experts, each into its slot. Does not block.

        What the caller's stream has enqueued so far is through with the slots before they change.
        """
        groups: list[int] = []
        arenas: list[int] = []
        for key, slot in zip(keys, slots, strict=True):
            groups += self._groups_of[key]
            arenas += self._arenas_of_key[key] if key in self._mapped else [slot]
        self._ask_for(keys, ahead=ahead)
        self.engine.place(groups, arenas, ahead=ahead)

    def _ask_for(self, keys: Sequence[int], *, ahead: bool) -> None:
        """See Note [Experts on their way]."""
        if self._arrival is None or not self._arrival.is_arriving:
            return
        new = [key for key in keys if key not in self._hastened]
        spans = [
            (extent.file, extent.offset, extent.nbytes)
            for key in new
            for group in self._groups_of[key]
            for extent in self._groups[group].extents
        ]
        if ahead:
            self._arrival.expect(spans)
        elif spans:
            self._hastened.update(new)
            self._arrival.hasten(spans)

    def collect(self, keys: Sequence[int], *, at_least: int) -> list[int]:
        """Which of these have landed; blocks until so many have.

        Raises:
            ReadError, TruncatedCheckpoint, CheckpointChanged, CorruptCheckpoint, DeviceError: One
                could not be read. None of those that had not landed is placed any more.
        """
        self._ask_for(keys, ahead=False)
        groups = [group for key in keys for group in self._groups_of[key]]
        wanted = len(groups) if at_least == len(keys) else at_least
        while True:
            landed = self.engine.collect(groups, at_least=wanted)
            if len(landed) == len(groups):
                return list(keys)
            there = set(landed)
            whole = [key for key in keys if there.issuperset(self._groups_of[key])]
            if len(whole) >= at_least:
                return whole
            # Parts have come, and too few experts as a whole.
            wanted = len(landed) + 1

    def evict(self, keys: Collection[int]) -> None:
        """Their bytes may go."""
        self.engine.evict([group for key in keys for group in self._groups_of[key]])

    def tensors(self, key: int, slot: int) -> dict[str, torch.Tensor]:
        """An expert's tensors by name, while it is collected and neither evicted nor replaced."""
        mapped = self._mapped.get(key)
        return self._views[slot] if mapped is None else mapped

    def read(self, entries: Sequence[Entry]) -> list[torch.Tensor]:
        """Small matrices, past the slots. Blocks. Raises as `collect`."""
        if self._arrival is not None:
            self._arrival.hasten([(entry.file, entry.offset, entry.nbytes) for entry in entries])
        return [self._read_matrix(entry) for entry in entries]

    def _read_matrix(self, entry: Entry) -> torch.Tensor:
        matrix = torch.empty(entry.shape, dtype=entry.dtype)
        rows = torch.arange(len(matrix))
        self.engine.read_rows(matrix.view(torch.uint8), rows, entry.file, entry.offset, len(matrix))
        return matrix

    def layer_id(self, layer: int) -> torch.Tensor:
        """A number for a layer of this model's, that no other model has: 0-dim int64."""
        return self.engine.group_id(layer)

    def pool(self, slot_class: int, name: str) -> torch.Tensor:
        """The tensor of this name in every slot of a class: [num_slots, *shape], with gaps."""
        slots = self.slots_of[slot_class]
        first = self._views[slots.start][name]
        step = self._slot_bytes[slot_class] // first.itemsize
        return first.as_strided((len(slots), *first.shape), (step, *first.stride()))

    def memory(self, slot_class: int) -> tuple[torch.Tensor, int]:
        """All slots of a class, uint8, one after the other, and the bytes of one."""
        return self._pools[slot_class], self._slot_bytes[slot_class]

    def offset(self, slot_class: int, name: str) -> int:
        """Where in a slot of a class the tensor of this name begins, bytes."""
        first = self._views[self.slots_of[slot_class].start][name]
        return int(first.data_ptr() - self._pools[slot_class].data_ptr())

    def stats(self) -> dict[str, Any]:
        """The engine's counters and effective modes."""
        report = self.engine.stats()
        if self._gds is not None:
            report |= {
                "io_mode": self._gds.mode,
                "refusal": self._gds.reason or self._gds.refusal,
            }
        return report

    def close(self) -> None:
        """May be called twice."""
        self.engine.close()
        if self._gds is not None:
            self._gds.close()

    # -- setting up --------------------------------------------------------------------------

    def _attach(self, classes: Sequence[SlotClass], plan: SlotPlan, choice: Choice) -> None:
        groups: list[Group] = []
        arena_of: list[int] = []
        self._slot_bytes = plan.slot_bytes
        self._arenas_of_key: dict[int, list[int]] = {}
        self._allocate(classes)
        can_map = choice.mode.io == "mmap" and self.device.is_host
        for slot_class, slots in zip(classes, self.slots_of, strict=True):
            for key, group in zip(slot_class.keys, slot_class.groups, strict=True):
                is_mapped = can_map and _can_be_mapped(group)
                parts = _parts_of(group) if is_mapped else [group]
                self._groups_of[key] = list(range(len(groups), len(groups) + len(parts)))
                groups += parts
                if is_mapped:
                    arena_of += self._map(key, group)
                else:
                    arena_of.append(slots.start)
        self._groups = groups
        if choice.mode.io == "gds":
            self._gds = self._open_gds()
        self.engine.attach(
            self._arenas,
            groups,
            arena_of,
            [],
            0,
            pooled=range(len(groups)),
            in_ram=_spread_in_ram(groups, choice.ram_bytes),
        )
        if self._gds is not None:
            self._gds.start()

    def _allocate(self, classes: Sequence[SlotClass]) -> None:
        """One pool for each class, cut into slots."""
        self._views: list[dict[str, torch.Tensor]] = []
        self._pools: list[torch.Tensor] = []
        for slot_class, slots in zip(classes, self.slots_of, strict=True):
            size = slot_class.slot_bytes
            pool = self.device.allocate(size * len(slots))
            self._pools.append(pool)
            members = slot_class.groups[0].members
            for index in range(len(slots)):
                arena = pool[index * size : (index + 1) * size]
                self._arenas.append(arena)
                self._views.append({m.name: _view(arena, m) for m in members})

    def _map(self, key: int, group: Group) -> list[int]:
        first = len(self._arenas)
        tensors = {}
        for member, extent in zip(group.members, group.extents, strict=True):
            pages = self.engine.map(extent.file, extent.offset, extent.nbytes)
            self._arenas.append(pages)
            tensors[member.name] = pages.view(member.dtype).view(member.shape)
        self._mapped[key] = tensors
        self._arenas_of_key[key] = list(range(first, len(self._arenas)))
        return self._arenas_of_key[key]

    def _open_gds(self) -> GdsServer:
        files = self._checkpoint.files
        return GdsServer(
            [Path(file.reach) for file in files],
            [astuple(file.stamp) for file in files],
            self._arenas,
            self.engine.take_read,
            self.engine.answer_read,
            self.engine.abandon_reads,
        )

    def _verify(self, verify: str) -> None:
        digests = recorded_digests(
            self._checkpoint, self._groups, home_folder() / "digests", self.engine.digest
        )
        self.engine.set_digests(digests, verify)


def _view(arena: torch.Tensor, member: Member) -> torch.Tensor:
    raw = arena[member.offset : member.offset + member.nbytes]
    return raw.view(member.dtype).view(member.shape)


def _class_of_keys(classes: Sequence[SlotClass]) -> list[int]:
    found = {key: index for index, slot_class in enumerate(classes) for key in slot_class.keys}
    return [found[key] for key in range(len(found))]


def _slot_ranges(plan: SlotPlan) -> list[range]:
    ranges, end = [], 0
    for count in plan.num_slots:
        ranges.append(range(end, end + count))
        end += count
    return ranges


def _can_be_mapped(group: Group) -> bool:
    return len(group.extents) == len(group.members) and all(
        extent.offset % ALIGNMENT == 0 for extent in group.extents
    )


def _parts_of(group: Group) -> list[Group]:
    """Each tensor by itself: pages of a file are no slot."""
    return [
        Group(
            f"{group.name}: {member.name}",
            (Member(member.name, member.dtype, member.shape, 0, member.nbytes),),
            (Extent(extent.file, extent.offset, extent.nbytes, 0),),
            extent.nbytes,
        )
        for member, extent in zip(group.members, group.extents, strict=True)
    ]


def _spread_in_ram(groups: Sequence[Group], ram_bytes: int) -> list[int]:
    """Of all groups, as many as fit, evenly: no layer is the only one that waits for the disk."""
    total = sum(group.nbytes for group in groups)
    if ram_bytes >= total:
        return list(range(len(groups)))
    share = ram_bytes / total if total else 0.0
    return [n for n in range(len(groups)) if int((n + 1) * share) > int(n * share)]
