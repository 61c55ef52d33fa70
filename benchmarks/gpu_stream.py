"""Steps of one model, resident, streamed and by peers, in turn: against ceilings and each other.

A step is one forward, behind another one: the arenas are as the pass before left them. Every round
measures the ceilings and visits every arm; every figure is a median over rounds.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_arms import Arm, Peer, Streamed, arms_of
from gpu_ceilings import disk_gbps, link_gbps
from gpu_llama import forward, ids_for, resident_llama, shape_for, weights_of
from gpu_place import Place
from gpu_report import Report, spread

_MOST_ROUNDS = 7
_RARE_ROUNDS = 2
# Steps of one visit: as many as take this long.
_VISIT_SECONDS = 0.3
_MOST_STEPS = 5
# Weights must be hidden where computing takes this much longer than moving them.
_HIDDEN_FROM = 1.2
# Of the norm of the difference to that of the logits: bfloat16, in another order.
_TOLERANCE = 2e-2

Rounds = dict[str, list[float]]


class Bench:
    """The arms, what is fed to them, and what was measured."""

    def __init__(self, place: Place, folder: Path, report: Report) -> None:
        shape = shape_for(place)
        self.place, self.folder, self.report = place, folder, report
        self.ids = ids_for(shape, place.where)
        self.resident = Arm("resident", place, resident_llama(folder, place.where))
        self.want = {n: forward(self.resident.model, ids) for n, ids in self.ids.items()}
        assert all(want.isfinite().all() for want in self.want.values())
        self.arms: dict[str, Arm] = {}
        self.facts: dict[tuple[str, int], dict[str, Any]] = {}
        self.seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.transfer: Rounds = defaultdict(list)
        self.ceiling: Rounds = defaultdict(list)

    def tokens(self, arm: Arm) -> list[int]:
        """Of the batches that an arm is seen with."""
        every = sorted(self.ids)
        return [every[0], every[len(every) // 2]] if arm.is_rare else every

    # -- setting up ----------------------------------------------------------------------------

    def make_arms(self) -> None:
        for tokens in self.ids:
            self.look(self.resident, tokens)
        ways = arms_of(self.place, self.folder, disk_gbps(weights_of(self.folder)))
        for name, (reason, make) in ways.items():
            if reason:
                self.report.skip(name, reason)
                continue
            with self.report.attempt(name):
                self.make_arm(name, make)

    def make_arm(self, name: str, make: Callable[[], Arm]) -> None:
        """An arm whose numbers differ, or that fails otherwise, is not timed."""
        before = self.place.allocated()
        arm = make()
        if before is not None:
            arm.held_bytes = (self.place.allocated() or 0) - before
        try:
            for tokens in self.tokens(arm):
                self.look(arm, tokens)
        except BaseException:
            arm.close()
            raise
        self.arms[name] = arm

    def look(self, arm: Arm, tokens: int) -> None:
        """What does not depend on the clock: numbers, memory, waits; how many steps are a visit."""
        arm.settle()
        got: list[torch.Tensor] = []
        peak = self.place.peak_of(lambda: got.append(arm.step(self.ids[tokens])))
        facts = {"peak_bytes": peak, "steps_of_a_visit": 1} | self.compare(arm, tokens, got[0])
        if not arm.is_rare:
            facts |= self.waits(arm, tokens)
        if arm.source != "disk" and not arm.is_rare:
            seconds = self.place.steady(lambda: arm.step(self.ids[tokens]), 1)[0]
            facts["steps_of_a_visit"] = min(_MOST_STEPS, max(1, int(_VISIT_SECONDS / seconds)))
        self.facts[arm.name, tokens] = facts

    def compare(self, arm: Arm, tokens: int, got: torch.Tensor) -> dict[str, Any]:
        want = self.want[tokens].float()
        error = ((got.float() - want).norm() / want.norm()).item()
        assert error <= _TOLERANCE, f"{arm.name}, {tokens} tokens: {error} off the resident model"
        return {"equals_resident": torch.equal(got, self.want[tokens]), "relative_error": error}

    def waits(self, arm: Arm, tokens: int) -> dict[str, Any]:
        """Of the host in a step: for the device, which is never right, and for a read to come."""
        before = arm.counters()
        syncs = self.place.num_syncs_of(lambda: arm.step(self.ids[tokens]))
        after = arm.counters()
        # One step went before the one that was looked at.
        waits = {name: (after[name] - before[name]) / 2 for name in ("num_waits",) if name in after}
        return {"host_syncs": syncs} | waits

    # -- rounds --------------------------------------------------------------------------------

    def run(self) -> None:
        shuffler = random.Random(0)
        for number in range(2 if self.place.is_simulated else _MOST_ROUNDS):
            self.ceiling["ram"].append(link_gbps(self.place))
            self.ceiling["disk"].append(disk_gbps(weights_of(self.folder)))
            arms = [self.resident, *self.arms.values()]
            shuffler.shuffle(arms)
            for arm in sorted(arms, key=lambda arm: arm.is_rare):
                if not arm.is_rare or (number < _RARE_ROUNDS and self.report.has_time()):
                    self.visit(arm)
            self.report["stream"] = self.result()
            if not self.report.has_time():
                break

    def visit(self, arm: Arm) -> None:
        if isinstance(arm, Streamed):
            arm.settle()
            self.transfer[arm.name] += self.place.steady(arm.sweep, 1)
        measure = self.place.steady if arm.is_primed else self.place.steps
        for tokens in self.tokens(arm):
            arm.settle()
            ids, count = self.ids[tokens], self.facts[arm.name, tokens]["steps_of_a_visit"]
            seconds = measure(lambda ids=ids: arm.step(ids), count)
            self.seconds[arm.name, tokens].append(median(seconds))

    # -- results -------------------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        seen = [arm for arm in self.arms.values() if self.seconds[arm.name, 1]]
        streamed = [arm for arm in seen if isinstance(arm, Streamed)]
        peers = [arm for arm in seen if isinstance(arm, Peer)]
        return {
            "num_rounds": len(self.ceiling["ram"]),
            "ceiling_gbps": {name: spread(rounds) for name, rounds in self.ceiling.items()},
            "transfers": {arm.name: self.transfer_of(arm) for arm in streamed},
            "resident": [self.resident_line(tokens) for tokens in self.ids],
            "steps": [self.line(arm, n) for arm in streamed for n in self.tokens(arm)],
            "peers": [self.peer_line(arm, n) for arm in peers for n in self.tokens(arm)],
        }

    def transfer_of(self, arm: Streamed) -> dict[str, Any]:
        """A pass that computes nothing."""
        plan, counters = arm.plan, arm.counters()
        pairs = zip(self.transfer[arm.name], self.ceiling[arm.source], strict=False)
        return {
            "source": arm.source,
            "io_mode": counters["io_mode"],
            "reader": counters["reader"],
            "refusal": counters["refusal"],
            "chunk_bytes": counters["chunk_bytes"],
            "is_pinned": counters["is_pinned"],
            "streamed_groups": len(plan.streamed),
            "ram_groups": len(plan.in_ram),
            "resident_groups": len(plan.resident),
            "bytes_per_step": plan.streamed_bytes,
            "budget_bytes": plan.budget_bytes,
            "held_bytes": arm.held_bytes,
            "seconds": spread(self.transfer[arm.name]),
            "share_of_ceiling": spread([plan.streamed_bytes / s / c / 1e9 for s, c in pairs]),
        }

    def resident_line(self, tokens: int) -> dict[str, Any]:
        seconds = self.seconds["resident", tokens]
        return {"tokens": tokens, "step_seconds": spread(seconds)} | self.facts["resident", tokens]

    def line(self, arm: Streamed, tokens: int) -> dict[str, Any]:
        steps, computes = self.seconds[arm.name, tokens], self.seconds["resident", tokens]
        nbytes = arm.plan.streamed_bytes
        moved = [nbytes / gbps / 1e9 for gbps in self.ceiling[arm.source]]
        bounds = [max(pair) for pair in zip(computes, moved, strict=False)]
        parts = [max(pair) for pair in zip(computes, self.transfer[arm.name], strict=False)]
        compute, transfer = median(computes), median(self.transfer[arm.name])
        return {
            "arm": arm.name,
            "tokens": tokens,
            "step_seconds": spread(steps),
            "tokens_per_second": tokens / median(steps),
            "compute_seconds": compute,
            "transfer_seconds": transfer,
            "gbps": nbytes / median(steps) / 1e9,
            "share_of_ceiling": median(a / b for a, b in zip(moved, steps, strict=False)),
            "step_over_bound": spread(_ratios(steps, bounds)),
            "step_over_parts": spread(_ratios(steps, parts)),
            "weight_stall_ratio": median(
                (step - compute) / step for step, compute in zip(steps, computes, strict=False)
            ),
            "is_hidden": compute >= _HIDDEN_FROM * transfer,
            **self.facts[arm.name, tokens],
            **self.memory(arm, tokens),
        }

    def memory(self, arm: Streamed, tokens: int) -> dict[str, Any]:
        """Peak, and what is allowed: the budget, and what the resident model's step takes."""
        own, activations = (
            self.facts[name, tokens]["peak_bytes"] for name in (arm.name, "resident")
        )
        if own is None or activations is None or arm.held_bytes is None:
            return {"device_peak_bytes": None, "device_allowed_bytes": None}
        return {
            "device_peak_bytes": arm.held_bytes + own,
            "device_allowed_bytes": arm.plan.budget_bytes + activations,
        }

    def peer_line(self, arm: Peer, tokens: int) -> dict[str, Any]:
        """`nexus_speedup` compares with our arm that moves the same bytes, in the same rounds."""
        theirs, ours = self.seconds[arm.name, tokens], self.seconds[arm.rival, tokens]
        speedup = {"nexus_speedup": spread(_ratios(theirs, ours))} if ours else {}
        return {
            "arm": arm.name,
            "tokens": tokens,
            "against": arm.rival,
            "step_seconds": spread(theirs),
            **speedup,
            **self.facts[arm.name, tokens],
        }


def _ratios(above: list[float], below: list[float]) -> list[float]:
    """By round, as far as both were visited."""
    return [a / b for a, b in zip(above, below, strict=False)]


def measure(place: Place, folder: Path, report: Report) -> None:
    """Fill the report's `stream`."""
    bench = Bench(place, folder, report)
    bench.make_arms()
    bench.run()
    for arm in bench.arms.values():
        arm.close()
