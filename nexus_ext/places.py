"""What lies where: in a file, and in a group. No bytes are read here.

File ──has──▶ Entry (one tensor)      Group ──consists of──▶ Member ◀──is filled by── Extent
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["ALIGNMENT", "Entry", "Extent", "File", "Group", "Member", "Place", "Stamp"]

# Bytes. Every member starts on such a boundary inside its group: BLAS may differ in the last bit
# for weights that are less aligned (torch 2.13, f32 GEMV at byte offsets 4 and 8).
ALIGNMENT = 64


@dataclass(frozen=True)
class Stamp:
    """What a file was when it was opened; a difference later is `CheckpointChanged`."""

    device: int
    inode: int
    size: int  # bytes
    mtime_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Stamp:
        """Take the stamp of an open file descriptor."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class File:
    """One file with weights: an absolute path without links, and what stood there.

    Attributes:
        path: How it is called.
        stamp: What it was.
        start: Where in it the checkpoint begins, which reaches to its end.
        descriptor: Of a file that may lose its name while it is in use; -1 where it keeps it.
    """

    path: Path
    stamp: Stamp
    start: int = 0
    descriptor: int = -1

    @property
    def reach(self) -> str:
        """The path to open it by."""
        return str(self.path) if self.descriptor < 0 else f"/proc/self/fd/{self.descriptor}"


@dataclass(frozen=True, slots=True)  # there may be a million
class Entry:
    """One tensor in a file; `file` indexes `Checkpoint.files`, `offset` counts from byte 0."""

    name: str
    file: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """Contiguous bytes in a file that go to contiguous bytes of a group; never empty."""

    file: int
    offset: int
    nbytes: int
    group_offset: int


@dataclass(frozen=True)
class Member:
    """One tensor inside a group; `offset` is in bytes and a multiple of `ALIGNMENT`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Group:
    """What moves together. `nbytes` counts padding and is a multiple of `ALIGNMENT`."""

    name: str
    members: tuple[Member, ...]
    extents: tuple[Extent, ...]
    nbytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes to read from disk: `nbytes` without the padding."""
        return sum(extent.nbytes for extent in self.extents)

    @property
    def is_contiguous(self) -> bool:
        """Whether one extent, placed at the group's first byte, fills it."""
        return len(self.extents) == 1 and self.extents[0].group_offset == 0


class Place(NamedTuple):
    """Where a shard lies: at the end of a file, from `start` on. The descriptor is of that file,
    which may lose its name, or -1.
    """

    path: Path
    start: int = 0
    descriptor: int = -1
