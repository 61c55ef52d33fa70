"""What one store counts, what the disk said last, and what outlives the process of it."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from nexus_ext.cache.report import DiskStats
from nexus_ext.cache.totals import Totals
from nexus_ext.errors import CorruptCheckpoint, WriteError

__all__ = ["Ledger"]


class Ledger:
    """Counters of one store. Thread-safe.

    Attributes:
        said: How the last blob was read, and what went wrong last: texts of DiskStats.
    """

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.said = {"io_mode": "", "reader": "", "last_error": ""}

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name] += number

    def refuse(self, why: str) -> None:
        """A put wrote nothing."""
        self.count(f"refused_{why}")

    def fail(self, name: str, error: Exception) -> None:
        """Count an error, and keep its text."""
        self.count(name)
        self.said["last_error"] = str(error)

    def fail_reading(self, error: Exception) -> None:
        """A blob could not be believed, or not be read."""
        is_corrupt = isinstance(error, CorruptCheckpoint)
        self.fail("corruptions" if is_corrupt else "read_errors", error)

    def fields(self) -> dict[str, Any]:
        """The counters and texts of DiskStats."""
        names = [name for name, kind in DiskStats.__annotations__.items() if kind == "int"]
        with self._lock:
            return {name: self._counts[name] for name in names} | self.said

    def tell(self, only_if_due: bool = False) -> None:
        """Add what came since the last call to what outlives this process."""
        with self._lock:
            counts = Counter(self._counts)
        try:
            self._totals.tell(counts, only_if_due)
        except WriteError as error:
            self.fail("index_errors", error)

    def totals(self) -> dict[str, int]:
        """Of all processes. Raises ReadError."""
        self.tell()
        return self._totals.read()
