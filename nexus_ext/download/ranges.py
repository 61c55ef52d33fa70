"""Sets of byte ranges: what has landed, what is missing."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["Ranges"]


class Ranges:
    """Half-open ranges that neither overlap nor touch, in order. Not for several threads."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def nbytes(self) -> int:
        return sum(self._ends) - sum(self._starts)

    def add(self, start: int, end: int) -> None:
        """Unite with [start, end); nothing happens where it is empty."""
        if start >= end:
            return
        first, last = bisect_left(self._ends, start), bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def remove(self, start: int, end: int) -> None:
        """Take [start, end) out; nothing happens where it is empty."""
        if start >= end:
            return
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        kept = []
        for left, right in zip(self._starts[first:last], self._ends[first:last], strict=True):
            kept += [(left, min(right, start)), (max(left, end), right)]
        kept = [(left, right) for left, right in kept if left < right]
        self._starts[first:last] = [left for left, _ in kept]
        self._ends[first:last] = [right for _, right in kept]

    def within(self, start: int, end: int) -> tuple[int, int] | None:
        """The first piece of these ranges inside [start, end), or None."""
        at = bisect_right(self._ends, start)
        if at == len(self._starts) or self._starts[at] >= end or start >= end:
            return None
        return max(start, self._starts[at]), min(end, self._ends[at])

    def end_of(self, offset: int) -> int:
        """How far the ranges reach without a gap from `offset` on; `offset` if not at all."""
        at = bisect_right(self._ends, offset)
        inside = at < len(self._starts) and self._starts[at] <= offset
        return self._ends[at] if inside else offset

    def covers(self, start: int, end: int) -> bool:
        """Whether every byte of [start, end) is in."""
        return start >= end or self.end_of(start) >= end

    def pieces(self, start: int, end: int) -> list[tuple[int, int]]:
        """The pieces of [start, end) that are in."""
        found = []
        while (piece := self.within(start, end)) is not None:
            found.append(piece)
            start = piece[1]
        return found

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        """The pieces of [start, end) that are not in."""
        found = []
        while start < end:
            piece = self.within(start, end) or (end, end)
            if start < piece[0]:
                found.append((start, piece[0]))
            start = piece[1]
        return found
