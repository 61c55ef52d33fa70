"""The engine on a GPU, real or simulated: right bytes in every order, no synchronising, no leak.

A consumer acquires groups and enqueues a kernel that reads each; what the kernels saw is compared
when all is done. The simulated driver runs copies late, by seed, and declares misuse.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ext.checkpoint import Group
from nexus_ext.engine import Engine, Faults, ReadMode

KIB = 1 << 10
CHUNK = 64 * KIB
# One that is faster than its disk, or slower, by seed.
MAX_DELAY_US = 300


@dataclass
class CudaRig:
    """An attached engine on a GPU, and what its kernels saw."""

    gpu: Any
    engine: Engine
    source: Any
    groups: Sequence[Group]
    arenas: Sequence[torch.Tensor]
    arena_of: Sequence[int]
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def use(self, group: int) -> None:
        """Acquire, and enqueue a kernel that reads."""
        arena = self.arenas[self.arena_of[group]]
        self.engine.acquire(group, arena)
        self.seen.append((group, self.gpu.read(arena[: self.groups[group].nbytes])))

    def sweep(self, passes: int = 1) -> None:
        for _ in range(passes):
            for group in range(len(self.groups)):
                self.use(group)
            self.engine.end_pass()

    def num_wrong(self) -> int:
        """Bytes that kernels saw and that are not the file's. Waits for them."""
        self.gpu.synchronize()
        wrong = 0
        for group, seen in self.seen:
            for extent in self.groups[group].extents:
                have = seen.numpy()[extent.group_offset : extent.group_offset + extent.nbytes]
                want = self.source.data[extent.offset : extent.offset + extent.nbytes]
                wrong += extent.nbytes - int(np.count_nonzero(have == want))
        self.seen.clear()
        return wrong

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.stats()


class Bench:
    """Makes rigs; closes them."""

    def __init__(self, gpu: Any, lab: Any) -> None:
        self.gpu = gpu
        self.lab = lab
        self.source = lab.source(2 << 20)
        self._rigs: list[CudaRig] = []

    def groups(self, count: int = 5, nbytes: int = 150 * KIB) -> list[Group]:
        """At odd offsets, each of two extents that lie apart in the file."""
        made = []
        for index in range(count):
            begin = index * (nbytes + 5000) + 13
            first = nbytes // 3
            places = ((0, begin, first), (0, begin + first + 700, nbytes - first))
            made.append(self.lab.group(*places))
        return made

    def rig(
        self,
        groups: Sequence[Group] | None = None,
        *,
        num_arenas: int = 3,
        num_resident: int = 0,
        in_ram: Sequence[int] = (),
        poison: bool = False,
        faults: Faults | None = None,
        verify: str = "off",
        **mode: Any,
    ) -> CudaRig:
        groups = self.groups() if groups is None else groups
        chosen = ReadMode(**{"chunk_bytes": CHUNK, "depth": 4} | mode)
        engine = self.lab.engine(
            [self.source], chosen, device=self.gpu.device.name, poison=poison, faults=faults
        )
        largest = max(group.nbytes for group in groups)
        arenas = [self.gpu.memory(group.nbytes) for group in groups[:num_resident]]
        arenas += [self.gpu.memory(largest) for _ in range(num_arenas)]
        arena_of = [
            index if index < num_resident else num_resident + (index - num_resident) % num_arenas
            for index in range(len(groups))
        ]
        order = range(num_resident, len(groups))
        engine.attach(arenas, groups, arena_of, order, num_arenas - 1, in_ram=in_ram)
        if verify != "off":
            engine.set_digests([engine.digest(index) for index in range(len(groups))], verify)
        rig = CudaRig(self.gpu, engine, self.source, groups, arenas, arena_of)
        self._rigs.append(rig)
        return rig

    def close(self) -> None:
        for rig in self._rigs:
            rig.engine.close()
        self._rigs.clear()
        self.lab.close()
        self.lab._engines.clear()


@pytest.fixture
def bench(gpu: Any, lab: Any) -> Iterator[Bench]:
    made = Bench(gpu, lab)
    yield made
    made.close()


pytestmark = pytest.mark.takes_simcuda

# -- right bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_arenas", [2, 3, 4])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_kernels_see_the_files_bytes(bench: Bench, io: str, num_arenas: int) -> None:
    rig = bench.rig(io=io, num_arenas=num_arenas)
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    assert rig.stats["bytes_copied"] >= 8 * 150 * KIB  # some were still there
    assert rig.stats["bytes_staged"] == rig.stats["bytes_copied"]


def draw_and_run(bench: Bench, seed: int) -> int:
    """A rig, an order and kernels of any length, as the seed has it; bytes that were wrong."""
    rng = random.Random(seed)
    groups = bench.groups(rng.choice([3, 5]), rng.choice([30, 150]) * KIB)
    count = len(groups)
    rig = bench.rig(
        groups,
        num_arenas=rng.choice([2, 3]),
        num_resident=rng.choice([0, 0, 1]),
        in_ram=rng.sample(range(count), rng.choice([0, 0, 1, count])),
        poison=rng.random() < 0.5,
        depth=rng.choice([2, 4]),
        num_slots=rng.choice([3, 5]),
        verify=rng.choice(["off", "off", "first", "always"]),
    )
    order = list(range(count))
    for _ in range(3):
        if rng.random() < 0.2:
            rng.shuffle(order)
        for group in order:
            rig.use(group)
            if rng.random() < 0.3:
                bench.gpu.delay(rng.randrange(2 * MAX_DELAY_US))
    return rig.num_wrong()


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("batch", range(20))
def test_a_thousand_seeds_give_right_bytes(bench: Bench, sim_gpu: Any, batch: int) -> None:
    for seed in range(50 * batch, 50 * (batch + 1)):
        sim_gpu.reset(seed, MAX_DELAY_US)
        assert draw_and_run(bench, seed) == 0, f"seed {seed}"
        bench.close()
        counts = sim_gpu.sim.counts()
        assert not sim_gpu.sim.leaks(), f"seed {seed}"
        assert counts["num_bad_pointers"] == counts["num_use_after_free"] == 0, f"seed {seed}"
        assert counts["num_blocking_streams"] == counts["num_timing_events"] == 0
        assert counts["num_pageable_copies"] == 0, f"seed {seed}"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("seed", range(40))
def test_a_real_gpu_gives_right_bytes(bench: Bench, seed: int) -> None:
    assert draw_and_run(bench, seed) == 0
