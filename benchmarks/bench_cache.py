"""The cache: verified reads against the disk's ceiling; how long opening takes; what memory gives.

Rates in 1e9 bytes a second, CPU in milliseconds per 1e9 bytes, all threads together. Every round
reads the same blob in every arm: `raw` is our own raw reader (O_DIRECT, into memory that is used
again and again, nothing compared), `warm` a verified read into memory that was used before, `fresh`
one into new memory, as `load` without `out` does it. `memory`: a hit of the RAM tier, whose every
byte is then read once, against a copy of as many bytes. `streamed`: steps of one token of a model
most of which streams, by the share of it that lies in memory of all processes (`ram_budget`).
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
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from nexus_ext.bench import machine
from nexus_ext.cache import DiskTier, RamTier
from nexus_ext.demo import make_llama
from nexus_ext.engine import ReadMode, measure_read
from nexus_ext.module import stats
from nexus_ext.pretrained import from_pretrained, plan_pretrained

MIB = 1 << 20
SMALL = {"num_blocks": 4, "hidden": 64, "intermediate": 96, "vocabulary": 128}


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


def memory_rates(nbytes: int, num_rounds: int) -> dict[str, Any]:
    """A hit of the RAM tier and a read of its bytes, beside a copy and a read of plain memory."""
    data = torch.frombuffer(bytearray(os.urandom(nbytes)), dtype=torch.uint8)
    out, digest = torch.empty_like(data), "ab" * 32
    with closing(RamTier(2 * nbytes + 16 * MIB)) as tier:
        tier.put(digest, [data])

        def hit() -> torch.Tensor:
            found = tier.load(digest)
            assert found is not None
            return found

        arms: dict[str, Callable[[], object]] = {
            "hit": hit,
            "hit_and_read": lambda: hit().view(torch.int64).sum(),
            "read": lambda: data.view(torch.int64).sum(),
            "copy": lambda: out.copy_(data),
        }
        runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}
        for _ in range(num_rounds):
            for arm, act in arms.items():
                runs[arm].append(timed(act, nbytes))
        effective = tier.effective
    result: dict[str, Any] = {arm: medians(found) for arm, found in runs.items()}
    return result | {"nbytes": nbytes, "effective": effective}


def streamed_steps(folder: Path, sizes: dict[str, int], num_rounds: int) -> dict[str, Any]:
    """Seconds of a step by the share of the blocks in shared memory, arms in turn."""
    make_llama(folder, **sizes)
    plan = plan_pretrained(folder, budget="1TiB")
    needed = plan.outside_bytes + 3 * max(plan.group_bytes)
    ids = torch.tensor([[1]])
    with ExitStack() as stack:
        models = {}
        for share in (0.0, 0.5, 1.0):
            # Staging comes first.
            room = int(share * sum(plan.group_bytes)) + 64 * MIB if share else "auto"
            model = from_pretrained(folder, budget=needed, io="direct", ram_budget=room)
            models[share] = stack.enter_context(model)  # type: ignore[call-overload]
        seconds: dict[float, list[float]] = {share: [] for share in models}
        for _ in range(num_rounds):
            for share, model in models.items():
                began = time.perf_counter()
                with torch.inference_mode():
                    model(ids)
                seconds[share].append(time.perf_counter() - began)
        found = {share: stats(model) for share, model in models.items()}
    return {
        "model_bytes": sum(plan.group_bytes) + plan.outside_bytes,
        "budget_bytes": needed,
        "step_seconds": {str(share): median(times) for share, times in seconds.items()},
        "ram_groups": {str(share): one.ram_groups for share, one in found.items()},
        "ram_mode": {str(share): one.ram_mode for share, one in found.items()},
        "rounds": {str(share): times for share, times in seconds.items()},
    }


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
        result["memory"] = memory_rates(sizes[-1], num_rounds)
        model = SMALL if options.toy else {"num_blocks": 12}
        result["streamed"] = streamed_steps(Path(name) / "model", model, num_rounds)
    result["machine"] = machine()
    shown = [{k: v for k, v in one.items() if k != "rounds"} for one in result["reads"]]
    Console().print(result | {"reads": shown})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
