"""What is let in, and where: admission, budgets, room, turns of the zones.

Owns the order of a put: it is announced and counts, room is made, it is written, it is entered.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch

from nexus_ext.cache.header import Header
from nexus_ext.cache.index_row import Row
from nexus_ext.cache.ledger import Ledger
from nexus_ext.cache.report import Entry
from nexus_ext.cache.room import Room
from nexus_ext.cache.rotation import Rotation
from nexus_ext.cache.uses import Uses
from nexus_ext.cache.zone import Fate, Zone
from nexus_ext.errors import ReadError, WriteError

__all__ = ["Admission", "Writer", "is_full"]

# On a full disk the index needs some room too, to say what went.
_SLACK_BYTES = 256 << 10

Admission = Literal["always", "second-touch"]


class Writer:
    """Writes into the zones of one tier. Thread-safe."""

    def __init__(
        self,
        zones: Sequence[Zone],
        ledger: Ledger,
        uses: Uses,
        let_go: Callable[[Zone, bytes], Fate],
        *,
        max_bytes: int,
        write_budget: int | None,
        admission: Admission,
    ) -> None:
        """`let_go` removes a blob for which there is no room, unless it is held."""
        self._zones = zones
        self._ledger = ledger
        self._uses = uses
        self._max_bytes = max_bytes
        self._write_budget = write_budget
        self._admission = admission
        self._rotation = Rotation(len(zones))
        self._room = Room(zones, max_bytes, ledger.count, let_go)

    def put(
        self,
        key: str,
        tensors: Sequence[torch.Tensor],
        kind: str,
        about: Mapping[str, Any],
        known: tuple[Zone, Row] | None,
    ) -> Entry | None:
        """Keep bytes under a key, where `known` lies if that is something; None, and counted,
        where nothing is let in.

        Raises:
            ReadError, WriteError: The disk would not, or an index.
        """
        writable = [zone for zone in self._zones if zone.is_writable]
        if not writable:
            return self._refuse("read_only")
        is_new = known is None and self._admission == "second-touch"
        if is_new and not writable[0].index.was_seen(key):
            return self._refuse("first_touch")
        header = Header.of(key, kind, about, self._uses.now_ns(), tensors)
        if known is not None and known[1].digest == header.sha256:
            self._ledger.count("puts_known")
            self._uses.note(known[0], header.sha256)
            return known[0].entry(known[1])
        if known is not None and not known[0].is_writable:
            return self._refuse("read_only")  # what lies there could come back
        row = Row(
            key,
            header.sha256,
            kind,
            json.dumps(dict(about)),
            header.created_ns,
            header.nbytes,
            header.stored_bytes,
            header.created_ns,
        )
        for zone in writable if known is None else [known[0]]:
            if zone.index.has(header.sha256) and zone.adopt(row):
                self._ledger.count("puts_known")
                return zone.entry(row)
        if header.stored_bytes > self._max_bytes:
            return self._refuse("too_large")
        if not self._may_write(header.file_nbytes):
            return self._refuse("write_budget")  # without a word to the index
        zone = known[0] if known is not None else self._next_zone()
        return self._write(zone, header, row, tensors)

    def _write(
        self, zone: Zone, header: Header, row: Row, tensors: Sequence[torch.Tensor]
    ) -> Entry | None:
        self._uses.flush()
        for is_last in (False, True):
            try:
                name = self._announce(zone, header, row)
                if name is None:
                    return None
                zone.write(name, header, row, tensors)
                break
            except WriteError as error:
                # A full disk may be full of what is used less.
                wanted = row.stored + _SLACK_BYTES
                if is_last or not is_full(error) or not self._room.free(zone, wanted):
                    raise
        for other in self._zones:
            if other is not zone and other.is_writable:
                other.forget_key(row.key)  # another process may have put it there meanwhile
        self._ledger.count("puts")
        self._ledger.count("payload_bytes", row.nbytes)
        self._ledger.count("written_bytes", header.file_nbytes)
        return zone.entry(row)

    def _announce(self, zone: Zone, header: Header, row: Row) -> str | None:
        """As `Zone.announce`, with room for it; None, and counted, where there is none.

        First it counts, then room is made: of several who come at once, each sees the others.
        """
        with self._room.lock:
            name = zone.announce(row)
            try:
                if not self._may_write(header.file_nbytes - row.stored):
                    why = "write_budget"
                elif not self._room.make():
                    why = "full"
                else:
                    return name
            except BaseException:
                zone.withdraw(name, row)
                raise
            zone.withdraw(name, row)
        self._ledger.refuse(why)
        return None

    def _next_zone(self) -> Zone:
        free = [zone.folder.free_bytes() if zone.is_writable else 0 for zone in self._zones]
        chosen = self._rotation.next(free)
        if chosen is None:  # all are full to the last byte: one of them evicts
            chosen = next(i for i, zone in enumerate(self._zones) if zone.is_writable)
        return self._zones[chosen]

    def _may_write(self, nbytes: int) -> bool:
        if self._write_budget is None:
            return True
        now = time.time_ns()
        used = sum(zone.index.written_bytes_of_day(now) for zone in self._zones)
        coming = sum(zone.index.pending_bytes() for zone in self._zones)
        return used + coming + nbytes <= self._write_budget

    def _refuse(self, why: str) -> Entry | None:
        self._ledger.refuse(why)
        return None

    def tidy(self) -> None:
        """No more than is allowed, whoever put it there."""
        try:
            with self._room.lock:
                self._room.make()
        except (WriteError, ReadError) as error:
            self._ledger.fail("write_errors", error)


def is_full(error: Exception) -> bool:
    """Whether a disk had no room."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "is full" in str(cause)  # what SQLite says
