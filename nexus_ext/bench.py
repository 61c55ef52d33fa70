"""How fast a streamed model is, against its own bounds and against peers, in one run.

Every round visits every arm once, so that a noisy machine is noisy for all of them; every figure
is a median over rounds. `slack_x` compares a step with the larger of its two parts, each measured
alone in the same rounds: the computation with resident weights, and the reads without computing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nexus_ext.arms import Arm, ArmSpec, check_kinds
from nexus_ext.ceiling import Ceiling, measure_ceiling
from nexus_ext.checkpoint import Checkpoint
from nexus_ext.engine import cached_bytes
from nexus_ext.hub import locate
from nexus_ext.plan import Plan, predict_step

__all__ = ["bench", "drop_page_cache", "machine"]


@dataclass
class _Rounds:
    """What was measured, round by round."""

    step: list[dict[str, float]]
    sweep: list[dict[str, float]]
    peers: dict[str, list[float]]
    ceilings: list[Ceiling]
    cache_growth: list[int]


def bench(
    model: str | Path,
    *,
    num_tokens: int = 1,
    num_steps: int = 5,
    against: Sequence[str] = ("resident",),
    memory_limit: int | None = None,
    generate_tokens: int = 0,
    progress: Callable[[str], None] = lambda what: None,
    **options: Any,
) -> dict[str, Any]:
    """Measure a model's forward over `num_tokens` tokens.

    Args:
        model: Folder or hub id.
        num_tokens: Tokens of one forward.
        num_steps: Rounds.
        against: "resident" and "accelerate", each in a process of its own.
        memory_limit: Bytes each process may use, page cache included.
        generate_tokens: If not 0, also compare that many greedy tokens with the resident model's.
        progress: Told what is going on.
        **options: As in `stream`.

    Returns:
        The keys listed in benchmarks/README.md; bytes, seconds, and 1e9 bytes a second.
    """
    check_kinds(list(against))
    path = locate(model)
    files = [file.path for file in Checkpoint.open(path).files]
    largest = max(files, key=lambda file: file.stat().st_size)
    with ExitStack() as stack:

        def start(kind: str, limit: int | None) -> Arm:
            progress(f"loading: {kind}")
            return stack.enter_context(Arm(ArmSpec(kind, path, num_tokens, options), limit))

        streamed = start("streamed", memory_limit)
        # The resident model is the yardstick of compute; a limit would only make it fail.
        peers = {k: start(k, None if k == "resident" else memory_limit) for k in against}
        rounds = _run(streamed, peers, files, largest, num_steps, progress)
        result = _result(rounds, streamed, peers, num_tokens)
        if generate_tokens and "resident" in peers:
            progress("generating")
            result |= _compare_tokens(streamed, peers["resident"], generate_tokens)
        return result | {"machine": machine(), "memory_limit_bytes": memory_limit}


def _run(
    streamed: Arm,
    peers: dict[str, Arm],
    files: list[Path],
    largest: Path,
    num_steps: int,
    progress: Callable[[str], None],
) -> _Rounds:
    rounds = _Rounds([], [], {kind: [] for kind in peers}, [], [])
    for number in range(num_steps):
        progress(f"round {number + 1} of {num_steps}")
        rounds.ceilings.append(measure_ceiling(largest))
        drop_page_cache(files)
        cached = _cached(files)
        rounds.step.append(streamed.step())
        rounds.cache_growth.append(_cached(files) - cached)
        rounds.sweep.append(streamed.sweep())
        for kind, peer in peers.items():
            rounds.peers[kind].append(peer.step()["seconds"])
    return rounds


def _result(
    rounds: _Rounds, streamed: Arm, peers: dict[str, Arm], num_tokens: int
) -> dict[str, Any]:
    report = streamed.report()
    stats, plan = report["stats"], streamed.facts["plan"]
    step = _median(rounds.step, "seconds")
    stall = _median(rounds.step, "stall_seconds")
    streamed_bytes = _median(rounds.step, "bytes_read")
    io = _median(rounds.sweep, "seconds")
    compute = median(rounds.peers["resident"]) if "resident" in peers else step - stall
    ceiling = median(c.gbps for c in rounds.ceilings)
    return {
        "num_tokens": num_tokens,
        "step_seconds": step,
        "tokens_per_second": num_tokens / step,
        "compute_seconds": compute,
        "compute_source": "resident arm" if "resident" in peers else "step less stall",
        "io_seconds": io,
        "slack_x": step / max(compute, io),
        "weight_stall_ratio": stall / step,
        "bytes_streamed_per_step": int(streamed_bytes),
        "stream_gbps": streamed_bytes / step * 1e-9,
        "io_gbps": streamed_bytes / io * 1e-9,
        "disk_ceiling_gbps": ceiling,
        "disk_ceiling_source": rounds.ceilings[0].source,
        "raw_reader_gbps": median(c.reader_gbps for c in rounds.ceilings),
        "share_of_ceiling": median(
            measured["bytes_read"] / measured["seconds"] * 1e-9 / c.gbps
            for measured, c in zip(rounds.step, rounds.ceilings, strict=True)
        ),
        "budget_bytes": plan.budget_bytes,
        "device_bytes": plan.device_bytes,
        "model_bytes": plan.outside_bytes + sum(plan.group_bytes),
        "peak_rss_bytes": report["peak_rss_bytes"],
        "peak_device_bytes": report["peak_device_bytes"],
        "device": stats["device"],
        "baseline_rss_bytes": streamed.facts["baseline_rss_bytes"],
        "file_cache_growth_bytes": max(rounds.cache_growth),
        "io_mode_requested": stats["io_mode_requested"],
        "io_mode": stats["io_mode"],
        "reader": stats["reader"],
        "resident_groups": len(plan.resident),
        "streamed_groups": len(plan.streamed),
        "lookahead": plan.lookahead,
        "predicted_step_seconds": _predict(plan, compute, ceiling),
        "peers": {
            kind: {
                "step_seconds": median(seconds),
                "tokens_per_second": num_tokens / median(seconds),
                "nexus_speedup": median(
                    theirs / ours["seconds"]
                    for theirs, ours in zip(seconds, rounds.step, strict=True)
                ),
                "peak_rss_bytes": peers[kind].report()["peak_rss_bytes"],
            }
            for kind, seconds in rounds.peers.items()
        },
        "rounds": {
            "step_seconds": [r["seconds"] for r in rounds.step],
            "io_seconds": [r["seconds"] for r in rounds.sweep],
            "disk_ceiling_gbps": [c.gbps for c in rounds.ceilings],
            **{f"{kind}_seconds": seconds for kind, seconds in rounds.peers.items()},
        },
    }


def _predict(plan: Plan, compute_seconds: float, ceiling_gbps: float) -> float:
    """What the plan says of the same step, from the measured rates."""
    each = compute_seconds / plan.num_groups
    return predict_step(
        plan.group_bytes,
        plan.streamed,
        plan.arena_of,
        [each] * plan.num_groups,
        ceiling_gbps * 1e9,
        in_ram=plan.in_ram,
    )


def _compare_tokens(streamed: Arm, resident: Arm, num_tokens: int) -> dict[str, Any]:
    ours, theirs = streamed.generate(num_tokens), resident.generate(num_tokens)
    return {"tokens": ours, "tokens_equal": ours == theirs}


def _median(rounds: list[dict[str, float]], key: str) -> float:
    return median(one[key] for one in rounds)


def _cached(files: list[Path]) -> int:
    return sum(max(0, cached_bytes(str(path))) for path in files)


def drop_page_cache(files: Sequence[Path]) -> None:
    """Ask the kernel to forget the files' pages; mapped and dirty ones stay."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "cpu": cpu,
        "num_cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nexus_ext": version("nexus_ext"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
