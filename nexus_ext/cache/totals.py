"""Counters that outlive processes, gathered so that counting does not write to the disk.

They live in the index: when that is lost they begin anew. A process that is killed takes the last
seconds of its counting with it.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from nexus_ext.cache.index import Index
from nexus_ext.errors import ConfigError

__all__ = ["COUNTED", "Totals"]

# What a tier counts itself, and what whoever fetches ahead may tell it: layers asked for ahead,
# those of them that were used, how often the queue was looked at and what was in it together.
COUNTED = (
    "hits",
    "misses",
    "puts",
    "puts_known",
    "evictions",
    "corruptions",
    "reads",
    "read_ns",
    "read_bytes",
    "prefetched",
    "prefetch_used",
    "queue_looks",
    "queue_depths",
)
_LONGEST_SECONDS = 5.0


class Totals:
    """What one tier has told its index. Thread-safe.

    The first folder that can be written to has the counters of the whole tier.
    """

    def __init__(self, indexes: Sequence[Index]) -> None:
        self._indexes = indexes
        self._lock = threading.Lock()
        self._told: Counter[str] = Counter()
        self._told_at = time.monotonic()

    @staticmethod
    def check(name: str) -> None:
        """Raises ConfigError unless it is counted."""
        if name not in COUNTED:
            raise ConfigError(f"What is counted is one of {', '.join(COUNTED)}; got {name!r}.")

    def tell(self, counts: Mapping[str, int], only_if_due: bool = False) -> None:
        """Add what came since the last call.

        Args:
            counts: Since the tier was opened.
            only_if_due: Do nothing if the last call was not long ago.

        Raises:
            WriteError: The index cannot be written to; the next call tells it all.
        """
        with self._lock:
            if not self._indexes:
                return
            if only_if_due and time.monotonic() - self._told_at < _LONGEST_SECONDS:
                return
            self._told_at = time.monotonic()
            # A hit that could not be read becomes a miss: differences may be negative.
            news = {name: counts.get(name, 0) - self._told[name] for name in COUNTED}
            news = {name: number for name, number in news.items() if number}
            if news:
                self._indexes[0].count(news)
                self._told.update(news)

    def read(self) -> dict[str, int]:
        """All counters, over all folders. Raises ReadError if an index cannot be read."""
        return {name: sum(index.tally(name) for index in self._indexes) for name in COUNTED}
