"""Whether a folder may be a cache, and what its files are called.

folder/index-000001.sqlite      what is where
folder/blobs/ab/<sha256>.nx     the blobs
folder/blobs/ab/.<owner>.<n>.tmp    one that is being written
folder/quarantine/<sha256>.nx   the last one that was bad, to be looked at
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nexus_ext.cache.index_file import unfinished_owner
from nexus_ext.errors import ConfigError, ReadError
from nexus_ext.owners import OWNER, Owner

__all__ = ["Folder", "remove_if_possible"]

_TEMPORARY = re.compile(
    rf"(?:[0-9a-f]{{2}}/)?\.(?P<owner>{OWNER.pattern})\.[0-9a-z]{{1,20}}\.tmp", re.ASCII
)
_BLOB = re.compile(r"([0-9a-f]{64})\.nx", re.ASCII)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
_numbers = itertools.count()


class Folder:
    """One folder of a cache: names in it, and leave to use them.

    Attributes:
        path: Of the folder, absolute.
        file_mode: Permissions of new files.
        read_only: Why nothing can be written; empty where it can.
    """

    def __init__(self, path: Path, shared: bool) -> None:
        """Make it where it is missing, and judge it.

        Raises:
            ConfigError: It cannot be made, is no folder, or others may write to it.
        """
        # One name for one folder: what is held is known by it.
        self.path = path.expanduser().resolve()
        self.file_mode = 0o666 & ~_umask() if shared else 0o600
        self.folder_mode = 0o777 & ~_umask() if shared else 0o700
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=self.folder_mode)
        except OSError as error:
            raise ConfigError(
                f"A cache needs a folder; {self.path} cannot be made: {error.strerror}. Name "
                "another one."
            ) from error
        _judge(self.path, shared)
        self.read_only = self._try_to_write()
        if self.blobs.exists():
            _judge(self.blobs, shared)

    @property
    def blobs(self) -> Path:
        return self.path / "blobs"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine"

    def blob(self, digest: bytes) -> Path:
        """Where the blob of a SHA-256 lies."""
        name = digest.hex()
        return self.blobs / name[:2] / f"{name}.nx"

    def has(self, digest: bytes) -> bool:
        """Whether there is a blob of a SHA-256; also where it cannot be reached."""
        try:
            self.blob(digest).stat()
        except FileNotFoundError:
            return False
        except OSError:
            return True  # who opens it learns why
        return True

    def new_temporary(self, digest: bytes) -> str:
        """A name below `blobs` that no process ever had, beside where the blob will be."""
        return f"{digest.hex()[:2]}/.{Owner.current()}.{next(_numbers)}.tmp"

    @staticmethod
    def new_probe() -> str:
        """A name below `blobs` for what no index hears of: it lies where every opening looks for
        what the dead left.
        """
        return f".{Owner.current()}.{next(_numbers)}.tmp"

    def every_blob(self) -> Iterator[tuple[bytes, Path]]:
        """Digest and path of all that is called like a blob."""
        for inner in _entries(self.blobs):
            if len(inner.name) != 2 or not inner.is_dir(follow_symlinks=False):
                continue
            for entry in _entries(Path(inner.path)):
                match = _BLOB.fullmatch(entry.name)
                if match is not None and match[1][:2] == inner.name:
                    yield bytes.fromhex(match[1]), Path(entry.path)

    @staticmethod
    def is_temporary(name: str) -> bool:
        """Whether `new_temporary` makes such names."""
        return _TEMPORARY.fullmatch(name) is not None

    def is_abandoned(self, temporary: str, began_seconds: float = 0) -> bool:
        """Whether a name below `blobs` is a temporary whose writer is dead."""
        match = _TEMPORARY.fullmatch(temporary)
        owner = None if match is None else Owner.parse(match["owner"])
        return owner is not None and _is_dead(owner, self.blobs / temporary, began_seconds)

    def remove_abandoned(self, *, everywhere: bool) -> None:
        """Remove what dead processes left.

        Args:
            everywhere: Look into the folders of the blobs too, one by one.
        """
        for entry in _entries(self.path):
            owner = unfinished_owner(entry.name)
            if owner is not None and _is_dead(owner, Path(entry.path)):
                remove_if_possible(Path(entry.path))
        names = [entry.name for entry in _entries(self.blobs)]
        if everywhere:
            inner = [name for name in names if len(name) == 2]
            names += [f"{one}/{e.name}" for one in inner for e in _entries(self.blobs / one)]
        for name in names:
            if self.is_abandoned(name):
                remove_if_possible(self.blobs / name)

    def set_aside(self, blob: Path) -> None:
        """Move a blob into quarantine; the one that lay there goes. Raises OSError."""
        self.quarantine.mkdir(exist_ok=True, mode=self.folder_mode)
        if self.quarantine.is_symlink():  # what lies behind it is no business of ours
            blob.unlink(missing_ok=True)
            return
        for old in _entries(self.quarantine):
            if _BLOB.fullmatch(old.name):
                Path(old.path).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            os.rename(blob, self.quarantine / blob.name)

    def free_bytes(self) -> int:
        """Of the file system, for this user; 0 where it cannot be asked."""
        try:
            info = os.statvfs(self.path)
        except OSError:
            return 0
        return info.f_bavail * info.f_frsize

    def _try_to_write(self) -> str:
        """Only doing it tells: root may write whatever the mode says, and nobody to a read-only
        mount.
        """
        try:
            self.blobs.mkdir(exist_ok=True, mode=self.folder_mode)
            probe = self.blobs / self.new_probe()
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.file_mode))
            probe.unlink()
        except OSError as error:
            # A full disk may have room later.
            return os.strerror(error.errno) if error.errno in _READ_ONLY else ""
        return ""


def remove_if_possible(path: Path) -> None:
    """What cannot be removed now, say because it is another user's, waits for the next opening."""
    with suppress(OSError):
        path.unlink()


def _is_dead(owner: Owner, path: Path, began_seconds: float = 0) -> bool:
    try:
        return owner.is_dead(max(path.stat().st_mtime, began_seconds))
    except FileNotFoundError:
        return owner.is_dead(began_seconds)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Raises ReadError where there may be some that cannot be seen now."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    except OSError as error:
        raise ReadError(
            f"A cache must be able to look into its folders; {folder} cannot be looked into: "
            f"{error.strerror}. Look at the disk, and at how many files may be open."
        ) from error


def _judge(path: Path, shared: bool) -> None:
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"A cache needs a folder; {path} is none. Name another one.")
    if shared:
        return
    if info.st_uid != os.geteuid():
        raise ConfigError(
            f"A cache belongs to who uses it; {path} belongs to user {info.st_uid}, and this is "
            f"user {os.geteuid()}. Name another folder, or pass shared=True if you trust its owner."
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"Nobody else may write to a cache; others may write to {path} (mode "
            f"{stat.S_IMODE(info.st_mode):o}). Run chmod 700 on it, or pass shared=True if you "
            "trust them all."
        )


def _umask() -> int:
    """Of the process; asking for it by setting it would change what other threads make."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077
