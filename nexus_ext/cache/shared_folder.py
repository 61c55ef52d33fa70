"""Segments that several processes use: files `<digest>` in a folder of tmpfs, and who uses it.

A segment is written under a name that tells its writer and renamed when it is whole, so a name
means whole bytes. `.lock` is held while room is made, for the budget's sake only; `.users` is held,
shared, by everybody who uses the folder: who leaves last takes the segments along, because memory
that nobody uses must not stay taken until the machine is started again.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from nexus_ext.errors import ConfigError
from nexus_ext.owners import OWNER, Owner

__all__ = ["Evict", "Reserved", "SharedFolder", "allocate", "default_folder"]

# Takes a segment away, if nobody holds it; whether it did.
Evict: TypeAlias = "Callable[[str], bool]"

_SHARED_MEMORY = Path("/dev/shm")
_PAGE_BYTES = 4096
_TEMPORARY = re.compile(rf"\.({OWNER.pattern})\.(\d+)\.tmp", re.ASCII)
_SEGMENT = re.compile(r"[0-9a-f]{16,128}", re.ASCII)
# Somebody may take the folder away whenever it is made; not that often.
_MOST_TRIES = 100
_numbers = itertools.count()  # of temporaries of this process, whichever tier makes them


def default_folder(name: str) -> Path:
    """Where the processes of this user share what is called `name`."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return _SHARED_MEMORY / f"nexus-{os.getuid()}-{digest}"


@dataclass(frozen=True)
class Reserved:
    """A new file with memory behind it, and nobody else's yet; `path` is None for a memfd."""

    descriptor: int
    path: Path | None


@dataclass(frozen=True)
class _Found:
    path: Path
    nbytes: int
    used_ns: int
    writer: Owner | None  # of a temporary


class SharedFolder:
    """One process's door to the folder. Methods may be called by several threads.

    Attributes:
        path: The folder.
        num_abandoned: Temporaries of dead processes that it removed.
    """

    def __init__(self, path: Path) -> None:
        """Join those who use the folder; it is made if it is not there.

        Raises:
            ConfigError: It cannot be made, or is not this user's alone.
        """
        self.path = path
        self.num_abandoned = 0
        self._owner = str(Owner.current())
        try:
            self._users = self._join()
            with self._locked():
                self._remove_abandoned(self._scan())
        except OSError as error:
            raise ConfigError(
                f"shared segments need a folder in memory; {path} cannot be used: {error.strerror}."
                " Mount a tmpfs there, or use shared=False."
            ) from error

    def open(self, digest: str) -> int | None:
        """A descriptor of the segment, marked as used now; None where there is none.

        Raises:
            OSError: It is there and cannot be opened.
        """
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path / digest, flags)
        except FileNotFoundError:
            return None
        try:
            os.utime(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def reserve(self, nbytes: int, max_bytes: int, evict: Evict) -> Reserved | None:
        """A new file of so many bytes; what was used least recently is evicted for it.

        Returns:
            None where the budget has no room for it.

        Raises:
            OSError: The memory is full (ENOSPC), though nothing is left here to evict.
        """
        with self._locked():
            found = self._scan()
            if _total(found) + nbytes > max_bytes:
                found = self._remove_abandoned(found)
            over = _total(found) + _pages(nbytes) - max_bytes
            victims = iter(_segments(found))
            while over > 0:
                victim = next(victims, None)
                if victim is None:
                    return None
                if evict(victim.path.name) or not victim.path.exists():
                    over -= victim.nbytes
            return self._create(nbytes, victims, evict)

    def publish(self, reserved: Reserved, digest: str) -> None:
        """It is whole: everybody may see it."""
        assert reserved.path is not None
        os.rename(reserved.path, self.path / digest)

    def discard(self, reserved: Reserved) -> None:
        """Nothing will come of it."""
        assert reserved.path is not None
        reserved.path.unlink(missing_ok=True)

    def remove(self, digest: str) -> bool:
        """Whether it was there. Who has mapped it keeps it."""
        try:
            os.unlink(self.path / digest)
        except FileNotFoundError:
            return False
        return True

    def digests(self) -> list[str]:
        """All segments, the least recently used first."""
        return [found.path.name for found in _segments(self._scan())]

    def nbytes(self) -> int:
        """Bytes of all processes' segments, unfinished ones too."""
        return _total(self._scan())

    def leave(self) -> None:
        """The last one takes what is there along. May be called once."""
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._users)
            return
        try:
            self._clear()
        finally:
            os.close(self._users)

    # -- joining and leaving -----------------------------------------------------------------

    def _join(self) -> int:
        for _ in range(_MOST_TRIES):
            try:
                with suppress(FileExistsError):
                    os.mkdir(self.path, 0o700)
                _check_private(self.path)
                descriptor = self._open_own(".users")
            except FileNotFoundError:
                if not self.path.parent.is_dir():
                    raise
                continue  # the last user left, between two of these lines
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, self.path / ".users"):
                return descriptor
            os.close(descriptor)  # it went with the folder
        raise OSError(errno.EBUSY, "it is taken away again and again")

    def _open_own(self, name: str) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.path / name, flags, 0o600)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A description of its own for every call: threads exclude each other too.
        descriptor = self._open_own(".lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _clear(self) -> None:
        try:
            for name in os.listdir(self.path):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()
        except OSError as error:
            # Somebody came meanwhile, and stays or has gone again: it is theirs now.
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                raise

    # -- room --------------------------------------------------------------------------------

    def _scan(self) -> list[_Found]:
        found = []
        for name in os.listdir(self.path):
            temporary = _TEMPORARY.fullmatch(name)
            if temporary is None and not _SEGMENT.fullmatch(name):
                continue
            try:
                info = os.lstat(self.path / name)
            except FileNotFoundError:
                continue  # somebody was faster
            writer = Owner.parse(temporary[1]) if temporary else None
            found.append(_Found(self.path / name, _pages(info.st_size), info.st_mtime_ns, writer))
        return found

    def _remove_abandoned(self, found: list[_Found]) -> list[_Found]:
        """What dead processes did not finish goes; the rest is returned."""
        kept = []
        for one in found:
            if one.writer is not None and one.writer.is_dead(one.used_ns / 1e9):
                one.path.unlink(missing_ok=True)
                self.num_abandoned += 1
            else:
                kept.append(one)
        return kept

    def _create(self, nbytes: int, victims: Iterator[_Found], evict: Evict) -> Reserved:
        path = self.path / f".{self._owner}.{next(_numbers)}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while not allocate(descriptor, nbytes):
                victim = next(victims, None)
                if victim is None:
                    raise OSError(errno.ENOSPC, f"{self.path} has no room for {nbytes} bytes")
                evict(victim.path.name)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return Reserved(descriptor, path)


def allocate(descriptor: int, nbytes: int) -> bool:
    """Put memory behind every page of a new file; False where there is not so much.

    On a full tmpfs a later write would kill the process (SIGBUS).
    """
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False
    return True


def _segments(found: list[_Found]) -> list[_Found]:
    """The whole ones, the least recently used first."""
    whole = [one for one in found if one.writer is None]
    return sorted(whole, key=lambda one: (one.used_ns, one.path.name))


def _pages(nbytes: int) -> int:
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES


def _total(found: list[_Found]) -> int:
    return sum(one.nbytes for one in found)


def _check_private(path: Path) -> None:
    info = os.lstat(path)
    is_ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    if not is_ours or info.st_mode & 0o077:
        raise ConfigError(
            f"the folder of shared segments must be a folder of this user's, with mode 0700; {path}"
            f" has mode {stat.filemode(info.st_mode)} and owner {info.st_uid}. Remove it, or name "
            "another."
        )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)
