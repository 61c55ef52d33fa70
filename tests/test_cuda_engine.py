"""The engine on a GPU, real or simulated: right bytes in every order, no synchronising, no leak.

A consumer acquires groups and enqueues a kernel that reads each; what the kernels saw is compared
when all is done. The simulated driver runs copies late, by seed, and declares misuse.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from nexus_ext.engine import Faults
from nexus_ext.errors import CorruptCheckpoint, DeviceError, EngineClosed, ReadError

KIB = 1 << 10
CHUNK = 64 * KIB
# One that is faster than its disk, or slower, by seed.
MAX_DELAY_US = 300


pytestmark = pytest.mark.takes_simcuda

# -- right bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("num_arenas", [2, 3, 4])
@pytest.mark.parametrize("io", ["direct", "buffered", "mmap"])
def test_kernels_see_the_files_bytes(bench: Any, io: str, num_arenas: int) -> None:
    rig = bench.rig(io=io, num_arenas=num_arenas)
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    assert rig.stats["bytes_copied"] >= 8 * 150 * KIB  # some were still there
    assert rig.stats["bytes_staged"] == rig.stats["bytes_copied"]


def draw_and_run(bench: Any, seed: int) -> int:
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
def test_a_thousand_seeds_give_right_bytes(bench: Any, sim_gpu: Any, batch: int) -> None:
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
def test_a_real_gpu_gives_right_bytes(bench: Any, seed: int) -> None:
    assert draw_and_run(bench, seed) == 0


def test_groups_that_stay_in_ram_are_read_once_and_copied_whole(bench: Any) -> None:
    groups = bench.groups(count=7)
    rig = bench.rig(groups, num_arenas=2, in_ram=range(7))
    rig.sweep(passes=2)  # some first reads may have been given up for others
    first = rig.stats
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    now = rig.stats
    grown = {name: now[name] - first[name] for name in now if name.startswith(("num_", "bytes"))}
    assert grown["bytes_read"] == 0
    assert grown["num_ram_loads"] == grown["num_loads"] == grown["num_copies"] > 0
    # From RAM nobody waits for another thread.
    assert grown["num_waits"] == 0
    assert now["ram_bytes"] >= sum(group.nbytes for group in groups)


def test_some_groups_in_ram_and_some_from_disk(bench: Any) -> None:
    rig = bench.rig(bench.groups(count=7), num_arenas=3, in_ram=[0, 2, 5], poison=True)
    rig.sweep(passes=4)
    assert rig.num_wrong() == 0
    assert rig.stats["num_ram_loads"] > 0
    assert rig.stats["bytes_read"] > 2 * 4 * 150 * KIB


def test_a_group_longer_than_one_locked_part_is_copied_in_several(bench: Any) -> None:
    """No copy may reach from one registered range into the next: the driver refuses it."""
    nbytes = (256 << 20) + (1 << 20)
    bench.source = bench.lab.source(nbytes + 8192)
    big, small = bench.lab.group((0, 5000, nbytes)), bench.lab.group((0, 0, KIB))
    rig = bench.rig([big, small, small], num_resident=1, in_ram=[0], chunk_bytes=4 << 20)
    rig.use(0)
    assert rig.num_wrong() == 0
    assert rig.stats["ram_bytes"] > nbytes


@pytest.mark.parametrize("in_ram", [[], [0, 1, 2, 3, 4]], ids=["disk", "ram"])
def test_streams_may_change_between_groups(bench: Any, gpu: Any, in_ram: list[int]) -> None:
    rig = bench.rig(in_ram=in_ram, num_arenas=2)
    for _ in range(3):
        rig.use(0)
        with gpu.stream():
            rig.use(1)
            rig.use(2)
            with gpu.stream():
                rig.use(3)
        rig.use(4)
    assert rig.num_wrong() == 0


def test_several_engines_share_a_gpu(bench: Any) -> None:
    rigs = [bench.rig(num_arenas=2, in_ram=in_ram) for in_ram in ([], [1, 2], range(5))]
    for _ in range(3):
        for group in range(5):
            for rig in rigs:
                rig.use(group)
    assert [rig.num_wrong() for rig in rigs] == [0, 0, 0]


def test_a_group_is_acquired_again_on_another_stream(bench: Any, gpu: Any) -> None:
    rig = bench.rig(num_arenas=2)
    for group in (0, 1, 2):
        rig.use(group)
        with gpu.stream():
            rig.use(group)
    assert rig.num_wrong() == 0


# -- verified bytes --------------------------------------------------------------------------------


@pytest.mark.parametrize("in_ram", [[], [1, 3]], ids=["disk", "ram"])
@pytest.mark.parametrize("verify", ["first", "always"])
def test_flipped_bits_heal_or_are_refused(bench: Any, verify: str, in_ram: list[int]) -> None:
    faults = Faults(seed=5, flip_ppm=500_000)
    rig = bench.rig(verify=verify, faults=faults, in_ram=in_ram, num_arenas=2)
    refused = 0
    # Which read is hit depends on which comes first.
    for _ in range(50):
        for group in range(5):
            try:
                rig.use(group)
            except CorruptCheckpoint:
                refused += 1
        if rig.stats["num_healed"] + refused > 0:
            break
    assert rig.stats["num_injected_flips"] > 0
    assert rig.stats["num_healed"] + refused > 0
    wrong = rig.num_wrong()
    if verify == "always":
        assert wrong == 0


def assert_all_verified(stats: dict[str, Any], at_least: int) -> None:
    # What landed in one of the arenas before the digests were known was loaded again.
    assert at_least <= stats["num_verified"] <= stats["num_landed"] <= stats["num_verified"] + 3


def test_bytes_are_hashed_in_order_whatever_the_order_they_come_in(bench: Any) -> None:
    faults = Faults(seed=2, delay_ppm=400_000, delay_us=2000)
    rig = bench.rig(verify="always", faults=faults, num_slots=3, use_uring=False)
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    stats = rig.stats  # one look: the next pass is under way
    assert_all_verified(stats, at_least=13)
    assert stats["num_failed"] == 0


def test_what_lies_in_ram_is_hashed_again_when_it_is_always_verified(bench: Any) -> None:
    rig = bench.rig(verify="always", in_ram=range(5), num_arenas=2)
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    stats = rig.stats
    assert_all_verified(stats, at_least=15)
    assert stats["num_ram_loads"] >= 8


# -- errors of the disk ----------------------------------------------------------------------------


@pytest.mark.parametrize("in_ram", [[], range(5)], ids=["disk", "ram"])
def test_a_failed_read_is_typed_and_can_be_repeated(bench: Any, in_ram: list[int]) -> None:
    rig = bench.rig(faults=Faults(seed=3, errno_ppm=200_000), in_ram=in_ram, num_arenas=2)
    for _ in range(4):
        for group in range(5):
            while True:
                with contextlib.suppress(ReadError):
                    rig.use(group)
                    break
    # Those that failed ahead of their time were read again without a word.
    assert rig.stats["num_failed"] > 0
    assert rig.num_wrong() == 0


def test_short_reads_and_delays_change_nothing(bench: Any) -> None:
    faults = Faults(seed=1, short_ppm=200_000, again_ppm=50_000, delay_ppm=100_000, delay_us=500)
    rig = bench.rig(faults=faults, in_ram=[2])
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    assert rig.stats["num_short_reads"] > 0


# -- the end ---------------------------------------------------------------------------------------


def test_an_engine_may_close_while_everything_is_under_way(bench: Any, gpu: Any) -> None:
    for in_ram in ([], range(5)):
        rig = bench.rig(in_ram=in_ram)
        gpu.delay(3000)
        rig.use(0)
        rig.use(1)
        rig.engine.close()
        assert rig.num_wrong() == 0
        with pytest.raises(EngineClosed):
            rig.use(2)


def test_a_gpu_that_is_not_there_is_named(bench: Any) -> None:
    with pytest.raises(DeviceError, match="looking for the device"):
        bench.lab.engine([bench.source], bench.mode(), device="cuda:99")
