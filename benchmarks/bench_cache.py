"""The disk tier of the cache: verified reads against the disk's ceiling; how long opening takes.

Rates in 1e9 bytes a second, CPU in milliseconds per 1e9 bytes, all threads together. Every round
reads the same blob in every arm: `raw` is our own raw reader (O_DIRECT, into memory that is used
again and again, nothing compared), `warm` a verified read into memory that was used before, `fresh`
one into new memory, as `load` without `out` does it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from nexus_ext.bench import machine
from nexus_ext.cache import DiskTier
from nexus_ext.engine import ReadMode, measure_read

MIB = 1 << 20


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def timed(act: Callable[[], object], nbytes: int) -> dict[str, float]:
    """Rate and CPU cost of reading so many bytes."""
    began, cpu = time.perf_counter(), cpu_seconds()
    act()
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    return {"gbps": nbytes / seconds / 1e9, "cpu_ms_per_gb": cpu * 1e12 / nbytes}


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def read_rates(folder: Path, nbytes: int, num_rounds: int) -> dict[str, Any]:
    """Medians by arm, and what comparing every block costs."""
    data = torch.frombuffer(bytearray(os.urandom(nbytes)), dtype=torch.uint8)
    with DiskTier(folder, 4 * nbytes + 16 * MIB) as tier:
        began = time.perf_counter()
        entry = tier.put("blob", [data])
        put_gbps = nbytes / (time.perf_counter() - began) / 1e9
        assert entry is not None
        out = tier.read(entry)
        arms: dict[str, Callable[[], object]] = {
            "raw": lambda: measure_read(str(entry.path), ReadMode("direct"), nbytes),
            "warm": lambda: tier.read(entry, out),
            "fresh": lambda: tier.read(entry),
        }
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for _ in range(num_rounds):
            for arm, act in arms.items():
                runs[arm].append(timed(act, nbytes))
        assert torch.equal(tier.read(entry), data)
        stats = tier.stats()
    result: dict[str, Any] = {arm: medians(found) for arm, found in runs.items()}
    ratios = [
        warm["gbps"] / raw["gbps"] for warm, raw in zip(runs["warm"], runs["raw"], strict=True)
    ]
    hashing = timed(lambda: torch.ops.nexus.block_digests([data], MIB), nbytes)
    return result | {
        "nbytes": nbytes,
        "io_mode": stats.io_mode,
        "reader": stats.reader,
        "put_gbps": put_gbps,
        "hash_gbps": hashing["gbps"],
        # Of rounds, not of medians: the disk's rate varies more than what is measured.
        "share_of_ceiling": median(ratios),
        "verification_cost_percent": 100 * (1 - median(ratios)),
        "verification_cpu_ms_per_gb": hashing["cpu_ms_per_gb"],
        "rounds": runs,
    }


def open_seconds(folder: Path, num_entries: int, num_rounds: int) -> dict[str, float]:
    """Opening a tier of so many entries: with its index, and with the index lost."""
    real = os.fsync, os.fdatasync
    # Filling it is no part of this.
    os.fsync = os.fdatasync = lambda _: None
    try:
        with DiskTier(folder, "1TiB") as tier:
            for number in range(num_entries):
                tier.put(f"model/revision/layers.{number}", [number.to_bytes(8, "little")])
    finally:
        os.fsync, os.fdatasync = real
    times: dict[str, list[float]] = {"open_seconds": [], "get_seconds": [], "rebuild_seconds": []}
    for number in range(num_rounds):
        began = time.perf_counter()
        tier = DiskTier(folder, "1TiB")
        times["open_seconds"].append(time.perf_counter() - began)
        began = time.perf_counter()
        assert tier.get(f"model/revision/layers.{number}") is not None
        times["get_seconds"].append(time.perf_counter() - began)
        assert tier.stats().entries == num_entries
        tier.close()
    for _ in range(2):
        next(folder.glob("index-*.sqlite")).unlink()
        began = time.perf_counter()
        with DiskTier(folder, "1TiB") as tier:
            times["rebuild_seconds"].append(time.perf_counter() - began)
            assert tier.stats().entries == num_entries
    return {name: median(found) for name, found in times.items()} | {"entries": num_entries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes, num_rounds, num_entries = ([2 * MIB], 1, 50)
    if not options.toy:
        sizes, num_rounds, num_entries = [16 * MIB, 128 * MIB, 512 * MIB], 9, 10_000
    result: dict[str, Any] = {"reads": []}
    with tempfile.TemporaryDirectory(dir=Path.home()) as name:
        for nbytes in sizes:
            folder = Path(name) / f"of-{nbytes}"
            result["reads"].append(read_rates(folder, nbytes, num_rounds))
        result["opening"] = open_seconds(Path(name) / "many", num_entries, num_rounds)
    result["machine"] = machine()
    shown = [{k: v for k, v in one.items() if k != "rounds"} for one in result["reads"]]
    Console().print(result | {"reads": shown})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
