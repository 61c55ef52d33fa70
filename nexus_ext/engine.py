"""The typed face of the native engine: open, attach, acquire, stats, close.

Owns the engine's number. It knows arenas, groups and files; it has never heard of a model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from nexus_ext import ops
from nexus_ext.checkpoint import File, Group
from nexus_ext.errors import NexusError, to_native
from nexus_ext.ops import native

__all__ = [
    "Engine",
    "Faults",
    "ReadMode",
    "cached_bytes",
    "caller_number",
    "measure_copy",
    "measure_read",
]


@dataclass(frozen=True)
class ReadMode:
    """How files are read: what is asked for, not what comes of it (see `Engine.stats`)."""

    io: str = "direct"
    use_uring: bool = True
    trailing_drop: bool = True
    depth: int | None = None
    chunk_bytes: int = 1 << 20
    num_slots: int | None = None


@dataclass(frozen=True)
class Faults:
    """Seeded faults injected into reads, in millionths of a read; for tests."""

    seed: int = 0
    errno_ppm: int = 0
    again_ppm: int = 0
    short_ppm: int = 0
    delay_ppm: int = 0
    flip_ppm: int = 0
    delay_us: int = 0
    refuse_ppm: int = 0


class Engine:
    """Moves groups of `files` into arenas, ahead of who reads them.

    Owns one native engine with its thread, its descriptors and its staging slots. Blocking calls
    release the GIL. Not for use in a forked child.
    """

    def __init__(
        self,
        files: Sequence[File],
        mode: ReadMode,
        *,
        device: str = "cpu",
        poison: bool = False,
        faults: Faults | None = None,
        descriptors: Sequence[int] = (),
    ) -> None:
        """Open the files.

        Args:
            files: What will be read.
            mode: How.
            device: Where the arenas will be: "cpu", or "cuda:0" and so on.
            poison: Fill freed arenas with NaN bytes.
            faults: Test hook.
            descriptors: Where files still arrive, one for each file: of the file that grows, or -1
                for one that is there. They stay the caller's, and may be closed afterwards.

        Raises:
            ConfigError: A file still arrives, and the mode maps files or is "gds".
            CheckpointChanged: A file is not what its stamp says.
            ReadError: A file cannot be opened.
            DeviceError, DeviceLost: The device cannot be used.
        """
        stamps = [number for file in files for number in astuple(file.stamp)]
        held = [file.descriptor for file in files]
        self.handle: int = ops.call(
            native.engine_open,
            [str(file.path) for file in files],
            stamps,
            device,
            mode.io,
            mode.use_uring,
            mode.trailing_drop,
            mode.depth or 0,
            mode.chunk_bytes,
            mode.num_slots or 0,
            poison,
            list(astuple(faults)) if faults else [],
            list(descriptors) or held,
            not descriptors,
        )

    def attach(
        self,
        arenas: Sequence[torch.Tensor],
        groups: Sequence[Group],
        arena_of: Sequence[int],
        order: Sequence[int],
        lookahead: int,
        brief: Collection[int] = (),
        in_ram: Collection[int] = (),
        pooled: Collection[int] = (),
    ) -> None:
        """Give every group its arena and start loading. Does not block.

        Args:
            arenas: 1-D uint8 tensors; kept alive until the engine is closed and forgotten.
            groups: What moves together; their numbers are their indices.
            arena_of: For each group the index of its arena.
            order: The groups that share arenas, in the order they are used; others are resident,
                or pooled.
            lookahead: Groups of `order` loaded ahead of the one in use.
            brief: Groups that are used beside the one in use, and given back at once.
            in_ram: Groups that stay in page-locked memory once they were read; on a device only.
            pooled: Groups that have no arena until they are placed (`place`). Their `arena_of` is
                any of those that they may be placed in: equally far behind a page boundary, large
                enough, and no other group's own.
        """
        kinds = [frozenset(kind) for kind in (brief, in_ram, pooled)]
        table = [
            number
            for index, (group, arena) in enumerate(zip(groups, arena_of, strict=True))
            for number in (arena, group.nbytes, *(index in kind for kind in kinds))
        ]
        extents = [
            number
            for index, group in enumerate(groups)
            for extent in group.extents
            for number in (index, *astuple(extent))
        ]
        ops.call(
            native.engine_attach, self.handle, list(arenas), table, extents, list(order), lookahead
        )

    def set_digests(self, digests: Sequence[int], verify: str) -> None:
        """From now on compare landings with `digests` (XXH3-64 by group)."""
        ops.call(native.engine_set_digests, self.handle, list(digests), verify)

    def digest(self, group: int) -> int:
        """Read a group past the arenas and hash it: XXH3-64 of its extents, in order. Blocks."""
        digest: int = ops.call(native.engine_digest, self.handle, group)
        return digest

    def acquire(self, group: int, arena: torch.Tensor) -> None:
        """Block until `group` stands in `arena`, and free the arena acquired before.

        Raises:
            ReadError, TruncatedCheckpoint, CheckpointChanged, CorruptCheckpoint: The group could
                not be read; asking again reads again.
            EngineClosed, ForkedEngine, ThreadConflict: The engine cannot be used from here.
        """
        number = self.group_id(group)
        ops.acquire_(arena, number, number)

    def group_id(self, group: int) -> torch.Tensor:
        """What ops call a group: 0-dim int64, naming this engine and the group in it.

        Raises:
            EngineError: No number of a group.
        """
        return torch.tensor(ops.call(native.engine_group_id, self.handle, group))

    def wait(self, group: int) -> None:
        """Block until a resident group has landed; frees nothing. Raises as `acquire`."""
        ops.call(native.engine_wait, self.handle, group)

    def place(self, groups: Sequence[int], arenas: Sequence[int], *, ahead: bool = False) -> None:
        """Load pooled groups, each into the arena beside it, in turn. Does not block.

        What stands in an arena is forgotten, and so is where a group stood before; what the
        caller's stream has enqueued so far is through with both before they change. A group that
        stands in that very arena, or is on its way there, is not loaded again.

        Args:
            groups: Pooled ones.
            arenas: Indices of arenas.
            ahead: These may wait until all others are loaded. Placed again without it, they no
                longer wait.

        Raises:
            EngineError: A group that is not pooled, or does not fit there.
            DeviceError, DeviceLost: The device cannot be used.
        """
        ops.call(native.engine_place, self.handle, list(groups), list(arenas), ahead)

    def collect(self, groups: Sequence[int], *, at_least: int = 1) -> list[int]:
        """Which of these placed groups have landed, in the order asked; they may be used by what
        the caller's stream enqueues from now on, until they are evicted or replaced.

        Blocks until `at_least` of them have, or all where that is more than there are; until then
        they are loaded before all others. Never blocks with `at_least` 0.

        Raises:
            ReadError, TruncatedCheckpoint, CheckpointChanged, CorruptCheckpoint, DeviceError: One
                could not be loaded. It is not placed any more: placing it again reads again.
            EngineError: One is not placed.
            ThreadConflict: Another thread took an arena meanwhile.
        """
        landed: list[int] = ops.call(native.engine_collect, self.handle, list(groups), at_least)
        return landed

    def evict(self, groups: Collection[int]) -> None:
        """Empty the arenas of these groups, once what the caller's stream has enqueued so far is
        through with them. Loads that are under way are dropped; mapped pages are given back in the
        background. Does nothing for a group that is not placed. Does not block.
        """
        ops.call(native.engine_evict, self.handle, list(groups))

    def end_pass(self, caller: int | None = None) -> None:
        """A thread is through with the group that it acquired last; another one may begin.

        Args:
            caller: Number of the thread (`caller_number`); None is the calling one.

        Raises:
            ThreadConflict: Another thread broke into the pass.
        """
        number = native.caller() if caller is None else caller
        ops.call(native.engine_end_pass, self.handle, number)

    def read_rows(
        self, out: torch.Tensor, rows: torch.Tensor, file: int, offset: int, num_rows: int
    ) -> None:
        """Fill `out` with rows of the table at `offset` of a file, in the order asked for. Blocks.

        Args:
            out: uint8 [len(rows), bytes of a row], contiguous.
            rows: int64, 1-D, contiguous.
            file: Index of the file.
            offset: Where the table begins, bytes.
            num_rows: Of the table.

        Raises:
            EngineError: A row that the table does not have.
            ReadError, TruncatedCheckpoint, CheckpointChanged: The bytes cannot be had.
        """
        ops.call(
            native.engine_read_rows, out, rows, self.handle, file, offset, out.shape[-1], num_rows
        )

    def prefault(self, *, background: bool) -> None:
        """Bring every page of the mapped files in, touching all of them in parallel."""
        ops.call(native.engine_prefault, self.handle, background)

    def map(self, file: int, offset: int, nbytes: int) -> torch.Tensor:
        """A file's bytes where they are mapped (io "mmap"): uint8, private, not to be written."""
        pages: torch.Tensor = ops.call(native.engine_map, self.handle, file, offset, nbytes)
        return pages

    def take_read(self) -> list[int]:
        """Mode "gds": the next read into device memory: ticket, file, offset, nbytes, address.

        Blocks until there is one; empty once there will be none.
        """
        taken: list[int] = native.external_take(self.handle)
        return taken

    def answer_read(self, ticket: int, result: int, text: str) -> None:
        """Bytes read, 0 at the end of the file, or -errno and what was wrong."""
        native.external_answer(self.handle, ticket, result, text)

    def abandon_reads(self, reason: str) -> None:
        """Nobody serves them any more, or writes into the buffer of one that was taken."""
        native.external_abandon(self.handle, reason)

    # -- files that still arrive: nothing is read of them but what was announced ------------------

    def announce(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """These (file, offset, nbytes) stand in their files, and change no more.

        Loads and rows that waited for them go on. Does not block.

        Raises:
            EngineError: Outside a file.
            EngineClosed: It was closed.
        """
        ops.call(native.engine_announce, self.handle, [number for span in spans for number in span])

    def settle(self, file: int, mtime_ns: int) -> None:
        """A file is whole and the right one, last written to at `mtime_ns`: from now on another
        time is `CheckpointChanged`. Does not block. Raises as `announce`.
        """
        ops.call(native.engine_settle, self.handle, file, mtime_ns)

    def end_arrival(self, error: NexusError) -> None:
        """Nothing more will come: whoever needs what is missing gets `error`, again and again.

        Does not block. Raises as `announce`.
        """
        ops.call(native.engine_end_arrival, self.handle, to_native(error))

    def refuse(self, error: NexusError) -> None:
        """What came is wrong: from now on every call but `close` raises `error`. Does not block.
        Raises as `announce`.
        """
        ops.call(native.engine_refuse, self.handle, to_native(error))

    def stats(self) -> dict[str, Any]:
        """Effective modes and counters; see `nexus_ext.profiling.Stats`."""
        report: dict[str, Any] = json.loads(ops.call(native.engine_stats, self.handle))
        return report

    def close(self) -> None:
        """Stop the thread and close the files. May be called twice; waits for reads in flight."""
        native.engine_close(self.handle)


def caller_number() -> int:
    """The calling thread, as engines know it."""
    number: int = native.caller()
    return number


def measure_read(path: str, mode: ReadMode, max_bytes: int) -> dict[str, Any]:
    """Read up to `max_bytes` of a file as fast as it goes: the ceiling. Blocks.

    Returns:
        io_mode, reader, refusal, depth, chunk_bytes, bytes, seconds, gbps (1e9 bytes a second),
        memory_alignment, offset_alignment.
    """
    report: dict[str, Any] = json.loads(
        ops.call(
            native.measure_read,
            path,
            mode.io,
            mode.use_uring,
            mode.depth or 0,
            mode.chunk_bytes,
            max_bytes,
        )
    )
    return report


def measure_copy(
    arena: torch.Tensor, device: str, chunk_bytes: int, max_bytes: int
) -> dict[str, Any]:
    """Copy about `max_bytes` from page-locked memory to a device, in chunks: its ceiling. Blocks.

    Args:
        arena: uint8, at least a chunk, on the device; overwritten.
        device: The engine's name of it, "cuda:0".
        chunk_bytes: Of one copy.
        max_bytes: In all.

    Returns:
        bytes, seconds, gbps (1e9 bytes a second), is_pinned.
    """
    report: dict[str, Any] = json.loads(
        ops.call(native.measure_copy, arena, device, chunk_bytes, max_bytes)
    )
    return report


def cached_bytes(path: str) -> int:
    """Bytes of the file in the page cache now; -1 where the kernel does not tell."""
    nbytes: int = ops.call(native.cached_bytes, path)
    return nbytes
