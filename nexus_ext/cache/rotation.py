"""Which folder is written to next: each in its turn, more often where there is more room."""

from __future__ import annotations

import threading
from collections.abc import Sequence

__all__ = ["Rotation"]


class Rotation:
    """Turns among a fixed number of places, spread as evenly as their weights allow.

    Everybody gains its weight in each round; who has most gets the turn, and pays for it with the
    sum. So a place with a third of the weight has every third turn.
    """

    def __init__(self, num_places: int) -> None:
        self._credit = [0.0] * num_places
        self._lock = threading.Lock()

    def next(self, weights: Sequence[float]) -> int | None:
        """The place whose turn it is; one of weight 0 has none. None if all have."""
        total = sum(weights)
        if total <= 0:
            return None
        with self._lock:
            for place, weight in enumerate(weights):
                self._credit[place] += weight / total
            able = [place for place, weight in enumerate(weights) if weight > 0]
            chosen = max(able, key=lambda place: self._credit[place])
            self._credit[chosen] -= 1.0
        return chosen
