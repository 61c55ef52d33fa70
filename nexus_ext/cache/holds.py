"""What must not be evicted now, by anybody in this process.

Several stores may be open on one folder, so the holds belong to the process. A held blob is open:
should another process unlink it, its bytes can still be read here. A forked child holds nothing.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from nexus_ext.cache.blob import open_blob
from nexus_ext.errors import ReadError

__all__ = ["hold", "is_held", "let_go", "lock", "open_held"]


@dataclass
class _Hold:
    descriptor: int
    count: int


@dataclass
class _Holds:
    """Those of one process."""

    pid: int = field(default_factory=os.getpid)
    lock: threading.RLock = field(default_factory=threading.RLock)
    by_path: dict[Path, _Hold] = field(default_factory=dict)


_holds = _Holds()


def _mine() -> _Holds:
    global _holds
    if _holds.pid != os.getpid():
        # Whoever had the parent's lock is not here to give it back.
        _holds = _Holds()
    return _holds


def lock() -> threading.RLock:
    """Whoever removes a blob has it, from the question whether it is held to the end."""
    return _mine().lock


def hold(path: Path) -> None:
    """Once more. Raises as `open_blob` if it is not there."""
    mine = _mine()
    with mine.lock:
        if path not in mine.by_path:
            mine.by_path[path] = _Hold(open_blob(path), 0)
        mine.by_path[path].count += 1


def let_go(path: Path) -> None:
    """Once less."""
    mine = _mine()
    with mine.lock:
        mine.by_path[path].count -= 1
        if mine.by_path[path].count == 0:
            os.close(mine.by_path.pop(path).descriptor)


def is_held(path: Path) -> bool:
    """Call with `lock`."""
    return path in _mine().by_path


def open_held(path: Path) -> int:
    """A descriptor of the caller's own. Raises as `open_blob` if the file is neither there nor
    held.
    """
    try:
        return open_blob(path)
    except FileNotFoundError:
        mine = _mine()
        with mine.lock:
            if path not in mine.by_path:
                raise
            try:
                return os.dup(mine.by_path[path].descriptor)
            except OSError as error:
                raise ReadError(
                    f"A cached file that is held must be readable; {path} is not: "
                    f"{error.strerror}. Look at how many files may be open."
                ) from error
