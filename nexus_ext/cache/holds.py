"""What must not be evicted now, by anybody in this process.

Several stores may be open on one folder, so the holds belong to the process. A held blob is open:
should another process unlink it, its bytes can still be read here.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path

from nexus_ext.cache.blob import open_blob

__all__ = ["hold", "is_held", "let_go", "lock", "open_held"]


@dataclass
class _Hold:
    descriptor: int
    count: int


_holds: dict[Path, _Hold] = {}
# Whoever removes a blob has it, from the question whether it is held to the end.
lock = threading.RLock()


def hold(path: Path) -> None:
    """Once more. Raises as `open_blob` if it is not there."""
    with lock:
        if path not in _holds:
            _holds[path] = _Hold(open_blob(path), 0)
        _holds[path].count += 1


def let_go(path: Path) -> None:
    """Once less."""
    with lock:
        _holds[path].count -= 1
        if _holds[path].count == 0:
            os.close(_holds.pop(path).descriptor)


def is_held(path: Path) -> bool:
    """Call with `lock`."""
    return path in _holds


def open_held(path: Path) -> int:
    """A descriptor of the caller's own: of the file that is held, else as `open_blob`."""
    with lock:
        if path in _holds:
            return os.dup(_holds[path].descriptor)
    return open_blob(path)
