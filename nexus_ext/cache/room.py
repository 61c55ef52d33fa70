"""Room: what goes when something comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from nexus_ext.cache.zone import Zone

__all__ = ["Room"]

# Looked at together; one is mostly enough.
_BATCH = 64


class Room:
    """Evicts what was used longest ago, over all zones, until the budget holds.

    Attributes:
        lock: Have it from `make` until what comes is announced, so that two who come at the same
            time do not get the same room. Other processes count on the index alone.
    """

    def __init__(
        self,
        zones: Sequence[Zone],
        max_bytes: int,
        count: Callable[[str], object],
        let_go: Callable[[Zone, bytes], bool] = Zone.evict,
    ) -> None:
        """`let_go` removes a blob from a zone; False if it stays."""
        self._zones = zones
        self._max_bytes = max_bytes
        self._count = count
        self._let_go = let_go
        self.lock = threading.Lock()

    def make(self, nbytes: int) -> bool:
        """Room for so many bytes more; False if what stays is held, or may not be removed.

        Raises:
            ReadError, WriteError: The indexes cannot be used, or files not be removed.
        """
        excess = sum(zone.index.stored_bytes() for zone in self._zones) + nbytes - self._max_bytes
        return excess <= 0 or self._evict(self._zones, excess) >= excess

    def free(self, zone: Zone, nbytes: int) -> bool:
        """So many bytes fewer in one zone, whatever the budget says; whether anything went."""
        with self.lock:
            return self._evict([zone], nbytes) > 0

    def _evict(self, zones: Sequence[Zone], nbytes: int) -> int:
        """At least so many bytes, if there are; how many."""
        freed, limit = 0, _BATCH
        while freed < nbytes:
            able = [zone for zone in zones if zone.is_writable]
            oldest = [(*row, zone) for zone in able for row in zone.index.oldest(limit)]
            oldest.sort(key=lambda one: one[0])
            went = 0
            for _, digest, stored, zone in oldest:
                if freed >= nbytes:
                    break
                if not self._let_go(zone, digest):
                    continue
                went += 1
                freed += stored
                self._count("evictions")
            if went == 0 and len(oldest) < limit:
                break  # all that is left is held
            if went == 0:
                limit *= 2  # look behind what is held
        return freed
