"""What a shared store says about itself."""

from __future__ import annotations

from dataclasses import dataclass

from nexus_ext.cache.compression import Decision

__all__ = ["RemoteStats"]


@dataclass(frozen=True)
class RemoteStats:
    """Counters of this store since it was opened.

    Attributes:
        url: Without credentials.
        hits, misses: Of `get` and `fetch`, by object.
        puts, puts_known: Objects written; that were there already.
        refused_corrupt: Objects and notes that were not what they should be.
        refused_too_large: Objects beyond `max_object_bytes`.
        refused_read_only: Puts into a store that cannot be written to.
        unreachable: Times that the store could not be asked, or said no.
        wire_bytes_in, plain_bytes_in: Read from it, and what that came to.
        wire_bytes_out, plain_bytes_out: Written to it, and what that was.
        link_bytes_per_second: Of what was read; None before a megabyte was.
        decision: About compression, of what was put last.
        last_error: Kind of the last error, and its number.
    """

    url: str
    hits: int
    misses: int
    puts: int
    puts_known: int
    refused_corrupt: int
    refused_too_large: int
    refused_read_only: int
    unreachable: int
    wire_bytes_in: int
    plain_bytes_in: int
    wire_bytes_out: int
    plain_bytes_out: int
    link_bytes_per_second: float | None
    decision: Decision | None
    last_error: str
