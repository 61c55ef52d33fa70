"""What an odd alignment costs: reads staged and copied, against reads that land in place.

Rates in 1e9 bytes a second; CPU in milliseconds per 1e9 bytes, all threads together.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from nexus_ext.bench import machine
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode, measure_read

NUM_ARENAS = 2


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def stream(path: Path, offset: int, group_bytes: int, num_groups: int) -> dict[str, float]:
    """Two passes over the file from `offset` on; the second one's rate and CPU cost."""
    descriptor = os.open(path, os.O_RDONLY)
    file = File(path, Stamp.of(descriptor))
    os.close(descriptor)
    engine = Engine([file], ReadMode("direct"))
    groups = [
        Group(str(i), (), (Extent(0, offset + i * group_bytes, group_bytes, 0),), group_bytes)
        for i in range(num_groups)
    ]
    memory = [torch.empty(group_bytes + (4 << 20), dtype=torch.uint8) for _ in range(NUM_ARENAS)]
    starts = [-buffer.data_ptr() % (2 << 20) for buffer in memory]
    arenas = [b[s : s + group_bytes] for b, s in zip(memory, starts, strict=True)]
    order = list(range(num_groups))
    engine.attach(arenas, groups, [i % NUM_ARENAS for i in order], order, NUM_ARENAS - 1)
    for _ in range(2):
        began, cpu = time.perf_counter(), cpu_seconds()
        for i in order:
            engine.acquire(i, arenas[i % NUM_ARENAS])
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    staged = engine.stats()["bytes_staged"]
    engine.close()
    gigabytes = group_bytes * num_groups / 1e9
    return {
        "gbps": gigabytes / seconds,
        "cpu_ms_per_gb": cpu * 1e3 / gigabytes,
        "staged_share": staged / (2 * group_bytes * num_groups),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    group_bytes, num_groups = (1 << 20, 4) if options.toy else (48 << 20, 18)
    arms: dict[str, list[dict[str, float]]] = {"in place": [], "realigned": []}
    ceilings = []
    with tempfile.NamedTemporaryFile(dir=Path.home()) as named:
        path = Path(named.name)
        with path.open("wb") as out:
            for _ in range(num_groups + 1):
                out.write(os.urandom(group_bytes))
            os.fsync(out.fileno())
        for _ in range(1 if options.toy else 9):
            arms["in place"].append(stream(path, 0, group_bytes, num_groups))
            arms["realigned"].append(stream(path, 72, group_bytes, num_groups))
            ceilings.append(measure_read(str(path), ReadMode("direct"), 1 << 30)["gbps"])
    result = {
        arm: {key: median(run[key] for run in runs) for key in runs[0]}
        for arm, runs in arms.items()
    }
    result["raw_reader_gbps"] = median(ceilings)
    result["machine"] = machine()
    Console().print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
