"""When blobs were used, gathered so that a hit does not write to the disk."""

from __future__ import annotations

import threading
import time

from nexus_ext.cache.index import Index

__all__ = ["Touches"]

_MOST = 128
_LONGEST_SECONDS = 5.0


class Touches:
    """What one index is to be told. Thread-safe. Losing it costs the order of eviction, no more."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._lock = threading.Lock()
        self._waiting: dict[bytes, tuple[int, int]] = {}
        self._told_at = time.monotonic()

    def add(self, digest: bytes, when_ns: int) -> None:
        """A blob was used; tells the index when enough has come together.

        Raises:
            WriteError: The index cannot be written to; what was gathered is forgotten.
        """
        with self._lock:
            _, count = self._waiting.get(digest, (0, 0))
            self._waiting[digest] = (when_ns, count + 1)
            is_due = time.monotonic() - self._told_at > _LONGEST_SECONDS
        if is_due or len(self._waiting) >= _MOST:
            self.flush()

    def flush(self) -> None:
        """Tell the index now. Raises as `add`."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._told_at = time.monotonic()
        if waiting:
            self._index.touch(waiting)
