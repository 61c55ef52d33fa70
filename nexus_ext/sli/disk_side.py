"""The disk side of a `LayerCache`: one disk tier, or a store of several with another one of all
nodes behind it. Both have the same calls; owns which of them it is, and what it says of itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from nexus_ext.cache.disk import Admission, DiskTier
from nexus_ext.cache.remote import RemoteStore
from nexus_ext.cache.report import DiskStats
from nexus_ext.cache.tier_report import TieredStats, TierStats
from nexus_ext.cache.tiers import Tier, TieredStore
from nexus_ext.errors import ConfigError

__all__ = ["Disk", "DiskOptions", "open_disk", "open_ledger", "report_of"]

Disk: TypeAlias = "DiskTier | TieredStore"

# A ledger holds nothing: it must not make others' entries go.
_NO_LIMIT_BYTES = 1 << 62


@dataclass(frozen=True)
class DiskOptions:
    """What a user said about disks.

    Attributes:
        folders: Of one tier; none if there are `tiers`.
        max_bytes: Of that tier; 0 keeps nothing on disk.
        tiers: Several, fastest first.
        remote: Behind them.
        publish: Whether what is kept goes there too.
        admission, write_budget_bytes_per_day: Of one tier.
    """

    folders: Sequence[Path]
    max_bytes: int
    tiers: Sequence[Tier]
    remote: RemoteStore | None
    publish: bool
    admission: Admission
    write_budget_bytes_per_day: int | None


def open_disk(options: DiskOptions) -> Disk | None:
    """Open what was asked for; None where that is nothing.

    Raises:
        ConfigError: Options that exclude each other, or a folder that cannot be used.
    """
    _check(options)
    if options.tiers:
        return TieredStore(options.tiers, remote=options.remote, publish=options.publish)
    if not options.max_bytes:
        return None
    budget = options.write_budget_bytes_per_day
    if options.remote is None:
        return DiskTier(
            options.folders,
            options.max_bytes,
            write_budget_bytes_per_day=budget,
            admission=options.admission,
        )
    # Plain, so that the same folder can be used without the remote store.
    tier = Tier(options.folders[0], options.max_bytes, "off", budget)
    return TieredStore([tier], remote=options.remote, publish=options.publish)


def _check(options: DiskOptions) -> None:
    is_tiered = bool(options.tiers) or options.remote is not None
    if options.publish and options.remote is None:
        raise ConfigError("publish=True needs a store to publish to, got none; pass remote=URL.")
    if options.remote is not None and not options.tiers and not options.max_bytes:
        raise ConfigError(
            "What a remote store gives is kept on disk here; got max_cache_size_gb=0. Allow it "
            "some room, or pass tiers."
        )
    if is_tiered and options.admission != "always":
        raise ConfigError(
            f"admission={options.admission!r} is for one disk tier, got several or a remote store. "
            "Give tiers a write_budget_bytes_per_day instead."
        )
    if options.tiers and options.write_budget_bytes_per_day is not None:
        raise ConfigError(
            "Each of several tiers has a write budget of its own; got write_budget_gb_per_day. "
            "Pass Tier(..., write_budget_bytes_per_day=...)."
        )
    if options.remote is not None and not options.tiers and len(options.folders) > 1:
        raise ConfigError(
            f"Behind several folders a remote store needs tiers, got {len(options.folders)} "
            "folders. Pass tiers=[Tier(...), ...], fastest first."
        )


def open_ledger(disk: Disk | None, options: DiskOptions) -> DiskTier | None:
    """Where counters are kept that outlive processes: with the only tier, or with the first."""
    if disk is None or isinstance(disk, DiskTier):
        return disk
    first = options.tiers[0].path if options.tiers else options.folders[0]
    return DiskTier(Path(first).expanduser(), _NO_LIMIT_BYTES)


def report_of(disk: Disk) -> dict[str, Any]:
    """Its part of `LayerCache.get_stats`."""
    stats = disk.stats()
    if isinstance(stats, DiskStats):
        name = ", ".join(str(zone.folder) for zone in stats.zones)
        tiers, gone = [_tier(name, stats.hits, stats)], stats.evictions
        sums = _sums([stats])
    else:
        tiers, gone = [_measured(tier) for tier in stats.tiers], stats.dropped
        sums = _sums([tier.disk for tier in stats.tiers])
    return (
        sums
        | _moves(stats)
        | _remote(stats)
        | {
            "ssd_evictions": gone,
            "tiers": tiers,
            "ssd": stats,
        }
    )


def _sums(disks: Sequence[DiskStats]) -> dict[str, Any]:
    payload = sum(disk.payload_bytes for disk in disks)
    written = sum(disk.written_bytes for disk in disks)
    return {
        "ssd_bytes": sum(disk.stored_bytes for disk in disks),
        "ssd_corruptions": sum(disk.corruptions for disk in disks),
        "ssd_read_bytes": sum(disk.read_bytes for disk in disks),
        "written_bytes": written,
        "write_amplification": written / payload if payload else 0.0,
        "ssd_error": next((disk.last_error for disk in disks if disk.last_error), ""),
    }


def _tier(name: str, hits: int, disk: DiskStats) -> dict[str, Any]:
    return {
        "folder": name,
        "hits": hits,
        "bytes": disk.stored_bytes,
        "read_bytes": disk.read_bytes,
        "written_bytes": disk.written_bytes,
        "evictions": disk.evictions,
        "bytes_per_second": None,
        "compression": "",
    }


def _measured(tier: TierStats) -> dict[str, Any]:
    return _tier(str(tier.folder), tier.hits, tier.disk) | {
        "bytes_per_second": tier.rate.bytes_per_second if tier.rate else None,
        "compression": tier.decision.why if tier.decision else "",
    }


def _moves(stats: DiskStats | TieredStats) -> dict[str, Any]:
    names = ("promotions", "promoted_bytes", "demotions", "demoted_bytes")
    moves: dict[str, Any] = {name: getattr(stats, name, 0) for name in names}
    return moves | {"moved_bytes": moves["promoted_bytes"] + moves["demoted_bytes"]}


def _remote(stats: DiskStats | TieredStats) -> dict[str, Any]:
    """Bytes are those on the wire."""
    remote = None if isinstance(stats, DiskStats) else stats.remote
    if remote is None:
        return {"remote_bytes": 0, "published_bytes": 0, "remote_refused": 0, "remote_error": ""}
    return {
        "remote_bytes": remote.wire_bytes_in,
        "published_bytes": remote.wire_bytes_out,
        "remote_refused": remote.refused_corrupt + remote.refused_too_large,
        "remote_error": remote.last_error,
    }
