"""Streaming a model of four times its budget: against the disk's ceiling, its own parts, and peers.

    as_written  weights begin at an odd offset, as in most checkpoints: every read is realigned
    aligned     weights begin on a page: reads land in place

Prints a table per line and writes one JSON. See benchmarks/README.md for how to read it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from nexus_ext.bench import bench
from nexus_ext.cli import bench_table
from nexus_ext.config import home_folder
from nexus_ext.demo import make_llama

GIB = 1 << 30
# The shape that is benchmarked, and one that a test can afford.
FULL = {"num_blocks": 48}
TOY = {"num_blocks": 6, "hidden": 64, "intermediate": 128, "vocabulary": 256}
ALIGNMENTS = {"as_written": 72, "aligned": 4096}
console = Console(stderr=True)


def model(name: str, shape: dict[str, int], folder: Path) -> Path:
    path = folder / f"llama-{name}-{shape['num_blocks']}"
    if not path.exists():
        console.print(f"writing {path}")
        make_llama(path, **shape, data_alignment=ALIGNMENTS[name])
    return path


def lines(toy: bool, folder: Path) -> dict[str, dict]:
    """Name of a line -> arguments of `bench`."""
    shape = TOY if toy else FULL
    # A toy's process weighs more than its model: its limit must leave room for torch.
    budget = 600_000 if toy else 600 << 20
    limit = 2 * GIB if toy else budget + 3 * GIB // 2
    paths = {name: model(name, shape, folder) for name in ALIGNMENTS}
    found = {}
    for name, path in paths.items():
        for tokens in (1,) if toy else (1, 64, 128):
            found[f"{name}, {tokens} tokens"] = {
                "model": path,
                "num_tokens": tokens,
                "budget": budget,
                "io": "direct",
            }
    for tokens in (1,) if toy else (1, 128):
        found[f"limited, {tokens} tokens"] = {
            "model": paths["as_written"],
            "num_tokens": tokens,
            "budget": budget,
            "io": "direct",
            "against": ["accelerate"],
            "memory_limit": limit,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true", help="tiny model, one round")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--only", default="", help="lines whose name contains this")
    parser.add_argument("--folder", type=Path, default=home_folder() / "bench")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = {}
    for name, arguments in lines(options.toy, options.folder).items():
        if options.only not in name:
            continue
        steps = 1 if options.toy else options.steps
        results[name] = bench(num_steps=steps, **arguments)
        Console().print(f"\n{name}", bench_table(results[name]))
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
