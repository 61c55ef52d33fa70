"""What is in a folder of blobs: keys, sizes, and when each was used last.

An index only says where to look. It can always be made again from the blobs' own headers, every row
carries a seal over what it claims, and a blob proves its bytes itself: whatever happens to this
file costs time, and never a wrong byte.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from nexus_ext.cache import forks
from nexus_ext.cache.index_file import (
    Connection,
    IndexFile,
    frozen_rows,
    is_broken,
    memory_index,
)
from nexus_ext.errors import EngineClosed, ReadError, WriteError

__all__ = ["Index", "Row"]

T = TypeVar("T")

# Keys that were refused once are remembered up to here, the latest ones.
_MOST_SEEN = 1 << 16
# A day in slots of ten minutes.
_SLOT_NS = 600 * 10**9
_DAY_SLOTS = 144
_ROW = (
    "SELECT names.key, names.digest, kind, about, created, nbytes, stored, used, uses, seal "
    "FROM names JOIN blobs ON names.digest = blobs.digest"
)


@dataclass(frozen=True)
class Row:
    """A key and what lies under it.

    Attributes:
        key: Of the caller.
        digest: SHA-256 of the payload: which blob.
        kind, about: As in the blob's header; `about` is JSON.
        created_ns, used_ns: Nanoseconds since 1970.
        nbytes: Of the payload.
        stored: Bytes that the blob takes of its disk.
        uses: How often it was asked for.
    """

    key: str
    digest: bytes
    kind: str
    about: str
    created_ns: int
    nbytes: int
    stored: int
    used_ns: int
    uses: int = 0

    def seal(self) -> bytes:
        """Over what must not be mistaken; when it was used may be."""
        fields = [self.key, self.kind, self.about, str(self.created_ns), str(self.nbytes)]
        parts = [self.digest, *(_encode(field) for field in fields)]
        framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
        return hashlib.blake2b(framed, digest_size=16).digest()

    @classmethod
    def parse(cls, values: tuple[object, ...]) -> Row | None:
        """Of `_ROW`; None for one that was not written so."""
        *fields, seal = values
        if [*map(type, fields)] != [*(bytes,) * 4, *(int,) * 5]:
            return None
        key, digest, kind, about, *numbers = cast("tuple[Any, ...]", fields)
        try:
            row = cls(_decode(key), digest, _decode(kind), _decode(about), *numbers)
        except UnicodeDecodeError:
            return None
        if len(row.digest) != 32 or seal != row.seal():
            return None
        try:
            return row if isinstance(json.loads(row.about), dict) else None
        except (ValueError, RecursionError):
            return None  # anybody can seal what is no description


class Index:
    """The index of one folder. Thread-safe; several processes may have it open.

    Every call is one transaction. One that finds the file broken makes it anew, and runs again.
    """

    def __init__(
        self, folder: Path, mode: int, scan: Callable[[], Iterable[Row]], in_memory: bool = False
    ) -> None:
        """Open, or make from what `scan` finds.

        Args:
            folder: Where it is kept.
            mode: Permissions of its file.
            scan: The blobs that are there; called when there is no index that can be believed.
            in_memory: Keep it nowhere; of one that is there a copy is made.

        Raises:
            WriteError: It cannot be kept there.
        """
        self._folder = folder
        self._mode = mode
        self._scan = scan
        self._lock = threading.RLock()
        self._file: IndexFile | None = None
        self._connection: Connection | None = None
        self._is_closed = False
        self.num_rebuilds = 0
        if in_memory:
            kept = frozen_rows(folder, f"{_ROW} ORDER BY used")
            rows = None if kept is None else [row for row in map(Row.parse, kept) if row]
            self._scan = scan if rows is None else lambda: rows
            self._connection = memory_index(self._fill)
        else:
            self._open()
            forks.follow(self)

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._is_closed = True
            self._let_go()

    def suspend(self) -> None:
        """Let go of the file, and let nobody have it until `resume`, in the same thread."""
        self._lock.acquire()
        self._let_go()

    def resume(self) -> None:
        """Whoever wants it next opens it again."""
        self._lock.release()

    # -- reading ----------------------------------------------------------------------------------

    def find(self, key: str) -> Row | None:
        """What lies under a key. A row that is not what was written counts as none."""
        found = self._read(lambda db: db.execute(f"{_ROW} WHERE key = ?", (_encode(key),)))
        return Row.parse(found[0]) if found else None

    def rows(self) -> list[Row]:
        """All of them, the one used longest ago first."""
        found = map(Row.parse, self._read(lambda db: db.execute(f"{_ROW} ORDER BY used")))
        return [row for row in found if row is not None]

    def rows_of(self, digest: bytes) -> list[Row]:
        """The keys of one blob."""
        query = f"{_ROW} WHERE names.digest = ?"
        found = map(Row.parse, self._read(lambda db: db.execute(query, (digest,))))
        return [row for row in found if row is not None]

    def has(self, digest: bytes) -> bool:
        """Whether a blob is known."""
        query = "SELECT 1 FROM blobs WHERE digest = ?"
        return bool(self._read(lambda db: db.execute(query, (digest,))))

    def num_blobs(self) -> int:
        return self._number("SELECT COUNT(*) FROM blobs")

    def num_names(self) -> int:
        return self._number("SELECT COUNT(*) FROM names")

    def stored_bytes(self) -> int:
        """What the blobs take of the disk, those included that are just being written."""
        query = (
            "SELECT (SELECT COALESCE(SUM(stored), 0) FROM blobs) + "
            "(SELECT COALESCE(SUM(stored), 0) FROM pending)"
        )
        return self._number(query)

    def pending_bytes(self) -> int:
        """Of what is just being written."""
        return self._number("SELECT COALESCE(SUM(stored), 0) FROM pending")

    def oldest(self, limit: int) -> list[tuple[int, bytes, int]]:
        """(when used, digest, stored bytes) of the blobs used longest ago."""
        query = "SELECT used, digest, stored FROM blobs ORDER BY used LIMIT ?"
        found = self._read(lambda db: db.execute(query, (limit,)))
        return [row for row in found if [*map(type, row)] == [int, bytes, int]]  # type: ignore[misc]

    def pending(self) -> list[tuple[bytes, bytes, float]]:
        """(temporary, digest, began in seconds since 1970) of what is being written, or was when a
        process died.
        """
        found = self._read(lambda db: db.execute("SELECT temporary, digest, began FROM pending"))
        kinds = [bytes, bytes, int]
        return [
            (row[0], row[1], row[2] / 1e9)  # type: ignore[misc, operator]
            for row in found
            if [*map(type, row)] == kinds
        ]

    def written_bytes_of_day(self, now_ns: int) -> int:
        """Bytes written in the 24 hours before `now_ns`, to ten minutes."""
        slot = now_ns // _SLOT_NS
        # What a clock that was wrong put into the far future does not count.
        query = "SELECT COALESCE(SUM(nbytes), 0) FROM written WHERE slot > ? AND slot <= ?"
        span = (slot - _DAY_SLOTS, slot + _DAY_SLOTS)
        return self._number(query, span)

    def tally(self, name: str) -> int:
        """A counter that outlives processes: "written", "payload", and those of `count`."""
        query = "SELECT COALESCE(SUM(value), 0) FROM tallies WHERE name = ?"
        return self._number(query, (_encode(name),))

    # -- writing ----------------------------------------------------------------------------------

    def begin(self, temporary: str, row: Row) -> None:
        """A blob is going to be written; its bytes count from now on."""
        values = (_encode(temporary), row.digest, row.stored, row.used_ns)

        def act(db: Connection) -> None:
            db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?)", values)

        self._write(act)

    def add(
        self,
        row: Row,
        is_there: Callable[[], bool],
        unlink: Callable[[bytes], None],
        temporary: str | None = None,
        written: int = 0,
    ) -> bool:
        """Enter a key. What lay under it goes, with every other name that it had.

        Args:
            row: The key and its blob.
            is_there: Whether the blob's file is; asked inside the transaction, where nobody can
                remove it.
            unlink: Removes the file of a digest. Called before the transaction ends: a row without
                its file is a miss, a file without its row would come back with the next rebuild.
            temporary: What `begin` was told.
            written: Bytes that went to the disk for it.

        Returns:
            False, and nothing entered, if the file is not there.
        """

        def act(db: Connection) -> bool:
            if not is_there():
                return False
            old = db.execute("SELECT digest FROM names WHERE key = ?", (_encode(row.key),))
            for (digest,) in old.fetchall():
                if digest != row.digest:
                    _remove(db, digest, unlink)
            _enter(db, row)
            if temporary is not None:
                db.execute("DELETE FROM pending WHERE temporary = ?", (_encode(temporary),))
            if written:
                _note_written(db, row.used_ns, written, row.nbytes)
            return True

        return self._write(act)

    def remove(
        self,
        digest: bytes,
        unlink: Callable[[bytes], None],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Forget a blob with all its names, and unlink its file (see `add`); whether it was known.

        Args:
            digest: Which.
            unlink: Removes the file.
            is_wanted: Asked inside the transaction, where nobody can change what it looks at.
        """
        return self._write(lambda db: is_wanted() and _remove(db, digest, unlink))

    def clean(self, temporary: bytes, digest: bytes, unlink: Callable[[bytes], None]) -> None:
        """What was begun and not ended: its note, and its blob unless that has a name, or somebody
        else is just writing it.
        """

        def act(db: Connection) -> None:
            db.execute("DELETE FROM pending WHERE temporary = ?", (temporary,))
            for table in ("blobs", "pending"):
                query = f"SELECT 1 FROM {table} WHERE digest = ?"
                if db.execute(query, (digest,)).fetchall():
                    return
            if len(digest) == 32:
                unlink(digest)

        self._write(act)

    def touch(self, used: Mapping[bytes, tuple[int, int]]) -> None:
        """By digest: when it was used last, and how often since the last call."""
        rows = [(when, count, digest) for digest, (when, count) in used.items()]
        statement = "UPDATE blobs SET used = MAX(used, ?), uses = uses + ? WHERE digest = ?"

        def act(db: Connection) -> None:
            db.executemany(statement, rows)

        self._write(act)

    def count(self, numbers: Mapping[str, int]) -> None:
        """Add to counters that outlive processes; they begin anew with the index.

        Raises:
            WriteError: It cannot be written to.
        """

        def act(db: Connection) -> None:
            _add_tallies(db, numbers)

        self._write(act)

    def was_seen(self, key: str) -> bool:
        """Whether a key was asked about before; it is remembered from now on."""
        number = hashlib.blake2b(_encode(key), digest_size=16).digest()

        def act(db: Connection) -> bool:
            if db.execute("SELECT 1 FROM seen WHERE key = ?", (number,)).fetchall():
                return True
            latest = db.execute("INSERT INTO seen (key) VALUES (?)", (number,)).lastrowid or 0
            db.execute("DELETE FROM seen WHERE number <= ?", (latest - _MOST_SEEN,))
            return False

        return self._write(act)

    # -- the file ---------------------------------------------------------------------------------

    def _open(self) -> None:
        try:
            self._file = IndexFile(self._folder, self._mode, self._fill)
        except (sqlite3.Error, OSError) as error:
            raise self._cannot("kept", error) from error
        self._connection = self._file.connection
        self.num_rebuilds += self._file.was_rebuilt

    def _fill(self, db: Connection) -> int:
        rows = list(self._scan())
        for row in rows:
            _enter(db, row)
        return len(rows)

    def _read(self, query: Callable[[Connection], sqlite3.Cursor]) -> list[tuple[object, ...]]:
        return self._ask(lambda db: query(db).fetchall())

    def _number(self, query: str, values: tuple[object, ...] = ()) -> int:
        def number(db: Connection) -> int:
            (found,) = db.execute(query, values).fetchone()
            # A sum over damaged rows may be anything, and budgets are judged by it.
            if not isinstance(found, int):
                raise sqlite3.DatabaseError(f"{found!r} is no number")
            return found

        return self._ask(number)

    def _ask(self, query: Callable[[Connection], T]) -> T:
        try:
            return self._run(query)
        except WriteError as error:
            raise ReadError(str(error)) from error

    def _write(self, act: Callable[[Connection], T]) -> T:
        def transaction(db: Connection) -> T:
            try:
                # An interrupt that comes while this waits is seen when it is through.
                db.execute("BEGIN IMMEDIATE")
                result = act(db)
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise
            return result

        return self._run(transaction)

    def _run(self, act: Callable[[Connection], T]) -> T:
        """Run, and once more in a new file if this one is broken or was put aside meanwhile."""
        with self._lock:
            for is_last in (False, False, True):
                connection = self._opened()
                try:
                    result = act(connection)
                except sqlite3.Error as error:
                    if self._file is None or is_last or not is_broken(error):
                        raise self._cannot("used", error) from error
                    self._of_file(self._file.put_aside)
                else:
                    if is_last or self._file is None or self._of_file(self._file.is_current):
                        return result
                self._let_go()
        raise AssertionError("the last round returns or raises")

    def _opened(self) -> Connection:
        if self._is_closed:
            raise EngineClosed("An index must be open; this one was closed. Open another tier.")
        if self._connection is None:
            self._open()
        assert self._connection is not None
        return self._connection

    def _of_file(self, ask: Callable[[], T]) -> T:
        try:
            return ask()
        except OSError as error:
            raise self._cannot("used", error) from error

    def _let_go(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):  # it may be broken: that is why it is let go
                connection.close()

    def _cannot(self, what: str, error: Exception) -> WriteError:
        return WriteError(
            f"A cache keeps an index in its folder; the one in {self._folder} cannot be {what}: "
            f"{error}. Look at its permissions and at the room on its disk; it may be deleted."
        )


def _enter(db: Connection, row: Row) -> None:
    db.execute(
        "INSERT INTO blobs VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
        "stored = excluded.stored, used = MAX(used, excluded.used)",
        (row.digest, row.stored, row.used_ns, row.uses),
    )
    fields = (_encode(row.key), row.digest, _encode(row.kind), _encode(row.about))
    db.execute(
        "INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*fields, row.created_ns, row.nbytes, row.seal()),
    )


def _remove(db: Connection, digest: bytes, unlink: Callable[[bytes], None]) -> bool:
    db.execute("DELETE FROM names WHERE digest = ?", (digest,))
    was_known = db.execute("DELETE FROM blobs WHERE digest = ?", (digest,)).rowcount > 0
    if isinstance(digest, bytes) and len(digest) == 32:
        unlink(digest)
    return was_known


def _note_written(db: Connection, now_ns: int, written: int, payload: int) -> None:
    slot = now_ns // _SLOT_NS
    db.execute("DELETE FROM written WHERE slot <= ?", (slot - _DAY_SLOTS,))
    db.execute(
        "INSERT INTO written VALUES (?, ?) ON CONFLICT (slot) DO UPDATE SET nbytes = nbytes + ?",
        (slot, written, written),
    )
    _add_tallies(db, {"written": written, "payload": payload})


def _add_tallies(db: Connection, numbers: Mapping[str, int]) -> None:
    statement = (
        "INSERT INTO tallies VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + ?"
    )
    rows = [(_encode(name), value, value) for name, value in numbers.items()]
    db.executemany(statement, rows)


def _encode(text: str) -> bytes:
    # Names of files may hold what is no UTF-8.
    return text.encode("utf-8", "surrogatepass")


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")
