"""A blob: one immutable file that says what it holds and can prove it.

    0     magic, checksum of the header, version, lengths, SHA-256 of the payload
    80    JSON: key, kind, when it was made, what the caller says about it
          XXH3-64 of every block of the payload
    4096n the payload, one part behind the other

The name of the file is the SHA-256 of its payload, so a name never means other bytes than it did.
The payload begins at a multiple of 4096: direct reads land in place. Every byte of the header is
under its checksum, every byte of the payload under its block's. They find damage, not malice.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from nexus_ext.cache.header import ALIGNMENT, BLOCK_BYTES, Header, check_beginning, corrupt
from nexus_ext.cache.parts import Part, tensors_of, view_of
from nexus_ext.errors import ReadError, WriteError

__all__ = [
    "BLOCK_BYTES",
    "Header",
    "Part",
    "open_blob",
    "read_header",
    "tensors_of",
    "view_of",
    "write_blob",
]

# Linux takes no more buffers in one call.
_MAX_BUFFERS = 1024


def write_blob(
    path: Path, temporary: Path, header: Header, parts: Sequence[torch.Tensor], mode: int
) -> None:
    """Write a blob so that `path` has all of it or does not exist, also after a power cut.

    Blocks until the disk has it. Leaves no pages in the page cache, and no temporary.

    Args:
        path: Where it will be.
        temporary: In the same folder; nobody else's.
        header: Of `parts`.
        parts: As of `tensors_of`.
        mode: Permissions.

    Raises:
        WriteError: The disk would not take it; its cause has the errno.
    """
    try:
        _make_folder(path.parent, mode | (mode & 0o444) >> 2)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, mode)
        try:
            _write_all(descriptor, [memoryview(header.encode()), *map(view_of, parts)])
            os.fdatasync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        os.rename(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        _remove_if_possible(temporary)
        raise WriteError(
            f"A cache must be able to write; {path} ({header.file_nbytes} bytes) could not be "
            f"written: {error.strerror}. Make room, or give the cache another folder."
        ) from error
    except BaseException:
        _remove_if_possible(temporary)
        raise


def _remove_if_possible(path: Path) -> None:
    # Where nothing can be written, nothing can be removed either. Whoever opens next does it.
    with suppress(OSError):
        path.unlink()


def _write_all(descriptor: int, views: list[memoryview]) -> None:
    offset = 0
    waiting = [view for view in views if view.nbytes]
    while waiting:
        count = os.pwritev(descriptor, waiting[:_MAX_BUFFERS], offset)
        offset += count
        while waiting and count >= waiting[0].nbytes:
            count -= waiting.pop(0).nbytes
        if count:
            waiting[0] = waiting[0][count:]


def _make_folder(folder: Path, mode: int) -> None:
    with suppress(FileExistsError):
        folder.mkdir(mode=mode)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_blob(path: Path) -> int:
    """A descriptor of the file, and of no link, pipe or device.

    Raises:
        FileNotFoundError: There is none.
        CorruptCheckpoint: Something else stands there.
        ReadError: It cannot be opened.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        raise
    except OSError as error:
        if path.is_symlink():
            raise corrupt(str(path), "a link stands in its place") from error
        raise ReadError(
            f"A cached file must be readable; cannot open {path}: {error.strerror}. Look at its "
            "permissions, and at how many files may be open."
        ) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise corrupt(str(path), "no regular file stands in its place")


def read_header(descriptor: int, name: str) -> Header:
    """Read and check the header, and that the file is as long as it says.

    Raises:
        CorruptCheckpoint: It is not one, or the file is cut or longer.
        ReadError: The disk answered with an error; has its errno. Without one the stack is full.
    """
    size = os.fstat(descriptor).st_size
    if size < ALIGNMENT:
        raise corrupt(name, f"it ends inside its header, after {size} bytes")
    head = _pread(descriptor, ALIGNMENT, 0, name)
    header_nbytes = check_beginning(head, size, name)
    if header_nbytes > ALIGNMENT:
        head += _pread(descriptor, header_nbytes - ALIGNMENT, ALIGNMENT, name)
    return Header.decode(head, name)


def _pread(descriptor: int, nbytes: int, offset: int, name: str) -> bytearray:
    data = bytearray()
    while len(data) < nbytes:
        try:
            got = os.pread(descriptor, nbytes - len(data), offset + len(data))
        except OSError as error:
            failed = ReadError(
                f"A read must succeed; the header of {name} failed at offset "
                f"{offset + len(data)}: {error.strerror}. Check the disk."
            )
            failed.errno = error.errno
            raise failed from error
        if not got:
            raise corrupt(name, f"it ends inside its header, after {offset + len(data)} bytes")
        data += got
    return data
