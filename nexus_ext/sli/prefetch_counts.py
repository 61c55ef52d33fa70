"""What a prefetcher counts, and what the guide would like to see."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PrefetchCounts", "Verdict", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """One of the guide's targets beside what was measured here.

    Attributes:
        target: In the guide's words.
        measured: Or None, where nothing was counted yet.
        is_met: Or None.
    """

    target: str
    measured: float | None
    is_met: bool | None


class PrefetchCounts:
    """Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._max_depth = 0

    def note(
        self, tier: str, was_ahead: bool, was_learnt: bool, was_there: bool, seconds: float
    ) -> None:
        """One layer that was served: whether it was fetched ahead, because of a learnt order, and
        was there when it was asked for.
        """
        with self._lock:
            self._counts["total_requests"] += 1
            self._counts[f"from_{tier}"] += 1
            self._counts["prefetch_used"] += was_ahead
            self._counts["learnt_used"] += was_learnt
            self._counts["prefetch_ready"] += was_ahead and was_there
            self._counts["cache_hits"] += was_there or tier in ("memory", "ssd")
            self._seconds += seconds

    def note_issued(self, is_learnt: bool) -> None:
        """A layer is fetched ahead."""
        with self._lock:
            self._counts["prefetch_issued"] += 1
            self._counts["learnt_issued"] += is_learnt

    def note_dropped(self) -> None:
        """A layer was fetched ahead, or was to be, and nobody came for it."""
        with self._lock:
            self._counts["prefetch_dropped"] += 1

    def note_depth(self, depth: int) -> None:
        """Fetches that are under way, or wait, when the next ones were begun at a request."""
        with self._lock:
            self._counts["depth_sum"] += depth
            self._counts["depth_times"] += 1
            self._max_depth = max(self._max_depth, depth)

    def report(self) -> dict[str, Any]:
        """Of all requests that were served:

        total_requests; cache_hits: it lay in memory or on the cache's disk when it was asked for,
        or had been fetched ahead; from_memory, from_ssd, from_remote, from_source; avg_latency_ms.
        Of what was fetched ahead: prefetch_issued, prefetch_used, prefetch_ready (there when it was
        asked for; others were still on their way), prefetch_dropped; prefetch_hit_rate, used of
        those used or dropped. learnt_issued, learnt_used: of these, what the order learnt says, and
        not the next numbers. avg_queue_depth, max_queue_depth: fetches under way or waiting, once
        a request has begun its own.
        """
        with self._lock:
            counts, seconds = Counter(self._counts), self._seconds
            deepest = self._max_depth
        names = (
            "total_requests",
            "cache_hits",
            "from_memory",
            "from_ssd",
            "from_remote",
            "from_source",
            "prefetch_issued",
            "prefetch_used",
            "prefetch_ready",
            "prefetch_dropped",
            "learnt_issued",
            "learnt_used",
        )
        decided = counts["prefetch_used"] + counts["prefetch_dropped"]
        return {name: counts[name] for name in names} | {
            "cache_hit_ratio": _share(counts["cache_hits"], counts["total_requests"]),
            "avg_latency_ms": 1e3 * _share(seconds, counts["total_requests"]),
            "prefetch_hit_rate": _share(counts["prefetch_used"], decided),
            "avg_queue_depth": _share(counts["depth_sum"], counts["depth_times"]),
            "max_queue_depth": deepest,
        }


def verdicts(report: Mapping[str, Any]) -> dict[str, Verdict]:
    """The guide's targets, beside a report."""
    asked, decided = report["total_requests"], report["prefetch_used"] + report["prefetch_dropped"]
    ratio, rate = report["cache_hit_ratio"], report["prefetch_hit_rate"]
    latency, depth = report["avg_latency_ms"], report["avg_queue_depth"]
    return {
        "cache_hit_ratio": _verdict("> 85 %", ratio, ratio > 0.85, asked),
        "avg_load_latency_ms": _verdict("< 100 ms", latency, latency < 100, asked),
        "prefetch_hit_rate": _verdict("> 70 %", rate, rate > 0.70, decided),
        "queue_depth": _verdict("2 to 4", depth, 2 <= depth <= 4, asked),
    }


def _verdict(target: str, measured: float, is_met: bool, count: int) -> Verdict:
    return Verdict(target, measured, is_met) if count else Verdict(target, None, None)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
