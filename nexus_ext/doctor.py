"""`nexus doctor`: what this machine offers, which modes will really be used, and why."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from nexus_ext import gds
from nexus_ext.ceiling import measure_ceiling
from nexus_ext.config import home_folder
from nexus_ext.device import Device
from nexus_ext.engine import ReadMode, measure_copy, measure_read
from nexus_ext.memory import available_bytes, default_budget, format_bytes, locked_limit_bytes
from nexus_ext.ops import native

__all__ = ["examine", "tune"]

_PROBE_BYTES = 256 << 20
_DEPTHS = (4, 8, 16, 32)
_LINK_CHUNK_BYTES = 8 << 20
_CHUNKS = (256 << 10, 1 << 20, 4 << 20)


def examine(path: Path | None = None) -> dict[str, Any]:
    """Facts by name. Reads `path` (a big file on the disk in question), or a file made for it."""
    if path is not None:
        return _machine() | _disk(path)
    folder = home_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as probe:
        _fill(Path(probe.name))
        return _machine() | _disk(Path(probe.name))


def tune(path: Path) -> list[dict[str, Any]]:
    """Rates of depths and chunk sizes on a file, the fastest first: what to pass to `stream`."""
    results = [
        measure_read(str(path), ReadMode("direct", depth=depth, chunk_bytes=chunk), _PROBE_BYTES)
        for _ in range(3)
        for depth in _DEPTHS
        for chunk in _CHUNKS
    ]
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for result in results:
        key = (result["depth"], result["chunk_bytes"])
        best[key] = max(best.get(key, result), result, key=lambda one: one["gbps"])
    return sorted(best.values(), key=lambda one: -one["gbps"])


def _fill(path: Path) -> None:
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(_PROBE_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def _disk(path: Path) -> dict[str, Any]:
    direct = measure_read(str(path), ReadMode("direct"), _PROBE_BYTES)
    threads = measure_read(str(path), ReadMode("direct", use_uring=False), _PROBE_BYTES)
    ceiling = measure_ceiling(path, _PROBE_BYTES)
    return {
        "file": str(path),
        "io asked / effective": f"direct / {direct['io_mode']}",
        "reader": direct["reader"],
        "refused": direct["refusal"] or "nothing",
        "alignment": f"memory {direct['memory_alignment']}, offset {direct['offset_alignment']}",
        "rate, this reader": f"{direct['gbps']:.2f} GB/s",
        "rate, threads": f"{threads['gbps']:.2f} GB/s",
        "rate, fio": "fio is not installed"
        if ceiling.fio_gbps is None
        else f"{ceiling.fio_gbps:.2f} GB/s",
    }


def _gpu() -> dict[str, Any]:
    """Torch's GPU, and how fast page-locked memory gets there."""
    if not torch.cuda.is_available():
        return {"GPU": f"none that torch {torch.__version__} can use"}
    device = Device.of("cuda")
    arena = device.allocate(_LINK_CHUNK_BYTES)
    link = measure_copy(arena, device.name, _LINK_CHUNK_BYTES, _PROBE_BYTES)
    pinned = "page-locked" if link["is_pinned"] else "not page-locked"
    return {
        "GPU": f"{torch.cuda.get_device_name()}, {format_bytes(device.available_bytes())} free",
        "rate to the GPU": f"{link['gbps']:.2f} GB/s, {pinned}",
    }


def _gds() -> str:
    is_there, why_not = gds.available()
    return "yes" if is_there else f"no: {why_not}"


def _machine() -> dict[str, Any]:
    available = available_bytes()
    locked = locked_limit_bytes()
    return {
        "memory available": f"{format_bytes(available)} (cgroup limits counted)",
        "budget 'auto'": format_bytes(default_budget(available)),
        "memory lock limit": "none" if locked is None else format_bytes(locked),
        "torch": torch.__version__,
        **_gpu(),
        "GPUDirect Storage": _gds(),
        "profiler ranges": "built in" if native.has_nvtx() else "left out of this build",
        "fio": shutil.which("fio") or "not installed",
    }
