"""Which segments this process has looked at: they are not looked at again."""

from __future__ import annotations

import os
import threading

__all__ = ["Seen"]

# Remembered up to here; one more look does no harm.
_MOST = 1 << 16


class Seen:
    """Names, and the numbers of their files. Numbers are used again, so both must be the same.
    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return len(self._files)

    def has(self, name: str, descriptor: int) -> bool:
        """Whether this very file was remembered under the name."""
        return self._files.get(name) == _identity(descriptor)

    def remember(self, name: str, descriptor: int) -> None:
        """It was looked at, and is right."""
        with self._lock:
            self._files[name] = _identity(descriptor)
            if len(self._files) > _MOST:
                del self._files[next(iter(self._files))]

    def forget(self, name: str) -> None:
        """It is gone."""
        with self._lock:
            self._files.pop(name, None)


def _identity(descriptor: int) -> tuple[int, int]:
    info = os.fstat(descriptor)
    return info.st_dev, info.st_ino
