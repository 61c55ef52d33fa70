"""Every wait is needed: leave one out, and some kernel sees wrong bytes.

The simulated driver leaves out calls, as if the program had forgotten them. Each deletion must be
noticed, and by bytes; the same rig with nothing left out is right under the seeds that noticed one.

    deletion                      what then happens
    lane waits for `free`         a copy overwrites what a kernel still reads
    the caller's record of it     the same
    current waits for `ready`     a kernel reads before the copy is done
    the lane's record of it       the same
    a slot waits for `copied`     a read overwrites a slot that is still copied from
"""

from __future__ import annotations

import time
from typing import Any

import pytest

KIB = 1 << 10
MAX_DELAY_US = 400
SEEDS = range(30)

pytestmark = pytest.mark.needs_simcuda


def num_wrong(bench: Any, sim_gpu: Any, seed: int, dropped: str, **rig: Any) -> int:
    sim_gpu.reset(seed, MAX_DELAY_US)
    sim_gpu.sim.drop(dropped)
    chosen = {"num_arenas": 2, "num_slots": 3, "depth": 2} | rig
    made = bench.rig(bench.groups(count=5, nbytes=200 * KIB), **chosen)
    for _ in range(3):
        for group in range(5):
            made.use(group)
            bench.gpu.delay(MAX_DELAY_US)
    wrong: int = made.num_wrong()
    assert bool(dropped) == bool(sim_gpu.sim.counts()["num_dropped"])
    bench.close()
    return wrong


DELETIONS = ["wait:lane", "record:current", "wait:current", "record:lane", "query,synchronize"]
RIGS = {"disk": {}, "ram": {"in_ram": range(5)}, "poison": {"poison": True}}


@pytest.mark.parametrize(
    ("deletion", "rig"),
    # What stays in RAM leaves the ring once, when nobody is in a hurry.
    [(d, r) for d in DELETIONS for r in RIGS if (d, r) != ("query,synchronize", "ram")],
)
def test_a_wait_that_is_left_out_is_noticed(
    bench: Any, sim_gpu: Any, deletion: str, rig: str
) -> None:
    for seed in SEEDS:
        if num_wrong(bench, sim_gpu, seed, deletion, **RIGS[rig]):
            break
    else:
        pytest.fail(f"without {deletion} every byte was right under {len(SEEDS)} seeds")
    assert num_wrong(bench, sim_gpu, seed, "", **RIGS[rig]) == 0


def wrong_in_what_was_there_before(bench: Any, sim_gpu: Any, seed: int, dropped: str) -> int:
    """An allocator gives out memory that a kernel enqueued before still reads."""
    sim_gpu.reset(seed, MAX_DELAY_US)
    arena = sim_gpu.memory(200 * KIB)
    before = arena.clone()
    sim_gpu.delay(20 * MAX_DELAY_US)
    seen = sim_gpu.read(arena)
    sim_gpu.sim.drop(dropped)
    engine = bench.lab.engine([bench.source], bench.mode(), device=sim_gpu.device.name)
    groups = [bench.lab.group((0, index * 1000, 200 * KIB)) for index in range(2)]
    engine.attach([arena], groups, [0, 0], [0, 1], 1)
    engine.acquire(0, arena)
    sim_gpu.synchronize()
    wrong = int((seen != before).sum())
    bench.close()
    return wrong


@pytest.mark.parametrize("deletion", ["wait:lane", "record:current"])
def test_an_arena_may_still_be_read_by_who_had_its_memory_before(
    bench: Any, sim_gpu: Any, deletion: str
) -> None:
    noticed = [
        seed for seed in SEEDS if wrong_in_what_was_there_before(bench, sim_gpu, seed, deletion) > 0
    ]
    assert noticed
    for seed in noticed[:5]:
        assert wrong_in_what_was_there_before(bench, sim_gpu, seed, "") == 0


def test_the_caller_never_waits_for_the_gpu(bench: Any, sim_gpu: Any) -> None:
    sim_gpu.reset(1, MAX_DELAY_US)
    sim_gpu.sim.mark_caller_thread()
    for in_ram in ([], range(5), [1, 3]):
        rig = bench.rig(in_ram=in_ram)
        rig.sweep(passes=3)
        assert sim_gpu.sim.counts()["num_synchronize_caller"] == 0
        assert rig.num_wrong() == 0
        before = sim_gpu.sim.counts()["num_synchronize_caller"]
        rig.engine.close()  # memory is given back: here the caller does wait
        assert sim_gpu.sim.counts()["num_synchronize_caller"] > before
        sim_gpu.reset(2, MAX_DELAY_US)
        sim_gpu.sim.mark_caller_thread()


def test_a_ring_that_is_full_waits_for_its_copies_and_not_for_all(bench: Any, sim_gpu: Any) -> None:
    """The reader runs ahead of slow copies as far as there are slots."""
    rig = bench.rig(num_slots=3, depth=2, num_arenas=3)
    lanes = sim_gpu.sim.counts()["live_streams"]
    assert lanes >= 3
    rig.sweep(passes=2)
    assert rig.num_wrong() == 0
    stats = rig.stats
    assert stats["num_slots"] == 3
    assert stats["num_copies"] > 20


def test_reads_go_on_until_every_slot_waits_for_its_copy(bench: Any, sim_gpu: Any) -> None:
    """No copy may begin while the arenas are in use: the ring fills, and then the reader stops."""
    sim_gpu.sim.hold_stream(sim_gpu._current)
    sim_gpu.delay(1)  # what had the arenas' memory before
    groups = bench.groups(count=4, nbytes=400 * KIB)
    rig = bench.rig(groups, num_arenas=4, num_slots=20, depth=4)
    deadline = time.monotonic() + 60
    while rig.stats["num_reads"] < 20 or rig.stats["num_in_flight"]:
        assert time.monotonic() < deadline, rig.stats
        time.sleep(0.001)
    time.sleep(0.05)
    assert rig.stats["num_reads"] == rig.stats["num_slots"] == 20
    sim_gpu.sim.hold_stream(sim_gpu._current, False)
    rig.sweep(passes=2)
    assert rig.num_wrong() == 0
