"""Pooled groups: whoever was collected stays in its arena until it is evicted or replaced.

A test says which group goes where; a model of the pool says what must stand there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ext.checkpoint import Group
from nexus_ext.engine import Engine, Faults, ReadMode, cached_bytes
from nexus_ext.errors import (
    CheckpointChanged,
    CorruptCheckpoint,
    EngineClosed,
    EngineError,
    ReadError,
    ThreadConflict,
    TruncatedCheckpoint,
)

KIB = 1 << 10
MIB = 1 << 20
PAGE = 4096
GROUP = 200_000
ALL = 1 << 20  # more than there are
# From one group to the next: in direct mode they land in place, all but the tail.
STEP = 50 * PAGE
READERS = {
    "direct io_uring": ReadMode(io="direct"),
    "direct threads": ReadMode(io="direct", use_uring=False),
    "buffered threads": ReadMode(io="buffered"),
    "mmap copied": ReadMode(io="mmap"),
    "mmap in place": ReadMode(io="mmap"),
}
COPYING = [name for name in READERS if name != "mmap in place"]
# Every read begins late, at a random time within 20 ms.
LATE = Faults(seed=7, delay_ppm=1_000_000, delay_us=20_000)
# Long enough to find a thread waiting, whatever else the machine does.
VERY_LATE = Faults(seed=7, delay_ppm=1_000_000, delay_us=1_000_000)
PATIENCE_SECONDS = 60


def pool_memory(count: int, nbytes: int, phase: int = 0) -> list[torch.Tensor]:
    """Arenas full of 0xff, each `phase` bytes behind a page boundary."""
    step = -(-nbytes // PAGE) * PAGE + PAGE
    memory = torch.full((count * step + PAGE,), 0xFF, dtype=torch.uint8)
    start = -memory.data_ptr() % PAGE + phase
    return [memory[start + i * step :][:nbytes] for i in range(count)]


@dataclass
class Pool:
    """An engine whose groups are all pooled. Arena i of a view is group i's own."""

    engine: Engine
    source: Any
    groups: Sequence[Group]
    arenas: Sequence[torch.Tensor]
    views: bool
    where: dict[int, int] = field(default_factory=dict)

    def place(self, groups: Sequence[int], arenas: Sequence[int], *, ahead: bool = False) -> None:
        arenas = groups if self.views else arenas
        self.engine.place(groups, arenas, ahead=ahead)
        self.where |= dict(zip(groups, arenas, strict=True))

    def get(self, group: int, arena: int) -> None:
        """Place, wait and compare."""
        self.place([group], [arena])
        assert self.engine.collect([group]) == [group]
        assert self.num_wrong(group) == 0

    def num_wrong(self, group: int) -> int:
        """Bytes of the arena where the group was placed last that are not the file's."""
        arena = self.arenas[self.where[group]].numpy()
        wrong = 0
        for extent in self.groups[group].extents:
            have = arena[extent.group_offset : extent.group_offset + extent.nbytes]
            want = self.source.data[extent.offset : extent.offset + extent.nbytes]
            wrong += extent.nbytes - int(np.count_nonzero(have == want))
        return wrong

    @property
    def stats(self) -> dict[str, Any]:
        return self.engine.stats()

    def wait_until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(stats := self.stats):
            assert time.monotonic() < deadline, stats
            time.sleep(0.0005)

    def settle(self) -> None:
        self.wait_until(lambda stats: stats["num_in_flight"] == 0)


def make_pool(
    lab: Any,
    reader: str = "direct io_uring",
    *,
    num_groups: int = 8,
    num_arenas: int = 3,
    groups: Sequence[Group] | None = None,
    phase: int = 0,
    verify: str = "off",
    poison: bool = False,
    faults: Faults | None = None,
    **mode: Any,
) -> Pool:
    if groups is None:
        groups = [lab.group((0, index * STEP, GROUP)) for index in range(num_groups)]
    end = max(e.offset + e.nbytes for group in groups for e in group.extents)
    source = lab.source(end + 100)
    chosen = ReadMode(**{**READERS[reader].__dict__, "chunk_bytes": 64 * KIB, **mode})
    engine = lab.engine([source], chosen, poison=poison, faults=faults)
    views = reader == "mmap in place"
    if views:
        extents = [group.extents[0] for group in groups]
        arenas = [engine.map(e.file, e.offset, e.nbytes) for e in extents]
        arena_of = list(range(len(groups)))
    else:
        arenas = pool_memory(num_arenas, max(group.nbytes for group in groups), phase)
        arena_of = [index % num_arenas for index in range(len(groups))]
    engine.attach(arenas, groups, arena_of, [], 0, pooled=range(len(groups)))
    if verify != "off":
        engine.set_digests([engine.digest(index) for index in range(len(groups))], verify)
    return Pool(engine, source, groups, arenas, views)


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_thread(action: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


# -- the bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", [0, 64])
def test_a_group_that_is_placed_lands(lab: Any, reader: str, phase: int) -> None:
    pool = make_pool(lab, reader, phase=phase)
    for group in (0, 1, 5, 5, 7, 0):
        pool.get(group, group % 3)
    assert pool.stats["num_failed"] == 0


def test_nothing_is_loaded_before_it_is_placed(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader)
    pool.engine.set_digests([pool.engine.digest(index) for index in range(8)], "always")
    pool.settle()
    assert pool.stats["num_loads"] == pool.stats["num_reads"] == 0


def test_more_groups_than_arenas_pass_through_in_any_order(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, num_groups=40, num_arenas=5, poison=True)
    random = np.random.default_rng(1)
    for _ in range(60):
        chosen = [int(group) for group in random.choice(40, 5, replace=False)]
        pool.place(chosen, [int(arena) for arena in random.permutation(5)])
        assert pool.engine.collect(chosen, at_least=ALL) == chosen
        assert [pool.num_wrong(group) for group in chosen] == [0] * 5


def test_groups_of_many_extents_and_sizes_share_arenas(lab: Any) -> None:
    random = np.random.default_rng(2)
    groups = [
        lab.group(
            *((0, int(random.integers(10**6)), int(random.integers(1, 9000))) for _ in range(12)),
            gap=int(random.integers(50)),
            start=int(random.integers(4096)),
        )
        for _ in range(12)
    ]
    for reader in COPYING:
        pool = make_pool(lab, reader, groups=groups, num_arenas=3)
        for _ in range(3):
            for group in range(12):
                pool.get(group, group % 3)


def test_a_group_that_stands_in_its_arena_is_not_loaded_again(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=LATE)
    pool.place([0, 1], [0, 1])
    pool.place([0, 1], [0, 1])  # on its way
    assert pool.engine.collect([0, 1], at_least=ALL) == [0, 1]
    pool.place([1, 0], [1, 0])
    assert pool.engine.collect([1, 0]) == [1, 0]
    stats = pool.stats
    assert (stats["num_loads"], stats["num_landed"]) == (2, 2)
    assert stats["num_hits"] + stats["num_waits"] == 4
    assert stats["num_hits"] >= 2


@pytest.mark.parametrize("reader", COPYING)
def test_a_group_that_moves_leaves_its_arena_empty(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, poison=True)
    pool.get(3, 0)
    pool.get(3, 1)
    assert (pool.arenas[0].numpy() == 0xFF).all()
    pool.place([4, 3], [1, 0])  # into the place of one that moves away
    assert pool.engine.collect([3, 4], at_least=ALL) == [3, 4]
    assert [pool.num_wrong(3), pool.num_wrong(4)] == [0, 0]
    pool.place([3, 4], [1, 0])  # two change places
    assert pool.engine.collect([4, 3], at_least=ALL) == [4, 3]
    assert [pool.num_wrong(3), pool.num_wrong(4)] == [0, 0]


@pytest.mark.parametrize("reader", COPYING)
def test_named_twice_the_last_placing_counts(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader)
    pool.place([0, 1, 0], [0, 0, 1])
    assert pool.engine.collect([0, 1], at_least=ALL) == [0, 1]
    assert [pool.num_wrong(0), pool.num_wrong(1)] == [0, 0]
    pool.place([2, 3], [2, 2])
    pool.where.pop(2)
    assert pool.engine.collect([3]) == [3]
    assert pool.num_wrong(3) == 0
    with pytest.raises(EngineError, match="Only a placed group"):
        pool.engine.collect([2])


def test_pooled_groups_live_beside_streamed_and_resident_ones(lab: Any) -> None:
    source = lab.source(8 * GROUP)
    engine = lab.engine([source], ReadMode(chunk_bytes=64 * KIB), poison=True)
    arenas = pool_memory(5, GROUP)
    groups = lab.slices(GROUP, 8)
    # 0 stays, 1..3 take turns in arenas 1 and 2, the others are pooled.
    engine.attach(arenas, groups, [0, 1, 2, 1, 3, 3, 4, 4], [1, 2, 3], 1, pooled=range(4, 8))

    def is_right(group: int, arena: int) -> bool:
        want = source.data[group * GROUP : (group + 1) * GROUP]
        return bool(np.array_equal(arenas[arena].numpy(), want))

    engine.wait(0)
    for step in range(12):
        engine.place([4 + step % 4], [3 + step % 2])
        engine.acquire(1 + step % 3, arenas[[1, 2, 1][step % 3]])
        assert is_right(1 + step % 3, [1, 2, 1][step % 3])
        assert engine.collect([4 + step % 4]) == [4 + step % 4]
        assert is_right(4 + step % 4, 3 + step % 2)
        assert is_right(0, 0)
    engine.end_pass()


def test_a_pooled_group_without_bytes_lands_at_once(lab: Any, reader: str) -> None:
    empty = Group("empty", (), (), 0)
    full = lab.group((0, 0, GROUP))
    engine = lab.engine([lab.source(GROUP)], READERS[reader])
    arenas = pool_memory(2, GROUP)
    engine.attach(arenas, [empty, full, empty], [0, 0, 1], [], 0, pooled=range(3))
    for _ in range(3):
        engine.place([0, 1], [0, 1])
        assert engine.collect([0], at_least=0) == [0]
        engine.place([2], [1])
        assert engine.collect([2, 0], at_least=0) == [2, 0]
        engine.evict([0, 2])


# -- loads that are given up --------------------------------------------------------------------


@pytest.mark.parametrize("reader", COPYING)
@pytest.mark.parametrize("phase", [0, 64])
def test_a_load_in_flight_is_dropped_when_its_arena_is_given_away(
    lab: Any, reader: str, phase: int
) -> None:
    pool = make_pool(lab, reader, phase=phase, faults=LATE, num_arenas=2)
    for step in range(6):
        before = pool.stats["num_reads"]
        pool.place([2 * step % 8], [0])
        pool.wait_until(lambda stats, before=before: stats["num_reads"] > before)
        pool.get((2 * step + 1) % 8, 0)
        pool.settle()
        assert pool.num_wrong((2 * step + 1) % 8) == 0
    assert pool.stats["num_stale_reads"] > 0
    assert pool.stats["num_failed"] == 0


def test_a_load_in_flight_is_dropped_when_it_is_evicted(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=VERY_LATE)
    pool.place([0], [0])
    pool.wait_until(lambda stats: stats["num_reads"] > 0)
    pool.engine.evict([0])
    pool.settle()
    assert pool.stats["num_landed"] == 0
    assert pool.stats["num_stale_reads"] > 0
    pool.get(0, 0)


def test_a_group_may_move_while_it_is_loaded(lab: Any) -> None:
    pool = make_pool(lab, faults=VERY_LATE)
    for arena in (0, 1, 2, 0, 1):
        pool.place([6], [arena])
        pool.wait_until(lambda stats: stats["num_reads"] > 0)
    assert pool.engine.collect([6]) == [6]
    assert pool.num_wrong(6) == 0
    pool.settle()
    assert pool.stats["num_landed"] == 1


# -- what comes first ---------------------------------------------------------------------------


def behind_a_read(lab: Any, reader: str, arrange: Callable[[Pool], object]) -> Pool:
    """A pool where all that `arrange` does comes while the one read of group 7 is under way."""
    for _ in range(20):
        groups = [lab.group((0, index * STEP, 49 * PAGE)) for index in range(8)]
        pool = make_pool(
            lab,
            reader,
            groups=groups,
            num_arenas=8,
            depth=1,
            chunk_bytes=256 * KIB,
            faults=Faults(seed=7, delay_ppm=1_000_000, delay_us=200_000),
        )
        pool.place([7], [7])
        pool.wait_until(lambda stats: stats["num_reads"] == 1)
        arrange(pool)
        if pool.stats["num_reads"] == 1:
            return pool
        pool.engine.close()
    raise AssertionError("the machine was too busy twenty times")


def check_order(pool: Pool, *expected: int) -> None:
    """Whenever one looks, those that have landed are the first of the expected ones."""
    landed: set[int] = set()
    while len(landed) < len(expected):
        landed = set(pool.engine.collect(expected, at_least=0))
        assert landed == set(expected[: len(landed)]), expected
    assert [pool.num_wrong(group) for group in expected] == [0] * len(expected)


def test_ahead_comes_after_all_others_and_each_in_order_of_placing(lab: Any, reader: str) -> None:
    def arrange(pool: Pool) -> None:
        pool.place([0, 1, 2], [0, 1, 2], ahead=True)
        pool.place([6, 4], [6, 4])
        pool.place([3], [3], ahead=True)
        pool.place([5], [5])

    check_order(behind_a_read(lab, reader, arrange), 7, 6, 4, 5, 0, 1, 2, 3)


def test_an_ahead_load_that_is_placed_again_is_urgent(lab: Any) -> None:
    def arrange(pool: Pool) -> None:
        pool.place([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], ahead=True)
        pool.place([5], [5])
        pool.place([3, 2], [3, 2])
        pool.place([5, 3], [5, 3], ahead=True)  # once urgent, always

    pool = behind_a_read(lab, "direct io_uring", arrange)
    check_order(pool, 7, 5, 3, 2, 0, 1, 4)
    assert pool.stats["num_loads"] == 7


def test_who_replaces_a_load_comes_after_those_who_were_there(lab: Any) -> None:
    def arrange(pool: Pool) -> None:
        pool.place([0, 1, 2, 3], [0, 1, 2, 3])
        pool.place([4], [1])
        pool.engine.evict([2])
        pool.place([2], [2])

    check_order(behind_a_read(lab, "direct io_uring", arrange), 7, 0, 3, 4, 2)


def test_what_is_waited_for_comes_first(lab: Any, reader: str) -> None:
    threads = []

    def arrange(pool: Pool) -> None:
        pool.place([0, 1, 2], [0, 1, 2])
        pool.place([3, 4, 5], [3, 4, 5], ahead=True)
        threads.append(in_thread(lambda: pool.engine.collect([5, 2], at_least=ALL)))
        pool.wait_until(lambda stats: stats["num_waits"] == 2)

    check_order(behind_a_read(lab, reader, arrange), 7, 5, 2, 0, 1, 3, 4)
    for thread, _ in threads:
        thread.join()
    assert threads[-1][1] == []


# -- collecting ---------------------------------------------------------------------------------


def test_collecting_any_returns_as_soon_as_one_is_there(lab: Any, reader: str) -> None:
    rounds = 0
    for _ in range(10):
        pool = make_pool(lab, reader, num_arenas=6, depth=1, faults=LATE)
        pool.place([0, 1, 2, 3, 4, 5], range(6))
        rounds = collect_one_by_one(pool, [5, 3, 4, 1, 0, 2])
        stats = pool.stats
        assert stats["num_hits"] + stats["num_waits"] == 6
        if rounds >= 3:
            assert stats["stall_seconds"] > 0
            return
    raise AssertionError(f"{rounds} rounds, or the machine was too busy ten times")


def collect_one_by_one(pool: Pool, left: list[int]) -> int:
    """As they come, in how many calls."""
    rounds = 0
    while left:
        landed = pool.engine.collect(left)
        assert landed == [group for group in left if group in landed]
        assert landed
        assert [pool.num_wrong(group) for group in landed] == [0] * len(landed)
        left = [group for group in left if group not in landed]
        rounds += 1
    return rounds


def test_collecting_all_returns_them_in_the_order_asked(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, num_arenas=6, faults=LATE)
    pool.place([0, 1, 2, 3, 4, 5], range(6))
    assert pool.engine.collect([4, 0, 2], at_least=ALL) == [4, 0, 2]
    hits = pool.stats["num_hits"]
    waits = pool.stats["num_waits"]
    assert hits + waits == 3
    assert pool.engine.collect([2, 4, 0], at_least=ALL) == [2, 4, 0]
    stats = pool.stats
    assert (stats["num_hits"], stats["num_waits"]) == (hits + 3, waits)


def test_collecting_does_not_block_where_enough_are_there(lab: Any) -> None:
    pool = make_pool(lab, num_arenas=3, faults=VERY_LATE)
    assert pool.engine.collect([]) == pool.engine.collect([], at_least=ALL) == []
    pool.place([0, 1, 2], [0, 1, 2])
    assert pool.engine.collect([0, 1, 2], at_least=0) == []
    first = pool.engine.collect([0, 1, 2])
    before = pool.stats
    assert set(first) <= set(pool.engine.collect([0, 1, 2]))
    assert pool.stats["num_waits"] == before["num_waits"] == 1
    assert pool.stats["stall_seconds"] == before["stall_seconds"]
    assert len(pool.engine.collect([2, 1, 0], at_least=2)) >= 2
    assert len(pool.engine.collect([2, 1, 0], at_least=99)) == 3


def test_a_group_named_twice_is_returned_twice(lab: Any) -> None:
    pool = make_pool(lab, faults=LATE)
    pool.place([0, 1], [0, 1])
    assert pool.engine.collect([1, 0, 1], at_least=ALL) == [1, 0, 1]


# -- eviction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", COPYING)
def test_what_is_evicted_is_poison_until_something_comes(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, poison=True)
    poison = np.full(GROUP, 0xFF, np.uint8)
    pool.get(0, 0)
    pool.get(1, 1)
    pool.place([2], [2])
    pool.wait_until(lambda stats: stats["num_landed"] == 3)
    pool.engine.evict([2, 0])  # one was never collected
    assert np.array_equal(pool.arenas[0].numpy(), poison)
    assert np.array_equal(pool.arenas[2].numpy(), poison)
    assert pool.num_wrong(1) == 0
    for group in (0, 2):
        with pytest.raises(EngineError, match=f"group {group} was never placed"):
            pool.engine.collect([group])
    pool.get(0, 2)
    assert np.array_equal(pool.arenas[0].numpy(), poison)


@pytest.mark.parametrize("reader", COPYING)
def test_what_is_replaced_is_poison_until_its_bytes_come(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, poison=True, num_arenas=1)
    pool.get(0, 0)
    late = make_pool(lab, reader, poison=True, num_arenas=1, faults=VERY_LATE)
    late.get(0, 0)
    late.place([1], [0])
    seen = late.arenas[0].numpy().copy()
    assert ((seen == 0xFF) | (seen == late.source.data[STEP : STEP + GROUP])).all()


def test_evicting_again_does_nothing(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader)
    pool.get(0, 0)
    for groups in ([0], [0], [3, 0], []):
        pool.engine.evict(groups)
    pool.get(3, 0)
    pool.engine.evict([0])  # its arena is another's
    assert pool.num_wrong(3) == 0
    assert pool.engine.collect([3]) == [3]


@pytest.mark.parametrize("trailing_drop", [True, False])
def test_evicted_views_give_their_pages_back(
    lab: Any, trailing_drop: bool, drop_from_cache: Callable[[Path], None]
) -> None:
    groups = [lab.group((0, index * 4 * MIB, 4 * MIB)) for index in range(8)]
    pool = make_pool(lab, "mmap in place", groups=groups, trailing_drop=trailing_drop)
    path = str(pool.source.path)
    drop_from_cache(pool.source.path)
    pool.place(range(8), range(8))
    assert pool.engine.collect(range(8), at_least=ALL) == [*range(8)]
    assert cached_bytes(path) == pool.source.path.stat().st_size
    pool.engine.evict([0, 1, 2, 3, 5])
    if trailing_drop:
        pool.wait_until(lambda stats: stats["num_dropped"] == 5)
        # A folio that lies across the border to one that stays may stay.
        assert cached_bytes(path) < 20 * MIB
    else:
        pool.settle()
        assert pool.stats["num_dropped"] == 0
        assert cached_bytes(path) == pool.source.path.stat().st_size
    assert [pool.num_wrong(group) for group in (4, 6, 7)] == [0] * 3
    pool.place(range(8), range(8))
    assert pool.engine.collect(range(8), at_least=ALL) == [*range(8)]
    assert [pool.num_wrong(group) for group in range(8)] == [0] * 8


def test_a_view_that_is_evicted_while_it_comes_leaves_no_page(
    lab: Any, drop_from_cache: Callable[[Path], None]
) -> None:
    pool = make_pool(lab, "mmap in place", faults=LATE)
    drop_from_cache(pool.source.path)
    pool.place([0, 4], [0, 4])
    pool.wait_until(lambda stats: stats["num_reads"] > 0)
    pool.engine.evict([0, 4])
    pool.wait_until(lambda stats: stats["num_dropped"] == 2)
    assert pool.stats["num_in_flight"] == 0
    pool.get(4, 4)


def test_a_view_that_is_placed_again_in_time_keeps_its_pages(lab: Any) -> None:
    pool = make_pool(lab, "mmap in place", faults=VERY_LATE)
    pool.place([0], [0])
    pool.wait_until(lambda stats: stats["num_reads"] > 0)
    pool.engine.evict([0])
    pool.get(0, 0)
    assert pool.stats["num_stale_reads"] > 0
    assert pool.stats["num_dropped"] == 0


# -- digests ------------------------------------------------------------------------------------


def test_flipped_bits_are_healed_or_refused(lab: Any, reader: str) -> None:
    faults = Faults(seed=1, flip_ppm=60_000)
    pool = make_pool(lab, reader, verify="always", poison=True, faults=faults)
    refused: list[tuple[int, str]] = []
    for step in range(150):
        group, arena = step % 8, step % 3
        try:
            pool.engine.evict([group])
            pool.get(group, arena)
        except CorruptCheckpoint as error:
            refused.append((group, str(error)))
    assert all(f"group {group} of" in message for group, message in refused)
    stats = pool.stats
    assert stats["num_injected_flips"] > 10
    assert stats["num_healed"] > 0
    assert stats["num_verified"] == 150 - len(refused)


def test_a_bit_that_flips_every_time_is_corruption(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, verify="always", faults=Faults(flip_ppm=1_000_000))
    for group in (0, 5, 0):
        pool.place([group], [1])
        with pytest.raises(CorruptCheckpoint, match=f"group {group} of .*in two reads"):
            pool.engine.collect([group])
        with pytest.raises(EngineError, match="its load failed"):
            pool.engine.collect([group])


def test_verify_first_checks_a_group_once(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, verify="first")
    for _ in range(3):
        for group in range(8):
            pool.get(group, group % 3)
            pool.engine.evict([group])
    assert pool.stats["num_verified"] == 8


def test_digests_that_come_late_cover_what_was_not_collected(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader)
    pool.get(0, 0)
    pool.place([1, 2], [1, 2])
    pool.wait_until(lambda stats: stats["num_landed"] == 3)
    digests = [pool.engine.digest(group) for group in range(8)]
    pool.place([0], [0])  # the engine looks what there is to do: nothing
    pool.engine.set_digests([digest ^ 1 for digest in digests], "always")
    with pytest.raises(CorruptCheckpoint, match="group 1 of"):
        pool.engine.collect([1])
    assert pool.engine.collect([0]) == [0]
    pool.engine.set_digests(digests, "always")
    # Its failure was told to nobody: it is read again, and nobody has to ask.
    pool.wait_until(lambda stats: stats["num_verified"] == 1)
    assert pool.engine.collect([2]) == [2]
    assert pool.num_wrong(2) == 0
    pool.get(1, 1)


# -- errors -------------------------------------------------------------------------------------


def test_a_failed_read_is_told_once_and_placing_again_reads_again(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=Faults(seed=3, errno_ppm=100_000), poison=True)
    failed: list[str] = []
    for step in range(120):
        group, arena = (5 * step) % 8, step % 3
        pool.engine.evict([group])
        try:
            pool.get(group, arena)
        except ReadError as error:
            failed.append(str(error))
            with pytest.raises(EngineError, match="its load failed"):
                pool.engine.collect([group])
    assert len(failed) == pool.stats["num_failed"]
    assert 0 < len(failed) < 120
    assert all(str(pool.source.path) in message for message in failed)


def test_a_failure_is_told_though_others_have_landed(lab: Any) -> None:
    pool = make_pool(lab)
    pool.get(0, 0)
    os.truncate(pool.source.path, 5 * STEP)
    pool.place([7], [2])
    with pytest.raises(TruncatedCheckpoint, match="ends at offset"):
        pool.engine.collect([0, 7], at_least=ALL)
    assert pool.engine.collect([0]) == [0]
    assert pool.num_wrong(0) == 0
    pool.place([7, 1], [2, 1])
    pool.wait_until(lambda stats: stats["num_failed"] == 3)
    for group, error in ((1, CheckpointChanged), (7, TruncatedCheckpoint)):
        with pytest.raises(error):
            pool.engine.collect([group], at_least=0)
    pool.engine.evict([0, 1, 7])


def test_a_failed_group_may_be_evicted_or_replaced_untold(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=Faults(errno_ppm=1_000_000))
    pool.place([0, 1, 2], [0, 1, 2])
    pool.wait_until(lambda stats: stats["num_failed"] == 3)
    pool.engine.evict([0])
    pool.place([1], [1])
    pool.wait_until(lambda stats: stats["num_failed"] == 4)
    pool.place([3], [2])
    with pytest.raises(EngineError, match="Only a placed group can be collected; group 0 "):
        pool.engine.collect([0])
    with pytest.raises(ReadError, match="errno 5"):
        pool.engine.collect([1, 3], at_least=ALL)


def test_short_and_interrupted_reads_change_nothing(lab: Any, reader: str) -> None:
    faults = Faults(seed=4, short_ppm=300_000, again_ppm=200_000)
    pool = make_pool(lab, reader, faults=faults, poison=True)
    for step in range(60):
        pool.get((3 * step) % 8, step % 3)
    assert pool.stats["num_failed"] == 0


# -- wrong use ----------------------------------------------------------------------------------


def test_only_placed_groups_can_be_collected(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader)
    pool.get(0, 0)
    with pytest.raises(EngineError, match="Only a placed group can be collected; group 4 "):
        pool.engine.collect([0, 4])
    if not pool.views:
        pool.get(1, 0)
        with pytest.raises(EngineError, match=r"group 0 .*its arena was given to another group"):
            pool.engine.collect([1, 0], at_least=0)
    assert pool.engine.collect([1 - pool.views]) == [1 - pool.views]


def test_pooled_groups_are_not_acquired(lab: Any) -> None:
    pool = make_pool(lab)
    for use in (lambda: pool.engine.acquire(0, pool.arenas[0]), lambda: pool.engine.wait(0)):
        with pytest.raises(EngineError, match="Group 0 is pooled: place it"):
            use()
    pool.get(0, 0)


def test_groups_that_are_not_pooled_are_not_placed(lab: Any) -> None:
    engine = lab.engine([lab.source(3 * GROUP)], ReadMode())
    arenas = pool_memory(3, GROUP)
    engine.attach(arenas, lab.slices(GROUP, 3), [0, 1, 2], [1], 0, pooled=[2])
    for group in (0, 1):
        for use in (
            lambda group=group: engine.place([group], [2]),
            lambda group=group: engine.collect([group]),
            lambda group=group: engine.evict([group]),
        ):
            with pytest.raises(EngineError, match=f"Group {group} is not pooled"):
                use()
        with pytest.raises(EngineError, match=f"no other group's own; got {group} of 3"):
            engine.place([2], [group])
    engine.place([2], [2])
    assert engine.collect([2]) == [2]


@pytest.mark.parametrize("group", [-1, 8, 2**31, 2**62])
def test_a_group_that_does_not_exist_is_refused(lab: Any, group: int) -> None:
    pool = make_pool(lab)
    pool.get(0, 0)
    for use in (
        lambda: pool.engine.place([0, group], [1, 2]),
        lambda: pool.engine.collect([group]),
        lambda: pool.engine.evict([group]),
    ):
        with pytest.raises(EngineError, match=r"lies in \[0, 8\)"):
            use()
    # Nothing was moved before all was looked at.
    assert pool.engine.collect([0]) == [0]
    assert pool.num_wrong(0) == 0


@pytest.mark.parametrize("arena", [-1, 3, 2**31, 2**62])
def test_an_arena_that_does_not_exist_is_refused(lab: Any, arena: int) -> None:
    pool = make_pool(lab)
    with pytest.raises(EngineError, match="no other group's own"):
        pool.engine.place([0], [arena])
    with pytest.raises(EngineError, match="got 2 groups and 1 arenas"):
        pool.engine.place([0, 1], [0])


def test_a_group_goes_only_where_its_pieces_fit(lab: Any) -> None:
    engine = lab.engine([lab.source(3 * GROUP)], ReadMode())
    arenas = [*pool_memory(2, GROUP), *pool_memory(1, GROUP - 1), *pool_memory(1, GROUP, phase=64)]
    engine.attach(arenas, lab.slices(GROUP, 2), [0, 3], [], 0, pooled=[0, 1])
    for group, arena in ((0, 2), (0, 3), (1, 0)):
        with pytest.raises(EngineError, match="the same place in a page"):
            engine.place([group], [arena])
    engine.place([0, 1], [1, 3])
    assert engine.collect([0, 1], at_least=ALL) == [0, 1]


def test_a_view_holds_its_own_group_only(lab: Any) -> None:
    source = lab.source(3 * GROUP)
    engine = lab.engine([source], ReadMode(io="mmap"))
    views = [engine.map(0, index * PAGE, PAGE) for index in range(2)]
    groups = [lab.group((0, index * PAGE, PAGE)) for index in range(3)]
    arenas = [*views, *pool_memory(1, PAGE)]
    engine.attach(arenas, groups, [0, 1, 2], [], 0, pooled=range(3))
    for group, arena in ((0, 1), (0, 2), (2, 0)):
        with pytest.raises(EngineError, match="A view holds the group whose pages it is"):
            engine.place([group], [arena])
    engine.place([0, 1, 2], [0, 1, 2])
    assert engine.collect([2, 1, 0], at_least=ALL) == [2, 1, 0]
    assert np.array_equal(arenas[2].numpy(), source.data[2 * PAGE : 3 * PAGE])


def test_pooled_groups_stand_in_no_order_and_share_no_arena_with_others(lab: Any) -> None:
    engine = lab.engine([lab.source(3 * GROUP)], ReadMode())
    arenas, groups = pool_memory(2, GROUP), lab.slices(GROUP, 2)
    with pytest.raises(EngineError, match="Group 1 is pooled: it is placed, and in no order"):
        engine.attach(arenas, groups, [0, 1], [0, 1], 1, pooled=[1])
    with pytest.raises(EngineError, match="arena 0 belongs to another group"):
        engine.attach(arenas, groups, [0, 0], [0], 1, pooled=[1])
    engine.attach(arenas, groups, [0, 1], [0], 1, pooled=[1])


# -- threads, signals, the end ------------------------------------------------------------------


@pytest.mark.parametrize("deed", ["replaced", "evicted", "moved"])
def test_who_waits_for_a_group_that_is_taken_away_is_told(lab: Any, deed: str) -> None:
    pool = make_pool(lab, faults=VERY_LATE)
    pool.place([0, 1], [0, 1])
    thread, raised = in_thread(lambda: pool.engine.collect([1, 0], at_least=ALL))
    pool.wait_until(lambda stats: stats["num_waits"] == 2)
    if deed == "evicted":
        pool.engine.evict([0])
    else:
        pool.engine.place(*(([2], [0]) if deed == "replaced" else ([0], [2])))
    thread.join()
    assert isinstance(raised[0], ThreadConflict)
    assert "took the arena of group 0" in str(raised[0])
    pool.get(3, 0)


def test_two_threads_may_wait_for_the_same_group(lab: Any) -> None:
    pool = make_pool(lab, faults=VERY_LATE)
    pool.place([0, 1], [0, 1])
    threads = [in_thread(lambda: pool.engine.collect([0, 1], at_least=ALL)) for _ in range(2)]
    for thread, raised in threads:
        thread.join()
        assert not raised
    assert [pool.num_wrong(group) for group in (0, 1)] == [0, 0]


def test_ctrl_c_ends_a_wait_and_the_load_goes_on(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=VERY_LATE)
    pool.place([3, 4], [0, 1])

    def send() -> None:
        pool.wait_until(lambda stats: stats["num_waits"] == 2)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread, raised = in_thread(send)
        with pytest.raises(KeyboardInterrupt):
            pool.engine.collect([3, 4], at_least=ALL)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert not raised
    assert pool.engine.collect([3, 4], at_least=ALL) == [3, 4]
    assert [pool.num_wrong(3), pool.num_wrong(4)] == [0, 0]
    assert pool.stats["num_loads"] == 2


def test_closing_wakes_who_waits_and_refuses_everything_after(lab: Any, reader: str) -> None:
    pool = make_pool(lab, reader, faults=VERY_LATE)
    pool.place([0], [0])
    thread, raised = in_thread(lambda: pool.engine.collect([0]))
    pool.wait_until(lambda stats: stats["num_waits"] == 1)
    pool.engine.close()
    thread.join()
    assert isinstance(raised[0], EngineClosed)
    for use in (
        lambda: pool.engine.place([0], [0]),
        lambda: pool.engine.collect([0]),
        lambda: pool.engine.collect([]),
        lambda: pool.engine.evict([0]),
    ):
        with pytest.raises(EngineClosed, match="was closed"):
            use()


def test_an_engine_closes_in_the_midst_of_everything(lab: Any, reader: str) -> None:
    for step in range(10):
        pool = make_pool(lab, reader, faults=Faults(seed=step, delay_ppm=500_000, delay_us=3000))
        pool.place([0, 1, 2], [0, 1, 2])
        pool.engine.collect([0])
        pool.engine.evict([0, 1])
        pool.place([3, 4], [0, 1], ahead=True)
        pool.engine.close()


FORK = """
import os, sys
from pathlib import Path
import torch
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.errors import ForkedEngine

path = Path(sys.argv[1])
data = path.read_bytes()
with open(path, "rb") as file:
    stamp = Stamp.of(file.fileno())
size = len(data) // 4
groups = [Group("g", (), (Extent(0, size * i, size, 0),), size) for i in range(4)]
memory = torch.zeros(3 * 4096 + 2 * (size // 4096 + 1) * 4096, dtype=torch.uint8)
start = -memory.data_ptr() % 4096
step = (size // 4096 + 1) * 4096
arenas = [memory[start + i * step :][:size] for i in range(2)]
engine = Engine([File(path, stamp)], ReadMode())
engine.attach(arenas, groups, [0] * 4, [], 0, pooled=range(4))
engine.place([0, 1], [0, 1])
pid = os.fork()
if pid == 0:
    refused = 0
    for use in (
        lambda: engine.place([2], [0]), lambda: engine.collect([0]), lambda: engine.evict([0]),
    ):
        try:
            use()
        except ForkedEngine:
            refused += 1
    engine.close()
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
assert engine.collect([0, 1], at_least=2) == [0, 1]
assert bytes(arenas[1].numpy()) == data[size : 2 * size]
engine.close()
print("parent and child are fine")
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on(
    lab: Any, run_python: Callable[..., str]
) -> None:
    assert run_python(FORK, lab.source(4 * 70_000).path) == "parent and child are fine\n"


# -- anything at all ----------------------------------------------------------------------------


class Model:
    """What a pool must hold: by arena the group that was placed last, by group if it was used."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.placed: dict[int, int] = {}  # arena by group
        self.collected: set[int] = set()

    def forget(self, group: int) -> None:
        self.placed.pop(group, None)
        self.collected.discard(group)

    def place(self, groups: list[int], arenas: list[int], ahead: bool) -> None:
        self.pool.place(groups, arenas, ahead=ahead)
        for group, arena in zip(groups, groups if self.pool.views else arenas, strict=True):
            if self.placed.get(group) == arena:
                continue
            for other in [o for o, at in self.placed.items() if at == arena]:
                self.forget(other)
            self.forget(group)
            self.placed[group] = arena

    def collect(self, groups: list[int], at_least: int) -> None:
        try:
            landed = self.pool.engine.collect(groups, at_least=at_least)
        except (ReadError, CorruptCheckpoint):
            for group in groups:
                self.forget_if_failed(group)
            return
        assert len(landed) >= min(at_least, len(groups))
        assert landed == [group for group in groups if group in landed]
        assert self.collected.intersection(groups) <= set(landed)
        self.collected.update(landed)

    def forget_if_failed(self, group: int) -> None:
        try:
            self.pool.engine.collect([group], at_least=0)
        except (EngineError, ReadError, CorruptCheckpoint):
            self.forget(group)

    def evict(self, groups: list[int]) -> None:
        self.pool.engine.evict(groups)
        for group in groups:
            self.forget(group)

    def check(self) -> None:
        for group in self.collected:
            assert self.pool.num_wrong(group) == 0, f"group {group} has wrong bytes"


STORM = Faults(
    errno_ppm=5_000,
    again_ppm=100_000,
    short_ppm=100_000,
    delay_ppm=100_000,
    flip_ppm=10_000,
    delay_us=1_000,
)


@pytest.mark.parametrize("storm", [False, True], ids=["calm", "storm"])
def test_any_two_thousand_operations_leave_the_right_bytes(
    lab: Any, reader: str, storm: bool
) -> None:
    random = np.random.default_rng(11)
    num_groups, num_arenas = 24, 7
    groups = [
        # On pages of their own: a flipped bit of one view is no other's.
        lab.group(
            (0, 20 * PAGE * index + int(random.integers(PAGE)), int(random.integers(1, 70_000)))
        )
        for index in range(num_groups)
    ]
    pool = make_pool(
        lab,
        reader,
        groups=groups,
        num_arenas=num_arenas,
        poison=True,
        verify="always" if storm else "off",
        faults=STORM if storm else Faults(seed=1, delay_ppm=100_000, delay_us=500),
    )
    model = Model(pool)

    def some(things: Sequence[int], most: int) -> list[int]:
        count = int(random.integers(1, most + 1))
        return [int(thing) for thing in random.permutation(things)[:count]]

    for _ in range(2000):
        kind = random.random()
        if kind < 0.4 or not model.placed:
            arenas = some(range(num_arenas), 4)
            chosen = [int(group) for group in random.permutation(num_groups)[: len(arenas)]]
            model.place(chosen, arenas, bool(random.random() < 0.3))
        elif kind < 0.85:
            asked = some(sorted(model.placed), 6)
            model.collect(asked, int(random.choice([0, 1, 1, len(asked)])))
        else:
            model.evict(some(range(num_groups), 4))
        model.check()
    for group in range(num_groups):
        for _ in range(100):
            model.place([group], [group % num_arenas], False)
            model.collect([group], 1)
            if group in model.collected:
                break
        assert group in model.collected
        model.check()
    stats = pool.stats
    assert stats["num_loads"] > 500
    assert (stats["num_failed"] > 0) == storm
