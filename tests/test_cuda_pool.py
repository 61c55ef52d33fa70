"""Pooled groups on a GPU, real or simulated: kernels read what was collected, whoever comes next.

A consumer places groups, collects them and enqueues a kernel that reads each, before it gives their
arenas to others; what the kernels saw is compared when all is done. Then every wait is left out in
turn, by the simulated driver, and must be missed:

    deletion                      what then happens
    lane waits for `free`         a copy overwrites what a kernel still reads
    the caller's record of it     the same
    current waits for `ready`     a kernel reads before the copy is done
    the lane's record of it       the same
    a slot waits for `copied`     a read overwrites a slot that is still copied from
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ext.checkpoint import Group
from nexus_ext.engine import Engine, Faults
from nexus_ext.errors import (
    CorruptCheckpoint,
    DeviceError,
    DeviceLost,
    EngineClosed,
    EngineError,
    ReadError,
)

KIB = 1 << 10
PAGE = 4096
ALL = 1 << 20  # more than there are
MAX_DELAY_US = 400
SEEDS = range(30)
INVALID_VALUE, LAUNCH_FAILED = 1, 719

pytestmark = pytest.mark.takes_simcuda


@dataclass
class Pool:
    """An engine on a GPU whose groups are all pooled, and what its kernels saw."""

    gpu: Any
    engine: Engine
    source: Any
    groups: Sequence[Group]
    arenas: Sequence[torch.Tensor]
    where: dict[int, int] = field(default_factory=dict)
    seen: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def place(self, groups: Sequence[int], arenas: Sequence[int], *, ahead: bool = False) -> None:
        self.engine.place(groups, arenas, ahead=ahead)
        self.where |= dict(zip(groups, arenas, strict=True))

    def read(self, group: int) -> None:
        """Enqueue a kernel that reads what was collected."""
        arena = self.arenas[self.where[group]]
        self.seen.append((group, self.gpu.read(arena[: self.groups[group].nbytes])))

    def use(self, groups: Sequence[int], *, at_least: int = ALL) -> list[int]:
        landed = self.engine.collect(groups, at_least=at_least)
        for group in landed:
            self.read(group)
        return landed

    def get(self, group: int, arena: int) -> None:
        self.place([group], [arena])
        assert self.use([group]) == [group]

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


def make_pool(
    bench: Any,
    groups: Sequence[Group] | None = None,
    *,
    num_arenas: int = 3,
    in_ram: Sequence[int] = (),
    poison: bool = False,
    faults: Faults | None = None,
    verify: str = "off",
    **mode: Any,
) -> Pool:
    groups = bench.groups(count=6) if groups is None else groups
    gpu = bench.gpu
    engine = bench.lab.engine(
        [bench.source], bench.mode(**mode), device=gpu.device.name, poison=poison, faults=faults
    )
    size = -(-max(group.nbytes for group in groups) // PAGE) * PAGE
    memory = gpu.memory(num_arenas * size)
    arenas = [memory[index * size : (index + 1) * size] for index in range(num_arenas)]
    everybody = range(len(groups))
    engine.attach(arenas, groups, [0] * len(groups), [], 0, in_ram=in_ram, pooled=everybody)
    if verify != "off":
        engine.set_digests([engine.digest(index) for index in everybody], verify)
    return Pool(gpu, engine, bench.source, groups, arenas)


# -- right bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("in_ram", [[], range(6)], ids=["disk", "ram"])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_kernels_see_the_files_bytes(bench: Any, io: str, in_ram: Sequence[int]) -> None:
    pool = make_pool(bench, io=io, in_ram=in_ram)
    for step in range(20):
        pool.get((5 * step) % 6, step % 3)
    assert pool.num_wrong() == 0
    assert (pool.stats["num_ram_loads"] > 0) == bool(in_ram)


def draw_and_run(bench: Any, seed: int) -> int:
    """A pool, groups and kernels as the seed has them; bytes that were wrong."""
    rng = random.Random(seed)
    count = rng.choice([4, 7])
    num_arenas = rng.choice([2, 3, 4])
    pool = make_pool(
        bench,
        bench.groups(count, rng.choice([30, 150]) * KIB),
        num_arenas=num_arenas,
        in_ram=rng.sample(range(count), rng.choice([0, 0, 1, count])),
        poison=rng.random() < 0.5,
        depth=rng.choice([2, 4]),
        num_slots=rng.choice([3, 5]),
        verify=rng.choice(["off", "off", "first", "always"]),
    )
    for _ in range(12):
        chosen = rng.sample(range(count), rng.randint(1, num_arenas))
        pool.place(chosen, rng.sample(range(num_arenas), len(chosen)), ahead=rng.random() < 0.3)
        if rng.random() < 0.2:
            pool.engine.evict(chosen[:1])
            chosen = chosen[1:]
        left = list(chosen) if rng.random() < 0.8 else []  # or nobody wants them after all
        while left:
            landed = pool.use(left, at_least=rng.choice([1, ALL]))
            left = [group for group in left if group not in landed]
            if rng.random() < 0.3:
                bench.gpu.delay(rng.randrange(2 * MAX_DELAY_US))
        if rng.random() < 0.3:
            pool.engine.evict(rng.sample(range(count), 2))
    return pool.num_wrong()


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("batch", range(10))
def test_five_hundred_seeds_give_right_bytes(bench: Any, sim_gpu: Any, batch: int) -> None:
    for seed in range(50 * batch, 50 * (batch + 1)):
        sim_gpu.reset(seed, MAX_DELAY_US)
        assert draw_and_run(bench, seed) == 0, f"seed {seed}"
        bench.close()
        counts = sim_gpu.sim.counts()
        assert not sim_gpu.sim.leaks(), f"seed {seed}"
        assert counts["num_bad_pointers"] == counts["num_use_after_free"] == 0, f"seed {seed}"
        assert counts["num_pageable_copies"] == 0, f"seed {seed}"


@pytest.mark.needs_cuda
@pytest.mark.parametrize("seed", range(40))
def test_a_real_gpu_gives_right_bytes(bench: Any, seed: int) -> None:
    assert draw_and_run(bench, seed) == 0


def test_more_arenas_than_lanes(bench: Any) -> None:
    """A GPU runs so many queues side by side and no more: a pool does not ask for others."""
    pool = make_pool(bench, bench.groups(count=60, nbytes=20 * KIB), num_arenas=50, poison=True)
    if bench.gpu.sim is not None:
        assert bench.gpu.sim.counts()["live_streams"] == 32
    rng = random.Random(1)
    for _ in range(6):
        chosen = rng.sample(range(60), 50)
        pool.place(chosen, rng.sample(range(50), 50))
        pool.use(chosen)
    assert pool.num_wrong() == 0


def test_streams_may_change_between_uses(bench: Any, gpu: Any) -> None:
    for in_ram in ([], range(6)):
        pool = make_pool(bench, in_ram=in_ram, num_arenas=2)
        for step in range(4):
            pool.get(step, 0)
            with gpu.stream():
                pool.use([step])
                pool.get(step + 1, 1)
                with gpu.stream():
                    pool.get((step + 2) % 6, 0)
            pool.use([(step + 2) % 6, step + 1])
        assert pool.num_wrong() == 0


def test_what_is_known_to_be_there_is_not_waited_for(bench: Any, gpu: Any) -> None:
    pool = make_pool(bench)
    pool.get(0, 0)
    gpu.synchronize()
    pool.use([0])
    if gpu.sim is not None:
        before = gpu.sim.calls()
        pool.use([0])
        after = gpu.sim.calls()
        for call in ("cuStreamWaitEvent", "cuEventQuery", "cuEventRecord"):
            assert after[call] == before[call]
    assert pool.num_wrong() == 0


@pytest.mark.needs_simcuda
def test_the_caller_never_waits_for_the_gpu(bench: Any, sim_gpu: Any) -> None:
    for in_ram in ([], range(6), [1, 3]):
        sim_gpu.reset(1, MAX_DELAY_US)
        sim_gpu.sim.mark_caller_thread()
        pool = make_pool(bench, in_ram=in_ram, poison=True)
        for step in range(12):
            pool.get((5 * step) % 6, step % 3)
            pool.engine.evict([step % 6])
        assert sim_gpu.sim.counts()["num_synchronize_caller"] == 0
        assert pool.num_wrong() == 0
        bench.close()


# -- every wait is needed --------------------------------------------------------------------------


def num_wrong(bench: Any, sim_gpu: Any, seed: int, dropped: str, **given: Any) -> int:
    sim_gpu.reset(seed, MAX_DELAY_US)
    sim_gpu.sim.drop(dropped)
    evicts = given.pop("evicts", False)
    chosen = {"num_arenas": 2, "num_slots": 3, "depth": 2} | given
    pool = make_pool(bench, bench.groups(count=5, nbytes=200 * KIB), **chosen)
    for step in range(15):
        pool.get(step % 5, step % 2)
        bench.gpu.delay(MAX_DELAY_US)
        if evicts:
            pool.engine.evict([step % 5])
    wrong = pool.num_wrong()
    assert bool(dropped) == bool(sim_gpu.sim.counts()["num_dropped"])
    bench.close()
    return wrong


DELETIONS = ["wait:lane", "record:current", "wait:current", "record:lane", "query,synchronize"]
RIGS: dict[str, dict[str, Any]] = {
    "disk": {},
    "ram": {"in_ram": range(5)},
    "poison": {"poison": True},
    "evict": {"evicts": True},
    "evict-poison": {"evicts": True, "poison": True},
}


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("deletion", DELETIONS)
def test_a_wait_that_is_left_out_is_noticed(
    bench: Any, sim_gpu: Any, deletion: str, rig: str
) -> None:
    for seed in SEEDS:
        if num_wrong(bench, sim_gpu, seed, deletion, **RIGS[rig]):
            break
    else:
        pytest.fail(f"without {deletion} every byte was right under {len(SEEDS)} seeds")
    assert num_wrong(bench, sim_gpu, seed, "", **RIGS[rig]) == 0


# -- loads that are given up, errors, verified bytes -----------------------------------------------


@pytest.mark.parametrize("in_ram", [[], range(6)], ids=["disk", "ram"])
def test_a_load_may_be_replaced_moved_or_evicted_on_its_way(
    bench: Any, in_ram: Sequence[int]
) -> None:
    faults = Faults(seed=2, delay_ppm=500_000, delay_us=2000)
    pool = make_pool(bench, in_ram=in_ram, faults=faults, verify="always", poison=True)
    rng = random.Random(3)
    for _ in range(60):
        for _ in range(rng.randint(1, 4)):
            pool.place([rng.randrange(6)], [rng.randrange(3)])
            if rng.random() < 0.2:
                pool.engine.evict([rng.randrange(6)])
        pool.get(rng.randrange(6), rng.randrange(3))
    assert pool.num_wrong() == 0
    assert pool.stats["num_stale_reads"] > 0 or in_ram
    assert pool.stats["num_failed"] == 0


def test_a_copy_in_ram_is_filled_by_one_load_at_a_time(bench: Any) -> None:
    """A group moves while it is read: what its first reads bring late must not come last."""
    faults = Faults(seed=7, delay_ppm=1_000_000, delay_us=50_000)
    pool = make_pool(bench, in_ram=range(6), faults=faults, depth=16)
    num_seen = 0
    for group in range(6):
        before = pool.stats["num_reads"]
        pool.place([group], [0])
        # All of its reads begin at once.
        while (first := pool.stats["num_reads"]) == before:
            pass
        pool.place([group], [1])
        while not pool.engine.collect([group], at_least=0):
            now = pool.stats
            num_new = now["num_reads"] - first
            assert not num_new or now["num_in_flight"] <= num_new
            num_seen += num_new > 0
        pool.read(group)
    assert num_seen > 0
    assert pool.num_wrong() == 0


@pytest.mark.parametrize("in_ram", [[], [1, 3]], ids=["disk", "ram"])
@pytest.mark.parametrize("verify", ["first", "always"])
def test_flipped_bits_heal_or_are_refused(bench: Any, verify: str, in_ram: Sequence[int]) -> None:
    faults = Faults(seed=5, flip_ppm=200_000)
    pool = make_pool(bench, verify=verify, faults=faults, in_ram=in_ram)
    refused = 0
    for step in range(100):
        try:
            pool.get((5 * step) % 6, step % 3)
        except CorruptCheckpoint:
            refused += 1
    stats = pool.stats
    assert stats["num_injected_flips"] > 0
    assert stats["num_healed"] + refused > 0
    wrong = pool.num_wrong()
    if verify == "always":
        assert wrong == 0


@pytest.mark.parametrize("in_ram", [[], range(6)], ids=["disk", "ram"])
def test_a_failed_read_is_typed_and_can_be_repeated(bench: Any, in_ram: Sequence[int]) -> None:
    pool = make_pool(bench, faults=Faults(seed=3, errno_ppm=100_000), in_ram=in_ram)
    for step in range(40):
        while True:
            with contextlib.suppress(ReadError):
                pool.get((5 * step) % 6, step % 3)
                break
    assert pool.stats["num_failed"] > 0
    assert pool.num_wrong() == 0


@pytest.mark.needs_simcuda
def test_without_room_in_ram_groups_are_read_each_time(bench: Any, sim_gpu: Any) -> None:
    """Wherever a group is on its way to by then, it is read as it must be cut now."""
    bench.source = bench.lab.source(8 << 20)
    # So large that it takes a while to find no room.
    groups = [bench.lab.group((0, 700 * index + 13, 4 << 20)) for index in range(6)]
    rng = random.Random(1)
    for seed in range(10):
        sim_gpu.reset(seed, 100)
        pool = make_pool(bench, groups, in_ram=range(6))
        sim_gpu.sim.set_registered_limit(0)
        for group in range(6):
            pool.place([group], [0])
            time.sleep(rng.random() * 1e-3)
            pool.get(group, 1)
        assert pool.num_wrong() == 0
        assert pool.stats["num_ram_loads"] == 0
        assert pool.stats["pin_refusal"]
        bench.close()


# -- reads into device memory ----------------------------------------------------------------------


@contextlib.contextmanager
def served(engine: Engine, path: os.PathLike[str]) -> Iterator[None]:
    """Reads into device memory are done by a thread here, as kvikio does them."""

    def serve() -> None:
        with open(path, "rb") as file:
            while taken := engine.take_read():
                ticket, _, offset, nbytes, address = taken
                data = os.pread(file.fileno(), nbytes, offset)
                ctypes.memmove(address, data, len(data))
                engine.answer_read(ticket, len(data), "")

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        engine.close()
        thread.join()


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("verify", ["off", "always"])
def test_reads_may_land_on_the_device(bench: Any, sim_gpu: Any, verify: str) -> None:
    for seed in range(10):
        sim_gpu.reset(seed, MAX_DELAY_US)
        pool = make_pool(bench, io="gds", poison=bool(seed % 2))
        with served(pool.engine, pool.source.path):
            if verify != "off":
                pool.engine.set_digests([pool.engine.digest(index) for index in range(6)], verify)
            for step in range(15):
                pool.place([(step + 1) % 6], [(step + 1) % 3], ahead=True)
                pool.get(step % 6, step % 3)
                bench.gpu.delay(MAX_DELAY_US)
            assert pool.num_wrong() == 0
            stats = pool.stats
            assert stats["bytes_direct"] > stats["bytes_staged"] > 0
        bench.close()


@pytest.mark.needs_simcuda
@pytest.mark.parametrize("deletion", ["query", "record:current"])
def test_reads_into_an_arena_wait_for_its_readers(bench: Any, sim_gpu: Any, deletion: str) -> None:
    def run(seed: int, dropped: str) -> int:
        sim_gpu.reset(seed, MAX_DELAY_US)
        sim_gpu.sim.drop(dropped)
        pool = make_pool(bench, io="gds", num_arenas=2)
        with served(pool.engine, pool.source.path):
            for step in range(10):
                pool.get(step % 6, step % 2)
                bench.gpu.delay(MAX_DELAY_US)
            wrong = pool.num_wrong()
        bench.close()
        return wrong

    seed = next(seed for seed in SEEDS if run(seed, deletion))
    assert run(seed, "") == 0


# -- a driver that refuses -------------------------------------------------------------------------


@pytest.mark.needs_simcuda
def test_while_a_graph_is_captured_nothing_is_moved(bench: Any, sim_gpu: Any) -> None:
    pool = make_pool(bench)
    pool.get(0, 0)
    sim_gpu.sim.set_capturing(sim_gpu._current, 1)
    for use in (
        lambda: pool.engine.place([1], [0]),
        lambda: pool.engine.collect([0]),
        lambda: pool.engine.evict([0]),
    ):
        with pytest.raises(DeviceError, match="CUDA graph replays kernels"):
            use()
    sim_gpu.sim.set_capturing(sim_gpu._current, 0)
    assert pool.use([0]) == [0]
    pool.get(1, 0)
    assert pool.num_wrong() == 0


@pytest.mark.needs_simcuda
@pytest.mark.parametrize(
    "call", ["cuMemcpyHtoDAsync", "cuStreamWaitEvent", "cuStreamIsCapturing", "cuMemsetD8Async"]
)
def test_a_call_that_fails_once_leaves_the_pool_usable(bench: Any, sim_gpu: Any, call: str) -> None:
    seen: list[DeviceError] = []
    for nth in range(16):
        sim_gpu.reset(nth, 100)
        pool = make_pool(bench, in_ram=[1], poison=True, num_arenas=2)
        sim_gpu.sim.fail(call, nth, INVALID_VALUE)
        for step in range(8):
            for _ in range(2):
                try:
                    pool.get(step % 6, step % 2)
                    break
                except DeviceError as error:
                    seen.append(error)
        assert pool.num_wrong() == 0
        bench.close()
        assert not sim_gpu.sim.leaks()
    assert len(seen) > 4
    assert not any(isinstance(error, DeviceLost) for error in seen)


@pytest.mark.needs_simcuda
def test_a_device_that_is_lost_ends_the_engine(bench: Any, sim_gpu: Any) -> None:
    num_lost = 0
    for nth in range(0, 120, 5):
        sim_gpu.reset(nth, 100)
        pool = make_pool(bench)
        sim_gpu.sim.fail("*", nth, LAUNCH_FAILED, sticky=True)
        try:
            for step in range(6):
                pool.get(step % 6, step % 3)
        except DeviceLost:
            num_lost += 1
            with pytest.raises(DeviceLost):
                pool.engine.evict([0])
        bench.close()
        assert not sim_gpu.sim.leaks()
    assert num_lost > 10


# -- the end ---------------------------------------------------------------------------------------


def test_an_engine_may_close_while_everything_is_under_way(bench: Any, gpu: Any) -> None:
    for in_ram in ([], range(6)):
        pool = make_pool(bench, in_ram=in_ram)
        gpu.delay(3000)
        pool.get(0, 0)
        pool.place([1, 2], [1, 2])
        pool.place([3, 4], [1, 0], ahead=True)
        pool.engine.close()
        with pytest.raises(EngineClosed):
            pool.engine.collect([3])


def test_an_arena_given_away_forgets_its_group(bench: Any) -> None:
    pool = make_pool(bench)
    pool.get(0, 0)
    pool.get(1, 0)
    with pytest.raises(EngineError, match=r"group 0 .*its arena was given to another group"):
        pool.engine.collect([0])
    assert pool.num_wrong() == 0
