"""Has the disk begin with what was written, long before it must be there.

Otherwise the kernel would hold a whole file back until the end, and only then be told to hurry.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["start_writeback"]

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: begin, do not wait


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Begin to write these bytes of a file to its disk, where the system can; a hint.

    Blocks no longer than the disk's queue is full. What goes wrong is told by a later fdatasync of
    the same descriptor, and is not used up here.
    """
    if (call := _sync_file_range()) is not None:
        call(descriptor, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        call.restype = ctypes.c_int
    return call
