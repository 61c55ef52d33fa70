"""Turns: one thread at a time for each name."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Turns"]


class Turns:
    """Thread-safe; a name that nobody waits for takes no memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Have the turn of a name; blocks until it is free."""
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.num_users += 1
        try:
            with turn.lock:
                yield
        finally:
            with self._lock:
                turn.num_users -= 1
                if turn.num_users == 0:
                    del self._turns[name]


@dataclass
class _Turn:
    """Who has it, and how many threads want it."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    num_users: int = 0
