"""A file of a checkpoint that is on its way, as those see it who need its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from nexus_ext.errors import TruncatedCheckpoint

__all__ = ["Here", "Shard", "Span", "has_landed"]

Span = tuple[int, int, int]  # file, offset, nbytes


class Shard(Protocol):
    """A file on its way; see `nexus_ext.download.Arriving`."""

    @property
    def nbytes(self) -> int: ...
    @property
    def has_ended(self) -> bool: ...
    def open(self) -> BinaryIO: ...
    def want(self, ranges: Sequence[tuple[int, int]]) -> None: ...
    def want_all(self) -> None: ...
    def wait(self, offset: int, nbytes: int) -> None: ...
    def landed(self) -> list[tuple[int, int]]: ...
    def result(self) -> object: ...


def has_landed(shard: Shard, offset: int, nbytes: int) -> bool:
    """Whether all of these bytes stand there."""
    return any(
        start <= offset and offset + nbytes <= start + length for start, length in shard.landed()
    )


class Here:
    """A file that was fetched before: a shard that has come."""

    has_ended = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self.nbytes = path.stat().st_size

    def open(self) -> BinaryIO:
        return open(self._path, "rb", buffering=0)

    def want(self, ranges: Sequence[tuple[int, int]]) -> None:
        """There it is."""

    def want_all(self) -> None:
        """There it is."""

    def wait(self, offset: int, nbytes: int) -> None:
        if offset + nbytes > self.nbytes:
            raise TruncatedCheckpoint(
                f"{self._path} must have {offset + nbytes} bytes, but has {self.nbytes}; fetch it "
                "again"
            )

    def landed(self) -> list[tuple[int, int]]:
        return [(0, self.nbytes)]

    def result(self) -> Path:
        return self._path
