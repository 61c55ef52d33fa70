"""The disk tier: what was fetched once from far away is kept near, under a budget.

    put ─▶ hash ─▶ room ─▶ a zone: blob, then index            get ─▶ index ─▶ Entry
                                                              read ─▶ blob, every block compared

Owns the policy over all zones: what is let in, what goes when there is no room, what is counted. A
cache is never a reason to fail: what the disk refuses is counted and reported, and work goes on.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from nexus_ext.cache import holds
from nexus_ext.cache.blob import Header, Part, tensors_of
from nexus_ext.cache.checking import verify_zones
from nexus_ext.cache.index import Row
from nexus_ext.cache.reading import BlockMode
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats
from nexus_ext.cache.room import Room
from nexus_ext.cache.rotation import Rotation
from nexus_ext.cache.totals import Totals
from nexus_ext.cache.touches import Touches
from nexus_ext.cache.zone import Fate, Zone
from nexus_ext.engine import Faults
from nexus_ext.errors import (
    ConfigError,
    CorruptCheckpoint,
    EngineClosed,
    ForkedEngine,
    ReadError,
    WriteError,
)
from nexus_ext.memory import parse_bytes

__all__ = ["Admission", "DiskTier"]

# On a full disk the index needs some room too, to say what went.
_SLACK_BYTES = 256 << 10

Admission = Literal["always", "second-touch"]


class DiskTier:
    """Keeps bytes under keys in one or more folders; least recently used ones go first.

    A key names bytes that do not change: put the revision into it. Any number of tiers, threads and
    processes may use the same folders; a forked child opens its own.
    """

    def __init__(
        self,
        directories: str | Path | Sequence[str | Path],
        max_bytes: int | str,
        *,
        write_budget_bytes_per_day: int | str | None = None,
        admission: Admission = "always",
        shared: bool = False,
        io: Literal["direct", "buffered"] = "direct",
        use_uring: bool = True,
        faults: Faults | None = None,
    ) -> None:
        """Open the folders; makes those that are missing. Reads no blob unless an index is lost.

        Args:
            directories: The zones: a folder, or several, best on different devices. They are
                written to in turn, more often where more is free.
            max_bytes: Of disk, over all of them ("50GB").
            write_budget_bytes_per_day: Bytes that may be written in 24 hours, by all processes;
                over it nothing is written. None is no limit.
            admission: "second-touch" writes what is put for the second time.
            shared: Whether folders of other users, or ones that others may write to, will do.
            io: "direct" bypasses the page cache where that works.
            use_uring: Whether io_uring may be used where it works.
            faults: Test hook.

        Raises:
            ConfigError: An option that cannot be, or a folder that cannot be used.
        """
        many = [directories] if isinstance(directories, str | Path) else directories
        folders = [Path(folder) for folder in many]
        if not folders:
            raise ConfigError("A disk tier needs a folder, got none.")
        if admission not in get_args(Admission):
            raise ConfigError(
                f"admission must be one of {', '.join(get_args(Admission))}; got {admission!r}."
            )
        if io not in ("direct", "buffered"):
            raise ConfigError(f"io of a disk tier must be direct or buffered, got {io!r}.")
        self._admission = admission
        self._max_bytes = parse_bytes(max_bytes)
        budget = write_budget_bytes_per_day
        self._write_budget = None if budget is None else parse_bytes(budget)
        mode = BlockMode(io, use_uring, faults)
        self._zones = _open_zones(dict.fromkeys(folders), shared, mode)
        self._touches = {zone.folder.path: Touches(zone.index) for zone in self._zones}
        self._rotation = Rotation(len(self._zones))
        self._counts: Counter[str] = Counter()
        self._said = {"io_mode": "", "reader": "", "last_error": ""}
        self._lock = threading.Lock()  # of counts, and of the clock
        self._latest_ns = 0
        self._room = Room(self._zones, self._max_bytes, self._count, self._let_go)
        self._totals = Totals([zone.index for zone in self._zones if zone.is_writable])
        self._pid = os.getpid()
        self._is_closed = False
        self._tidy()

    # -- looking ----------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """What lies under a key, which counts as used now; reads no payload."""
        self._check_open()
        found = self._find(key)
        self._count("misses" if found is None else "hits")
        self._tell(only_if_due=True)
        if found is None:
            return None
        zone, row = found
        self._touch(zone, row.digest)
        return zone.entry(row)

    def read(self, entry: Entry, out: torch.Tensor | None = None) -> torch.Tensor:
        """The payload of an entry, every block compared with its digest. Blocks, without the GIL.

        Args:
            entry: Of `get`, `put`, `hold` or `entries`.
            out: uint8 [entry.nbytes], contiguous, on the CPU; read into in place where it begins on
                a page boundary. None: new memory that does.

        Returns:
            `out`, flat, or the new memory. After an error `out` holds nothing that may be used.

        Raises:
            CorruptCheckpoint: The bytes are not those that were put. They are set aside, and the
                entry is gone.
            ReadError: The disk answered with an error (the entry is gone too), or the entry was
                evicted meanwhile.
            ConfigError: Another `out`.
        """
        self._check_open()
        zone = self._zone_of(entry.folder)
        began = time.perf_counter_ns()
        try:
            payload, report = zone.read(bytes.fromhex(entry.digest), entry.nbytes, out)
        except FileNotFoundError:
            zone.forget_missing(bytes.fromhex(entry.digest))
            raise ReadError(
                f"An entry can be read while it is there; {entry.path} was evicted. Fetch its "
                "bytes again; `hold` an entry that must stay."
            ) from None
        except (CorruptCheckpoint, ReadError) as error:
            self._fail_reading(error)
            raise
        self._count("reads")
        self._count("read_ns", time.perf_counter_ns() - began)
        self._count("read_bytes", report.nbytes)
        self._count("second_readings", report.num_second)
        self._said["io_mode"] = "direct" if report.is_direct else "buffered"
        self._said["reader"] = "io_uring" if report.is_ring else "threads"
        return payload

    def load(self, key: str, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """`get` and `read`: None where there is nothing, or nothing that can be believed or read.

        Raises:
            ConfigError: Another `out`.
        """
        entry = self.get(key)
        if entry is None:
            return None
        try:
            return self.read(entry, out)
        except (CorruptCheckpoint, ReadError):  # counted there
            self._count("hits", -1)
            self._count("misses")
            return None

    @contextmanager
    def hold(self, key: str) -> Iterator[Entry | None]:
        """While inside, nobody in this process evicts what lies under a key, and should another
        process do so, it can still be read. None where there is nothing.
        """
        self._check_open()
        path = None
        found = self._find(key)
        if found is not None:
            try:
                holds.hold(found[0].folder.blob(found[1].digest))
                path = found[0].folder.blob(found[1].digest)
            except (FileNotFoundError, CorruptCheckpoint, ReadError):
                found = None
        try:
            yield None if found is None else found[0].entry(found[1])
        finally:
            if path is not None and self._pid == os.getpid():
                holds.let_go(path)

    def entries(self) -> list[Entry]:
        """All of them, the one used longest ago first."""
        self._check_open()
        self._flush()
        found = [(row.used_ns, zone.entry(row)) for zone in self._zones for row in self._rows(zone)]
        return [entry for _, entry in sorted(found, key=lambda one: one[0])]

    # -- changing ---------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        parts: Sequence[Part],
        *,
        kind: str = "layer",
        about: Mapping[str, Any] | None = None,
    ) -> Entry | None:
        """Keep bytes under a key; what lay there goes. Blocks until the disk has them.

        Bytes that are there already, under any key, are not written again. (One file then has
        several keys, and they go together.)

        Args:
            key: What the bytes are: model, revision, layer, format.
            parts: uint8 tensors on the CPU, or buffers; kept one behind the other. They must not
                change meanwhile.
            kind: A word for it.
            about: What else should be known; JSON.

        Returns:
            The entry; None where nothing was written, and `stats` says why.

        Raises:
            ConfigError: Parts or descriptions that cannot be kept.
        """
        self._check_open()
        tensors = tensors_of(parts)
        try:
            return self._put(key, tensors, kind, about or {})
        except (WriteError, ReadError) as error:
            full = _is_full(error)
            self._fail("refused_full" if full else "write_errors", error)
            return None

    def evict(self, key: str) -> bool:
        """Remove what lies under a key, and its other keys. False if there is nothing, if it is
        held in this process, or if it cannot be removed.
        """
        self._check_open()
        found = self._find(key)
        return found is not None and self._remove(found[0], found[1].digest)

    def clear(self) -> int:
        """Remove everything that is not held; how many blobs."""
        self._check_open()
        digests = [(zone, row.digest) for zone in self._zones for row in self._rows(zone)]
        return sum(self._remove(zone, digest) for zone, digest in dict.fromkeys(digests))

    def verify(self) -> VerifyReport:
        """Read every block of every blob; set aside what is bad, enter what the index had lost.

        Blocks for as long as the disk takes. Others may go on meanwhile.

        Raises:
            ReadError, WriteError: An index cannot be used.
        """
        self._check_open()
        report = verify_zones(self._zones, self._fail_reading)
        self._tidy()
        return report

    # -- the whole --------------------------------------------------------------------------------

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter that outlives this process (see `totals.COUNTED`).

        Raises:
            ConfigError: There is no such counter.
        """
        self._check_open()
        self._totals.check(name)
        self._count(name, number)

    def totals(self) -> dict[str, int]:
        """Counters of all processes since the index was made; what others gathered and did not
        tell yet is missing.

        Raises:
            ReadError: The index cannot be read.
        """
        self._check_open()
        self._tell()
        return self._totals.read()

    def stats(self) -> DiskStats:
        """Counters and the state of every zone."""
        self._check_open()
        zones = tuple(self._stats_of(zone) for zone in self._zones)
        with self._lock:
            names = [n for n, kind in DiskStats.__annotations__.items() if kind == "int"]
            fields: dict[str, Any] = {name: self._counts[name] for name in names} | self._said
        fields["entries"] = sum(zone.entries for zone in zones)
        fields["stored_bytes"] = sum(zone.stored_bytes for zone in zones)
        fields["max_bytes"] = self._max_bytes
        return DiskStats(**fields, zones=zones)

    def close(self) -> None:
        """Write down what was used when, and close. May be called twice."""
        if self._is_closed or self._pid != os.getpid():
            return
        self._flush()
        self._is_closed = True
        for zone in self._zones:
            zone.index.close()

    def __enter__(self) -> DiskTier:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside -----------------------------------------------------------------------------------

    def _put(
        self, key: str, tensors: Sequence[torch.Tensor], kind: str, about: Mapping[str, Any]
    ) -> Entry | None:
        writable = [zone for zone in self._zones if zone.is_writable]
        known = self._find(key)
        if not writable:
            return self._refuse("read_only")
        is_new = known is None and self._admission == "second-touch"
        if is_new and not writable[0].index.was_seen(key):
            return self._refuse("first_touch")
        header = Header.of(key, kind, about, self._now_ns(), tensors)
        if known is not None and known[1].digest == header.sha256:
            self._count("puts_known")
            self._touch(known[0], header.sha256)
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
                self._count("puts_known")
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
        self._flush()
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
                if is_last or not _is_full(error) or not self._room.free(zone, wanted):
                    raise
        for other in self._zones:
            if other is not zone and other.is_writable:
                other.forget_key(row.key)  # another process may have put it there meanwhile
        self._count("puts")
        self._count("payload_bytes", row.nbytes)
        self._count("written_bytes", header.file_nbytes)
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
        self._refuse(why)
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

    def _find(self, key: str) -> tuple[Zone, Row] | None:
        """Of several zones the one that was put last."""
        found = []
        for zone in self._zones:
            try:
                row = zone.find(key)
            except ReadError as error:
                self._fail("index_errors", error)
                continue
            if row is not None:
                found.append((zone, row))
        return max(found, key=lambda one: one[1].created_ns, default=None)

    def _rows(self, zone: Zone) -> list[Row]:
        try:
            return zone.index.rows()
        except ReadError as error:
            self._fail("index_errors", error)
            return []

    def _stats_of(self, zone: Zone) -> ZoneStats:
        try:
            return zone.stats(time.time_ns())
        except ReadError as error:
            self._fail("index_errors", error)
            free = zone.folder.free_bytes()
            return ZoneStats(
                zone.folder.path, 0, 0, free, 0, 0, zone.index.num_rebuilds, str(error)
            )

    def _let_go(self, zone: Zone, digest: bytes) -> Fate:
        """Remove a blob because there is no room for it, unless it is held.

        Raises:
            ReadError, WriteError: The indexes cannot be used, or the file not be removed.
        """
        return zone.evict(digest)

    def _remove(self, zone: Zone, digest: bytes) -> bool:
        if not zone.is_writable:
            return False
        try:
            return zone.evict(digest) is Fate.REMOVED
        except WriteError as error:
            self._fail("write_errors", error)
            return False

    def _zone_of(self, folder: Path) -> Zone:
        for zone in self._zones:
            if zone.folder.path == folder:
                return zone
        raise ConfigError(
            f"An entry is read by a tier that has its folder; {folder} is none of "
            f"{', '.join(str(zone.folder.path) for zone in self._zones)}."
        )

    def _tidy(self) -> None:
        """No more than is allowed, whoever put it there."""
        try:
            with self._room.lock:
                self._room.make()
        except (WriteError, ReadError) as error:
            self._fail("write_errors", error)

    def _touch(self, zone: Zone, digest: bytes) -> None:
        if not zone.is_writable:
            return
        try:
            self._touches[zone.folder.path].add(digest, self._now_ns())
        except WriteError as error:
            self._fail("index_errors", error)

    def _tell(self, only_if_due: bool = False) -> None:
        with self._lock:
            counts = Counter(self._counts)
        try:
            self._totals.tell(counts, only_if_due)
        except WriteError as error:
            self._fail("index_errors", error)

    def _flush(self) -> None:
        self._tell()
        for zone in self._zones:
            try:
                self._touches[zone.folder.path].flush()
            except WriteError as error:
                self._fail("index_errors", error)

    def _now_ns(self) -> int:
        """Later than ever before here, also when the clock is set back."""
        with self._lock:
            self._latest_ns = max(time.time_ns(), self._latest_ns + 1)
            return self._latest_ns

    def _refuse(self, why: str) -> Entry | None:
        self._count(f"refused_{why}")
        return None

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _fail(self, name: str, error: Exception) -> None:
        self._count(name)
        self._said["last_error"] = str(error)

    def _fail_reading(self, error: Exception) -> None:
        is_corrupt = isinstance(error, CorruptCheckpoint)
        self._fail("corruptions" if is_corrupt else "read_errors", error)

    def _check_open(self) -> None:
        if self._pid != os.getpid():
            raise ForkedEngine(
                "A disk tier is used by the process that opened it; this is a forked child. Open "
                "another one here."
            )
        if self._is_closed:
            raise EngineClosed("A disk tier must be open; this one was closed. Open another one.")


def _open_zones(folders: Iterable[Path], shared: bool, mode: BlockMode) -> list[Zone]:
    """All of them, or none stays open."""
    zones: list[Zone] = []
    try:
        for folder in folders:
            zones.append(Zone(folder, shared, mode))
    except BaseException:
        for zone in zones:
            zone.index.close()
        raise
    return zones


def _is_full(error: Exception) -> bool:
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "is full" in str(cause)  # what SQLite says
