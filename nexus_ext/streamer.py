"""The join: a plan, a checkpoint and an engine become groups that can be acquired.

Owns the arenas (device memory) and the engine. It knows groups by number and tensors by name; it
has never heard of `nn.Module`.

The engine's group 0 is everything outside the groups: one resident arena. Group i here is number
i + 1 there; the tiles of projections that are read by rows come behind the groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, replace
from pathlib import Path

import torch

from nexus_ext.checkpoint import ALIGNMENT, Checkpoint, Entry, Extent, Group
from nexus_ext.config import StreamConfig, home_folder, poisons_freed_arenas
from nexus_ext.device import Device
from nexus_ext.digests import recorded_digests
from nexus_ext.engine import Engine, Faults, ReadMode, caller_number
from nexus_ext.gds import GdsServer
from nexus_ext.memory import available_bytes, default_budget, should_prefault
from nexus_ext.mode import DEFAULT_DEPTH, Choice, choose
from nexus_ext.plan import Plan, choose_shared, make_plan
from nexus_ext.profiling import Stats
from nexus_ext.rows import RowTable, TiledWeight, forget, remember, tiles_of
from nexus_ext.shared_groups import SharedGroups

__all__ = ["Progress", "Streamer", "plan_groups"]

# Called as (what, done_bytes, total_bytes) while something takes long.
Progress = Callable[[str, int, int], None]

_log = logging.getLogger("nexus_ext")

# Direct reads land in place when memory and file agree modulo this.
_PAGE_BYTES = 4096
# While one tile computes, one lands and one is asked for.
_TILE_ARENAS = 3


class Streamer:
    """Groups of one checkpoint on one device.

    `arena(i)` is the memory that holds group i after `acquire(i)` and until the next acquire.
    Blocking calls release the GIL. One thread at a time.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        groups: Sequence[Group],
        outside: Group,
        config: StreamConfig,
        device: Device,
        *,
        projections: Sequence[Entry] = (),
        tables: Sequence[Entry] = (),
        sequence: Sequence[int | Entry] | None = None,
        faults: Faults | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Plan, open, and start loading; returns when everything resident is there.

        Args:
            checkpoint: Where the bytes are.
            groups: What moves together, in the order of use.
            outside: The tensors that stay on the device.
            config: What the user asked for.
            device: Where the weights end.
            projections: Matrices that are read in tiles.
            tables: Matrices that are read row by row.
            sequence: Groups (indices) and projections in the order of use, as far as it is known;
                None is groups, then projections. The engine learns the real one.
            faults: Test hook.
            progress: Called while residents are read or digests are taken.

        Raises:
            BudgetError: Before the first byte is read.
            ReadError, TruncatedCheckpoint, CheckpointChanged: A resident group could not be read.
            DeviceError: The device cannot be used.
        """
        self.config = config
        self.device = device
        self.groups = tuple(groups)
        self.outside = outside
        self._checkpoint = checkpoint
        self._arrival = checkpoint.arrival
        self._tiles = {entry.name: tiles_of(entry, config.tile_bytes) for entry in projections}
        self._tables = tuple(tables)
        self._sequence = sequence or (*range(len(self.groups)), *projections)
        self._by_rows: list[TiledWeight | RowTable] = []
        self.is_closed = False
        self._progress = progress or (lambda what, done, total: None)
        self.plan, choice = plan_groups(
            checkpoint, self.groups, outside, config, device, projections=projections
        )
        self._reason = choice.reason
        self._prefault_reason = "only mapped files are pre-faulted"
        self._gds: GdsServer | None = None
        self._shared: SharedGroups | None = None
        self._segments: dict[int, torch.Tensor] = {}
        self.engine = Engine(
            checkpoint.files,
            choice.mode,
            device=device.name,
            poison=poisons_freed_arenas(),
            faults=faults,
            descriptors=() if checkpoint.arrival is None else checkpoint.arrival.descriptors,
        )
        try:
            if self.plan.shared:
                self._share(choice)
            self._start(choice.mode)
        except BaseException:
            self._stop()
            raise

    def _start(self, mode: ReadMode) -> None:
        if mode.io == "mmap":
            self._prefault()
        self._arenas, self._arena_of = self._allocate(mode)
        if mode.io == "gds":
            self._gds = self._open_gds()
        self.engine.attach(
            self._arenas,
            self._everything,
            self._arena_of,
            list(self._order()),
            # The tiles come between the groups, and should not keep them from being read ahead.
            self.plan.lookahead + _TILE_ARENAS * bool(self._tiles),
            brief=self._tile_range,
            in_ram=[group + 1 for group in self.plan.in_ram],
        )
        if self._gds is not None:
            self._gds.start()
        if self._arrival is not None:
            self._arrival.feed(self.engine, list(self._spans()))
        if self.config.verify != "off":
            self._verify()
        self._wait_for_residents()
        self.projection_ids, self.table_ids = self._open_by_rows()

    def _share(self, choice: Choice) -> None:
        """Bring what processes share; what finds no room there streams."""
        wanted = [self.groups[group] for group in self.plan.shared]
        self._shared = SharedGroups(
            self._checkpoint, self.groups, choice.mode, is_verified=self.config.verify != "off"
        )
        total = sum(group.nbytes for group in wanted)
        done = 0
        for number, group in zip(self.plan.shared, wanted, strict=True):
            self._progress("sharing weights", done, total)
            segment = self._shared.bring(group, self._phase_for(choice.mode, [group]))
            if segment is not None:
                self._segments[number] = segment
            done += group.nbytes
        if len(self._segments) < len(wanted):
            tiles = [tile for tiles in self._tiles.values() for tile in tiles]
            budget = self.plan.budget_bytes
            self.plan = _plan(
                self.groups, self.outside, self.config, budget, choice, tiles, self._segments
            )

    @property
    def _everything(self) -> list[Group]:
        """Every group of the engine, by number; it has nothing to read of what is shared."""
        tiles = [tile for tiles in self._tiles.values() for tile in tiles]
        groups = [
            replace(group, extents=()) if number in self._segments else group
            for number, group in enumerate(self.groups)
        ]
        return [self.outside, *groups, *tiles]

    @property
    def _tile_range(self) -> range:
        return range(len(self.groups) + 1, len(self._everything))

    def _tile_numbers(self) -> dict[str, range]:
        """The engine's numbers of each projection's tiles."""
        numbers, end = {}, len(self.groups) + 1
        for name, tiles in self._tiles.items():
            numbers[name] = range(end, end + len(tiles))
            end += len(tiles)
        return numbers

    def _order(self) -> Iterator[int]:
        """The engine's numbers of all that streams, in the order of use."""
        tiles = self._tile_numbers()
        for thing in self._sequence:
            if isinstance(thing, Entry):
                yield from tiles[thing.name]
            elif not self.is_resident(thing):
                yield thing + 1

    def _spans(self) -> Iterator[tuple[int, int, int]]:
        """(file, offset, nbytes) of all that is read, in the order of need."""
        everything = self._everything
        for number in (0, *(group + 1 for group in self.plan.resident), *self._order()):
            for extent in everything[number].extents:
                yield extent.file, extent.offset, extent.nbytes
        for entry in self._tables:
            yield entry.file, entry.offset, entry.nbytes

    def _open_by_rows(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Make ids, by the name of the tensor, for projections and for tables."""
        weights, tables = {}, {}
        for name, numbers in self._tile_numbers().items():
            tiles = zip(numbers, self._tiles[name], strict=True)
            weights[name] = TiledWeight(
                self.engine, [(n, tile, self._arenas[self._arena_of[n]]) for n, tile in tiles]
            )
        for number, entry in enumerate(self._tables, len(self._everything)):
            tables[entry.name] = RowTable(self.engine, number, entry)
        self._by_rows = [*weights.values(), *tables.values()]
        for thing in self._by_rows:
            remember(thing)
        return (
            {name: weight.id for name, weight in weights.items()},
            {name: table.id for name, table in tables.items()},
        )

    # -- what a model uses -------------------------------------------------------------------

    def arena(self, group: int) -> torch.Tensor:
        """The memory of a group: 1-D uint8, owned here. Fixed for the life of the streamer."""
        return self._arenas[self._arena_of[group + 1]]

    @property
    def outside_arena(self) -> torch.Tensor:
        """The memory of the tensors outside the groups; theirs alone."""
        return self._arenas[self._arena_of[0]]

    def group_id(self, group: int) -> torch.Tensor:
        """The group's name for `acquire_`: 0-dim int64."""
        return self.engine.group_id(group + 1)

    def is_resident(self, group: int) -> bool:
        return group + 1 not in self._streamed

    def end_pass(self, caller: int | None = None) -> None:
        """A thread is through a pass: the calling one, or that of the number."""
        self.engine.end_pass(caller)

    @staticmethod
    def caller_number() -> int:
        """The calling thread."""
        return caller_number()

    def sweep(self) -> None:
        """Acquire every group once, in order, computing nothing: what I/O alone takes."""
        for number in (*range(1, len(self.groups) + 1), *self._tile_range):
            self.engine.acquire(number, self._arenas[self._arena_of[number]])
        self.engine.end_pass()

    def stats(self) -> Stats:
        counted = self.engine.stats()
        return Stats.of(
            {
                **counted,
                **self._gds_stats(),
                "io_mode_requested": self.config.io,
                "io_reason": self._reason,
                "prefault_reason": self._prefault_reason,
                "budget_bytes": self.plan.budget_bytes,
                "device_bytes": self.plan.device_bytes,
                "ram_groups": len(self.plan.in_ram) + len(self.plan.shared),
                "ram_bytes": counted["ram_bytes"] + sum(s.nbytes for s in self._segments.values()),
                "ram_mode": self._ram_mode(),
                "ram_bytes_read": 0 if self._shared is None else self._shared.bytes_read,
                "resident_groups": len(self.plan.resident),
                "streamed_groups": len(self.plan.streamed),
                "lookahead": self.plan.lookahead,
                "network_bytes": 0 if self._arrival is None else self._arrival.bytes_received,
                "is_arriving": self._arrival is not None and self._arrival.is_arriving,
                "experts": None,
            }
        )

    def _ram_mode(self) -> str:
        if self._shared is not None:
            return self._shared.effective
        return "page-locked" if self.plan.in_ram else "off"

    def close(self) -> None:
        """Stop loading and close the files. May be called twice."""
        self.is_closed = True
        for thing in self._by_rows:
            forget(thing)
        self._stop()

    def _stop(self) -> None:
        self.engine.close()
        # Its reads end with the engine's; then nobody writes into arenas any more.
        if self._gds is not None:
            self._gds.close()
        if self._arrival is not None:
            self._arrival.close()
        if self._shared is not None:
            self._shared.close()
        if self._checkpoint.lease is not None:
            self._checkpoint.lease.close()

    # -- setting up --------------------------------------------------------------------------

    @property
    def _streamed(self) -> frozenset[int]:
        return frozenset(group + 1 for group in self.plan.streamed)

    def _allocate(self, mode: ReadMode) -> tuple[list[torch.Tensor], list[int]]:
        """An arena for every resident group, views where pages can be used in place, the ring."""
        plan = self.plan
        arenas: list[torch.Tensor] = []
        arena_of: dict[int, int] = {}
        ring_of = dict(zip(plan.streamed, plan.arena_of, strict=True))
        ring_index: dict[int, int] = {}
        phase = self._phase_for(mode, [self.groups[group] for group in plan.streamed])
        for number, group in enumerate((self.outside, *self.groups)):
            ring = ring_of.get(number - 1)
            if number - 1 in self._segments:
                arenas.append(self._segments[number - 1])
            elif ring is None:
                arenas.append(self.device.allocate(group.nbytes, self._phase_for(mode, [group])))
            elif mode.io == "mmap" and self.device.is_host and _can_be_viewed(group):
                extent = group.extents[0]
                arenas.append(self.engine.map(extent.file, extent.offset, extent.nbytes))
            elif ring not in ring_index:
                ring_index[ring] = len(arenas)
                arenas.append(self.device.allocate(plan.arena_bytes[ring], phase))
            else:
                arena_of[number] = ring_index[ring]
                continue
            arena_of[number] = len(arenas) - 1
        first = len(arenas)
        tile_arenas = _tile_arena_bytes(self._everything[len(self.groups) + 1 :])
        arenas += [self.device.allocate(nbytes) for nbytes in tile_arenas]
        for index, number in enumerate(self._tile_range):
            arena_of[number] = first + index % len(tile_arenas)
        return arenas, [arena_of[number] for number in range(len(self._everything))]

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

    def _gds_stats(self) -> dict[str, str]:
        """What reads into device memory really do."""
        if self._gds is None:
            return {}
        return {"io_mode": self._gds.mode, "refusal": self._gds.reason or self._gds.refusal}

    def _phase_for(self, mode: ReadMode, groups: Sequence[Group]) -> int:
        """Where reads land in place, where in a page it is matters."""
        return _common_phase(groups) if self.device.is_host or mode.io == "gds" else 0

    def _prefault(self) -> None:
        nbytes = sum(file.stamp.size for file in self._checkpoint.files)
        wanted, self._prefault_reason = should_prefault(
            self.config.prefault, nbytes, available_bytes()
        )
        _log.info("pre-fault: %s", self._prefault_reason)
        if wanted:
            self.engine.prefault(background=True)

    def _verify(self) -> None:
        everything = self._everything
        total = sum(group.file_bytes for group in everything)
        done = 0

        def take(index: int) -> int:
            nonlocal done
            self._progress("recording digests", done, total)
            digest = self.engine.digest(index)
            done += everything[index].file_bytes
            return digest

        folder = home_folder() / "digests"
        digests = recorded_digests(self._checkpoint, everything, folder, take)
        self.engine.set_digests(digests, self.config.verify)

    def _wait_for_residents(self) -> None:
        everything = (self.outside, *self.groups)
        numbers = [0, *(group + 1 for group in self.plan.resident)]
        total = sum(everything[number].nbytes for number in numbers)
        done = 0
        for number in numbers:
            self._progress("reading resident weights", done, total)
            # Nothing lands where there is nothing to read.
            if everything[number].extents:
                self.engine.wait(number)
            done += everything[number].nbytes
        self._progress("reading resident weights", total, total)


def _tile_arena_bytes(tiles: Sequence[Group]) -> list[int]:
    """Tiles take these arenas in turn."""
    count = min(_TILE_ARENAS, len(tiles))
    return [max(tile.nbytes for tile in tiles[index::count]) for index in range(count)]


def _common_phase(groups: Sequence[Group]) -> int:
    """Where an arena should start, modulo a page, so that most bytes can be read in place.

    Only offsets that keep members aligned come into question; else 0, and reads are staged.
    """
    weights: dict[int, int] = {}
    for group in groups:
        for extent in group.extents:
            phase = _phase(extent)
            weights[phase] = weights.get(phase, 0) + extent.nbytes
    best = max(weights, key=lambda phase: weights[phase], default=0)
    return best if best % ALIGNMENT == 0 else 0


def _phase(extent: Extent) -> int:
    return (extent.offset - extent.group_offset) % _PAGE_BYTES


def _can_be_viewed(group: Group) -> bool:
    return group.is_contiguous and group.extents[0].offset % ALIGNMENT == 0


def plan_groups(
    checkpoint: Checkpoint,
    groups: Sequence[Group],
    outside: Group,
    config: StreamConfig,
    device: Device,
    *,
    projections: Sequence[Entry] = (),
) -> tuple[Plan, Choice]:
    """The plan for `config`, and how it will be read; where something must stream, rates are
    measured first.

    Raises:
        BudgetError: The budget is too small; names the smallest that works.
    """
    budget = config.budget
    if budget == "auto":
        budget = default_budget(device.available_bytes())
    tiles = [tile for entry in projections for tile in tiles_of(entry, config.tile_bytes)]
    streams = bool(tiles) or outside.nbytes + sum(group.nbytes for group in groups) > budget
    choice = choose(checkpoint, config, device, streams=streams)
    shared = choose_shared([group.nbytes for group in groups], choice.shared_bytes)
    return _plan(groups, outside, config, budget, choice, tiles, shared), choice


def _plan(
    groups: Sequence[Group],
    outside: Group,
    config: StreamConfig,
    budget: int,
    choice: Choice,
    tiles: Sequence[Group],
    shared: Collection[int],
) -> Plan:
    return make_plan(
        [group.nbytes for group in groups],
        outside.nbytes,
        budget,
        config.lookahead,
        choice.rates,
        in_flight_bytes=(choice.mode.depth or DEFAULT_DEPTH) * choice.mode.chunk_bytes,
        tiled_bytes=sum(tile.nbytes for tile in tiles),
        tile_arena_bytes=sum(_tile_arena_bytes(tiles)),
        ram_bytes=choice.ram_bytes,
        shared=shared,
    )
