"""What compiling the blocks gives one token: eager, compiled, and as CUDA graphs; resident and
streamed from RAM. The first blocks of the model are enough.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch._dynamo.utils
from gpu_arms import Arm, Budget, Streamed
from gpu_llama import forward, ids_for, resident_llama, shape_for, shorten
from gpu_place import Place
from gpu_report import Report, spread
from torch import nn

from nexus_ext.blocks import find_blocks

_NUM_BLOCKS = 8
_FEW_BLOCKS = 4
_ROUNDS = 5
_STEPS = 10
_TOLERANCE = 2e-2
# How blocks are compiled, by what is printed.
_MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "cuda graphs": {"mode": "reduce-overhead"},
}


def measure(place: Place, folder: Path, report: Report) -> None:
    """Fill the report's `compile`, way by way: what comes first is there if time runs out."""
    num_blocks = _FEW_BLOCKS if place.is_simulated else _NUM_BLOCKS
    short = shorten(folder, folder.parent / f"short-{folder.name}", num_blocks)
    tokens, ids = next(iter(ids_for(shape_for(place), place.where).items()))
    if place.is_simulated:
        report.skip("inductor", "simulated: blocks are traced, and run by backend='eager'")
        report.skip("cuda graphs", "simulated: the processor has none")
    arms: dict[str, Arm] = {}
    facts: dict[str, dict[str, Any]] = {}
    want = forward(resident_llama(short, place.where), ids)
    for mode, options in _MODES.items():
        for where in ("resident", "ram"):
            name = f"{where}, {mode}"
            if mode in report.skipped:
                continue
            if not report.has_time():
                report.skip(name, "no time was left to compile")
                continue
            with report.attempt(name):
                arm = _arm(place, short, where, options)
                facts[name] = _warm(arm, ids, want)
                arms[name] = arm
        report["compile"] = _lines(place, arms, facts, tokens, ids)


def _arm(place: Place, short: Path, where: str, options: dict[str, Any] | None) -> Arm:
    if where == "resident":
        arm = Arm(where, place, resident_llama(short, place.where))
    else:
        budget = Budget.of(short, place)
        everything = budget.streaming(budget.num_groups)
        ram = 2 * sum(budget.plan.group_bytes) + (1 << 30)
        chosen = {"budget": everything, "ram_budget": ram, "io": "direct", "strict": False}
        arm = Streamed(where, place, short, "ram", **chosen)
    if options is not None:
        _compile(arm.model, {"backend": "eager"} if place.is_simulated else options)
    return arm


def _compile(model: nn.Module, options: dict[str, Any]) -> None:
    for _, block in find_blocks(model, None):
        block.compile(fullgraph=True, **options)


def _step(arm: Arm, ids: torch.Tensor) -> torch.Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return arm.step(ids)


def _warm(arm: Arm, ids: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Compile and compare. Graphs are recorded at the second step, and replayed from the third."""
    counters = torch._dynamo.utils.counters["inductor"]
    before, began = counters["cudagraph_skips"], time.perf_counter()
    _step(arm, ids).cpu()
    seconds = time.perf_counter() - began
    for _ in range(2):
        _step(arm, ids)
    got = _step(arm, ids)
    error = ((got.float() - want.float()).norm() / want.float().norm()).item()
    assert error <= _TOLERANCE, f"{error} off the eager resident model"
    return {
        "first_step_seconds": seconds,
        "cudagraph_skips": counters["cudagraph_skips"] - before,
        "relative_error": error,
    }


def _lines(
    place: Place,
    arms: dict[str, Arm],
    facts: dict[str, dict[str, Any]],
    tokens: int,
    ids: torch.Tensor,
) -> list[dict[str, Any]]:
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(2 if place.is_simulated else _ROUNDS):
        for name, arm in arms.items():
            arm.settle()
            steps = place.steady(lambda arm=arm: _step(arm, ids), _STEPS)
            taken[name].append(median(steps))
    lines = []
    for name, rounds in taken.items():
        eager = taken.get(f"{name.partition(',')[0]}, eager", rounds)
        ratios = [base / own for base, own in zip(eager, rounds, strict=True)]
        line = {"arm": name, "tokens": tokens, "step_seconds": spread(rounds)}
        lines.append(line | {"eager_ratio": spread(ratios)} | facts[name])
    return lines
