"""Where are the bytes of a group?

This file owns a checkpoint's files and their validated tensors, and how the tensors of a group are
laid out. It reads headers and never a weight byte, and it knows neither devices nor caches. A
checkpoint is untrusted input: see checkpoint_files.py.

    path ──▶ index? ──▶ files ──▶ entries ──▶ Group(members, extents)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from nexus_ext.checkpoint_files import (
    check_shard,
    listed,
    locate,
    read_file,
    read_followed,
    read_index,
    read_shards,
    sample,
)
from nexus_ext.errors import CheckpointMismatch, NexusError
from nexus_ext.header import quote
from nexus_ext.places import ALIGNMENT, Entry, Extent, File, Group, Member, Place, Stamp
from nexus_ext.safetensors_header import DTYPE_NAMES, file_order

__all__ = [
    "ALIGNMENT",
    "DTYPE_NAMES",
    "Arrival",
    "Checkpoint",
    "Entry",
    "Extent",
    "File",
    "Gate",
    "Group",
    "Lease",
    "Member",
    "Place",
    "Stamp",
]


class Gate(Protocol):
    """Whoever reads files that still arrive, and only what was announced; see `Engine`."""

    def announce(self, spans: Sequence[tuple[int, int, int]]) -> None: ...
    def settle(self, file: int, mtime_ns: int) -> None: ...
    def end_arrival(self, error: NexusError) -> None: ...
    def refuse(self, error: NexusError) -> None: ...


class Lease(Protocol):
    """Keeps files open, or from being removed, while a checkpoint is in use."""

    def close(self) -> None:
        """Let go of them. May be called twice."""


class Arrival(Protocol):
    """Files of a checkpoint that are not all here yet; see `nexus_ext.arriving`."""

    @property
    def descriptors(self) -> Sequence[int]:
        """Of each file, in the order of `Checkpoint.files`, until `close`."""

    @property
    def is_arriving(self) -> bool: ...

    @property
    def bytes_received(self) -> int: ...

    def read(self, file: int, offset: int, nbytes: int) -> bytes:
        """A few bytes, when they are here. Blocks."""

    def feed(self, gate: Gate, spans: Sequence[tuple[int, int, int]]) -> None:
        """Fetch (file, offset, nbytes) in this order, then the rest, and tell the gate. Once."""

    def join(self, gate: Gate) -> None:
        """Tell another gate, too, of all that came and that comes."""

    def expect(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """These come behind what is expected so far, and before the rest. Does not block."""

    def hasten(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Somebody waits for these: they come next. Does not block."""

    def close(self) -> None:
        """Fetch no more. Does not block."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The validated tensors of one checkpoint and where their bytes are.

    Attributes:
        path: The file or index that was opened, absolute, its links kept.
        files: The files with weights, in the order of their names.
        entries: Every tensor by name, in the order of file, then offset.
        arrival: Where the files are not all here yet: who brings them. Their paths are those they
            will have, and nothing stands there before they are whole.
        lease: Who keeps the files; closed with the model.
    """

    path: Path
    files: tuple[File, ...]
    entries: Mapping[str, Entry]
    arrival: Arrival | None = field(default=None, kw_only=True)
    lease: Lease | None = field(default=None, kw_only=True)

    @classmethod
    def open_arriving(
        cls, path: Path, shards: Mapping[str, tuple[Path, int]], arrival: Arrival
    ) -> Checkpoint:
        """Validate a checkpoint whose files still arrive; their headers are here.

        Args:
            path: Its index, whole; or, where there is none, its only file.
            shards: By name, in the order of the names: where the file will be, and an open
                descriptor of what grows.
            arrival: Who brings them.

        Raises:
            CheckpointFormatError, TruncatedCheckpoint: As `open`.
        """
        listed = read_index(path) if path.name.endswith(".index.json") else None
        files: list[File] = []
        entries: list[Entry] = []
        for number, (name, (target, descriptor)) in enumerate(shards.items()):
            file, found = read_followed(target, descriptor, number)
            if listed is not None:
                check_shard(path, name, {entry.name for entry in found}, listed[name])
            files.append(file)
            entries += found
        by_name = {entry.name: entry for entry in entries}
        return cls(path, tuple(files), MappingProxyType(by_name), arrival=arrival)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, start: int = 0) -> Checkpoint:
        """Find and validate a checkpoint; reads headers only, and keeps no file open.

        Args:
            path: A .safetensors file, an .index.json file, or a directory that holds
                model.safetensors, model.safetensors.index.json, exactly one
                *.safetensors.index.json or exactly one *.safetensors (the first that is there).
            start: Where in a single file it begins; it reaches to the end.

        Raises:
            CheckpointFormatError: Missing, not a regular file, pickled, or against the format.
            TruncatedCheckpoint: A file ends before its header or its tensors do.
            CheckpointChanged: A file was modified while its header was read.
        """
        found = locate(Path(path).absolute())
        if found.name.endswith(".index.json"):
            # Beside the index as it was named: in the hub's layout both are links to other folders.
            files, entries = read_shards(found, lambda shard: Place(found.parent / shard))
        else:
            file, tensors = read_file(Place(found, start), 0)
            files, entries = [file], tensors
        by_name = {entry.name: entry for entry in entries}
        return cls(found, tuple(files), MappingProxyType(by_name))

    @classmethod
    def open_within(cls, index: Path, place: Callable[[str], Place], lease: Lease) -> Checkpoint:
        """As `open`, where the shards lie at the end of other files.

        Args:
            index: An .index.json file.
            place: Where a shard lies.
            lease: Who keeps those files.

        Raises:
            As `open`, and what `place` raises.
        """
        files, entries = read_shards(index, place)
        by_name = {entry.name: entry for entry in entries}
        return cls(index, tuple(files), MappingProxyType(by_name), lease=lease)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def fingerprint(self) -> str:
        """64 hex digits over the names and stamps of the files: equal while none changed."""
        facts = [(file.path.name, *astuple(file.stamp)) for file in self.files]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def group(self, name: str, tensor_names: Iterable[str]) -> Group:
        """Lay out the tensors that move together.

        Members stand in the order of (file, offset), each on the next `ALIGNMENT` boundary.
        Neighbours that touch both in the file and in the group share an extent. A tensor without
        bytes is a member without extent. A repeated name counts once.

        Raises:
            CheckpointMismatch: A name is not in the checkpoint.
        """
        wanted = set(tensor_names)
        if unknown := wanted - self.entries.keys():
            raise CheckpointMismatch(
                f"every tensor of group {quote(name)} must be in {self.path}, which lacks "
                f"{listed(unknown)}; compare with its names: {sample(self.entries)}"
            )
        members: list[Member] = []
        extents: list[Extent] = []
        end = 0
        for entry in sorted((self.entries[tensor] for tensor in wanted), key=file_order):
            start = _align(end)
            members.append(Member(entry.name, entry.dtype, entry.shape, start, entry.nbytes))
            _append(extents, Extent(entry.file, entry.offset, entry.nbytes, start))
            end = start + entry.nbytes
        return Group(name, tuple(members), tuple(extents), _align(end))


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _append(extents: list[Extent], new: Extent) -> None:
    """Add an extent, or grow the last one when the two touch on both sides."""
    if new.nbytes == 0:
        return
    if extents:
        last = extents[-1]
        touching = (last.file, last.offset + last.nbytes, last.group_offset + last.nbytes)
        if touching == (new.file, new.offset, new.group_offset):
            extents[-1] = replace(last, nbytes=last.nbytes + new.nbytes)
            return
    extents.append(new)
