"""Room: what goes when something comes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from nexus_ext.cache.zone import Fate, Zone

__all__ = ["Room"]

# Looked at together; one is mostly enough.
_BATCH = 64


class Room:
    """Evicts what was used longest ago, over all zones, until the budget holds.

    Attributes:
        lock: Have it while room is made for what was announced: two of this process would both
            evict for the same bytes.
    """

    def __init__(
        self,
        zones: Sequence[Zone],
        max_bytes: int,
        count: Callable[[str], object],
        let_go: Callable[[Zone, bytes], Fate] = Zone.evict,
    ) -> None:
        """`let_go` removes a blob from a zone, unless it is held."""
        self._zones = zones
        self._max_bytes = max_bytes
        self._count = count
        self._let_go = let_go
        self.lock = threading.Lock()

    def make(self) -> bool:
        """Room for what was announced; False if what stays is held, or may not be removed.

        What other processes announce meanwhile counts too: who is later sees both.

        Raises:
            ReadError, WriteError: The indexes cannot be used, or files not be removed.
        """
        while True:
            excess = sum(zone.index.stored_bytes() for zone in self._zones) - self._max_bytes
            if excess <= 0:
                return True
            if not self._evict(self._zones, excess):
                return False

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
                fate = self._let_go(zone, digest)
                if fate is Fate.HELD:
                    continue
                went += 1
                freed += stored
                if fate is Fate.REMOVED:
                    self._count("evictions")
            if went == 0 and len(oldest) < limit:
                break  # all that is left is held
            if went == 0:
                limit *= 2  # look behind what is held
        return freed
