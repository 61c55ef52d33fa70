"""Several tiers as one: fast folders above slow ones, and a store of all nodes behind them.

    put ─▶ the fastest that takes it ──no room──▶ the next ──no room──▶ gone
    get ◀─ the fastest that has it   ◀──used twice── the next    ◀── once ── remote store

Owns who has a key when two tiers have it (the faster one), and what moves when. A move is a copy,
whole and verified, and then the end of the original: whoever dies between the two loses nothing.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch

from nexus_ext.cache.blob import Part, tensors_of
from nexus_ext.cache.level import ENCODED, Level, LevelOptions
from nexus_ext.cache.rates import MAX_AGE_SECONDS
from nexus_ext.cache.remote import RemoteStore
from nexus_ext.cache.remote_object import Note
from nexus_ext.cache.report import Entry, VerifyReport
from nexus_ext.cache.tier_report import TieredStats, TierStats
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError

__all__ = ["Tier", "TieredStore"]

# Keys that were used once are remembered up to here, the latest ones.
_MOST_TOUCHED = 1 << 16
_NUM_LOCKS = 1 << 20
# Two measurements of one disk differed by less.
_NOISE = 1.5


@dataclass(frozen=True)
class Tier:
    """One folder of a store.

    Attributes:
        path: The folder: on NVMe, an SSD, a hard disk, a network mount.
        max_bytes: Of its disk ("50GB").
        compress: "auto" compresses what is read faster so, by its measured rate; "off" does not.
        write_budget_bytes_per_day: As of DiskTier.
    """

    path: str | Path
    max_bytes: int | str
    compress: Literal["auto", "off"] = "auto"
    write_budget_bytes_per_day: int | str | None = None


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
        self._lock = threading.Lock()  # of what follows
        self._counts: Counter[str] = Counter()
        self._hits: Counter[Path] = Counter()
        self._touched: OrderedDict[tuple[Path, str], None] = OrderedDict()
        self._levels: list[Level] = []
        options = LevelOptions(shared, io, use_uring, max_rate_age_seconds)
        try:
            for tier in reversed(tiers):
                self._levels.insert(0, self._open(tier, options))
        except BaseException:
            self.close()
            raise

    def _open(self, tier: Tier, options: LevelOptions) -> Level:
        if tier.compress not in ("auto", "off"):
            raise ConfigError(f"compress of a tier is auto or off, got {tier.compress!r}.")
        return Level(
            Path(tier.path),
            tier.max_bytes,
            self._levels[0] if self._levels else None,
            self._demoted,
            options,
            compress=tier.compress,
            write_budget_bytes_per_day=tier.write_budget_bytes_per_day,
        )

    # -- looking ----------------------------------------------------------------------------------

    def get(self, key: str) -> Entry | None:
        """What lies under a key, which counts as used now; moved up if it was used before, fetched
        if only the remote store has it. None too where no tier would keep what was fetched.

        Raises:
            MissingExtra: The remote object is compressed, and zstandard is not installed.
        """
        used = self._use(key)
        if used is not None:
            entry, is_second = used
            return self._promote(entry, None) if is_second else entry
        return self._fetch(key, None)[0]

    def read(self, entry: Entry, out: torch.Tensor | None = None) -> torch.Tensor:
        """As DiskTier.read, from wherever its bytes are by now."""
        level = self._level_of(entry.folder)
        try:
            return level.read(entry, out)
        except ReadError:
            moved = self._find(entry.key)
            if moved is None or moved.digest != entry.digest or moved.folder == entry.folder:
                raise
            return self._level_of(moved.folder).read(moved, out)

    def load(self, key: str, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """`get` and `read`: None where there is nothing, or nothing that can be believed or read.

        Raises:
            ConfigError: Another `out`.
            MissingExtra: As `get`.
        """
        # What cannot be read is gone from its tier: a slower one may have it.
        for _ in range(len(self._levels) + 2):
            used = self._use(key)
            if used is None:
                break
            entry, is_second = used
            try:
                payload = self._level_of(entry.folder).read(entry, out)
            except (CorruptCheckpoint, ReadError):  # counted there
                self._count_hit(entry.folder, -1)
                continue
            if is_second:
                self._promote(entry, payload)
            return payload
        return self._fetch(key, out)[1]

    @contextmanager
    def hold(self, key: str) -> Iterator[Entry | None]:
        """As DiskTier.hold; what is held does not move either."""
        found = self._find(key)
        if found is None:
            yield None
            return
        with self._level_of(found.folder).hold(key) as entry:
            yield entry

    def entries(self) -> list[Entry]:
        """All of them, the one used longest ago first; a second copy is removed, and not listed."""
        kept: dict[str, Entry] = {}
        for level in self._levels:
            for entry in level.entries():
                if entry.key not in kept:
                    kept[entry.key] = entry
                else:
                    self._settle(kept[entry.key], entry)
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
        entry = self._keep(key, tensors, kind, about or {})
        if self._publish and self._remote is not None:
            note = self._remote.publish(key, tensors, kind=kind, about=about)
            self._count("published", note is not None)
        return entry

    def evict(self, key: str) -> bool:
        """As DiskTier.evict, in all tiers. The remote store keeps what it has."""
        found = [level.look(key) is not None and level.evict(key) for level in self._levels]
        return any(found) and self._find(key) is None

    def clear(self) -> int:
        """As DiskTier.clear, in all tiers."""
        return sum(level.clear() for level in self._levels)

    def verify(self) -> VerifyReport:
        """As DiskTier.verify, of all tiers."""
        found = [level.verify() for level in self._levels]
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
            TierStats(one.folder, one.rate, self._hits[one.folder], one.decision, one.stats())
            for one in self._levels
        )
        rates = [tier.rate.bytes_per_second for tier in tiers if tier.rate is not None]
        with self._lock:
            counts = Counter(self._counts)
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
        for level in self._levels:
            level.close()

    def __enter__(self) -> TieredStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- finding ----------------------------------------------------------------------------------

    def _find(self, key: str) -> Entry | None:
        """In the fastest tier that has it; a copy below goes.

        Looks twice: what moves up while the tiers are gone through from above can be missed once.
        """
        for _ in range(2):
            found = [entry for level in self._levels if (entry := level.look(key)) is not None]
            if found:
                for other in found[1:]:
                    self._settle(found[0], other)
                return found[0]
        return None

    def _use(self, key: str) -> tuple[Entry, bool] | None:
        """As `_find`, and it counts; whether it was used before."""
        found = self._find(key)
        entry = None if found is None else self._level_of(found.folder).get(key)
        if entry is None:
            return None
        for level in self._levels:
            if level.folder == entry.folder:
                break
            level.missed()
        self._count_hit(entry.folder)
        return entry, self._touch(entry) or entry.uses > 0

    def _touch(self, entry: Entry) -> bool:
        """Whether it was touched before here, where it lies now."""
        mark = (entry.folder, entry.digest)
        with self._lock:
            was_there = mark in self._touched
            self._touched[mark] = None
            self._touched.move_to_end(mark)
            if len(self._touched) > _MOST_TOUCHED:
                self._touched.popitem(last=False)
        return was_there

    def _level_of(self, folder: Path) -> Level:
        for level in self._levels:
            if level.folder == folder:
                return level
        raise ConfigError(
            f"An entry is read by a store that has its folder; {folder} is none of "
            f"{', '.join(str(level.folder) for level in self._levels)}."
        )

    # -- moving -----------------------------------------------------------------------------------

    def _promote(self, entry: Entry, payload: torch.Tensor | None) -> Entry:
        """Move an entry one tier up, with all its keys; where it is then. Stays if it is held, if
        it cannot be read, or if the tier above will not take it.
        """
        level = self._level_of(entry.folder)
        position = self._levels.index(level)
        if position == 0 or level.is_held(entry):
            return entry
        if payload is None:
            try:
                payload = level.read(entry)
            except (CorruptCheckpoint, ReadError):
                return entry  # who reads it is told
        above = self._levels[position - 1]
        copies = {
            one.key: above.put(one.key, [payload], kind=one.kind, about=one.about)
            for one in level.keys_of(entry)
        }
        copy = copies.get(entry.key)
        if copy is None or None in copies.values():
            return entry
        if not self._end_original(copy, entry):
            return self._find(entry.key) or entry
        with self._lock:
            self._touched.pop((entry.folder, entry.digest), None)
        self._count("promotions")
        self._count("promoted_bytes", entry.nbytes)
        return copy

    def _demoted(self, nbytes: int) -> None:
        self._count("demotions")
        self._count("demoted_bytes", nbytes)

    def _end_original(self, copy: Entry, original: Entry) -> bool:
        """Of what was moved up the original goes. False if its key got other bytes meanwhile: then
        it is the copy that goes.
        """
        above, below = self._level_of(copy.folder), self._level_of(original.folder)
        with below.moving() as is_mine:
            now = below.look(original.key)
            if now is not None and now.digest != original.digest:
                above.evict(copy.key)
                return False
            if is_mine and above.look(copy.key) is not None:
                below.evict(original.key)
        return True

    def _settle(self, upper: Entry, lower: Entry) -> None:
        """Of two copies the lower one goes, unless somebody is just moving."""
        below = self._level_of(lower.folder)
        with below.moving(wait=False) as is_mine:
            if not is_mine or self._level_of(upper.folder).look(upper.key) is None:
                return
            if below.evict(lower.key):
                self._count("settled")

    def _keep(
        self, key: str, tensors: Sequence[torch.Tensor], kind: str, about: Mapping[str, Any]
    ) -> Entry | None:
        known = self._find(key)
        levels = self._levels if known is None else [self._level_of(known.folder)]
        for level in levels:
            entry = level.put(key, tensors, kind=kind, about=about)
            if entry is not None:
                return entry
        return None

    # -- the remote store -------------------------------------------------------------------------

    def _fetch(
        self, key: str, out: torch.Tensor | None
    ) -> tuple[Entry | None, torch.Tensor | None]:
        """From the remote store into a tier, once for all threads and processes that ask: its
        entry, if a tier kept it, and its bytes.
        """
        if self._remote is None:
            self._miss()
            return None, None
        with self._levels[0].fetching(_number_of(key)):
            joined = self._join(key, out)
            if joined is not None:
                return joined
            self._miss()
            found = self._remote.fetch(key, out)
            if found is None:
                return None, None
            note, payload = found
            self._count("fetched")
            self._count("fetched_bytes", note.nbytes)
            return self._keep_fetched(note, payload), payload

    def _keep_fetched(self, note: Note, payload: torch.Tensor) -> Entry | None:
        # What only a tier may say of an entry is not taken from a note.
        about = {name: value for name, value in note.about.items() if name != ENCODED}
        try:
            return self._keep(note.key, [payload], note.kind, about)
        except ConfigError:
            return None  # a description that is more than a tier keeps: it is served, and not kept

    def _join(self, key: str, out: torch.Tensor | None) -> tuple[Entry, torch.Tensor] | None:
        """What somebody else fetched while this one waited."""
        used = self._use(key)
        if used is None:
            return None
        try:
            payload = self._level_of(used[0].folder).read(used[0], out)
        except (CorruptCheckpoint, ReadError):  # counted there
            self._count_hit(used[0].folder, -1)
            return None
        self._count("joined")
        return used[0], payload

    # -- counting ---------------------------------------------------------------------------------

    def _miss(self) -> None:
        self._count("misses")
        for level in self._levels:
            level.missed()

    def _count(self, name: str, number: int = 1) -> None:
        with self._lock:
            self._counts[name] += number

    def _count_hit(self, folder: Path, number: int = 1) -> None:
        with self._lock:
            self._hits[folder] += number


def _is_ordered(rates: Sequence[float]) -> bool:
    """Fastest first, but for what two measurements of one disk may differ by."""
    return all(below <= _NOISE * above for above, below in itertools.pairwise(rates))


def _number_of(key: str) -> int:
    """The same in every process; two keys with one number only wait for each other."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little") % _NUM_LOCKS
