"""Owns one decision: how files are read, and in which pieces they travel.

    choose(checkpoint, config, device) ──▶ Choice: read mode, ring, rates, room in RAM, and why

Rates are measured where something streams, in a few milliseconds, before the first weight is read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nexus_ext import gds
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.config import StreamConfig
from nexus_ext.device import Device
from nexus_ext.engine import ReadMode, cached_bytes, measure_copy, measure_read
from nexus_ext.errors import BudgetError
from nexus_ext.memory import available_bytes, default_budget, format_bytes, should_prefault
from nexus_ext.plan import Rates

__all__ = ["DEFAULT_DEPTH", "Choice", "choose"]

DEFAULT_DEPTH = 16
_SMALLEST_DEPTH = 2
_PAGE_BYTES = 4096
# A disk is as fast with less; a link to a GPU wants larger pieces than a disk.
_HOST_CHUNK_BYTES = 1 << 20
_LINK_CHUNK_BYTES = (1 << 20, 2 << 20, 4 << 20, 8 << 20)
# The smallest piece that is this close to the best rate: less to wait for, less memory.
_GOOD_ENOUGH = 0.95
# "auto" trusts the page cache from this share of the checkpoint on.
_MOSTLY_CACHED = 0.5
# Enough to see a rate, short enough not to be noticed.
_RATE_PROBE_BYTES = 64 << 20
# Page-locked memory is taken from everybody: half of what is free is left.
_LARGEST_RAM_SHARE = 0.5


@dataclass(frozen=True)
class Choice:
    """The read mode decided on, and why.

    Attributes:
        mode: How to read; chunk and ring sizes are set.
        reason: Why this mode.
        rates: Of disk and link, as far as they were measured.
        ram_bytes: Page-locked host memory for groups that stay in RAM; 0 on a host device.
        shared_bytes: Of memory that processes share, for groups that are used there; on a host
            device only.
    """

    mode: ReadMode
    reason: str
    rates: Rates
    ram_bytes: int = 0
    shared_bytes: int = 0


def choose(
    checkpoint: Checkpoint, config: StreamConfig, device: Device, *, streams: bool = True
) -> Choice:
    """Decide, and measure where something streams. Blocks for some milliseconds.

    Raises:
        BudgetError: `ram_budget` is too small for any staging.
    """
    nbytes = sum(file.stamp.size for file in checkpoint.files)
    available = available_bytes()
    io: str = config.io
    reason = "asked for"
    if config.io == "auto":
        io, reason = _choose_io(checkpoint, device, available)
    # Pages that fit in memory may stay: the next pass finds them.
    keeps_pages = io == "mmap" and should_prefault("auto", nbytes, available)[0]
    mode = ReadMode(
        io=io,
        use_uring=config.use_uring,
        trailing_drop=not keeps_pages if config.trailing_drop == "auto" else config.trailing_drop,
        depth=config.depth,
        chunk_bytes=_HOST_CHUNK_BYTES if config.chunk_bytes == "auto" else config.chunk_bytes,
    )
    # Of files that still arrive there is nothing to measure yet.
    if not streams or checkpoint.arrival is not None:
        return Choice(_within_ram_budget(mode, config), reason, Rates())
    path = max(checkpoint.files, key=lambda file: file.stamp.size).reach
    if device.is_host:
        mode = _within_ram_budget(mode, config)
        rates = Rates(_disk_rate(path, mode))
        return Choice(mode, reason, rates, shared_bytes=_shared_bytes(mode, config))
    link, chunk_bytes = _measure_link(device, config)
    mode = _within_ram_budget(replace(mode, chunk_bytes=chunk_bytes), config)
    disk = _disk_rate(path, mode)
    mode = replace(mode, num_slots=_num_slots(mode, disk / link, config))
    rates = Rates(disk, link_bytes_per_second=link)
    return Choice(mode, reason, rates, _ram_bytes(mode, config, available))


def _choose_io(checkpoint: Checkpoint, device: Device, available: int) -> tuple[str, str]:
    if checkpoint.arrival is not None:
        return "direct", "auto: the files still arrive"
    nbytes = sum(file.stamp.size for file in checkpoint.files)
    cached = sum(max(0, cached_bytes(file.reach)) for file in checkpoint.files)
    fits, _ = should_prefault("auto", nbytes, available)
    share = f"{format_bytes(cached)} of {format_bytes(nbytes)} are in the page cache"
    if fits and cached >= _MOSTLY_CACHED * nbytes:
        return "mmap", f"auto: {share} and all of it fits in free memory"
    reason = f"auto: {share}, {format_bytes(available)} are free"
    if device.is_host:
        return "direct", reason
    can_gds, why_not = gds.available()
    return ("gds", reason) if can_gds else ("direct", f"{reason}; no GPUDirect Storage: {why_not}")


def _slot_bytes(mode: ReadMode) -> int:
    return mode.chunk_bytes + 2 * _PAGE_BYTES


def _within_ram_budget(mode: ReadMode, config: StreamConfig) -> ReadMode:
    """As many reads in flight as `ram_budget` has staging slots for."""
    if config.ram_budget == "auto":
        return mode
    # The engine has half as many slots again as reads in flight.
    affordable = config.ram_budget // _slot_bytes(mode) * 2 // 3
    if affordable < _SMALLEST_DEPTH:
        fewest = _SMALLEST_DEPTH * 3 // 2
        raise BudgetError(
            f"ram_budget must hold {fewest} staging slots of {_slot_bytes(mode)} bytes, got "
            f"{config.ram_budget}; allow {fewest * _slot_bytes(mode)} or lower chunk_bytes."
        )
    return replace(mode, depth=min(mode.depth or DEFAULT_DEPTH, affordable))


def _disk_rate(path: str, mode: ReadMode) -> float:
    # The disk's own rate: what lands on a GPU directly comes no faster.
    direct = replace(mode, io="direct" if mode.io == "gds" else mode.io)
    return float(measure_read(path, direct, _RATE_PROBE_BYTES)["gbps"]) * 1e9


def _measure_link(device: Device, config: StreamConfig) -> tuple[float, int]:
    """The best rate to the device, and the chunk that reaches it nearly."""
    asked = config.chunk_bytes
    arena = device.allocate(max(_LINK_CHUNK_BYTES))
    sizes = _chunks_within(config) if asked == "auto" else [min(asked, len(arena))]
    rates = {
        size: measure_copy(arena, device.name, size, _RATE_PROBE_BYTES)["gbps"] * 1e9
        for size in sizes
    }
    best = max(rates.values())
    good = min(size for size, rate in rates.items() if rate >= _GOOD_ENOUGH * best)
    return best, good if asked == "auto" else asked


def _chunks_within(config: StreamConfig) -> list[int]:
    """Chunks of which `ram_budget` holds a whole ring; else the smallest."""
    ring = DEFAULT_DEPTH * 3 // 2
    fitting = [
        size
        for size in _LINK_CHUNK_BYTES
        if config.ram_budget == "auto" or ring * size <= config.ram_budget
    ]
    return fitting or [_LINK_CHUNK_BYTES[0]]


def _num_slots(mode: ReadMode, disk_over_link: float, config: StreamConfig) -> int:
    """While `depth` slots are read into, those copied from: as many as leave in that time. One
    more is hashed, and one changes sides.
    """
    depth = mode.depth or DEFAULT_DEPTH
    wanted = depth + math.ceil(depth * min(1.0, disk_over_link)) + 2
    if config.ram_budget == "auto":
        return wanted
    return min(wanted, config.ram_budget // _slot_bytes(mode))


def _shared_bytes(mode: ReadMode, config: StreamConfig) -> int:
    """What is left of `ram_budget` beside the ring; mapped files are shared as they are."""
    if config.ram_budget == "auto" or mode.io == "mmap":
        return 0
    num_slots = (mode.depth or DEFAULT_DEPTH) * 3 // 2
    return max(0, config.ram_budget - num_slots * _slot_bytes(mode))


def _ram_bytes(mode: ReadMode, config: StreamConfig, available: int) -> int:
    """Room for groups that stay in RAM, beside the ring."""
    ring = (mode.num_slots or 0) * _slot_bytes(mode)
    if config.ram_budget == "auto":
        return max(0, int(default_budget(available) * _LARGEST_RAM_SHARE) - ring)
    return max(0, config.ram_budget - ring)
