"""The way to an index: one transaction at a time, made anew where the file is broken.

Owns the connection, which is opened when it is wanted: it is closed while the process forks, and
when another process has put the file aside.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from nexus_ext.cache import forks
from nexus_ext.cache.index_file import Connection, Fill, IndexFile, is_broken, memory_index
from nexus_ext.errors import EngineClosed, ReadError, WriteError

__all__ = ["IndexConnection"]

T = TypeVar("T")


class IndexConnection:
    """To the index of one folder, or to one in memory. Thread-safe.

    A call that finds the file broken makes it anew, and runs again.

    Attributes:
        num_rebuilds: How often the index was made from the blobs.
    """

    def __init__(self, folder: Path, mode: int, fill: Fill, *, in_memory: bool) -> None:
        """Open it, or make it. Raises WriteError where it cannot be kept."""
        self._folder = folder
        self._mode = mode
        self._fill = fill
        self._lock = threading.RLock()
        self._file: IndexFile | None = None
        self._connection: Connection | None = None
        self._is_closed = False
        self.num_rebuilds = 0
        if in_memory:
            self._connection = memory_index(fill)
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

    def read(self, query: str, values: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
        """What a query finds. Raises ReadError."""
        return self._ask(lambda db: db.execute(query, values).fetchall())

    def number(self, query: str, values: tuple[object, ...] = ()) -> int:
        """The one number that a query finds. Raises ReadError."""

        def ask(db: Connection) -> int:
            (found,) = db.execute(query, values).fetchone()
            # A sum over damaged rows may be anything, and budgets are judged by it.
            if not isinstance(found, int):
                raise sqlite3.DatabaseError(f"{found!r} is no number")
            return found

        return self._ask(ask)

    def write(self, act: Callable[[Connection], T]) -> T:
        """One transaction, which nobody else is in. Raises WriteError, and what `act` does."""

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

    # -- inside -----------------------------------------------------------------------------------

    def _ask(self, query: Callable[[Connection], T]) -> T:
        try:
            return self._run(query)
        except WriteError as error:
            raise ReadError(str(error)) from error

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

    def _open(self) -> None:
        try:
            self._file = IndexFile(self._folder, self._mode, self._fill)
        except (sqlite3.Error, OSError) as error:
            raise self._cannot("kept", error) from error
        self._connection = self._file.connection
        self.num_rebuilds += self._file.was_rebuilt
