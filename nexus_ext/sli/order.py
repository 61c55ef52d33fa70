"""The order in which the layers of one model are asked for: learnt while it runs.

What comes next is what followed the last time that looked most like now, as the engine has it
(csrc/stream/order.h): of all earlier requests for this layer, the one with the longest run of equal
requests before it, and of equals the latest. Where nothing like now was seen, the next number
comes next. So a skipped, repeated, reversed or jumping loop is known after its first pass, and a
new one after the first pass of that. Nothing is drawn by chance.
"""

from __future__ import annotations

__all__ = ["Order"]

# Longer runs of equal requests tell no more.
_MOST_EQUAL = 64
# Requests remembered: some passes of the deepest models.
_MOST_KEPT = 1024


class Order:
    """Not thread-safe."""

    def __init__(self) -> None:
        self._history: list[int] = []

    def visit(self, index: int) -> None:
        """A layer was asked for."""
        self._history.append(index)
        if len(self._history) > _MOST_KEPT:
            del self._history[: _MOST_KEPT // 2]

    def predict(self, count: int, total: int) -> tuple[list[int], bool]:
        """What comes after the last visit.

        Args:
            count: Most layers.
            total: Of the model; there are none from here on.

        Returns:
            Different layers, most urgent first; the one in use only if it comes at once again. And
            whether they were learnt, or are the next numbers.
        """
        now = self._history[-1]
        place = self._likeliest_place()
        if place is None:
            return list(range(now + 1, min(now + 1 + count, total))), False
        found: list[int] = []
        for index in self._history[place + 1 :]:
            if len(found) == count:
                break
            is_repeat = index == now and found != []
            if not is_repeat and index not in found and index < total:
                found.append(index)
        return found, True

    def _likeliest_place(self) -> int | None:
        history, best, longest = self._history, None, 0
        for place in range(len(history) - 2, -1, -1):
            if history[place] != history[-1]:
                continue
            length = self._equal_before(place)
            if length > longest:
                best, longest = place, length
            if longest == _MOST_EQUAL:
                break
        return best

    def _equal_before(self, place: int) -> int:
        """How many visits up to `place`, itself included, are those up to now."""
        history, now = self._history, len(self._history) - 1
        limit, length = min(place + 1, _MOST_EQUAL), 0
        while length < limit and history[place - length] == history[now - length]:
            length += 1
        return length
