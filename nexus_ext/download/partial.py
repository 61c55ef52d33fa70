"""A file that is arriving, and its journal beside it: made, published, left, removed.

    .NAME.TOKEN.part            the bytes, sparse
    .NAME.TOKEN.OWNER.journal   what of them may be believed

No two processes ever write one part: its token is unique, and to rename the journal is to take the
pair over (`leftovers`). Locks decide nothing; where they work, they spare a copy.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from nexus_ext.download.journal import Block, Head, block_line, head_line
from nexus_ext.download.ranges import Ranges
from nexus_ext.download.writeback import start_writeback
from nexus_ext.errors import DownloadError, NexusError, WriteError
from nexus_ext.owners import free_name, own_name

__all__ = ["OPEN_FLAGS", "Partial", "stem_of", "try_lock", "writing"]

_MAX_STEM_BYTES = 80  # names are at most 255 bytes long, and ours add about 100
OPEN_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


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


def stem_of(target: Path) -> str:
    """What the names of a target's parts begin with."""
    name = os.fsencode(target.name)
    if len(name) <= _MAX_STEM_BYTES:
        return target.name
    return hashlib.sha256(name).hexdigest()[:32]


class Partial:
    """A part and its journal, both open. One process's own until it is released.

    `landed`, `claim` and `users` belong to the one who holds it, under a lock; writing needs none.
    """

    def __init__(self, target: Path, token: str, head: Head) -> None:
        self.target = target
        self.head = head
        self.landed = Ranges()
        self._claimed = Ranges()
        self.users = 0
        self.is_gone = False
        self._token = token
        self._journal_path = self._journal_at(own_name())
        self.path = target.parent / f".{stem_of(target)}.{token}.part"
        self._file = self._journal = -1

    def _journal_at(self, owner: str) -> Path:
        return self.target.parent / f".{stem_of(self.target)}.{self._token}.{owner}.journal"

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
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS
        self._journal = os.open(self._journal_path, flags | os.O_APPEND, 0o666)
        try_lock(self._journal)
        _append(self._journal, head_line(self.head))
        self._file = os.open(self.path, flags, 0o666)
        os.ftruncate(self._file, self.head.nbytes or 0)

    @classmethod
    def taken_over(
        cls, target: Path, token: str, head: Head, journal: int, journal_path: Path, owner: str
    ) -> Partial | None:
        """A pair that was left, without its part; None if somebody else was faster.

        Args:
            journal: Its descriptor; closed here where None is returned.
            journal_path: The name it was left by.
            owner: Who is to be named as its owner.
        """
        partial = cls(target, token, head)
        partial._journal = journal
        partial._journal_path = partial._journal_at(owner)
        try:
            # Of several who try only one finds the old name.
            os.rename(journal_path, partial._journal_path)
        except FileNotFoundError:
            partial.close()
            return None
        return partial

    def open_part(self) -> os.stat_result:
        """Open the bytes of a pair that was taken over.

        Raises:
            OSError: They are not there, or not to be had.
        """
        self._file = os.open(self.path, os.O_RDWR | OPEN_FLAGS)
        return os.fstat(self._file)

    def end_torn_line(self) -> None:
        """Begin a line in a journal whose last one is torn."""
        _append(self._journal, b"\n")

    @property
    def nbytes(self) -> int | None:
        return self.head.nbytes

    @property
    def is_complete(self) -> bool:
        return self.nbytes is not None and self.landed.covers(0, self.nbytes)

    def claim(self, start: int, end: int) -> list[tuple[int, int]]:
        """The pieces of [start, end) that nobody has written or is writing: now the caller's.

        So that no byte is written twice: the second one could come after the first was hashed.
        """
        gaps = self.landed.gaps(start, end)
        free = [piece for gap in gaps for piece in self._claimed.gaps(*gap)]
        for piece in free:
            self._claimed.add(*piece)
        return free

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
            _append(self._journal, block_line(block))

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
                # What it tells too late concerns a part that is verified before it is believed;
                # a published one was synchronised.
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        self._file = self._journal = -1


def _append(descriptor: int, data: bytes) -> None:
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


def try_lock(descriptor: int) -> bool:
    """Lock it; False where somebody else has. True where there are no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here: nothing depends on them
        return True
    return True
