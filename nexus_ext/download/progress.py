"""How much has arrived, told to the user."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Progress", "Teller"]

Progress = Callable[[str, int, "int | None"], None]


class Teller:
    """Calls a user's callback, one call at a time, and only with what it was not told yet."""

    def __init__(self, path: str, progress: Progress | None) -> None:
        self._path = path
        self._progress = progress
        self._lock = threading.Lock()
        self._told_bytes = -1

    def tell(self, state: Callable[[], tuple[int, int | None]]) -> None:
        """Tell what `state` says now: bytes done, and of how many.

        Blocks while another thread tells. What the callback raises is raised here.
        """
        if self._progress is None:
            return
        with self._lock:
            done, total = state()
            if done != self._told_bytes:
                self._told_bytes = done
                self._progress(self._path, done, total)
