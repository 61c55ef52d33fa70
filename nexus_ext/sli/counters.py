"""Requests by where they were served from, and how long that took."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

__all__ = ["Counters"]

_TIERS = ("memory", "ssd", "remote", "miss")


class Counters:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(_TIERS, 0.0)

    def note(self, tier: str, seconds: float) -> None:
        """One request, served from "memory", "ssd" or "remote", or by nobody ("miss")."""
        with self._lock:
            self._counts[tier] += 1
            self._seconds[tier] += seconds

    def report(self) -> dict[str, Any]:
        """Counts, the share of hits (0 before any request), mean times in milliseconds. Hits are
        of what is near: memory and disk.
        """
        with self._lock:
            counts, seconds = Counter(self._counts), dict(self._seconds)
        hits = counts["memory"] + counts["ssd"]
        asked = hits + counts["remote"] + counts["miss"]
        served = seconds["memory"] + seconds["ssd"]
        return {
            "hits": hits,
            "memory_hits": counts["memory"],
            "ssd_hits": counts["ssd"],
            "remote_hits": counts["remote"],
            "misses": counts["miss"],
            "hit_ratio": hits / asked if asked else 0.0,
            "avg_latency_ms": 1e3 * served / hits if hits else 0.0,
            "memory_avg_latency_ms": _mean_ms(seconds["memory"], counts["memory"]),
            "ssd_avg_latency_ms": _mean_ms(seconds["ssd"], counts["ssd"]),
            "remote_avg_latency_ms": _mean_ms(seconds["remote"], counts["remote"]),
        }


def _mean_ms(seconds: float, count: int) -> float:
    return 1e3 * seconds / count if count else 0.0
