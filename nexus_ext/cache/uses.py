"""When something was used: a clock that never goes back, and what the indexes are told of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from nexus_ext.cache.ledger import Ledger
from nexus_ext.cache.touches import Touches
from nexus_ext.cache.zone import Zone
from nexus_ext.errors import WriteError

__all__ = ["Uses"]


class Uses:
    """Of the blobs of some zones. Thread-safe. What cannot be written down is counted."""

    def __init__(self, zones: Sequence[Zone], ledger: Ledger) -> None:
        self._touches = {zone.folder.path: Touches(zone.index) for zone in zones}
        self._ledger = ledger
        self._lock = threading.Lock()
        self._latest_ns = 0

    def now_ns(self) -> int:
        """Later than ever before here, also when the clock is set back."""
        with self._lock:
            self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
            return self._latest_ns

    def note(self, zone: Zone, digest: bytes) -> None:
        """A blob is used now."""
        if not zone.is_writable:
            return
        try:
            self._touches[zone.folder.path].add(digest, self.now_ns())
        except WriteError as error:
            self._ledger.fail("index_errors", error)

    def flush(self) -> None:
        """Write down all that is known."""
        self._ledger.tell()
        for touches in self._touches.values():
            try:
                touches.flush()
            except WriteError as error:
                self._ledger.fail("index_errors", error)
