"""Groups that are used where they lie: in memory that all processes of a user share.

    a group ──read once, by who comes first──▶ segment ──private mapping──▶ arena, in each process

Owns one RAM tier for a streamer on the host, and what it holds there. The segments go when the last
process that uses them closes its model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple
from pathlib import Path

import torch

from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.segment import file_bytes
from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.cache.work_locks import locked
from nexus_ext.checkpoint import Checkpoint, Group
from nexus_ext.config import home_folder
from nexus_ext.digests import recorded_digests
from nexus_ext.engine import Engine, ReadMode

__all__ = ["SharedGroups"]

_PAGE_BYTES = 4096
_NUM_LOCKS = 1 << 20


class SharedGroups:
    """Some groups of one checkpoint, in shared memory. One thread at a time.

    Attributes:
        bytes_read: From the files, by this process.
    """

    def __init__(
        self, checkpoint: Checkpoint, groups: Sequence[Group], mode: ReadMode, *, is_verified: bool
    ) -> None:
        """Open the tier; there is room for these groups, and pages around them. What other
        processes brought takes of it: with all groups nothing that somebody uses has to go.

        Args:
            checkpoint: Whole files.
            groups: Of which some may be asked for.
            mode: How files are read.
            is_verified: Whether what is read must have its recorded digest.
        """
        self.bytes_read = 0
        self._checkpoint = checkpoint
        self._mode = mode
        self._is_verified = is_verified
        room = sum(file_bytes(group.nbytes) + 2 * _PAGE_BYTES for group in groups)
        # A folder for each checkpoint: who streams another one has a budget of its own. And what
        # somebody read without looking at digests is not what others want who do.
        name = f"groups of {checkpoint.path}: {checkpoint.fingerprint}"
        folder = default_folder(f"{name}, verified" if is_verified else name)
        self._tier = RamTier(room, folder=folder)
        self._holds = ExitStack()

    @property
    def effective(self) -> str:
        """ "shared", "off", or "private: " and why."""
        return self._tier.effective

    def bring(self, group: Group, phase: int) -> torch.Tensor | None:
        """The memory of a group, uint8 [nbytes], with its bytes; None where there is no room.

        Blocks while the group is read, by this process or another one. The tensor stays valid
        whatever becomes of the segment.

        Args:
            group: To be read, if nobody has.
            phase: Where in a page it begins best.

        Raises:
            ReadError, TruncatedCheckpoint, CheckpointChanged, CorruptCheckpoint: It could not be
                read.
        """
        digest = self._digest(group, phase)
        home = home_folder()
        # Only saves work: who comes second maps what the first one read. Without it both read.
        with suppress(OSError):
            home.mkdir(parents=True, exist_ok=True)
        with locked(home / "shared-groups.lock", int(digest, 16) % _NUM_LOCKS):
            memory = self._tier.fill(
                digest, group.nbytes, lambda out: self._read(group, out), phase=phase
            )
        if memory is not None:
            self._holds.enter_context(self._tier.hold(digest))
        return memory

    def close(self) -> None:
        """Let go of the tier. Tensors stay. May be called twice."""
        self._holds.close()
        self._tier.close()

    def _digest(self, group: Group, phase: int) -> str:
        """Names the bytes and their layout, while the files are what they were."""
        extents = [astuple(extent) for extent in group.extents]
        facts = [str(self._checkpoint.path), self._checkpoint.fingerprint, extents, phase]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _read(self, group: Group, out: torch.Tensor) -> None:
        engine = Engine(self._checkpoint.files, self._mode)
        try:
            engine.attach([out], [group], [0], [], 0)
            if self._is_verified:
                folder: Path = home_folder() / "digests"
                digests = recorded_digests(self._checkpoint, [group], folder, engine.digest)
                engine.set_digests(digests, "first")
            engine.wait(0)
        finally:
            engine.close()
        self.bytes_read += group.file_bytes
