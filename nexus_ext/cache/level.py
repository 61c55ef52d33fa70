"""One tier among several: a disk tier that hands down what it has no room for.

What is compressed looks plain from outside: sizes and digests of entries are those of the plain
bytes. Owns the order of a move down: the copy is there, then the original goes; a crash between
the two leaves both, and the faster one counts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from nexus_ext.cache import holds
from nexus_ext.cache.blob import Part, tensors_of, view_of
from nexus_ext.cache.compression import (
    Decision,
    check_promise,
    compress,
    decide,
    decompress_into,
)
from nexus_ext.cache.disk import DiskTier
from nexus_ext.cache.rates import Rate, rate_of
from nexus_ext.cache.reading import BlockMode, memory_for
from nexus_ext.cache.report import Entry
from nexus_ext.cache.work_locks import locked
from nexus_ext.cache.zone import Fate, Zone
from nexus_ext.errors import CorruptCheckpoint, ReadError

__all__ = ["ENCODED", "Level", "LevelOptions", "PackedEntry"]

# What a compressed entry says about itself, and nobody else may.
ENCODED = "nexus.zstd"


@dataclass(frozen=True)
class PackedEntry(Entry):
    """An entry whose file is compressed; its own fields are those of the plain bytes.

    Attributes:
        stored: As it lies in the tier.
    """

    stored: Entry


@dataclass(frozen=True)
class LevelOptions:
    """What all tiers of a store have in common: see TieredStore."""

    shared: bool
    io: Literal["direct", "buffered"]
    use_uring: bool
    max_rate_age_seconds: float


class Level(DiskTier):
    """A disk tier on one folder, above another one or the last.

    Attributes:
        folder: Where.
        rate: What its disk gives; None where that could not be measured.
        decision: About compression, of what was put last; None before.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int | str,
        below: Level | None,
        on_moved: Callable[[int], object],
        options: LevelOptions,
        *,
        compress: Literal["auto", "off"],
        write_budget_bytes_per_day: int | str | None,
    ) -> None:
        """Open it, as DiskTier does.

        Args:
            below: Takes what goes from here.
            on_moved: Told the plain bytes of every entry that it took.
            options: Of all tiers of a store.
        """
        self._below = below
        self._on_moved = on_moved
        self._compress = compress
        self.decision: Decision | None = None
        super().__init__(
            path,
            max_bytes,
            write_budget_bytes_per_day=write_budget_bytes_per_day,
            shared=options.shared,
            io=options.io,
            use_uring=options.use_uring,
        )
        zone = self._zones[0]
        self.folder = zone.folder.path
        mode = BlockMode(options.io, options.use_uring)
        self.rate: Rate | None = rate_of(zone.folder, mode, options.max_rate_age_seconds)

    # -- looking ----------------------------------------------------------------------------------

    def look(self, key: str) -> Entry | None:
        """As `get`, but it counts as nothing."""
        self._check_open()
        found = self._find(key)
        return None if found is None else _plain(found[0].entry(found[1]))

    def get(self, key: str) -> Entry | None:
        entry = super().get(key)
        return None if entry is None else _plain(entry)

    def entries(self) -> list[Entry]:
        return [_plain(entry) for entry in super().entries()]

    @contextmanager
    def hold(self, key: str) -> Iterator[Entry | None]:
        with super().hold(key) as entry:
            yield None if entry is None else _plain(entry)

    def keys_of(self, entry: Entry) -> list[Entry]:
        """All entries that are this one's blob."""
        zone, digest = self._zones[0], bytes.fromhex(_stored(entry).digest)
        return [_plain(zone.entry(row)) for row in zone.index.rows_of(digest)]

    def is_held(self, entry: Entry) -> bool:
        """Whether anybody in this process holds it."""
        with holds.lock():
            return holds.is_held(entry.path)

    def read(self, entry: Entry, out: torch.Tensor | None = None) -> torch.Tensor:
        if not isinstance(entry, PackedEntry):
            return super().read(entry, out)
        if out is not None:
            memory_for(entry.nbytes, out)
        packed = super().read(entry.stored)
        try:
            check_promise(entry.nbytes, packed.nbytes, str(entry.path))
            memory = memory_for(entry.nbytes, out)
            decompress_into([view_of(packed)], memory, entry.digest, str(entry.path))
        except CorruptCheckpoint as error:
            self._ledger.fail("corruptions", error)
            self._remove(self._zones[0], bytes.fromhex(entry.stored.digest))
            raise
        return memory

    # -- changing ---------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        parts: Sequence[Part],
        *,
        kind: str = "layer",
        about: Mapping[str, Any] | None = None,
    ) -> Entry | None:
        tensors = tensors_of(parts)
        said = dict(about or {})
        if ENCODED not in said and self._compress == "auto" and self.rate is not None:
            self.decision = decide(tensors, self.rate.bytes_per_second)
            if self.decision.is_on:
                known = self.look(key)
                if known is not None and known.digest == _digest(tensors):
                    self._ledger.count("puts_known")
                    return known
                said[ENCODED] = {
                    "nbytes": sum(part.nbytes for part in tensors),
                    "sha256": _digest(tensors),
                }
                tensors = [compress(tensors)]
        entry = super().put(key, tensors, kind=kind, about=said)
        return None if entry is None else _plain(entry)

    def missed(self) -> None:
        """What was asked for was not here."""
        self._ledger.count("misses")

    # -- locks ------------------------------------------------------------------------------------

    def moving(self, *, wait: bool = True) -> AbstractContextManager[bool]:
        """While inside nobody else moves an entry into this tier or out of it; whether that is so
        (see `work_locks`).
        """
        return self._locked("moves.lock", 0, wait)

    def fetching(self, number: int) -> AbstractContextManager[bool]:
        """While inside nobody else fetches what has this number."""
        return self._locked("fetch.lock", number, True)

    def _locked(self, name: str, number: int, wait: bool) -> AbstractContextManager[bool]:
        mode = self._zones[0].folder.file_mode
        return locked(self.folder / name, number, wait=wait, mode=mode)

    # -- down -------------------------------------------------------------------------------------

    def _let_go(self, zone: Zone, digest: bytes) -> Fate:
        if self._below is None or not zone.is_writable:
            return zone.evict(digest)
        with holds.lock():
            if holds.is_held(zone.folder.blob(digest)):
                return Fate.HELD
        # Else somebody who sees both copies could take the lower one while the upper one goes.
        with self._below.moving():
            self._hand_down(zone, digest)
            return zone.evict(digest)

    def _hand_down(self, zone: Zone, digest: bytes) -> None:
        assert self._below is not None
        rows = zone.index.rows_of(digest)
        if not rows:
            return
        try:
            payload, _ = zone.read(digest, rows[0].nbytes, None)
        except FileNotFoundError:
            return  # another process was quicker
        except (CorruptCheckpoint, ReadError) as error:
            self._ledger.fail_reading(error)
            return
        moved = None
        for entry in map(zone.entry, rows):
            # As it is: what is compressed stays so.
            taken = self._below.put(entry.key, [payload], kind=entry.kind, about=entry.about)
            moved = moved or taken
        if moved is not None:
            self._on_moved(moved.nbytes)


def _plain(entry: Entry) -> Entry:
    """As a caller sees it."""
    said = entry.about.get(ENCODED)
    if not isinstance(said, dict):
        return entry
    if [type(said.get(name)) for name in ("nbytes", "sha256")] != [int, str]:
        return entry  # a stranger's word
    about = {name: value for name, value in entry.about.items() if name != ENCODED}
    changed = replace(entry, about=about, nbytes=said["nbytes"], digest=said["sha256"])
    return PackedEntry(**vars(changed), stored=entry)


def _stored(entry: Entry) -> Entry:
    return entry.stored if isinstance(entry, PackedEntry) else entry


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    sha256 = hashlib.sha256()
    for tensor in tensors:
        sha256.update(view_of(tensor))
    return sha256.hexdigest()
