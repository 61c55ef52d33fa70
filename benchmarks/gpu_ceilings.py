"""What the machine can do: pinned copies to the device, copies on it, the disk. Rates in GB/s."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_llama import weights_of
from gpu_place import Place
from gpu_report import Report

from nexus_ext.ceiling import measure_ceiling
from nexus_ext.engine import ReadMode, measure_copy, measure_read

MIB = 1 << 20
_COPY_MIB = (1, 4, 16, 64, 256)
_READ_MIB = (1, 4, 8)
_LINK_CHUNK_BYTES = 64 * MIB
# Enough to see a rate.
_LINK_BYTES = 2 << 30
_READ_SECONDS = 0.4
_ROUNDS = 5


def measure(place: Place, folder: Path, report: Report) -> None:
    """Fill the report: h2d_nexus, h2d_torch (by MiB of a chunk), d2d, disk."""
    sizes = _COPY_MIB[:2] if place.is_simulated else _COPY_MIB
    with report.attempt("h2d_nexus"):
        report["h2d_nexus"] = {str(size): link_gbps(place, size * MIB) for size in sizes}
    with report.attempt("h2d_torch"):
        report["h2d_torch"] = {str(size): _torch_gbps(place, size * MIB) for size in sizes}
    with report.attempt("d2d"):
        report["d2d"] = d2d_gbps(place)
    with report.attempt("disk"):
        report["disk"] = _disk(weights_of(folder))


def link_gbps(place: Place, chunk_bytes: int = _LINK_CHUNK_BYTES) -> float:
    """Page-locked memory to the device, through our own lane."""
    if place.is_simulated:
        chunk_bytes = min(chunk_bytes, 4 * MIB)
    arena = place.memory(chunk_bytes)
    nbytes = 4 * chunk_bytes if place.is_simulated else _LINK_BYTES
    return float(measure_copy(arena, place.device.name, chunk_bytes, nbytes)["gbps"])


def disk_gbps(path: Path) -> float:
    """Direct reads of a file: the better of small and large pieces."""
    return max(_read_gbps(path, size * MIB) for size in (_READ_MIB[0], _READ_MIB[-1]))


def d2d_gbps(place: Place) -> float:
    """Copies on the device, bytes read and bytes written."""
    nbytes = 4 * MIB if place.is_simulated else 2 << 30
    source, target = place.memory(nbytes), place.memory(nbytes)
    seconds = place.steady(lambda: target.copy_(source), _ROUNDS)
    return 2 * nbytes / median(seconds) / 1e9


def _torch_gbps(place: Place, chunk_bytes: int) -> float:
    """The same copies through torch, one behind another."""
    source, target = place.host_memory(chunk_bytes), place.memory(chunk_bytes)
    count = max(4, (16 * MIB if place.is_simulated else _LINK_BYTES // 2) // chunk_bytes)

    def copy() -> None:
        for _ in range(count):
            target.copy_(source, non_blocking=True)

    seconds = median(place.steady(copy, _ROUNDS))
    assert torch.equal(target.cpu(), source)
    return count * chunk_bytes / seconds / 1e9


def _read_gbps(path: Path, chunk_bytes: int) -> float:
    """A short look says how much can be read in the time that a good one takes."""
    mode = ReadMode("direct", chunk_bytes=chunk_bytes)
    rate = measure_read(str(path), mode, 64 * MIB)["gbps"] * 1e9
    return float(measure_read(str(path), mode, int(rate * _READ_SECONDS) + chunk_bytes)["gbps"])


def _disk(path: Path) -> dict[str, Any]:
    mode = measure_read(str(path), ReadMode("direct"), 64 * MIB)
    return {
        "nexus": {str(size): _read_gbps(path, size * MIB) for size in _READ_MIB},
        "io_mode": mode["io_mode"],
        "reader": mode["reader"],
        "refusal": mode["refusal"],
        "fio": measure_ceiling(path).fio_gbps,
    }
