"""What a RAM tier says about itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RamStats"]


@dataclass(frozen=True)
class RamStats:
    """What a RAM tier did in this process, and what is there now.

    Attributes:
        effective: "shared", "off", or "private: " and why.
        max_bytes: The budget.
        nbytes: Of all segments, other processes' too.
        num_segments: That can be loaded now.
        hits, misses: Of `load`.
        fills: Segments made here.
        evictions: Segments this process took away, to make room or because it was asked to.
        corrupt: Segments that were not what they said, and were dropped.
        refused: Fills there was no room for.
        abandoned: Unfinished segments of dead processes that were removed.
    """

    effective: str
    max_bytes: int
    nbytes: int
    num_segments: int
    hits: int
    misses: int
    fills: int
    evictions: int
    corrupt: int
    refused: int
    abandoned: int
