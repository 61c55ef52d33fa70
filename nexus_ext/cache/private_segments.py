"""Segments of one process: memory without a name, where there is no folder to share.

A memfd can be mapped privately as often as a file can, so a caller's write is the caller's own here
too.
"""

from __future__ import annotations

import errno
import os
import threading
from collections import OrderedDict

from nexus_ext.cache.shared_folder import Evict, Reserved, allocate

__all__ = ["PrivateSegments"]

# Each takes a descriptor, and a process may have about a thousand.
_MOST = 256


class PrivateSegments:
    """Segments by digest, the least recently used first. Guarded by its owner's lock."""

    def __init__(self, lock: threading.RLock) -> None:
        self._lock = lock
        self._segments: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._reserved_bytes = 0

    def open(self, digest: str) -> int | None:
        """A descriptor of the segment, marked as used now; None where there is none."""
        with self._lock:
            if digest not in self._segments:
                return None
            self._segments.move_to_end(digest)
            return os.dup(self._segments[digest][0])

    def reserve(self, nbytes: int, max_bytes: int, evict: Evict) -> Reserved | None:
        """As `SharedFolder.reserve`.

        Raises:
            OSError: The process has no descriptor left, or the machine no memory.
        """
        with self._lock:
            for victim in self.digests():
                if self.nbytes() + nbytes <= max_bytes and len(self._segments) < _MOST:
                    break
                evict(victim)
            if self.nbytes() + nbytes > max_bytes or len(self._segments) >= _MOST:
                return None
            self._reserved_bytes += nbytes
        try:
            return Reserved(_new(nbytes), None)
        except BaseException:
            self._give_back(nbytes)
            raise

    def publish(self, reserved: Reserved, digest: str) -> None:
        """It is whole. The descriptor stays the caller's to close."""
        nbytes = os.fstat(reserved.descriptor).st_size
        with self._lock:
            self.remove(digest)
            self._segments[digest] = os.dup(reserved.descriptor), nbytes
            self._give_back(nbytes)

    def discard(self, reserved: Reserved) -> None:
        """Nothing will come of it."""
        self._give_back(os.fstat(reserved.descriptor).st_size)

    def remove(self, digest: str) -> bool:
        """Whether it was there. Who has mapped it keeps it."""
        with self._lock:
            descriptor, _ = self._segments.pop(digest, (-1, 0))
        if descriptor < 0:
            return False
        os.close(descriptor)
        return True

    def digests(self) -> list[str]:
        """All segments, the least recently used first."""
        with self._lock:
            return list(self._segments)

    def nbytes(self) -> int:
        """Bytes of all, unfinished ones too."""
        with self._lock:
            return self._reserved_bytes + sum(nbytes for _, nbytes in self._segments.values())

    def clear(self) -> None:
        """Drop all."""
        for digest in self.digests():
            self.remove(digest)

    def _give_back(self, nbytes: int) -> None:
        with self._lock:
            self._reserved_bytes -= nbytes


def _new(nbytes: int) -> int:
    descriptor = os.memfd_create("nexus-segment", os.MFD_CLOEXEC)
    try:
        if not allocate(descriptor, nbytes):
            raise OSError(errno.ENOMEM, f"there is no memory for {nbytes} bytes")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
