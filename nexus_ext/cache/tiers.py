"""Several tiers as one: fast folders above slow ones, and a store of all nodes behind them.

    put ─▶ the fastest that takes it ──no room──▶ the next ──no room──▶ gone
    get ◀─ the fastest that has it   ◀──used twice── the next    ◀── once ── remote store

Owns the face of a store, and what is asked of the remote one. What moves when: see `levels`.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from nexus_ext.cache.blob import Part, tensors_of
from nexus_ext.cache.level import ENCODED, LevelOptions
from nexus_ext.cache.levels import Levels, Tier
from nexus_ext.cache.rates import MAX_AGE_SECONDS
from nexus_ext.cache.remote import RemoteStore
from nexus_ext.cache.remote_object import Note
from nexus_ext.cache.report import Entry, VerifyReport
from nexus_ext.cache.tier_report import TieredStats, TierStats
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError

__all__ = ["Tier", "TieredStore"]

_NUM_LOCKS = 1 << 20
# Two measurements of one disk differed by less.
_NOISE = 1.5


class TieredStore:
    """Keeps bytes under keys in tiers. Use it as a DiskTier; threads and processes may share it.

    A key names bytes that do not change.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        remote: RemoteStore | None = None,
        publish: bool = False,
        shared: bool = False,
        io: Literal["direct", "buffered"] = "direct",
        use_uring: bool = True,
        max_rate_age_seconds: float = MAX_AGE_SECONDS,
    ) -> None:
        """Open the folders. Measures the rate of those that have none or an old one: 8 MiB are
        written and read twice.

        Args:
            tiers: Fastest first; `stats` says whether the measured rates agree.
            remote: Asked for what no tier has; what it gives is kept in the first one.
            publish: Whether what is put goes into the remote store too.
            shared, io, use_uring: As of DiskTier.
            max_rate_age_seconds: When a rate is old.

        Raises:
            ConfigError: No tiers, a folder twice, or an option or folder that cannot be.
        """
        folders = [Path(tier.path).expanduser().resolve() for tier in tiers]
        if not folders or len(set(folders)) != len(folders):
            raise ConfigError(
                "A store needs tiers, each with a folder of its own; got "
                f"{', '.join(map(str, folders)) or 'none'}."
            )
        self._remote = remote
        self._publish = publish
        self._levels = Levels(tiers, LevelOptions(shared, io, use_uring, max_rate_age_seconds))

    # -- looking ----------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """What lies under a key, which counts as used now; moved up if it was used before, fetched
        if only the remote store has it. None too where no tier would keep what was fetched.

        Raises:
            MissingExtra: The remote object is compressed, and zstandard is not installed.
        """
        used = self._levels.use(key)
        if used is not None:
            entry, is_second = used
            return self._levels.promote(entry, None) if is_second else entry
        return self._fetch(key, None)[0]

    def read(self, entry: Entry, out: torch.Tensor | None = None) -> torch.Tensor:
        """As DiskTier.read, from wherever its bytes are by now."""
        level = self._levels.of(entry.folder)
        try:
            return level.read(entry, out)
        except ReadError:
            moved = self._levels.find(entry.key)
            if moved is None or moved.digest != entry.digest or moved.folder == entry.folder:
                raise
            return self._levels.of(moved.folder).read(moved, out)

    def load(self, key: str, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """`get` and `read`: None where there is nothing, or nothing that can be believed or read.

        Raises:
            ConfigError: Another `out`.
            MissingExtra: As `get`.
        """
        # What cannot be read is gone from its tier: a slower one may have it.
        for _ in range(len(self._levels.all) + 2):
            used = self._levels.use(key)
            if used is None:
                break
            entry, is_second = used
            try:
                payload = self._levels.of(entry.folder).read(entry, out)
            except (CorruptCheckpoint, ReadError):  # counted there
                self._levels.count_hit(entry.folder, -1)
                continue
            if is_second:
                self._levels.promote(entry, payload)
            return payload
        return self._fetch(key, out)[1]

    @contextmanager
    def hold(self, key: str) -> Iterator[Entry | None]:
        """As DiskTier.hold; what is held does not move either."""
        found = self._levels.find(key)
        if found is None:
            yield None
            return
        with self._levels.of(found.folder).hold(key) as entry:
            yield entry

    def entries(self) -> list[Entry]:
        """All of them, the one used longest ago first; a second copy is removed, and not listed."""
        kept: dict[str, Entry] = {}
        for level in self._levels.all:
            for entry in level.entries():
                if entry.key not in kept:
                    kept[entry.key] = entry
                else:
                    self._levels.settle(kept[entry.key], entry)
        return sorted(kept.values(), key=lambda entry: entry.used_seconds)

    # -- changing ---------------------------------------------------------------------------------

    def put(
        self,
        key: str,
        parts: Sequence[Part],
        *,
        kind: str = "layer",
        about: Mapping[str, Any] | None = None,
    ) -> Entry | None:
        """As DiskTier.put, in the fastest tier that takes it; where the key is known, in its tier.

        Raises:
            ConfigError: Parts or descriptions that cannot be kept.
        """
        tensors = tensors_of(parts)
        if ENCODED in (about or {}):
            raise ConfigError(
                f"{ENCODED!r} is what the store says itself; say it under another name."
            )
        entry = self._levels.keep(key, tensors, kind, about or {})
        if self._publish and self._remote is not None:
            note = self._remote.publish(key, tensors, kind=kind, about=about)
            self._levels.count("published", note is not None)
        return entry

    def evict(self, key: str) -> bool:
        """As DiskTier.evict, in all tiers. The remote store keeps what it has."""
        found = [level.look(key) is not None and level.evict(key) for level in self._levels.all]
        return any(found) and self._levels.find(key) is None

    def clear(self) -> int:
        """As DiskTier.clear, in all tiers."""
        return sum(level.clear() for level in self._levels.all)

    def verify(self) -> VerifyReport:
        """As DiskTier.verify, of all tiers."""
        found = [level.verify() for level in self._levels.all]
        return VerifyReport(
            sum(one.num_blobs for one in found),
            sum(one.nbytes for one in found),
            tuple(bad for one in found for bad in one.bad),
            sum(one.num_adopted for one in found),
            sum(one.num_missing for one in found),
        )

    # -- the whole --------------------------------------------------------------------------------

    def stats(self) -> TieredStats:
        """Counters, the state of every tier, and the rates that were measured."""
        num_entries = len(self.entries())
        tiers = tuple(
            TierStats(
                one.folder, one.rate, self._levels.hits(one.folder), one.decision, one.stats()
            )
            for one in self._levels.all
        )
        rates = [tier.rate.bytes_per_second for tier in tiers if tier.rate is not None]
        counts = self._levels.counts()
        gone = sum(tier.disk.evictions for tier in tiers)
        return TieredStats(
            tiers=tiers,
            is_ordered=_is_ordered(rates),
            entries=num_entries,
            hits=sum(tier.hits for tier in tiers),
            misses=counts["misses"],
            promotions=counts["promotions"],
            promoted_bytes=counts["promoted_bytes"],
            demotions=counts["demotions"],
            demoted_bytes=counts["demoted_bytes"],
            dropped=gone - counts["demotions"],
            settled=counts["settled"],
            fetched=counts["fetched"],
            fetched_bytes=counts["fetched_bytes"],
            joined=counts["joined"],
            published=counts["published"],
            remote=None if self._remote is None else self._remote.stats(),
        )

    def close(self) -> None:
        """Close the tiers. May be called twice."""
        self._levels.close()

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- the remote store -------------------------------------------------------------------------

    def _fetch(
        self, key: str, out: torch.Tensor | None
    ) -> tuple[Entry | None, torch.Tensor | None]:
        """From the remote store into a tier, once for all threads and processes that ask: its
        entry, if a tier kept it, and its bytes.
        """
        if self._remote is None:
            self._levels.miss()
            return None, None
        with self._levels.all[0].fetching(_number_of(key)):
            joined = self._join(key, out)
            if joined is not None:
                return joined
            self._levels.miss()
            found = self._remote.fetch(key, out)
            if found is None:
                return None, None
            note, payload = found
            self._levels.count("fetched")
            self._levels.count("fetched_bytes", note.nbytes)
            return self._keep_fetched(note, payload), payload

    def _keep_fetched(self, note: Note, payload: torch.Tensor) -> Entry | None:
        # What only a tier may say of an entry is not taken from a note.
        about = {name: value for name, value in note.about.items() if name != ENCODED}
        try:
            return self._levels.keep(note.key, [payload], note.kind, about)
        except ConfigError:
            return None  # a description that is more than a tier keeps: it is served, and not kept

    def _join(self, key: str, out: torch.Tensor | None) -> tuple[Entry, torch.Tensor] | None:
        """What somebody else fetched while this one waited."""
        used = self._levels.use(key)
        if used is None:
            return None
        try:
            payload = self._levels.of(used[0].folder).read(used[0], out)
        except (CorruptCheckpoint, ReadError):  # counted there
            self._levels.count_hit(used[0].folder, -1)
            return None
        self._levels.count("joined")
        return used[0], payload


def _is_ordered(rates: Sequence[float]) -> bool:
    """Fastest first, but for what two measurements of one disk may differ by."""
    return all(below <= _NOISE * above for above, below in itertools.pairwise(rates))


def _number_of(key: str) -> int:
    """The same in every process; two keys with one number only wait for each other."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") % _NUM_LOCKS
