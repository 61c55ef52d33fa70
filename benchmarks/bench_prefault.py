"""mmap with and without pre-fault: the first forward against a warm one, from a cold page cache."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

import nexus_ext as nexus
from nexus_ext.bench import drop_page_cache, machine
from nexus_ext.demo import make_llama

NUM_TOKENS = 16


def first_and_warm(path: Path, prefault: str, budget: int) -> dict[str, float]:
    """Seconds of the first forward after the pages are in, of a warm one, and of the warm-up."""
    drop_page_cache(list(path.glob("*.safetensors")))
    model = nexus.from_pretrained(path, budget=budget, io="mmap", prefault=prefault)
    # The sweep runs in the background; what is asked is the first forward after it.
    while prefault == "on" and nexus.stats(model).prefault_seconds == 0:
        time.sleep(0.01)
    x = torch.randint(0, 256, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    times = []
    with torch.inference_mode():
        for _ in range(4):
            began = time.perf_counter()
            model(x)
            times.append(time.perf_counter() - began)
    stats = nexus.stats(model)
    nexus.close(model)
    return {
        "first_seconds": times[0],
        "warm_seconds": median(times[1:]),
        "first_over_warm": times[0] / median(times[1:]),
        "prefault_seconds": stats.prefault_seconds,
        "prefault_bytes": stats.prefault_bytes,
        "num_views": stats.num_views,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds = 1 if options.toy else 5
    shape = (
        {"num_blocks": 4, "hidden": 64, "intermediate": 128} if options.toy else {"num_blocks": 20}
    )
    arms: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    with tempfile.TemporaryDirectory(dir=Path.home()) as name:
        path = Path(name) / "llama"
        make_llama(path, **shape)
        budget = (
            sum(f.stat().st_size for f in path.glob("*.safetensors"))
            * (9 if options.toy else 3)
            // 10
        )
        for _ in range(rounds):
            for prefault in arms:
                arms[prefault].append(first_and_warm(path, prefault, budget))
    result = {
        prefault: {key: median(one[key] for one in runs) for key in runs[0]}
        for prefault, runs in arms.items()
    }
    result["machine"] = machine()
    Console().print(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
