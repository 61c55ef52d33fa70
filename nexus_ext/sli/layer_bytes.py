"""The bytes of layers by key: in memory, on the disk side, and in a store of all nodes behind it.

    keep ─▶ disk side, memory              find ◀─ memory ◀─ disk side ◀─ remote store

A key leads to a digest, and a digest to bytes that never change: memory, which knows digests alone,
cannot be out of date.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

from nexus_ext.cache.blob import view_of
from nexus_ext.cache.ram import RamTier
from nexus_ext.cache.report import Entry
from nexus_ext.cache.shared_folder import default_folder
from nexus_ext.errors import CorruptCheckpoint, ReadError
from nexus_ext.sli.disk_side import DiskOptions, open_disk, open_ledger, report_of

__all__ = ["Found", "LayerBytes"]

Found: TypeAlias = "tuple[torch.Tensor, str, str]"
"""The payload, where it came from ("memory", "ssd", "remote"), and its digest."""

# What a layer's entry says of itself. One that says more is in a form that only the store of
# several tiers reads which wrote it.
_ABOUT = {"model", "layer"}


class LayerBytes:
    """Payloads of layers. Thread-safe; not for use in a forked child.

    Attributes:
        disk: The disk side; None where nothing is kept on disk.
        ram: The memory tier.
    """

    def __init__(self, options: DiskOptions, max_ram_bytes: int, shares_memory: bool) -> None:
        """Open both sides. Raises as `open_disk`."""
        self.disk = open_disk(options)
        self._remote = options.remote
        self._ledger = open_ledger(self.disk, options)
        folders = "\n".join(str(folder.resolve()) for folder in options.folders)
        self.ram = RamTier(max_ram_bytes, folder=default_folder(folders), shared=shares_memory)
        self._only_in_memory: dict[str, str] = {}
        # Who looks holds an entry for a moment, and what is held cannot be removed.
        self._looking = threading.Lock()

    def keep(self, key: str, parts: Sequence[torch.Tensor], about: Mapping[str, Any]) -> None:
        """Keep a layer wherever there is room; what lay under its key goes."""
        entry = None if self.disk is None else self.disk.put(key, parts, about=about)
        digest = _digest_of(parts) if entry is None else entry.digest
        self.ram.put(digest, parts)
        self._only_in_memory.pop(key, None)
        if entry is None:
            # What lies on disk under this key, and perhaps cannot be removed, is another layer.
            self._only_in_memory[key] = digest
            self._evict(key)

    def find(self, key: str) -> Found | None:
        """A layer, from the nearest that has it; memory keeps it then, if there is room."""
        return self._in_memory_only(key) or self._near(key) or self._far(key)

    def forget(self, key: str) -> bool:
        """Whether there was one. The remote store keeps what it has."""
        digest = self._only_in_memory.pop(key, None)
        entry = self._look(key)
        for name in {digest, entry.digest if entry else None} - {None}:
            self.ram.evict(str(name))
        return self._evict(key) or digest is not None or entry is not None

    def clear(self) -> None:
        """Forget all, but for what the remote store has."""
        self._only_in_memory.clear()
        self.ram.clear()
        if self.disk is not None:
            self.disk.clear()

    def all_keys(self) -> set[str]:
        """Of all layers that are here."""
        on_disk = self.disk.entries() if self.disk is not None else []
        return {entry.key for entry in on_disk} | self._only_in_memory.keys()

    def count(self, name: str, number: int) -> None:
        """See `LayerCache.count`."""
        if self._ledger is not None:
            self._ledger.count(name, number)

    def report(self) -> dict[str, Any]:
        """Its part of `LayerCache.get_stats`."""
        ram = self.ram.stats()
        report: dict[str, Any] = {
            "memory_mode": ram.effective,
            "memory_bytes": ram.nbytes,
            "memory_evictions": ram.evictions,
            "memory_corruptions": ram.corrupt,
            "memory_refused": ram.refused,
            "ssd_evictions": 0,
        }
        if self.disk is not None:
            report |= report_of(self.disk)
        return report | {"evictions": ram.evictions + report["ssd_evictions"]}

    def close(self) -> None:
        """Let go. May be called twice."""
        self.ram.close()
        for disk in (self._ledger, self.disk):
            if disk is not None:
                disk.close()

    # -- finding -----------------------------------------------------------------------------

    def _in_memory_only(self, key: str) -> Found | None:
        """A layer that the disk did not take."""
        digest = self._only_in_memory.get(key)
        payload = None if digest is None else self.ram.load(digest)
        return None if payload is None or digest is None else (payload, "memory", digest)

    def _near(self, key: str) -> Found | None:
        """From memory or disk. What cannot be believed or read is gone from its tier then."""
        entry = self._entry(key)
        if entry is None:
            return None
        payload = self.ram.load(entry.digest)
        if payload is not None:
            return payload, "memory", entry.digest
        payload = self._read(entry)
        return None if payload is None else (payload, "ssd", entry.digest)

    def _far(self, key: str) -> Found | None:
        """From the remote store: into a tier, and into memory."""
        if self.disk is None or self._remote is None:
            return None
        payload = self.disk.load(key)
        if payload is None:
            return None
        digest = _digest_of([payload])
        if self._only_in_memory.get(key, digest) != digest:
            return None  # it was replaced here, and no disk took that
        kept = self.ram.put(digest, [payload])
        return payload if kept is None else kept, "remote", digest

    def _entry(self, key: str) -> Entry | None:
        """What lies on disk, which counts as used now; the remote store is not asked."""
        if self.disk is None or key in self._only_in_memory:
            return None
        if self._remote is not None and self._look(key) is None:
            return None
        entry = self.disk.get(key)
        return entry if entry is not None and entry.about.keys() <= _ABOUT else None

    def _look(self, key: str) -> Entry | None:
        """What lies on disk; nothing is counted, moved or fetched."""
        if self.disk is None:
            return None
        with self._looking, self.disk.hold(key) as entry:
            return entry

    def _evict(self, key: str) -> bool:
        with self._looking:
            return self.disk is not None and self.disk.evict(key)

    def _read(self, entry: Entry) -> torch.Tensor | None:
        """From disk into the RAM tier, or past it; None where it cannot be believed or read."""
        disk = self.disk
        assert disk is not None

        def fill(memory: torch.Tensor) -> None:
            disk.read(entry, memory)

        try:
            payload = self.ram.fill(entry.digest, entry.nbytes, fill)
            return disk.read(entry) if payload is None else payload
        except (CorruptCheckpoint, ReadError):
            return None  # the disk side counted it and set it aside


def _digest_of(parts: Sequence[torch.Tensor]) -> str:
    sha256 = hashlib.sha256()
    for part in parts:
        sha256.update(view_of(part))
    return sha256.hexdigest()
