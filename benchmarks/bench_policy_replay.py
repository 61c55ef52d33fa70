"""How much of a trace of routes each policy keeps, and how much the best possible one would.

Hit rates of replays from an empty cache: no device, no file, no time. `belady` knows all routes to
come, and no policy without that reaches it: where routes are drawn independently (the trace `iid`)
nothing is better, but for the order of layers, than always keeping the experts of highest chance,
which is `static`, the most used in hindsight. Budgets are shares of all experts' bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nexus_ext.bench import machine
from nexus_ext.experts.policy import POLICIES
from nexus_ext.experts.replay import belady, replay
from nexus_ext.experts.routes import RouteTrace, load_routes, synthetic_routes

BUDGETS = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)
# Layers, experts, experts a token: the shapes of OLMoE-1B-7B and Mixtral-8x7B. With these settings
# consecutive tokens share 37 % of a layer's experts, as real models do (30 to 45 %).
MODELS = {
    "olmoe": ((16, 64, 8), {"skew": 0.5, "locality": 0.6}),
    "mixtral": ((32, 8, 2), {"skew": 0.4, "locality": 0.3}),
    "iid": ((16, 64, 8), {"skew": 0.5, "locality": 0.0}),
}


def static(trace: RouteTrace, capacity_bytes: int) -> float:
    """The hit rate of keeping the most used keys, each from its first use on."""
    uses = Counter(key for route in trace.routes for key in route.keys)
    hits = 0
    for key, count in uses.most_common():
        capacity_bytes -= trace.sizes[key]
        if capacity_bytes < 0:
            break
        hits += count - 1
    return hits / trace.num_selected


def shared(trace: RouteTrace) -> float:
    """What share of a layer's keys the token before used too."""
    before: dict[int, set[int]] = {}
    num_shared = num_keys = 0
    for route in trace.routes:
        if route.layer in before:
            num_shared += len(before[route.layer].intersection(route.keys))
            num_keys += len(route.keys)
        before[route.layer] = set(route.keys)
    return num_shared / max(1, num_keys)


def measure(trace: RouteTrace) -> Iterator[dict[str, Any]]:
    """One line a budget."""
    for budget in BUDGETS:
        capacity = int(budget * sum(trace.sizes))
        # Shares of bytes: for experts of one size the same as shares of experts.
        best = belady(trace, capacity).byte_hit_rate
        kept = {name: replay(trace, capacity, name).byte_hit_rate for name in POLICIES}
        yield {
            "budget": budget,
            "capacity_bytes": capacity,
            **kept,
            "static": static(trace, capacity),
            "belady": best,
            **{f"{name}_over_belady": rate / best if best else 1.0 for name, rate in kept.items()},
        }


def run(name: str, trace: RouteTrace) -> dict[str, Any]:
    lines = list(measure(trace))
    num_tokens, overlap = len(trace.steps), shared(trace)
    title = f"{name}: {len(trace.num_experts)} layers, {trace.num_keys} experts, {num_tokens} steps"
    table = Table(title=f"{title}, {overlap:.0%} as the token before")
    for column in lines[0]:
        if column != "capacity_bytes":
            table.add_column(column.replace("_over_", "/"), justify="right")
    for line in lines:
        cells = {key: value for key, value in line.items() if key != "capacity_bytes"}
        table.add_row(f"{cells.pop('budget'):.0%}", *(f"{rate:.3f}" for rate in cells.values()))
    Console(width=130).print(table)
    return {"num_steps": num_tokens, "shared_with_token_before": overlap, "lines": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--trace", type=Path, help="a recorded trace instead of the made-up ones")
    parser.add_argument("--tokens", type=int, default=1500, help="of the made-up traces")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up traces")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    num_tokens = 20 if options.toy else options.tokens
    # Small tensors: a second thread only waits.
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine()}
    if options.trace:
        result[options.trace.name] = run(options.trace.name, load_routes(options.trace))
    else:
        for name, (shape, kind) in MODELS.items():
            trace = synthetic_routes(*shape, num_tokens, seed=options.seed, **kind)
            settings = {"shape": shape, "seed": options.seed} | kind
            result[name] = settings | run(name, trace)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
