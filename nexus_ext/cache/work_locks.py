"""Locks between processes that save work, and between threads alike.

Where a file system has none, or the folder cannot be written to, work is done twice; who would
destroy something then is told that it has no lock, and leaves it. They belong to an open file and
go with it, so a dead process holds none.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked"]

# l_type, l_whence, l_start, l_len, l_pid, and what the compiler puts behind.
_FLOCK = "hhqqi0q"


@contextmanager
def locked(path: Path, number: int = 0, *, wait: bool = True, mode: int = 0o600) -> Iterator[bool]:
    """Have byte `number` of a lock file, made where it is missing.

    Args:
        path: Of the file; nothing is ever written to it.
        number: Which of many locks it is.
        wait: Block until it is free.
        mode: Permissions of the file.

    Returns:
        False, and nothing is locked, if somebody else has it and `wait` is False, or where there
        can be no lock.
    """
    descriptor = _open(path, mode)
    try:
        yield descriptor >= 0 and _lock(descriptor, number, wait)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _open(path: Path, mode: int) -> int:
    """-1 where there can be none."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags, mode)
    except OSError:
        return -1


def _lock(descriptor: int, number: int, wait: bool) -> bool:
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK, asked)
    except OSError:
        return False  # somebody else has it, or the file system has none
    return True
