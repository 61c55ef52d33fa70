"""What is in a folder of blobs: keys, sizes, and when each was used last.

An index only says where to look. It can always be made again from the blobs' own headers, every row
carries a seal over what it claims, and a blob proves its bytes itself: whatever happens to this
file costs time, and never a wrong byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from nexus_ext.cache.index_connection import IndexConnection
from nexus_ext.cache.index_file import Connection, frozen_rows
from nexus_ext.cache.index_row import QUERY, Row, encode

__all__ = ["Index", "Row"]

# Keys that were refused once are remembered up to here, the latest ones.
_MOST_SEEN = 1 << 16
# A day in slots of ten minutes.
_SLOT_NS = 600 * 10**9
_DAY_SLOTS = 144


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
        self._scan = scan
        if in_memory:
            kept = frozen_rows(folder, f"{QUERY} ORDER BY used")
            rows = None if kept is None else [row for row in map(Row.parse, kept) if row]
            self._scan = scan if rows is None else lambda: rows
        self._db = IndexConnection(folder, mode, self._fill, in_memory=in_memory)

    @property
    def num_rebuilds(self) -> int:
        """How often it was made from the blobs, by this one."""
        return self._db.num_rebuilds

    def close(self) -> None:
        """May be called twice."""
        self._db.close()

    # -- reading ----------------------------------------------------------------------------------

    def find(self, key: str) -> Row | None:
        """What lies under a key. A row that is not what was written counts as none."""
        found = self._db.read(f"{QUERY} WHERE key = ?", (encode(key),))
        return Row.parse(found[0]) if found else None

    def rows(self) -> list[Row]:
        """All of them, the one used longest ago first."""
        found = map(Row.parse, self._db.read(f"{QUERY} ORDER BY used"))
        return [row for row in found if row is not None]

    def rows_of(self, digest: bytes) -> list[Row]:
        """The keys of one blob."""
        query = f"{QUERY} WHERE names.digest = ?"
        found = map(Row.parse, self._db.read(query, (digest,)))
        return [row for row in found if row is not None]

    def has(self, digest: bytes) -> bool:
        """Whether a blob is known."""
        query = "SELECT 1 FROM blobs WHERE digest = ?"
        return bool(self._db.read(query, (digest,)))

    def num_blobs(self) -> int:
        return self._db.number("SELECT COUNT(*) FROM blobs")

    def num_names(self) -> int:
        return self._db.number("SELECT COUNT(*) FROM names")

    def stored_bytes(self) -> int:
        """What the blobs take of the disk, those included that are just being written."""
        query = (
            "SELECT (SELECT COALESCE(SUM(stored), 0) FROM blobs) + "
            "(SELECT COALESCE(SUM(stored), 0) FROM pending)"
        )
        return self._db.number(query)

    def pending_bytes(self) -> int:
        """Of what is just being written."""
        return self._db.number("SELECT COALESCE(SUM(stored), 0) FROM pending")

    def oldest(self, limit: int) -> list[tuple[int, bytes, int]]:
        """(when used, digest, stored bytes) of the blobs used longest ago."""
        query = "SELECT used, digest, stored FROM blobs ORDER BY used LIMIT ?"
        found = self._db.read(query, (limit,))
        return [row for row in found if [*map(type, row)] == [int, bytes, int]]  # type: ignore[misc]

    def pending(self) -> list[tuple[bytes, bytes, float]]:
        """(temporary, digest, began in seconds since 1970) of what is being written, or was when a
        process died.
        """
        found = self._db.read("SELECT temporary, digest, began FROM pending")
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
        return self._db.number(query, span)

    def tally(self, name: str) -> int:
        """A counter that outlives processes: "written", "payload", and those of `count`."""
        query = "SELECT COALESCE(SUM(value), 0) FROM tallies WHERE name = ?"
        return self._db.number(query, (encode(name),))

    # -- writing ----------------------------------------------------------------------------------

    def begin(self, temporary: str, row: Row) -> None:
        """A blob is going to be written; its bytes count from now on."""
        values = (encode(temporary), row.digest, row.stored, row.used_ns)

        def act(db: Connection) -> None:
            db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?)", values)

        self._db.write(act)

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
            old = db.execute("SELECT digest FROM names WHERE key = ?", (encode(row.key),))
            for (digest,) in old.fetchall():
                if digest != row.digest:
                    _remove(db, digest, unlink)
            _enter(db, row)
            if temporary is not None:
                db.execute("DELETE FROM pending WHERE temporary = ?", (encode(temporary),))
            if written:
                _note_written(db, row.used_ns, written, row.nbytes)
            return True

        return self._db.write(act)

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
        return self._db.write(lambda db: is_wanted() and _remove(db, digest, unlink))

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

        self._db.write(act)

    def touch(self, used: Mapping[bytes, tuple[int, int]]) -> None:
        """By digest: when it was used last, and how often since the last call."""
        rows = [(when, count, digest) for digest, (when, count) in used.items()]
        statement = "UPDATE blobs SET used = MAX(used, ?), uses = uses + ? WHERE digest = ?"

        def act(db: Connection) -> None:
            db.executemany(statement, rows)

        self._db.write(act)

    def count(self, numbers: Mapping[str, int]) -> None:
        """Add to counters that outlive processes; they begin anew with the index.

        Raises:
            WriteError: It cannot be written to.
        """

        def act(db: Connection) -> None:
            _add_tallies(db, numbers)

        self._db.write(act)

    def was_seen(self, key: str) -> bool:
        """Whether a key was asked about before; it is remembered from now on."""
        number = hashlib.blake2b(encode(key), digest_size=16).digest()

        def act(db: Connection) -> bool:
            if db.execute("SELECT 1 FROM seen WHERE key = ?", (number,)).fetchall():
                return True
            latest = db.execute("INSERT INTO seen (key) VALUES (?)", (number,)).lastrowid or 0
            db.execute("DELETE FROM seen WHERE number <= ?", (latest - _MOST_SEEN,))
            return False

        return self._db.write(act)

    # -- the file ---------------------------------------------------------------------------------

    def _fill(self, db: Connection) -> int:
        rows = list(self._scan())
        for row in rows:
            _enter(db, row)
        return len(rows)


def _enter(db: Connection, row: Row) -> None:
    db.execute(
        "INSERT INTO blobs VALUES (?, ?, ?, ?) ON CONFLICT (digest) DO UPDATE SET "
        "stored = excluded.stored, used = MAX(used, excluded.used)",
        (row.digest, row.stored, row.used_ns, row.uses),
    )
    fields = (encode(row.key), row.digest, encode(row.kind), encode(row.about))
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
    rows = [(encode(name), value, value) for name, value in numbers.items()]
    db.executemany(statement, rows)
