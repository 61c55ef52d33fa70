"""A file that is arriving, and its journal beside it: made, taken over, published, removed.

    .NAME.TOKEN.part            the bytes, sparse
    .NAME.TOKEN.OWNER.journal   what of them may be believed

No two processes ever write one part: its token is unique, and to rename the journal is to take the
pair over. That is done only where the owner is gone for certain (`owners`). Where nobody can say,
the blocks are copied into a file of one's own. Locks decide nothing; where they work, they spare
such a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus_ext.download.journal import Block, Head, block_line, head_line, new_hasher, parse
from nexus_ext.download.ranges import Ranges
from nexus_ext.download.writeback import start_writeback
from nexus_ext.errors import DownloadError, NexusError, WriteError
from nexus_ext.owners import Fate, fate, free_name, own_name

__all__ = ["Partial", "adopt", "writing"]

_READ_BYTES = 1 << 20
_MAX_STEM_BYTES = 80  # names are at most 255 bytes long, and ours add about 100
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the file system refuses becomes a WriteError that names `path`."""
    try:
        yield
    except NexusError:  # said already
        raise
    except OSError as error:
        raise WriteError(
            f"{path.parent} must take the file {path.name}, but: {error.strerror or error}; make "
            "room or choose another folder, then fetch again"
        ) from error


def _stem(target: Path) -> str:
    name = os.fsencode(target.name)
    if len(name) <= _MAX_STEM_BYTES:
        return target.name
    return hashlib.sha256(name).hexdigest()[:32]


class Partial:
    """A part and its journal, both open. One process's own until it is released.

    `landed` and `users` belong to the one who holds it, under a lock; writing needs none.
    """

    def __init__(self, target: Path, token: str, head: Head) -> None:
        self.target = target
        self.head = head
        self.landed = Ranges()
        self.users = 0
        self.is_gone = False
        self._token = token
        self._journal_path = self._journal_at(own_name())
        self.path = target.parent / f".{_stem(target)}.{token}.part"
        self._file = self._journal = -1

    def _journal_at(self, owner: str) -> Path:
        return self.target.parent / f".{_stem(self.target)}.{self._token}.{owner}.journal"

    @classmethod
    def create(cls, target: Path, head: Head) -> Partial:
        """A new, empty one.

        Raises:
            WriteError: The folder does not take it, or has too little room.
        """
        partial = cls(target, secrets.token_hex(8), head)
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        try:
            with writing(target):
                partial._make()
        except WriteError:
            partial.remove()
            partial.close()
            raise
        return partial

    def _make(self) -> None:
        _check_room(self.target.parent, self.head.nbytes or 0)
        # The journal first: a part is never without one, so none is ever forgotten.
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS
        self._journal = os.open(self._journal_path, flags | os.O_APPEND, 0o666)
        _try_lock(self._journal)
        _write_all(self._journal, head_line(self.head))
        self._file = os.open(self.path, flags, 0o666)
        os.ftruncate(self._file, self.head.nbytes or 0)

    @property
    def nbytes(self) -> int | None:
        return self.head.nbytes

    @property
    def is_complete(self) -> bool:
        return self.nbytes is not None and self.landed.covers(0, self.nbytes)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Put the bytes where they belong.

        Raises:
            WriteError: The disk would not take them.
        """
        with writing(self.target):
            rest = memoryview(data)
            while rest:
                done = os.pwrite(self._file, rest, offset)
                rest, offset = rest[done:], offset + done

    def record(self, block: Block) -> None:
        """Append to the journal; the bytes were written before."""
        with writing(self.target):
            _write_all(self._journal, block_line(block))

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Read back what stands in the part; returns the number of bytes."""
        with writing(self.target):
            return os.preadv(self._file, [buffer], offset)

    def holds(self, data: memoryview, offset: int) -> bool:
        """Whether these bytes stand there already."""
        with writing(self.target):
            return os.pread(self._file, len(data), offset) == data

    def dup(self) -> int:
        """Another descriptor of the part, for reading; the caller's to close."""
        return os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_CLOEXEC)

    def start_writeback(self, start: int, end: int) -> None:
        """Have the disk begin with these bytes; does not wait for it. Errors come in `publish`."""
        start_writeback(self._file, start, end - start)

    def publish(self) -> None:
        """Make it the target: data to the disk, the name, the folder. The journal goes.

        Raises:
            DownloadError: Somebody took the part away.
            WriteError: The disk or the folder refused.
        """
        with writing(self.target):
            if self.nbytes is not None:
                os.ftruncate(self._file, self.nbytes)
            os.fdatasync(self._file)
            if not self._is_ours():
                raise DownloadError(
                    f"the part of {self.target} must stay beside it until it is whole, but it was "
                    "removed or replaced; leave hidden files alone, and fetch again"
                )
            os.rename(self.path, self.target)
            _sync_folder(self.target.parent)
            self.is_gone = True
            self._journal_path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._file))

    def release(self) -> None:
        """Leave it to be taken over. No thread of ours may write any more."""
        if not self.is_gone:
            self.is_gone = True
            # Where the folder is gone or closed by now, there is nothing to leave.
            with contextlib.suppress(OSError):
                os.rename(self._journal_path, self._journal_at(free_name()))

    def remove(self) -> None:
        """Leave nothing behind; threads that still write, write into nothing."""
        if not self.is_gone:
            self.is_gone = True
            # The journal last: a part that stayed would be found by it.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
                self._journal_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the descriptors; the last user does it."""
        for descriptor in (self._file, self._journal):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._journal = -1


def _write_all(descriptor: int, data: bytes) -> None:
    # A journal's line is one write, so that lines of several threads never mix. A disk that takes
    # half of it is full; the torn line is not believed.
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _check_room(folder: Path, nbytes: int) -> None:
    room = os.statvfs(folder)
    if room.f_blocks and room.f_bavail * room.f_frsize < nbytes:
        raise OSError(
            errno.ENOSPC, f"{nbytes} bytes are to come, {room.f_bavail * room.f_frsize} are free"
        )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot
            raise
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: nothing depends on them
        return True
    return True


# -- taking over ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A pair that somebody left, or works on."""

    journal: Path
    token: str
    fate: Fate


def adopt(target: Path, key: str) -> Partial | None:
    """Take over the best of what was left for this target, and remove the rest.

    Every block is read again and compared before it counts as landed. What belongs to a process
    that is alive stays untouched.

    Raises:
        WriteError: The folder refuses.
    """
    best: Partial | None = None
    with writing(target):
        for found in _find(target):
            partial = _take(target, found, key)
            if partial is None:
                continue
            best, worse = _better(best, partial)
            if worse is not None:
                worse.remove()
                worse.close()
    return best


def _better(one: Partial | None, two: Partial) -> tuple[Partial, Partial | None]:
    if one is None or two.landed.nbytes > one.landed.nbytes:
        return two, one
    return one, two


def _find(target: Path) -> list[_Found]:
    wanted = re.compile(re.escape(f".{_stem(target)}.") + r"([0-9a-f]{16})\.([0-9a-z-]+)\.journal")
    if not target.parent.is_dir():
        return []
    with os.scandir(target.parent) as entries:
        matches = [match for entry in entries if (match := wanted.fullmatch(entry.name))]
    found = [_Found(target.parent / match[0], match[1], fate(match[2])) for match in matches]
    return [one for one in found if one.fate != "alive"]


def _take(target: Path, found: _Found, key: str) -> Partial | None:
    """A pair that is ours now, its blocks verified; None if it was not to be had, or useless."""
    opened = _open_journal(found)
    if opened is None:
        return None
    journal, data = opened
    parsed = parse(data)
    partial = Partial(target, found.token, parsed[0] if parsed else Head(key, 0, ""))
    partial._journal = journal
    try:
        # Of several who try only one finds the old name.
        os.rename(found.journal, partial._journal_path)
    except FileNotFoundError:
        partial.close()
        return None
    if parsed is None or parsed[0].key != key or not _open_part(partial):
        partial.remove()
        partial.close()
        return None
    if found.fate == "unknown":
        return _copy(partial, parsed[1])
    if not data.endswith(b"\n"):
        _write_all(journal, b"\n")  # ends a torn line
    _verify(partial, parsed[1])
    return partial


def _open_journal(found: _Found) -> tuple[int, bytes] | None:
    """The journal, open, locked as far as locks go, and its bytes; None if it is not for us."""
    try:
        journal = os.open(found.journal, os.O_RDWR | os.O_APPEND | _FLAGS)
    except OSError as error:
        if _is_not_for_us(error):
            return None
        raise
    is_for_us = _is_plain(journal) and (_try_lock(journal) or found.fate != "unknown")
    if not is_for_us:
        os.close(journal)
        return None
    return journal, _read_all(journal)


def _read_all(descriptor: int) -> bytes:
    data = bytearray()
    while piece := os.pread(descriptor, _READ_BYTES, len(data)):
        data += piece
    return bytes(data)


def _open_part(partial: Partial) -> bool:
    try:
        partial._file = os.open(partial.path, os.O_RDWR | _FLAGS)
    except OSError as error:
        if _is_not_for_us(error):
            return False
        raise
    return _is_plain(partial._file) and os.fstat(partial._file).st_size == partial.nbytes


def _is_not_for_us(error: OSError) -> bool:
    """Gone, another user's, or a link or a device; what else may happen is an error."""
    return error.errno in (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENXIO)


def _is_plain(descriptor: int) -> bool:
    """A regular file with one name, of this user: nobody else prepared it."""
    status = os.fstat(descriptor)
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()


def _verify(partial: Partial, blocks: Sequence[Block]) -> None:
    for block in blocks:
        if _holds(partial, block):
            partial.landed.add(block.offset, block.offset + block.nbytes)


def _holds(partial: Partial, block: Block) -> bool:
    """Whether a block is still what was journalled: a power cut may have undone it."""
    algorithm, _, digest = block.digest.partition(":")
    hasher = new_hasher(algorithm)[1]
    if hasher is None:
        return False
    buffer = memoryview(bytearray(min(_READ_BYTES, block.nbytes)))
    at, end = block.offset, block.offset + block.nbytes
    while at < end:
        got = partial.read_into(buffer[: end - at], at)
        if got == 0:
            return False
        hasher.update(buffer[:got])
        at += got
    return hasher.hexdigest() == digest


def _copy(old: Partial, blocks: Sequence[Block]) -> Partial:
    """The blocks in a part of our own: the old owner may be alive, and write."""
    own = Partial.create(old.target, old.head)
    try:
        for block in blocks:
            _copy_bytes(old._file, own._file, block)
            if _holds(own, block):
                own.record(block)
                own.landed.add(block.offset, block.offset + block.nbytes)
    except OSError:
        own.remove()
        own.close()
        raise
    finally:
        old.remove()
        old.close()
    return own


def _copy_bytes(source: int, target: int, block: Block) -> None:
    at, end = block.offset, block.offset + block.nbytes
    while at < end:
        data = os.pread(source, min(_READ_BYTES, end - at), at)
        if not data:
            return
        at += os.pwrite(target, data, at)
