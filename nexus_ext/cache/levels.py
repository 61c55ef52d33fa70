"""Which tier has a key, and what moves between them.

Owns who has a key when two tiers have it (the faster one). A move is a copy, whole and verified,
and then the end of the original: whoever dies between the two loses nothing.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nexus_ext.cache.level import Level, LevelOptions
from nexus_ext.cache.report import Entry
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError

__all__ = ["Levels", "Tier"]

# Keys that were used once are remembered up to here, the latest ones.
_MOST_TOUCHED = 1 << 16


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


class Levels:
    """The tiers of a store. Thread-safe.

    Attributes:
        all: Fastest first.
    """

    def __init__(self, tiers: Sequence[Tier], options: LevelOptions) -> None:
        """Open all of them, or none stays open. Raises ConfigError."""
        self._lock = threading.Lock()  # of what follows
        self._counts: Counter[str] = Counter()
        self._hits: Counter[Path] = Counter()
        self._touched: OrderedDict[tuple[Path, str], None] = OrderedDict()
        self.all: list[Level] = []
        try:
            for tier in reversed(tiers):
                self.all.insert(0, self._open(tier, options))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """May be called twice."""
        for level in self.all:
            level.close()

    def _open(self, tier: Tier, options: LevelOptions) -> Level:
        if tier.compress not in ("auto", "off"):
            raise ConfigError(f"compress of a tier is auto or off, got {tier.compress!r}.")
        return Level(
            Path(tier.path),
            tier.max_bytes,
            self.all[0] if self.all else None,
            self._demoted,
            options,
            compress=tier.compress,
            write_budget_bytes_per_day=tier.write_budget_bytes_per_day,
        )

    # -- finding ----------------------------------------------------------------------------------

    def find(self, key: str) -> Entry | None:
        """In the fastest tier that has it; a copy below goes.

        Looks twice: what moves up while the tiers are gone through from above can be missed once.
        """
        for _ in range(2):
            found = [entry for level in self.all if (entry := level.look(key)) is not None]
            if found:
                for other in found[1:]:
                    self.settle(found[0], other)
                return found[0]
        return None

    def use(self, key: str) -> tuple[Entry, bool] | None:
        """As `_find`, and it counts; whether it was used before."""
        found = self.find(key)
        entry = None if found is None else self.of(found.folder).get(key)
        if entry is None:
            return None
        for level in self.all:
            if level.folder == entry.folder:
                break
            level.missed()
        self.count_hit(entry.folder)
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

    def of(self, folder: Path) -> Level:
        """The tier on a folder. Raises ConfigError."""
        for level in self.all:
            if level.folder == folder:
                return level
        raise ConfigError(
            f"An entry is read by a store that has its folder; {folder} is none of "
            f"{', '.join(str(level.folder) for level in self.all)}."
        )

    def keep(
        self, key: str, tensors: Sequence[torch.Tensor], kind: str, about: Mapping[str, Any]
    ) -> Entry | None:
        """In the fastest tier that takes it; where the key is known, in its tier."""
        known = self.find(key)
        levels = self.all if known is None else [self.of(known.folder)]
        for level in levels:
            entry = level.put(key, tensors, kind=kind, about=about)
            if entry is not None:
                return entry
        return None

    # -- moving -----------------------------------------------------------------------------------

    def promote(self, entry: Entry, payload: torch.Tensor | None) -> Entry:
        """Move an entry one tier up, with all its keys; where it is then. Stays if it is held, if
        it cannot be read, or if the tier above will not take it.
        """
        level = self.of(entry.folder)
        position = self.all.index(level)
        if position == 0 or level.is_held(entry):
            return entry
        if payload is None:
            try:
                payload = level.read(entry)
            except (CorruptCheckpoint, ReadError):
                return entry  # who reads it is told
        above = self.all[position - 1]
        copies = {
            one.key: above.put(one.key, [payload], kind=one.kind, about=one.about)
            for one in level.keys_of(entry)
        }
        copy = copies.get(entry.key)
        if copy is None or None in copies.values():
            return entry
        if not self._end_original(copy, entry):
            return self.find(entry.key) or entry
        with self._lock:
            self._touched.pop((entry.folder, entry.digest), None)
        self.count("promotions")
        self.count("promoted_bytes", entry.nbytes)
        return copy

    def _demoted(self, nbytes: int) -> None:
        self.count("demotions")
        self.count("demoted_bytes", nbytes)

    def _end_original(self, copy: Entry, original: Entry) -> bool:
        """Of what was moved up the original goes. False if its key got other bytes meanwhile: then
        it is the copy that goes.
        """
        above, below = self.of(copy.folder), self.of(original.folder)
        with below.moving() as is_mine:
            now = below.look(original.key)
            if now is not None and now.digest != original.digest:
                above.evict(copy.key)
                return False
            if is_mine and above.look(copy.key) is not None:
                below.evict(original.key)
        return True

    def settle(self, upper: Entry, lower: Entry) -> None:
        """Of two copies the lower one goes, unless somebody is just moving."""
        below = self.of(lower.folder)
        with below.moving(wait=False) as is_mine:
            if not is_mine or self.of(upper.folder).look(upper.key) is None:
                return
            if below.evict(lower.key):
                self.count("settled")

    # -- counting ---------------------------------------------------------------------------------

    def miss(self) -> None:
        """No tier has what was asked for."""
        self.count("misses")
        for level in self.all:
            level.missed()

    def count(self, name: str, number: int = 1) -> None:
        """Add to a counter of TieredStats."""
        with self._lock:
            self._counts[name] += number

    def count_hit(self, folder: Path, number: int = 1) -> None:
        """A tier had what was asked for."""
        with self._lock:
            self._hits[folder] += number

    def counts(self) -> Counter[str]:
        """The counters, as they are now."""
        with self._lock:
            return Counter(self._counts)

    def hits(self, folder: Path) -> int:
        """Of one tier."""
        return self._hits[folder]
