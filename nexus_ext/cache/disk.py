"""The disk tier: what was fetched once from far away is kept near, under a budget.

    put ─▶ hash ─▶ room ─▶ a zone: blob, then index            get ─▶ index ─▶ Entry
                                                              read ─▶ blob, every block compared

Owns the policy over all zones: what is let in, what goes when there is no room, what is counted. A
cache is never a reason to fail: what the disk refuses is counted and reported, and work goes on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import torch

from nexus_ext.cache import holds
from nexus_ext.cache.checking import verify_zones
from nexus_ext.cache.index import Row
from nexus_ext.cache.ledger import Ledger
from nexus_ext.cache.parts import Part, tensors_of
from nexus_ext.cache.reading import BlockMode
from nexus_ext.cache.report import DiskStats, Entry, VerifyReport, ZoneStats
from nexus_ext.cache.totals import Totals
from nexus_ext.cache.uses import Uses
from nexus_ext.cache.writing import Admission, Writer, is_full
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
        self._max_bytes = parse_bytes(max_bytes)
        budget = write_budget_bytes_per_day
        mode = BlockMode(io, use_uring, faults)
        self._zones = _open_zones(dict.fromkeys(folders), shared, mode)
        writable = [zone.index for zone in self._zones if zone.is_writable]
        self._ledger = Ledger(Totals(writable))
        self._uses = Uses(self._zones, self._ledger)
        self._writer = Writer(
            self._zones,
            self._ledger,
            self._uses,
            self._let_go,
            max_bytes=self._max_bytes,
            write_budget=None if budget is None else parse_bytes(budget),
            admission=admission,
        )
        self._pid = os.getpid()
        self._is_closed = False
        self._writer.tidy()

    # -- looking ----------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """What lies under a key, which counts as used now; reads no payload."""
        self._check_open()
        found = self._find(key)
        self._ledger.count("misses" if found is None else "hits")
        self._ledger.tell(only_if_due=True)
        if found is None:
            return None
        zone, row = found
        self._uses.note(zone, row.digest)
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
            self._ledger.fail_reading(error)
            raise
        self._ledger.count("reads")
        self._ledger.count("read_ns", time.perf_counter_ns() - began)
        self._ledger.count("read_bytes", report.nbytes)
        self._ledger.count("second_readings", report.num_second)
        self._ledger.said["io_mode"] = "direct" if report.is_direct else "buffered"
        self._ledger.said["reader"] = "io_uring" if report.is_ring else "threads"
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
            self._ledger.count("hits", -1)
            self._ledger.count("misses")
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
        self._uses.flush()
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
            return self._writer.put(key, tensors, kind, about or {}, self._find(key))
        except (WriteError, ReadError) as error:
            full = is_full(error)
            self._ledger.fail("refused_full" if full else "write_errors", error)
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
        report = verify_zones(self._zones, self._ledger.fail_reading)
        self._writer.tidy()
        return report

    # -- the whole --------------------------------------------------------------------------------

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter that outlives this process (see `totals.COUNTED`).

        Raises:
            ConfigError: There is no such counter.
        """
        self._check_open()
        Totals.check(name)
        self._ledger.count(name, number)

    def totals(self) -> dict[str, int]:
        """Counters of all processes since the index was made; what others gathered and did not
        tell yet is missing.

        Raises:
            ReadError: The index cannot be read.
        """
        self._check_open()
        return self._ledger.totals()

    def stats(self) -> DiskStats:
        """Counters and the state of every zone."""
        self._check_open()
        zones = tuple(self._stats_of(zone) for zone in self._zones)
        fields = self._ledger.fields()
        fields["entries"] = sum(zone.entries for zone in zones)
        fields["stored_bytes"] = sum(zone.stored_bytes for zone in zones)
        fields["max_bytes"] = self._max_bytes
        return DiskStats(**fields, zones=zones)

    def close(self) -> None:
        """Write down what was used when, and close. May be called twice."""
        if self._is_closed or self._pid != os.getpid():
            return
        self._uses.flush()
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

    def _find(self, key: str) -> tuple[Zone, Row] | None:
        """Of several zones the one that was put last."""
        found = []
        for zone in self._zones:
            try:
                row = zone.find(key)
            except ReadError as error:
                self._ledger.fail("index_errors", error)
                continue
            if row is not None:
                found.append((zone, row))
        return max(found, key=lambda one: one[1].created_ns, default=None)

    def _rows(self, zone: Zone) -> list[Row]:
        try:
            return zone.index.rows()
        except ReadError as error:
            self._ledger.fail("index_errors", error)
            return []

    def _stats_of(self, zone: Zone) -> ZoneStats:
        try:
            return zone.stats(time.time_ns())
        except ReadError as error:
            self._ledger.fail("index_errors", error)
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
            self._ledger.fail("write_errors", error)
            return False

    def _zone_of(self, folder: Path) -> Zone:
        for zone in self._zones:
            if zone.folder.path == folder:
                return zone
        raise ConfigError(
            f"An entry is read by a tier that has its folder; {folder} is none of "
            f"{', '.join(str(zone.folder.path) for zone in self._zones)}."
        )

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
