"""What a user holds in hand of a download under way."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from nexus_ext.download.facts import Fetched
from nexus_ext.download.transfer import Transfer
from nexus_ext.errors import ConfigError, DownloadCancelled, DownloadTimeout

__all__ = ["Arriving"]


class Arriving:
    """A download under way. Every method may be called from any thread."""

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._changed = transfer.changed

    def __repr__(self) -> str:
        return f"Arriving({self._transfer.download!r})"

    @property
    def nbytes(self) -> int:
        """The size of the file. Blocks until the source has told it.

        Raises:
            DownloadError, WriteError: What ended the download before.
        """
        self._wait_until(lambda: self._nbytes() is not None, None)
        nbytes = self._nbytes()
        assert nbytes is not None
        return nbytes

    def _nbytes(self) -> int | None:
        if self._transfer.fetched is not None:
            return self._transfer.fetched.nbytes
        partial = self._transfer.partial
        return partial.nbytes if partial is not None else None

    @property
    def part_path(self) -> Path:
        """The file that grows, full of holes; the target itself once that is there.

        Blocks until it is made. When the download ends the part gets the target's name, and after
        an error it may be gone: `open` cannot come too late.
        """
        self._wait_until(lambda: self._path() is not None, None)
        path = self._path()
        assert path is not None
        return path

    def _path(self) -> Path | None:
        if self._transfer.fetched is not None:
            return self._transfer.fetched.path
        partial = self._transfer.partial
        return partial.path if partial is not None else None

    def open(self) -> BinaryIO:
        """Open the bytes for reading, unbuffered; the caller closes. Blocks like `part_path`.

        Stays right when the part gets the target's name. Once it was called, a source that changes
        is an error, and is not begun anew.
        """
        self._wait_until(lambda: self._path() is not None, None)
        with self._changed:
            self._raise_error()
            self._transfer.is_promised = True
            partial = self._transfer.partial
            if self._transfer.fetched is None and partial is not None:
                return os.fdopen(partial.dup(), "rb", buffering=0)
        return open(self._transfer.download.path, "rb", buffering=0)

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Fetch these (offset, nbytes) next, in this order, before what was wanted earlier.

        Does not wait; what is under way is ended first. Rounded to blocks.

        Raises:
            ConfigError: A negative number.
        """
        if wrong := [one for one in ranges if min(one) < 0]:
            raise ConfigError(f"a range is (offset, nbytes), both 0 or more, got {wrong[0]}.")
        with self._changed:
            self._transfer.want([(offset, offset + nbytes) for offset, nbytes in ranges])

    def want_all(self) -> None:
        """Fetch the rest, too, of what was started lazily. Does not wait."""
        with self._changed:
            self._transfer.is_lazy = False
            self._changed.notify_all()

    def landed(self) -> list[tuple[int, int]]:
        """(offset, nbytes) of all that stands in the part now. Does not wait.

        As for `wait`: not yet compared with a digest of the whole. Empty after an error.
        """
        with self._changed:
            if self._transfer.fetched is not None:
                return [(0, self._transfer.fetched.nbytes)]
            partial = self._transfer.partial
            ranges = partial.landed if partial is not None else ()
            return [(start, end - start) for start, end in ranges]

    @property
    def has_ended(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        with self._changed:
            return self._transfer.ended

    def wait(self, offset: int, nbytes: int, timeout_seconds: float | None = None) -> None:
        """Block until these bytes stand in the part; what is missing of them comes next.

        They are the source's, checked for length and version, and not yet against a digest of the
        whole file. Once this returned, a source that changes is an error, and not begun anew.

        Raises:
            ConfigError: The file ends before.
            DownloadTimeout: They did not come in time. The download goes on.
            DownloadError, WriteError: What ended the download.
        """
        end = offset + nbytes
        self.want([(offset, nbytes)])
        with self._changed:
            self._wait_until(
                lambda: self._transfer.is_there(offset, end) or self._is_beyond(end),
                timeout_seconds,
            )
            if self._is_beyond(end):
                raise ConfigError(
                    f"bytes to wait for lie in the file, which has {self._nbytes()}, got "
                    f"{offset} to {end}; ask `nbytes` first"
                )
            self._transfer.is_promised = True

    def _is_beyond(self, end: int) -> bool:
        nbytes = self._nbytes()
        return nbytes is not None and end > nbytes

    def result(self) -> Fetched:
        """Block until the file stands under its name, or the download has failed.

        Raises:
            DownloadError, WriteError: What ended it; then all its temporaries are gone, but for a
                part that a later call goes on with.
        """
        with self._changed:
            while not self._transfer.ended:
                self._changed.wait()
            self._raise_error()
            assert self._transfer.fetched is not None
            return self._transfer.fetched

    def cancel(self) -> None:
        """End it, if it has not ended; does not wait. What arrived is kept for a later call."""
        with self._changed:
            self._transfer.fail(
                DownloadCancelled(
                    f"{self._transfer.download.source} was being fetched, but was cancelled; fetch "
                    "again to go on"
                )
            )
        self._transfer.wind_up()

    def _wait_until(self, is_true: Callable[[], bool], timeout_seconds: float | None) -> None:
        with self._changed:
            is_there = self._changed.wait_for(
                lambda: self._transfer.error is not None or is_true(), timeout_seconds
            )
            self._raise_error()
            if not is_there:
                raise DownloadTimeout(
                    f"bytes of {self._transfer.download.source} may take {timeout_seconds} s, and "
                    "did not come; wait longer"
                )

    def _raise_error(self) -> None:
        if self._transfer.error is not None:
            raise self._transfer.error
