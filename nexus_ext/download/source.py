"""What a source of bytes is: one answer at a time, checked before the first byte is believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from nexus_ext.download.body import ReadInto
from nexus_ext.download.line import Line

__all__ = ["Body", "Facts", "Source"]


@dataclass(frozen=True)
class Facts:
    """What a source says about the file.

    Attributes:
        nbytes: Its whole size; None where it is not told.
        validator: Another value is another file; "" where none is given.
    """

    nbytes: int | None
    validator: str


@dataclass(frozen=True)
class Body:
    """Bytes on their way.

    Attributes:
        facts: Of the whole file.
        offset: Where the first byte belongs.
        nbytes: How many will come; None where only the end will tell.
        is_whole: The answer is the whole file, even if a range was asked for.
        is_framed: Its end can be told from a broken connection.
        read_into: Puts the next bytes into a buffer that is not empty, and returns how many; 0 is
            the end. Blocks until there is one; raises Trouble where the connection breaks.
        close: Stop; may be called at any time, and twice.
        version: "HTTP/1.1", "HTTP/2", or the scheme.
    """

    facts: Facts
    offset: int
    nbytes: int | None
    is_whole: bool
    is_framed: bool
    read_into: ReadInto
    close: Callable[[], None]
    version: str


class Source(Protocol):
    """Where one file comes from. Used by many threads at a time."""

    def open(self, line: Line, span: tuple[int, int] | None, validator: str) -> Body:
        """Ask for the bytes [start, end) of the file, or for all of it.

        An answer may begin where it was asked to and be shorter, or be the whole file.

        Args:
            line: The caller's own connection.
            span: None asks for the whole file.
            validator: What the file was; lets a server notice that it changed. "" if unknown.

        Raises:
            Trouble: It may go better next time.
            DownloadError: It will not.
        """

    def recheck(self, validator: str) -> bool:
        """Whether the file still is what it was, where answers do not say it themselves."""
