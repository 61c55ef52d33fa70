"""One folder of a cache: its blobs, and the index over them.

Owns the order of things on the disk. A blob is announced in the index, written, and then entered;
one that goes is unlinked before its row goes. So whenever the process dies, what is left is either
whole and known, or known as unfinished, or a row without a file, which is a miss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

import torch

from nexus_ext.cache import holds
from nexus_ext.cache.blob import Header, open_blob, write_blob
from nexus_ext.cache.folder import Folder, remove_if_possible
from nexus_ext.cache.index import Index, Row
from nexus_ext.cache.reading import BlockMode, ReadReport, check_blocks, read_payload
from nexus_ext.cache.report import Entry, ZoneStats
from nexus_ext.cache.scanning import header_of, row_of, scan
from nexus_ext.errors import CorruptCheckpoint, EngineClosed, ReadError, WriteError

__all__ = ["Fate", "Zone"]


class Fate(Enum):
    """What came of an eviction."""

    REMOVED = "removed"
    MISSING = "missing"  # somebody else was quicker
    HELD = "held"


class Zone:
    """Blobs under one folder. Thread-safe, and safe with other processes in the same folder.

    Attributes:
        folder: Names, and whether it can be written to.
        index: What is there.
    """

    def __init__(self, path: Path, shared: bool, mode: BlockMode) -> None:
        """Open it; reads no blob unless the index is lost.

        Raises:
            ConfigError: The folder may not be used.
        """
        self.folder = Folder(path, shared)
        self._mode = mode
        self._bad: set[bytes] = set()  # those that could not be set aside
        if not self.folder.read_only:
            try:
                self._open_index()
                return
            except WriteError as error:
                self.folder.read_only = str(error)
        self.index = Index(self.folder.path, 0, self._scan, in_memory=True)

    def _open_index(self) -> None:
        self.index = Index(self.folder.path, self.folder.file_mode, self._scan)
        try:
            self._clean_up()
        except BaseException:
            self.index.close()
            raise

    @property
    def is_writable(self) -> bool:
        return not self.folder.read_only

    # -- finding ----------------------------------------------------------------------------------

    def find(self, key: str) -> Row | None:
        """The row of a key, if its blob is there.

        Raises:
            ReadError: The index cannot be read.
        """
        row = self.index.find(key)
        if row is None or row.digest in self._bad:
            return None
        if not self.folder.has(row.digest):
            self.forget_missing(row.digest)
            return None
        return row

    def entry(self, row: Row) -> Entry:
        """What a user sees of a row."""
        path = self.folder.blob(row.digest)
        return Entry(
            row.key,
            row.kind,
            json.loads(row.about),
            row.nbytes,
            row.digest.hex(),
            path,
            self.folder.path,
            row.created_ns / 1e9,
            row.used_ns / 1e9,
            row.uses,
        )

    def forget_missing(self, digest: bytes) -> None:
        """Somebody else evicted it. Its file, should it be there again, stays: it is whole."""
        if self.is_writable:
            with suppress(WriteError):  # the row is a miss as it is, and is found again
                self.index.remove(digest, lambda _: None, lambda: not self.folder.has(digest))

    # -- reading ----------------------------------------------------------------------------------

    def read(
        self, digest: bytes, nbytes: int, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, ReadReport]:
        """The payload, every block compared. What cannot be believed or read is set aside.

        Raises:
            FileNotFoundError: It is not there any more.
            CorruptCheckpoint: It is not what it should be.
            ReadError: The disk answered with an error.
            ConfigError: Another `out`.
        """
        path = self.folder.blob(digest)
        descriptor = holds.open_held(path)
        try:
            header = header_of(descriptor, path, digest)
            if header.nbytes != nbytes:
                raise CorruptCheckpoint(
                    f"A cached file has as many bytes as were put; {path} has {header.nbytes} and "
                    f"{nbytes} were. It is set aside; fetch its bytes again."
                )
            return read_payload(descriptor, header, str(path), self._mode, out)
        except (CorruptCheckpoint, ReadError) as error:
            # Without a number it was not the disk that refused.
            if isinstance(error, CorruptCheckpoint) or error.errno is not None:
                self.set_aside(digest, os.fstat(descriptor).st_ino)
            raise
        finally:
            os.close(descriptor)

    def set_aside(self, digest: bytes, inode: int) -> None:
        """Take a blob out of service; the last one stays in quarantine, to be looked at.

        Args:
            digest: Which.
            inode: Of the file that is bad; another one, put there meanwhile, stays.
        """
        path = self.folder.blob(digest)

        def is_it() -> bool:
            return path.exists() and path.stat().st_ino == inode

        # What cannot be moved is remembered, and not served.
        self._bad.add(digest)
        if self.is_writable:
            with suppress(WriteError), holds.lock():
                self.index.remove(digest, lambda _: self._quarantine(path), is_it)
                self._bad.discard(digest)

    def _quarantine(self, path: Path) -> None:
        try:
            self.folder.set_aside(path)
        except OSError as error:
            raise _cannot_remove(path, error) from error

    # -- writing ----------------------------------------------------------------------------------

    def adopt(self, row: Row) -> bool:
        """Enter a key for bytes that are here already. False if they are not."""
        path = self.folder.blob(row.digest)
        if row.digest in self._bad:
            return False
        try:
            descriptor = open_blob(path)
        except (FileNotFoundError, CorruptCheckpoint, ReadError):
            return False  # it is written anew
        try:
            header = header_of(descriptor, path, row.digest)
        except (CorruptCheckpoint, ReadError):
            return False
        finally:
            os.close(descriptor)
        return header.nbytes == row.nbytes and self._add(row)

    def announce(self, row: Row) -> str:
        """The bytes of a blob count from now on; returns what `write` wants to know.

        Raises:
            WriteError: The index cannot be written to.
        """
        name = self.folder.new_temporary(row.digest)
        self.index.begin(name, row)
        return name

    def write(self, name: str, header: Header, row: Row, parts: Sequence[torch.Tensor]) -> None:
        """Write a blob and enter its key; both are there when this returns, or neither.

        Raises:
            WriteError: The disk would not take it.
        """
        path = self.folder.blob(row.digest)
        try:
            # Somebody may evict it before it has its name; hardly twice.
            for _ in range(3):
                temporary = self.folder.blobs / name
                write_blob(path, temporary, header, parts, self.folder.file_mode)
                self._bad.discard(row.digest)
                if self._add(row, name, header.file_nbytes):
                    return
            raise WriteError(f"A cached file must stay; {path} vanished. Put it again.")
        except BaseException:
            self.withdraw(name, row)
            raise

    def withdraw(self, name: str, row: Row) -> None:
        """What was announced will not come. Where that cannot be said it counts as being written
        until this process ends, and whoever opens the folder then cleans up.
        """
        with suppress(WriteError, EngineClosed):
            self.index.clean(name.encode(), row.digest, self._unlink)

    def _add(self, row: Row, temporary: str | None = None, written: int = 0) -> bool:
        def is_there() -> bool:
            return self.folder.has(row.digest)

        with holds.lock():
            return self.index.add(row, is_there, self._unlink, temporary, written)

    def evict(self, digest: bytes) -> Fate:
        """Remove a blob and all its names, unless it is held in this process.

        Raises:
            WriteError: It cannot be removed.
        """
        with holds.lock():
            if holds.is_held(self.folder.blob(digest)):
                return Fate.HELD
            return Fate.REMOVED if self.index.remove(digest, self._unlink) else Fate.MISSING

    def forget_key(self, key: str) -> None:
        """Remove what lies under a key, held or not: it has a new value elsewhere.

        Raises:
            ReadError, WriteError: The index cannot be used, or the file not be removed.
        """
        row = self.index.find(key)
        if row is not None:
            with holds.lock():
                self.index.remove(row.digest, self._unlink)

    def _unlink(self, digest: bytes) -> None:
        path = self.folder.blob(digest)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            # A file system that takes nothing any more says so of what is not there, too.
            if self.folder.has(digest):
                raise _cannot_remove(path, error) from error

    # -- the whole of it --------------------------------------------------------------------------

    def check(self, digest: bytes, path: Path) -> Header:
        """Read a blob from end to end. Raises as `read`, and sets nothing aside."""
        descriptor = open_blob(path)
        try:
            header = header_of(descriptor, path, digest)
            check_blocks(descriptor, header, str(path), self._mode)
            return header
        finally:
            os.close(descriptor)

    def take_in(self, header: Header) -> bool:
        """Enter a blob that the index does not know. One whose key has other bytes by now goes
        instead, unless somebody is just entering it.

        Raises:
            ReadError, WriteError: The index cannot be used.
        """
        if self.index.find(header.key) is not None:
            self.index.clean(b"", header.sha256, self._unlink)
            return False
        return self._add(row_of(header))

    def stats(self, now_ns: int) -> ZoneStats:
        """Counts and sizes."""
        return ZoneStats(
            self.folder.path,
            self.index.num_names(),
            self.index.stored_bytes(),
            self.folder.free_bytes(),
            self.index.tally("written"),
            self.index.written_bytes_of_day(now_ns),
            self.index.num_rebuilds,
            self.folder.read_only,
        )

    def _scan(self) -> Iterator[Row]:
        return scan(self.folder, self._quarantine, self._unlink)

    def _clean_up(self) -> None:
        """What dead processes began and did not end."""
        self.folder.remove_abandoned(everywhere=False)
        for temporary, digest, began in self.index.pending():
            name = temporary.decode("ascii", "replace")
            if not self.folder.is_temporary(name):
                self.index.clean(temporary, b"", self._unlink)  # a damaged note names nothing
            elif self.folder.is_abandoned(name, began):
                remove_if_possible(self.folder.blobs / name)
                self.index.clean(temporary, digest, self._unlink)


def _cannot_remove(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"A cache must be able to remove its files; {path} could not be: {error.strerror}. Look at "
        "the permissions of its folder."
    )
