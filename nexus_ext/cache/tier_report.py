"""What a store of several tiers says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nexus_ext.cache.compression import Decision
from nexus_ext.cache.rates import Rate
from nexus_ext.cache.remote import RemoteStats
from nexus_ext.cache.report import DiskStats

__all__ = ["TierStats", "TieredStats"]


@dataclass(frozen=True)
class TierStats:
    """One tier.

    Attributes:
        folder: Where.
        rate: What its disk gives; None where that could not be measured.
        hits: Found here, by this store.
        decision: About compression, of what was put here last.
        disk: Its own counters.
    """

    folder: Path
    rate: Rate | None
    hits: int
    decision: Decision | None
    disk: DiskStats


@dataclass(frozen=True)
class TieredStats:
    """Counters of this store since it was opened.

    Attributes:
        tiers: In their order.
        is_ordered: False if a tier was measured to be half as fast again as the one above it.
        entries: Keys; one that is in two tiers for a moment counts once.
        hits, misses: Of `get` and `load`; `hits` is the sum over the tiers.
        promotions, promoted_bytes: Moved to a faster tier, and their plain bytes.
        demotions, demoted_bytes: Moved to a slower tier for want of room.
        dropped: Removed for want of room, and kept nowhere below.
        settled: Second copies, left by a crash or a race, that were removed.
        fetched, fetched_bytes: That came from the remote store, and their plain bytes.
        joined: Asked for while somebody else was fetching it, and then found here.
        published: That were put into the remote store too.
        remote: Its own counters; None without one.
    """

    tiers: tuple[TierStats, ...]
    is_ordered: bool
    entries: int
    hits: int
    misses: int
    promotions: int
    promoted_bytes: int
    demotions: int
    demoted_bytes: int
    dropped: int
    settled: int
    fetched: int
    fetched_bytes: int
    joined: int
    published: int
    remote: RemoteStats | None

    @property
    def hit_rate(self) -> float:
        """Hits of all that was asked for; 0 before."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0
