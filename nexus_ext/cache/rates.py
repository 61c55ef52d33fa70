"""How fast a folder gives bytes: measured with a file of our own, kept with the folder.

The file goes through the same verified reads as the cache's own, and is gone afterwards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nexus_ext.cache.blob import Header, open_blob, write_blob
from nexus_ext.cache.folder import Folder
from nexus_ext.cache.reading import BlockMode, read_payload
from nexus_ext.errors import CorruptCheckpoint, ReadError, WriteError

__all__ = ["MAX_AGE_SECONDS", "Rate", "rate_of"]

# Disks fill and age in weeks, not in hours.
MAX_AGE_SECONDS = 7 * 24 * 3600.0
# Enough for a figure, little enough for a disk's wear and for a slow network.
_PROBE_BYTES = 8 << 20
# A reading that took so long is not worth repeating.
_LONG_SECONDS = 0.25
_MOST_KEPT_BYTES = 4096
_IO_MODES = ("direct", "buffered")


@dataclass(frozen=True)
class Rate:
    """What a folder gave.

    Attributes:
        bytes_per_second: Read and compared.
        measured_seconds: When, since 1970.
        io_mode: "direct", or "buffered": then the page cache may have answered.
    """

    bytes_per_second: float
    measured_seconds: float
    io_mode: str


def rate_of(
    folder: Folder, mode: BlockMode, max_age_seconds: float = MAX_AGE_SECONDS
) -> Rate | None:
    """The rate that is kept with a folder, or a new one where that is old.

    Measuring blocks for a write and two reads of 8 MiB.

    Returns:
        None where nothing is kept and nothing can be written or read.
    """
    kept = _kept(folder.path / "rate.json")
    if kept is not None and 0 <= time.time() - kept.measured_seconds <= max_age_seconds:
        return kept
    if folder.read_only:
        return kept
    try:
        found = _measure(folder, BlockMode(mode.io, mode.use_uring))
        _keep(folder, found)
    except (WriteError, ReadError, CorruptCheckpoint, OSError):
        return kept  # the tier finds out itself what is wrong with its disk, and reports it
    return found


def _measure(folder: Folder, mode: BlockMode) -> Rate:
    probe = torch.frombuffer(bytearray(os.urandom(_PROBE_BYTES)), dtype=torch.uint8)
    header = Header.of("rate", "probe", {}, time.time_ns(), [probe])
    # Names of temporaries: should this process die, whoever comes next removes them.
    path, temporary = (folder.blobs / folder.new_probe() for _ in range(2))
    write_blob(path, temporary, header, [probe], folder.file_mode)
    try:
        descriptor = open_blob(path)
        try:
            seconds, is_direct = _read(descriptor, header, path, mode, probe)
            if seconds < _LONG_SECONDS:
                seconds = min(seconds, _read(descriptor, header, path, mode, probe)[0])
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    return Rate(_PROBE_BYTES / seconds, time.time(), "direct" if is_direct else "buffered")


def _read(
    descriptor: int, header: Header, path: Path, mode: BlockMode, out: torch.Tensor
) -> tuple[float, bool]:
    began = time.perf_counter()
    _, report = read_payload(descriptor, header, str(path), mode, out)
    return max(time.perf_counter() - began, 1e-9), report.is_direct


def _keep(folder: Folder, rate: Rate) -> None:
    said = {
        "bytes_per_second": rate.bytes_per_second,
        "measured_seconds": rate.measured_seconds,
        "io_mode": rate.io_mode,
    }
    text = json.dumps(said | {"check": _check(said)}) + "\n"
    temporary = folder.blobs / folder.new_probe()
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, folder.file_mode)
        with open(descriptor, "w") as file:
            file.write(text)
        os.rename(temporary, folder.path / "rate.json")
    finally:
        temporary.unlink(missing_ok=True)


def _kept(path: Path) -> Rate | None:
    """None for anything that `_keep` would not write."""
    try:
        descriptor = open_blob(path)  # and no pipe, which would be waited for
        with open(descriptor, "rb") as file:
            said = json.loads(file.read(_MOST_KEPT_BYTES))
    except (OSError, CorruptCheckpoint, ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or said.pop("check", None) != _check(said):
        return None
    names = ("bytes_per_second", "measured_seconds", "io_mode")
    rate, when, io_mode = (said.get(name, 0) for name in names)
    are_numbers = all(type(one) is float and 0 < one < math.inf for one in (rate, when))
    return Rate(rate, when, io_mode) if are_numbers and io_mode in _IO_MODES else None


def _check(said: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
