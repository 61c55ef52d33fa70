"""The I/O guide's latencies and its promise of overlap, on this machine.

a layer    read from the model's files, from the cache's disk, from memory
a pass     over all layers, fetched ahead or not, beside its compute alone and its reads alone
an order   backwards: the next number fetched ahead, or what was learnt in two passes before
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

from nexus_ext.bench import drop_page_cache, machine
from nexus_ext.demo import make_llama
from nexus_ext.sli import IOOptimizer, LayerCache, download_from_hub


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def latencies(path: Path, folder: Path, num_layers: int) -> dict[str, float]:
    """Median milliseconds of one layer, by where it comes from."""
    drop_page_cache(list(path.glob("*.safetensors")))
    found: dict[str, list[float]] = {"source": [], "ssd": [], "memory": []}
    with LayerCache(folder) as cache:
        for index in range(num_layers):
            began = time.perf_counter()
            layer = download_from_hub(path, index)
            found["source"].append(time.perf_counter() - began)
            cache.cache_layer(path, index, layer)
    # Another process would find the same: nothing is in memory.
    with LayerCache(folder) as cache:
        for tier in ("ssd", "memory"):
            for index in range(num_layers):
                began = time.perf_counter()
                cache.get_layer(path, index)
                found[tier].append(time.perf_counter() - began)
        cache.clear()
    return {f"{tier}_layer_ms": 1e3 * median(times) for tier, times in found.items()}


def passes(path: Path, num_layers: int, x: torch.Tensor) -> dict[str, float]:
    """Seconds of one pass over all layers that keeps none of them; compute alone; reads alone."""
    result = {"compute_seconds": compute_seconds(path, num_layers, x)}
    for name, lookahead, computes in (
        ("reads_seconds", 0, False),
        ("without_prefetch_seconds", 0, True),
        ("with_prefetch_seconds", 2, True),
    ):
        with tempfile.TemporaryDirectory() as folder, LayerCache(folder, 0, 0) as cache:
            result[name] = one_pass(cache, path, num_layers, x, lookahead, computes)
    parts = max(result["compute_seconds"], result["reads_seconds"])
    result["prefetch_pays_x"] = result["without_prefetch_seconds"] / result["with_prefetch_seconds"]
    result["over_larger_part_x"] = result["with_prefetch_seconds"] / parts
    return result


def compute_seconds(path: Path, num_layers: int, x: torch.Tensor) -> float:
    """Of a second pass over layers that are all in memory."""
    layers = [download_from_hub(path, index) for index in range(num_layers)]

    def compute() -> None:
        hidden = x
        for layer in layers:
            hidden = layer(hidden)

    compute()
    return seconds_of(compute)


def one_pass(
    cache: LayerCache, path: Path, num_layers: int, x: torch.Tensor, lookahead: int, computes: bool
) -> float:
    with IOOptimizer(
        cache, enable_prefetch=lookahead > 0, prefetch_lookahead=lookahead
    ) as optimizer:
        optimizer.prefetcher.num_layers(path)  # headers and config are read once, not timed
        drop_page_cache(list(path.glob("*.safetensors")))

        def run() -> None:
            hidden = x
            for index in range(num_layers):
                layer = optimizer.get_layer_with_prefetch(path, index, num_layers)
                hidden = layer(hidden) if computes else hidden

        return seconds_of(run)


def orders(path: Path, num_layers: int, x: torch.Tensor) -> dict[str, float]:
    """The third pass from the last layer to the first, by what is fetched ahead: seconds, and the
    share of layers that had been.
    """
    result = {}
    for name, learns in (("next_number", False), ("learnt", True)):
        with (
            tempfile.TemporaryDirectory() as folder,
            LayerCache(folder, 0, 0) as cache,
            IOOptimizer(cache, learn_order=learns) as optimizer,
        ):
            for _ in range(3):
                used = optimizer.prefetcher.stats()["prefetch_used"]
                drop_page_cache(list(path.glob("*.safetensors")))
                seconds = seconds_of(lambda: backwards(optimizer, path, num_layers, x))
            used = optimizer.prefetcher.stats()["prefetch_used"] - used
        result[f"backwards_{name}_seconds"] = seconds
        result[f"backwards_{name}_used_share"] = used / num_layers
    return result


def backwards(optimizer: IOOptimizer, path: Path, num_layers: int, x: torch.Tensor) -> None:
    hidden = x
    for index in reversed(range(num_layers)):
        hidden = optimizer.get_layer_with_prefetch(path, index, num_layers)(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rounds, num_layers, num_tokens = (1, 3, 8) if options.toy else (5, 12, 192)
    shape = {"hidden": 64, "intermediate": 128} if options.toy else {}
    runs: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=Path.home()) as name, torch.inference_mode():
        path = Path(name) / "llama"
        make_llama(path, num_blocks=num_layers, **shape)
        x = torch.randn(1, num_tokens, shape.get("hidden", 1024))
        for _ in range(rounds):
            runs.append(latencies(path, Path(name) / "cache", num_layers))
            runs[-1] |= passes(path, num_layers, x)
            runs[-1] |= orders(path, num_layers, x)
        nbytes = sum(p.nbytes for p in download_from_hub(path, 0).parameters())
    result: dict[str, object] = {key: median(run[key] for run in runs) for key in runs[0]}
    result |= {"layer_bytes": nbytes, "num_layers": num_layers, "num_tokens": num_tokens}
    result |= {"rounds": runs, "machine": machine()}
    Console().print({key: value for key, value in result.items() if key != "rounds"})
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
