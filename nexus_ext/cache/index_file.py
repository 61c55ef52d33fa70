"""The file of the index: opened and judged here, and made anew from the blobs when it is no good.

SQLite keeps a second file beside the first (the write-ahead log), and both belong together: a log
that is replayed into another database ruins it. So a name is never used twice. Files are numbered,
the highest number counts; a broken one is renamed out of the way (`lost-`), which everybody who has
it open notices, and the next number is linked into place whole, which only one process can do.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from nexus_ext.owners import Owner

__all__ = ["SCHEMA", "Connection", "IndexFile", "is_broken", "memory_index", "unfinished_owner"]

Connection = sqlite3.Connection

# Puts what the blobs say into an index; returns how many rows that made.
Fill: TypeAlias = "Callable[[Connection], int]"

_VERSION = 1
_NUMBERED = re.compile(r"(index|lost)-(\d{1,12})\.sqlite(|-wal|-shm|-journal)", re.ASCII)
_UNFINISHED = re.compile(
    r"new-index\.([0-9a-f-]+)\.[0-9a-f]+\.sqlite(?:|-wal|-shm|-journal)", re.ASCII
)
# How long a process waits for another one's transaction; they take milliseconds.
_BUSY_SECONDS = 60.0
# What SQLite says when it is not the file's fault.
_CIRCUMSTANCES = (
    "locked",
    "is full",
    "readonly",
    "unable to open",
    "out of memory",
    "interrupted",
)
_WHOLE = ("index", "")
# Bytes 18 and 19 of a file say who may write to it and how: to its log, or without one. Anything
# else is a damaged byte, and would make it read-only for ever.
_FORMATS = (b"\x02\x02", b"\x01\x01")
# A constant, so that a test can have an index whose locks do nothing.
_VFS = ""

# Texts are blobs: damaged UTF-8 is a wrong row then, and not an error of the whole query.
SCHEMA = (
    "CREATE TABLE blobs (digest BLOB PRIMARY KEY, stored INTEGER NOT NULL CHECK (stored > 0), "
    "used INTEGER NOT NULL, uses INTEGER NOT NULL)",
    "CREATE INDEX blobs_by_use ON blobs (used)",
    "CREATE TABLE names (key BLOB PRIMARY KEY, digest BLOB NOT NULL, kind BLOB NOT NULL, "
    "about BLOB NOT NULL, created INTEGER NOT NULL, nbytes INTEGER NOT NULL, seal BLOB NOT NULL)",
    "CREATE INDEX names_by_digest ON names (digest)",
    "CREATE TABLE pending (temporary BLOB PRIMARY KEY, digest BLOB NOT NULL, "
    "stored INTEGER NOT NULL, began INTEGER NOT NULL)",
    "CREATE TABLE seen (number INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE)",
    "CREATE TABLE written (slot INTEGER PRIMARY KEY, nbytes INTEGER NOT NULL)",
    "CREATE TABLE tallies (name BLOB PRIMARY KEY, value INTEGER NOT NULL)",
)


def is_broken(error: sqlite3.Error) -> bool:
    """Whether another file would help: not against a lock or a full file system. It may against an
    error of the disk, which is one of a place on it.
    """
    if not isinstance(error, sqlite3.OperationalError):
        return True
    return not any(text in str(error) for text in _CIRCUMSTANCES)


def memory_index(fill: Fill) -> Connection:
    """An index that nobody else sees and that is gone with the process."""
    connection = _connect(":memory:", uri=False)
    _create(connection, fill)
    return connection


def frozen_rows(folder: Path, query: str) -> list[tuple[object, ...]] | None:
    """What the newest index says, of a folder that cannot be written to. None if there is none, if
    it is no good, or if some of it is in a log, which nobody may replay there.
    """
    try:
        path = newest_index(folder)
        log = None if path is None else path.with_name(f"{path.name}-wal")
        if path is None or log is None or (log.exists() and log.stat().st_size > 0):
            return None
        _judge_head(path)
        with closing(_connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1{_VFS}")) as found:
            _judge(found)
            return found.execute(query).fetchall()
    except (OSError, sqlite3.Error):
        return None


class IndexFile:
    """The newest index of a folder, open.

    Attributes:
        path: Of the file.
        connection: To it.
        was_rebuilt: Whether there was another one before, or blobs, and it had to be made anew.
    """

    def __init__(self, folder: Path, mode: int, fill: Fill) -> None:
        """Open the newest one, or make one.

        Args:
            folder: Where it lives.
            mode: Permissions of the file.
            fill: For a new one.

        Raises:
            sqlite3.Error, OSError: There is none, and none can be made.
        """
        self._folder = folder
        self._mode = mode
        self.was_rebuilt = False
        # Whoever is quicker has made it; a second round is for one that is broken, too.
        for _ in range(8):
            path = newest_index(self._folder)
            if path is not None and self._open(path):
                return
            self.was_rebuilt |= self._make(fill)
        raise sqlite3.OperationalError(f"no index can be kept in {folder}")

    def is_current(self) -> bool:
        """False once another process put the file aside. Raises OSError."""
        try:
            return os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            return False

    def put_aside(self) -> None:
        """It is broken: whoever opens next makes another one. Raises OSError."""
        _put_aside(self.path)

    def _open(self, path: Path) -> bool:
        """False, and out of the way, if it is no index of this version or a broken one."""
        connection = None
        try:
            self._inode = os.stat(path).st_ino
            _judge_head(path)
            connection = _connect(f"{path.absolute().as_uri()}?mode=rw{_VFS}")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            _judge(connection)
        except FileNotFoundError:
            return False
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            if not path.exists():
                return False
            if not is_broken(error):
                raise
            _put_aside(path)
            return False
        self.path, self.connection = path, connection
        return True

    def _make(self, fill: Fill) -> bool:
        """Link a whole new one into place, unless somebody else did; whether it replaces one."""
        found = _files(self._folder)
        if any((kind, rest) == _WHOLE for kind, _, rest in found):
            return False  # to replace one that is whole would lose what is just being entered there
        number = 1 + max((number for _, number, _ in found), default=0)
        path = self._folder / f"index-{number:06}.sqlite"
        unique = f"{Owner.current()}.{os.urandom(8).hex()}"
        temporary = self._folder / f"new-index.{unique}.sqlite"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, self._mode))
        try:
            connection = _connect(f"{temporary.absolute().as_uri()}?mode=rw{_VFS}")
            try:
                num_rows = _create(connection, fill)
                # Written in the file: who opens it need not change it.
                connection.execute("PRAGMA journal_mode=WAL")
            finally:
                connection.close()
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        for kind, old, rest in _files(self._folder):
            if old < number:
                (self._folder / f"{kind}-{old:06}.sqlite{rest}").unlink(missing_ok=True)
        return num_rows > 0 or number > 1


def unfinished_owner(name: str) -> Owner | None:
    """Who was making a new index under this name; None for any other file."""
    match = _UNFINISHED.fullmatch(name)
    return None if match is None else Owner.parse(match[1])


def newest_index(folder: Path) -> Path | None:
    """The index that counts."""
    found = [number for kind, number, rest in _files(folder) if (kind, rest) == _WHOLE]
    return folder / f"index-{max(found):06}.sqlite" if found else None


def _files(folder: Path) -> list[tuple[str, int, str]]:
    """(index or lost, number, "" or -wal and so on) of all that have to do with an index."""
    matches = map(_NUMBERED.fullmatch, os.listdir(folder))
    return [(match[1], int(match[2]), match[3]) for match in matches if match is not None]


def _put_aside(path: Path) -> None:
    try:
        os.rename(path, path.with_name(path.name.replace("index-", "lost-")))
    except FileNotFoundError:
        return  # somebody else did


def _connect(name: str, uri: bool = True) -> Connection:
    connection = sqlite3.connect(
        name, uri=uri, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    connection.text_factory = bytes
    # What a stranger's file says about functions and sizes of cells is not believed.
    connection.execute("PRAGMA trusted_schema=OFF")
    connection.execute("PRAGMA cell_size_check=ON")
    return connection


def _create(connection: Connection, fill: Fill) -> int:
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute(f"PRAGMA user_version={_VERSION}")
    num_rows = fill(connection)
    connection.execute("COMMIT")
    return num_rows


def _judge_head(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # A pipe would be waited for.
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        head = os.pread(descriptor, 20, 0) if is_file else b""
    finally:
        os.close(descriptor)
    if head[18:20] not in _FORMATS:
        raise sqlite3.DatabaseError("another format")


def _judge(connection: Connection) -> None:
    """Raises sqlite3.DatabaseError unless the index is whole, and ours to the letter."""
    version = connection.execute("PRAGMA user_version").fetchone()
    kept = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    if version != (_VERSION,) or sorted(kept) != sorted((sql.encode(),) for sql in SCHEMA):
        raise sqlite3.DatabaseError("another schema")
    found = connection.execute("PRAGMA quick_check(1)").fetchone()
    if found != (b"ok",):
        raise sqlite3.DatabaseError(f"quick_check says {found!r}")
