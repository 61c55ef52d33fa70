"""What a disk tier says about itself: entries, counters, the state of its folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["DiskStats", "Entry", "VerifyReport", "ZoneStats"]


@dataclass(frozen=True)
class Entry:
    """What lies under a key.

    Attributes:
        key: Of the caller.
        kind: What it is, in a word.
        about: What the caller said about it; JSON.
        nbytes: Of the payload.
        digest: SHA-256 of the payload, hexadecimal: the name of its file.
        path: The file. Its first bytes are the header, not the payload.
        folder: The zone it lies in.
        created_seconds, used_seconds: Since 1970.
        uses: How often it was asked for, as far as that was written down.
    """

    key: str
    kind: str
    about: Mapping[str, Any]
    nbytes: int
    digest: str
    path: Path
    folder: Path
    created_seconds: float
    used_seconds: float
    uses: int


@dataclass(frozen=True)
class ZoneStats:
    """One folder of a tier.

    Attributes:
        folder: Where.
        entries: Keys.
        stored_bytes: What its blobs take of the disk, those included that are being written.
        free_bytes: Of the file system, for this user.
        written_bytes: That blobs cost since the index was made, by all processes.
        written_bytes_of_day: The same, in the last 24 hours.
        num_rebuilds: How often the index was made from the blobs, by this store.
        read_only: Why nothing is written here; empty where it is.
    """

    folder: Path
    entries: int
    stored_bytes: int
    free_bytes: int
    written_bytes: int
    written_bytes_of_day: int
    num_rebuilds: int
    read_only: str


@dataclass(frozen=True)
class DiskStats:
    """Counters of this store since it was opened; those of `zones` are older.

    Attributes:
        entries, stored_bytes: In all zones, now.
        max_bytes: Allowed.
        hits, misses: Of `get` and `load`.
        puts: Blobs written.
        puts_known: That were there already, and cost nothing.
        refused_first_touch, refused_write_budget, refused_too_large, refused_full,
            refused_read_only: Puts that wrote nothing, by reason.
        evictions: Blobs removed to make room.
        corruptions: Blobs that were not what they said they were, and were set aside.
        read_errors, write_errors, index_errors: The disk said no.
        read_bytes: Payload read, every block compared.
        payload_bytes, written_bytes: Put, and what that cost the disk.
        second_readings: Blocks that were right when they were read again.
        io_mode, reader: How the last blob was really read: "direct" or "buffered", "io_uring" or
            "threads"; empty before.
        last_error: What the disk said last.
        zones: The folders.
    """

    entries: int
    stored_bytes: int
    max_bytes: int
    hits: int
    misses: int
    puts: int
    puts_known: int
    refused_first_touch: int
    refused_write_budget: int
    refused_too_large: int
    refused_full: int
    refused_read_only: int
    evictions: int
    corruptions: int
    read_errors: int
    write_errors: int
    index_errors: int
    read_bytes: int
    payload_bytes: int
    written_bytes: int
    second_readings: int
    io_mode: str
    reader: str
    last_error: str
    zones: tuple[ZoneStats, ...]

    @property
    def hit_rate(self) -> float:
        """Hits of all that was asked for; 0 before."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def write_amplification(self) -> float:
        """Bytes written for a byte that was put; 0 before."""
        return self.written_bytes / self.payload_bytes if self.payload_bytes else 0.0


@dataclass(frozen=True)
class VerifyReport:
    """What reading everything found.

    Attributes:
        num_blobs, nbytes: That are right, and their payload.
        bad: The files that were not, and why; set aside, where that is possible.
        num_adopted: Blobs that the index had lost.
        num_missing: Keys whose blob is not there; forgotten.
    """

    num_blobs: int
    nbytes: int
    bad: tuple[tuple[Path, str], ...]
    num_adopted: int
    num_missing: int
