"""The disk's ceiling: what fio, or without it our own raw reader, gets from the very file."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nexus_ext.engine import ReadMode, measure_read

__all__ = ["Ceiling", "measure_ceiling"]

_BYTES = 1 << 30
_FIO_SECONDS = 1


@dataclass(frozen=True)
class Ceiling:
    """Rates in 1e9 bytes a second; `fio_gbps` is None where fio is not installed."""

    reader_gbps: float
    fio_gbps: float | None

    @property
    def gbps(self) -> float:
        return self.reader_gbps if self.fio_gbps is None else self.fio_gbps

    @property
    def source(self) -> str:
        return "nexus raw reader" if self.fio_gbps is None else "fio"


def measure_ceiling(path: Path, max_bytes: int = _BYTES) -> Ceiling:
    """Read the file with O_DIRECT as fast as it goes: about a second each. Blocks."""
    reader = measure_read(str(path), ReadMode("direct"), max_bytes)["gbps"]
    return Ceiling(reader, _fio_gbps(path))


def _fio_gbps(path: Path) -> float | None:
    if shutil.which("fio") is None:
        return None
    command = (
        f"fio --name=ceiling --filename={path} --readonly --rw=read --bs=1M --direct=1 "
        f"--ioengine=io_uring --iodepth=16 --fixedbufs --time_based --runtime={_FIO_SECONDS} "
        "--output-format=json"
    )
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    rate: float = json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]
    return rate / 1e9
