"""The engine's promises: after acquire the bytes are there, and while a group is used they stay.

Delays begin a read late, so an acquire that did not wait would find poison; and arenas start full
of 0xff, which is what poison is.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_ext import ops
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, Faults, ReadMode, cached_bytes, measure_read
from nexus_ext.errors import (
    CheckpointChanged,
    ConfigError,
    CorruptCheckpoint,
    EngineClosed,
    EngineError,
    ReadError,
    ThreadConflict,
)

KIB = 1 << 10
MIB = 1 << 20
GROUP = 512 * KIB
# Every read begins late, at a random time within 20 ms.
LATE = Faults(seed=7, delay_ppm=1_000_000, delay_us=20_000)
# Long enough to find a thread waiting, whatever else the machine does.
VERY_LATE = Faults(seed=7, delay_ppm=1_000_000, delay_us=1_000_000)


# -- the bytes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_bytes", [64 * KIB, 200_000, MIB])
@pytest.mark.parametrize(("num_arenas", "num_groups"), [(1, 3), (2, 5), (3, 7), (4, 4), (5, 3)])
def test_passes_deliver_every_group(
    lab: Any, reader: str, num_arenas: int, num_groups: int, chunk_bytes: int
) -> None:
    source = lab.source(num_groups * 150_000 + 99)
    groups = [lab.group((0, index * 150_000 + index, 150_000)) for index in range(num_groups)]
    rig = lab.rig([source], groups, reader, num_arenas=num_arenas, chunk_bytes=chunk_bytes)
    rig.sweep(passes=4)
    stats = rig.stats
    assert stats["num_hits"] + stats["num_waits"] == 4 * num_groups
    assert stats["num_failed"] == 0


def test_stats_name_the_reader_and_its_settings(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(MIB)], lab.slices(MIB // 4, 4), reader, depth=5)
    rig.sweep()
    stats = rig.stats
    io_mode, name = lab.expects(reader)
    assert stats["io_mode"] == io_mode
    assert stats["reader"].startswith(name)
    assert (stats["refusal"] == "") == (
        io_mode == "buffered" or name != "threads" or ("io_uring" not in reader)
    )
    assert (stats["depth"], stats["chunk_bytes"]) == (5, MIB)
    assert stats["num_views"] == (4 if reader == "mmap in place" else 0)


def test_groups_that_fit_are_read_once(lab: Any, reader: str) -> None:
    """As many arenas as groups: the second pass and the third find everything."""
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), reader, num_arenas=4, lookahead=3)
    rig.sweep(passes=3)
    stats = rig.stats
    if reader == "mmap in place":
        return  # the pages of a view are looked at again each time
    assert (stats["num_loads"], stats["num_landed"]) == (4, 4)
    assert stats["bytes_read"] == 4 * GROUP
    assert stats["num_hits"] >= 8


def test_residents_stay_while_others_stream(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(8 * GROUP)], lab.slices(GROUP, 8), reader, num_resident=3)
    for group in range(3):
        rig.engine.wait(group)
        assert rig.num_wrong(group) == 0
    rig.sweep(passes=3)
    for group in range(3):
        assert rig.num_wrong(group) == 0
    # Waited for once, acquired three times: always there.
    assert rig.stats["num_resident_hits"] >= 9


def test_only_residents_need_no_order(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(3 * GROUP)], lab.slices(GROUP, 3), reader, num_resident=3)
    rig.sweep(passes=2)
    assert rig.stats["num_loads"] == 3


def test_a_group_without_bytes_is_there_at_once(lab: Any, reader: str) -> None:
    empty = Group("empty", (), (), 0)
    data = [lab.group((0, index * 1000, 1000)) for index in range(3)]
    groups = [empty, data[0], empty, data[1], data[2], empty]
    for num_resident in (0, 1, 3):
        rig = lab.rig(
            [lab.source(3000)], groups, reader, num_resident=num_resident, verify="always"
        )
        rig.sweep(passes=3)
        assert rig.stats["num_failed"] == 0


def test_acquiring_again_is_idempotent(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), reader, poison=True)
    for group in (0, 1, 1, 1, 2, 2):
        rig.acquire(group)
        assert rig.num_wrong(group) == 0


def test_any_order_of_groups_is_served(lab: Any, reader: str) -> None:
    """Expected or not: the engine prefetches what comes next, and gets what is asked for."""
    rig = lab.rig([lab.source(9 * 70_000)], lab.slices(70_000, 9), reader, poison=True)
    for group in np.random.default_rng(3).integers(0, 9, 300):
        rig.acquire(int(group))
        assert rig.num_wrong(int(group)) == 0
    if reader != "mmap in place":
        assert rig.stats["num_mispredicted"] > 50


def test_another_tensor_of_the_same_size_gets_a_copy(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6))
    clone = torch.zeros(GROUP, dtype=torch.uint8)
    for group in (0, 1, 0, 5):
        rig.engine.acquire(group, clone)
        assert np.array_equal(clone.numpy(), rig.sources[0].data[group * GROUP :][:GROUP])
        rig.arena(group).fill_(0)  # what a compiler may write back is not taken for a group
    rig.sweep()
    assert rig.stats["num_cloned"] == 4


# -- the page cache ----------------------------------------------------------------------------


def test_direct_reads_leave_the_page_cache_alone(
    lab: Any, drop_from_cache: Callable[[Path], None]
) -> None:
    source = lab.source(8 * GROUP)
    drop_from_cache(source.path)
    rig = lab.rig([source], lab.slices(GROUP, 8))
    rig.sweep(passes=2)
    if lab.expects("direct io_uring")[0] != "direct":
        pytest.skip("direct reads are refused in the folder for temporary files")
    assert cached_bytes(str(source.path)) == 0


@pytest.mark.parametrize("reader", ["buffered threads", "mmap copied", "mmap in place"])
def test_trailing_drop_decides_whether_pages_stay(
    lab: Any, reader: str, drop_from_cache: Callable[[Path], None]
) -> None:
    source = lab.source(64 * MIB)
    left = {}
    for trailing_drop in (True, False):
        drop_from_cache(source.path)
        rig = lab.rig([source], lab.slices(MIB, 64), reader, trailing_drop=trailing_drop)
        rig.sweep(passes=2)
        rig.settle()
        left[trailing_drop] = cached_bytes(str(source.path))
        dropped = rig.stats["num_dropped"]
        assert (dropped > 0) == (trailing_drop and reader == "mmap in place")
    assert left[False] >= 60 * MIB
    # What is in use, ahead, just behind or read ahead by the kernel is there; the rest is not.
    assert left[True] <= 24 * MIB


def test_views_are_dropped_two_groups_behind(lab: Any) -> None:
    rig = lab.rig([lab.source(10 * GROUP)], lab.slices(GROUP, 10), "mmap in place", lookahead=1)
    for group in range(10):
        rig.acquire(group)
    # 0..8 were left; the last of them stays, one more than the distance would be dropped.
    rig.wait_until(lambda stats: stats["num_dropped"] == 8)
    rig.settle()
    assert rig.stats["num_dropped"] == 8
    assert rig.num_wrong(9) == 0


def test_prefault_brings_every_page_in(lab: Any, drop_from_cache: Callable[[Path], None]) -> None:
    source = lab.source(8 * GROUP + 1)
    drop_from_cache(source.path)
    engine = lab.engine([source], ReadMode(io="mmap"))
    engine.prefault(background=False)
    assert engine.stats()["prefault_bytes"] == 8 * GROUP + 1
    assert cached_bytes(str(source.path)) == 8 * GROUP + 1
    assert np.array_equal(engine.map(0, 0, 8 * GROUP + 1).numpy(), source.data)


@pytest.mark.parametrize("chunk_bytes", [64 * KIB, 100_001, MIB])
def test_the_ceiling_is_measured_with_any_chunk(lab: Any, reader: str, chunk_bytes: int) -> None:
    source = lab.source(MIB + 77)
    mode = {
        "direct io_uring": ReadMode(chunk_bytes=chunk_bytes),
        "direct threads": ReadMode(use_uring=False, chunk_bytes=chunk_bytes),
        "buffered threads": ReadMode(io="buffered", chunk_bytes=chunk_bytes),
    }.get(reader, ReadMode(io="mmap", chunk_bytes=chunk_bytes))
    report = measure_read(str(source.path), mode, 3 * MIB)
    io_mode, name = lab.expects(reader)
    assert report["io_mode"] == io_mode
    assert report["reader"].startswith(name)
    assert report["bytes"] > 2 * MIB
    assert report["chunk_bytes"] <= chunk_bytes


# -- poison ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader", ["direct io_uring", "direct threads", "buffered threads", "mmap copied"]
)
def test_a_freed_arena_is_poison_until_it_is_refilled(lab: Any, reader: str) -> None:
    rig = lab.rig(
        [lab.source(5 * GROUP)],
        lab.slices(GROUP, 5),
        reader,
        num_arenas=4,
        lookahead=1,
        poison=True,
    )
    poison = np.full(GROUP, 0xFF, np.uint8)
    rig.acquire(0)
    assert rig.num_wrong(0) == 0
    rig.acquire(1)  # frees arena 0, which nobody wants before group 4 comes next
    assert np.array_equal(rig.arena(0).numpy(), poison)
    rig.acquire(2)
    assert np.array_equal(rig.arena(0).numpy(), poison)
    assert np.array_equal(rig.arena(1).numpy(), poison)
    rig.acquire(3)
    rig.acquire(4)
    assert rig.num_wrong(4) == 0
    assert not np.array_equal(rig.arena(0).numpy(), poison)


def test_poison_is_nan_in_every_float_format() -> None:
    poison = torch.full((16,), 0xFF, dtype=torch.uint8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        assert torch.isnan(poison.view(dtype).float()).all()


def test_residents_and_views_are_never_poisoned(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), num_resident=2, poison=True)
    rig.sweep(passes=2)
    assert [rig.num_wrong(group) for group in (0, 1)] == [0, 0]
    views = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), "mmap in place", poison=True)
    views.sweep(passes=2)
    assert [views.num_wrong(group) for group in range(6)] == [0] * 6


# -- waiting -----------------------------------------------------------------------------------


def test_acquire_waits_for_late_reads(lab: Any, reader: str) -> None:
    rig = lab.rig(
        [lab.source(6 * GROUP)],
        lab.slices(GROUP, 6),
        reader,
        chunk_bytes=64 * KIB,
        poison=True,
        faults=LATE,
    )
    rig.sweep(passes=2)
    stats = rig.stats
    assert stats["num_injected_delays"] == stats["num_reads"]
    assert stats["num_waits"] > 0


def test_acquire_waits_for_late_staged_reads(lab: Any, reader: str) -> None:
    rig = lab.rig(
        [lab.source(6 * GROUP)],
        lab.slices(GROUP, 6),
        reader,
        phase=1,
        chunk_bytes=64 * KIB,
        poison=True,
        faults=LATE,
    )
    rig.sweep(passes=2)


def test_residents_are_waited_for(lab: Any, reader: str) -> None:
    rig = lab.rig(
        [lab.source(4 * GROUP)], lab.slices(GROUP, 4), reader, num_resident=4, faults=LATE
    )
    for group in range(4):
        rig.engine.wait(group)
        assert rig.num_wrong(group) == 0


# -- generations -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reader", ["direct io_uring", "direct threads", "buffered threads", "mmap copied"]
)
@pytest.mark.parametrize("phase", [0, 1])
def test_a_late_read_never_lands_in_the_next_generation(lab: Any, reader: str, phase: int) -> None:
    """Demand a group in an arena whose own prefetch is in flight, and look again much later."""
    rig = lab.rig(
        [lab.source(8 * GROUP)],
        lab.slices(GROUP, 8),
        reader,
        num_arenas=2,
        lookahead=1,
        phase=phase,
        chunk_bytes=64 * KIB,
        faults=LATE,
    )
    for group in (0, 3, 6, 1, 4, 7, 2, 5):  # never the one that was prefetched
        rig.acquire(group)
        assert rig.num_wrong(group) == 0
        rig.engine.end_pass()
    rig.settle()
    assert rig.num_wrong(5) == 0
    stats = rig.stats
    assert stats["num_stale_reads"] > 0
    assert stats["num_mispredicted"] >= 7
    assert stats["num_failed"] == 0


def test_a_group_in_use_is_left_alone_by_reads_that_were_abandoned(lab: Any) -> None:
    rig = lab.rig(
        [lab.source(8 * GROUP)],
        lab.slices(GROUP, 8),
        num_arenas=2,
        lookahead=1,
        chunk_bytes=64 * KIB,
        faults=LATE,
    )
    for group in (0, 3, 6, 1, 4, 7):
        rig.acquire(group)
        rig.settle()
        assert rig.num_wrong(group) == 0


def test_an_arena_in_use_is_never_refilled(lab: Any, reader: str) -> None:
    """Four groups are wanted ahead and share two arenas, one of them with the group in use."""
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), reader, num_arenas=2, lookahead=4)
    for group in (0, 1, 2, 3, 4, 5, 0, 1):
        rig.acquire(group)
        rig.wait_until(lambda stats: stats["num_in_flight"] == 0 and stats["num_landed"] >= 2)
        rig.settle()
        assert rig.num_wrong(group) == 0


def test_a_held_arena_stays_until_its_release(lab: Any) -> None:
    rig = lab.rig(
        [lab.source(8 * GROUP)], lab.slices(GROUP, 8), num_arenas=4, lookahead=3, poison=True
    )
    rig.acquire_held(0)
    for group in (1, 2, 3):
        rig.acquire_held(group)
        rig.release(group)
        rig.settle()
        assert rig.num_wrong(0) == 0
    rig.release(0)
    rig.wait_until(lambda stats: stats["num_landed"] >= 7)
    assert rig.num_wrong(4) == 0  # in the arena that was held


def test_releasing_what_is_not_held_does_nothing(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), poison=True)
    rig.acquire(1)
    rig.release(1)
    rig.release(0)
    assert rig.num_wrong(1) == 0
    with pytest.raises(EngineError, match=r"lies in \[0, 4\), got 4"):
        ops.call(
            torch.ops.nexus.release_, rig.arenas[0], torch.zeros(1), [], rig.engine.group_id(4)
        )


# -- threads -----------------------------------------------------------------------------------


def in_thread(action: Callable[[], None]) -> BaseException | None:
    """Run it to its end in another thread; returns what it raised."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


def test_a_second_thread_in_mid_pass_is_refused(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6))
    rig.acquire(0)
    assert isinstance(in_thread(lambda: rig.acquire(1)), ThreadConflict)
    assert rig.num_wrong(0) == 0
    for group in range(1, 6):
        rig.acquire(group)
        assert rig.num_wrong(group) == 0
    rig.engine.end_pass()
    assert in_thread(rig.sweep) is None
    rig.sweep()


def test_a_refused_thread_cannot_end_the_others_pass(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6))
    rig.acquire(0)
    assert in_thread(rig.engine.end_pass) is None
    assert isinstance(in_thread(lambda: rig.acquire(0)), ThreadConflict)


def test_a_thread_that_insists_takes_over_and_the_first_one_is_told(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6))
    rig.acquire(2)
    assert isinstance(in_thread(lambda: rig.acquire(0)), ThreadConflict)
    assert in_thread(rig.sweep) is None
    # What this thread computed from group 2 meanwhile is worth nothing.
    with pytest.raises(ThreadConflict, match="another thread began a pass"):
        rig.acquire(3)
    rig.sweep()


def test_after_a_takeover_a_new_pass_of_the_first_thread_is_welcome(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6))
    rig.acquire(2)
    assert isinstance(in_thread(lambda: rig.acquire(0)), ThreadConflict)
    assert in_thread(rig.sweep) is None
    rig.sweep()


# -- closing -----------------------------------------------------------------------------------


def test_closing_twice_is_fine_and_everything_after_is_refused(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4))
    rig.sweep()
    engine = rig.engine
    engine.close()
    engine.close()
    for use in (
        lambda: rig.acquire(0),
        lambda: engine.wait(0),
        lambda: engine.digest(0),
        lambda: engine.stats(),
        lambda: engine.end_pass(),
        lambda: engine.map(0, 0, 1),
        lambda: engine.prefault(background=False),
        lambda: engine.set_digests([0] * 4, "always"),
        lambda: engine.attach([], [], [], [], 1),
    ):
        with pytest.raises(EngineClosed, match="was closed"):
            use()


def test_an_engine_that_never_attached_closes(lab: Any) -> None:
    engine = lab.engine([lab.source(100)], ReadMode())
    with pytest.raises(EngineError, match="lies in"):
        engine.acquire(0, torch.empty(1, dtype=torch.uint8))
    engine.close()


def test_closing_wakes_a_thread_that_waits(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), reader, faults=VERY_LATE)
    raised: list[BaseException | None] = []
    waiting = threading.Thread(target=lambda: raised.append(in_thread(lambda: rig.acquire(0))))
    waiting.start()
    rig.wait_until(lambda stats: stats["num_waits"] == 1)
    rig.engine.close()
    waiting.join()
    assert isinstance(raised[0], EngineClosed)


def test_views_outlive_their_engine(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), "mmap in place")
    rig.sweep()
    rig.engine.close()
    assert [rig.num_wrong(group) for group in range(4)] == [0] * 4


def descriptors_and_threads() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def test_fifty_engines_leave_no_descriptor_and_no_thread(lab: Any, reader: str) -> None:
    source = lab.source(4 * 70_000)
    groups = lab.slices(70_000, 4)

    def cycle() -> None:
        rig = lab.rig([source], groups, reader, phase=1)
        rig.sweep()
        rig.engine.close()

    cycle()
    before = descriptors_and_threads()
    for _ in range(50):
        cycle()
    now = before[0] + 1, 0
    for _ in range(10_000):  # the kernel's own threads for a ring end a moment after it
        now = descriptors_and_threads()
        if now <= before:
            break
        threading.Event().wait(0.001)
    assert now[0] <= before[0]
    assert now[1] <= before[1]


# -- signals -----------------------------------------------------------------------------------


class Alarm(Exception):
    """What a signal handler raises here."""


@contextlib.contextmanager
def handling(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def signal_while_waiting(rig: Any, number: signal.Signals) -> threading.Thread:
    """Sends the signal once some acquire waits."""

    def send() -> None:
        rig.wait_until(lambda stats: stats["num_waits"] == 1)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def test_ctrl_c_ends_a_wait_and_the_engine_goes_on(lab: Any, reader: str) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), reader, faults=VERY_LATE)
    with handling(signal.SIGINT, signal.default_int_handler):
        sender = signal_while_waiting(rig, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            rig.acquire(3)
    sender.join()
    assert rig.stats["num_landed"] < 4
    rig.acquire(3)
    assert rig.num_wrong(3) == 0


def test_a_group_that_lands_after_ctrl_c_is_not_in_the_way(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), faults=VERY_LATE)
    with handling(signal.SIGINT, signal.default_int_handler):
        sender = signal_while_waiting(rig, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            rig.acquire(0)
    sender.join()
    rig.settle()
    for group in (1, 0):
        rig.acquire(group)
        assert rig.num_wrong(group) == 0


def test_what_a_signal_handler_raises_arrives_as_it_is(lab: Any) -> None:
    def ring(number: int, frame: object) -> None:
        raise Alarm("wake up")

    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), faults=VERY_LATE)
    with handling(signal.SIGUSR1, ring):
        sender = signal_while_waiting(rig, signal.SIGUSR1)
        with pytest.raises(Alarm, match="wake up"):
            rig.acquire(0)
    sender.join()
    rig.acquire(0)
    assert rig.num_wrong(0) == 0


# -- fork --------------------------------------------------------------------------------------

FORK_SETUP = """
import gc, multiprocessing, os, sys, threading
from pathlib import Path
import torch
from nexus_ext.checkpoint import Extent, File, Group, Stamp
from nexus_ext.engine import Engine, ReadMode
from nexus_ext.errors import ForkedEngine

path, io = Path(sys.argv[1]), sys.argv[2]
data = path.read_bytes()
with open(path, "rb") as file:
    stamp = Stamp.of(file.fileno())
size = len(data) // 4
groups = [Group("g", (), (Extent(0, size * i, size, 0),), size) for i in range(4)]
arenas = [torch.zeros(size, dtype=torch.uint8) for _ in range(2)]
engine = Engine([File(path, stamp)], ReadMode(io=io))
engine.attach(arenas, groups, [0, 1, 0, 1], range(4), 1)

def read(i):
    engine.acquire(i, arenas[i % 2])
    assert bytes(arenas[i % 2].numpy()) == data[size * i : size * (i + 1)]

def refused():
    count = 0
    for use in (
        lambda: engine.acquire(1, arenas[1]), engine.stats, lambda: engine.digest(0),
        engine.end_pass, lambda: engine.wait(0),
    ):
        try:
            use()
        except ForkedEngine:
            count += 1
    return count
"""

FORK_ONCE = (
    FORK_SETUP
    + """
def child():
    assert refused() == 5
    engine.close()
    engine.close()
    gc.collect()
    sys.exit(7)  # the whole way out, atexit and all

read(0)
pid = os.fork()
if pid == 0:
    child()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
process = multiprocessing.get_context("fork").Process(target=child)
process.start()
process.join()
assert process.exitcode == 7, process.exitcode
for i in range(4):
    read(i)
engine.close()
print("parent and children are fine")
"""
)

FORK_OFTEN = (
    FORK_SETUP
    + """
stop = False

def stream():
    while not stop:
        for i in range(4):
            read(i)

thread = threading.Thread(target=stream)
thread.start()
codes = []
for _ in range(25):
    pid = os.fork()
    if pid == 0:
        os._exit(refused())
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
stop = True
thread.join()
engine.close()
assert codes == [5] * 25, codes
print("parent and children are fine")
"""
)


@pytest.mark.parametrize("io", ["direct", "mmap"])
def test_a_forked_child_is_refused_and_ends_and_the_parent_goes_on(
    lab: Any, run_python: Callable[..., str], io: str
) -> None:
    said = run_python(FORK_ONCE, lab.source(4 * 70_000).path, io)
    assert said == "parent and children are fine\n"


def test_a_fork_at_any_moment_of_a_pass_leaves_no_child_hanging(
    lab: Any, run_python: Callable[..., str]
) -> None:
    said = run_python(FORK_OFTEN, lab.source(4 * 70_000).path, "direct")
    assert said == "parent and children are fine\n"


# -- digests -----------------------------------------------------------------------------------


def test_verification_covers_what_was_read_before_it_was_asked_for(lab: Any, reader: str) -> None:
    """Loading starts with attach, digests come later: nothing may slip through in between."""
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), reader, num_resident=2)
    for group in range(2):
        rig.engine.wait(group)
    rig.wait_until(lambda stats: stats["num_landed"] == 5)
    digests = [rig.engine.digest(group) for group in range(6)]
    wrong = [digest ^ 1 for digest in digests]
    rig.engine.set_digests(wrong, "first")
    for group in range(2):
        with pytest.raises(CorruptCheckpoint, match=f"group {group} of"):
            rig.engine.wait(group)
    for group in range(2, 6):
        with pytest.raises(CorruptCheckpoint, match=f"group {group} of .*from offset"):
            rig.acquire(group)
    rig.engine.set_digests(digests, "first")
    rig.sweep(passes=2)
    assert rig.stats["num_verified"] == 6


def test_verify_first_checks_each_group_once_and_always_checks_each_landing(lab: Any) -> None:
    verified = {}
    for verify in ("off", "first", "always"):
        rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), verify=verify)
        rig.sweep(passes=4)
        rig.settle()
        stats = rig.stats
        verified[verify] = stats["num_verified"]
        landed = stats["num_landed"]
    assert verified["off"] == 0
    assert verified["first"] == 6
    # Landed before the digests were known: not verified, and read again.
    assert landed - 3 <= verified["always"] <= landed


def test_digests_given_in_mid_use_leave_the_group_in_use_alone(lab: Any) -> None:
    rig = lab.rig([lab.source(6 * GROUP)], lab.slices(GROUP, 6), faults=LATE)
    rig.acquire(0)
    rig.engine.set_digests([rig.engine.digest(group) for group in range(6)], "always")
    rig.settle()
    assert rig.num_wrong(0) == 0
    rig.acquire(1)
    assert rig.num_wrong(1) == 0


# -- wrong use ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [-1, 4, 2**31, 2**32, 2**62])
def test_a_group_that_does_not_exist_is_refused(lab: Any, group: int) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4))
    for use in (
        lambda: rig.engine.acquire(group, rig.arenas[0]),
        lambda: rig.engine.wait(group),
        lambda: rig.engine.digest(group),
    ):
        with pytest.raises(EngineError, match=r"lies in \[0, "):
            use()
    rig.sweep()


def test_an_arena_of_another_size_is_refused(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4))
    for nbytes in (0, GROUP - 1, GROUP + 1):
        with pytest.raises(EngineError, match=f"{GROUP} bytes.*got a tensor of {nbytes} bytes"):
            rig.engine.acquire(0, torch.empty(nbytes, dtype=torch.uint8))
    rig.sweep()


@pytest.mark.parametrize(
    "number", [torch.tensor(1, dtype=torch.int32), torch.tensor([0, 1]), torch.empty(0).long()]
)
def test_a_group_id_of_another_kind_is_refused(lab: Any, number: torch.Tensor) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4))
    with pytest.raises(EngineError, match="0-dim int64 tensor"):
        ops.acquire_(rig.arena(1), number, number)


def test_waiting_for_a_group_that_streams_is_refused(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4), num_resident=1)
    with pytest.raises(EngineError, match="group 1 shares its arena, acquire it"):
        rig.engine.wait(1)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (ReadMode(io="carrier pigeon"), 'io must be .*, got "carrier pigeon"'),
        (ReadMode(io=""), 'io must be .*, got ""'),
        (ReadMode(chunk_bytes=0), "chunk_bytes must lie in 65536.*got 0"),
        (ReadMode(chunk_bytes=-1), "chunk_bytes must lie in"),
        (ReadMode(chunk_bytes=4096), "chunk_bytes must lie in"),
        (ReadMode(chunk_bytes=1 << 32), "chunk_bytes must lie in"),
        (ReadMode(depth=-1), "depth must lie in"),
        (ReadMode(depth=1 << 40), "depth must lie in"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(lab: Any, mode: ReadMode, message: str) -> None:
    source = lab.source(100)
    with pytest.raises(ConfigError, match=message):
        lab.engine([source], mode)
    with pytest.raises(ConfigError, match=message):
        measure_read(str(source.path), mode, MIB)


def test_a_file_that_is_not_there_is_a_read_error(lab: Any) -> None:
    source = lab.source(100)
    source.path.unlink()
    with pytest.raises(ReadError, match=f"cannot open {source.path}: No such file"):
        lab.engine([source], ReadMode())
    for look in (cached_bytes, lambda path: measure_read(path, ReadMode(), MIB)):
        with pytest.raises(ReadError, match="No such file"):
            look(str(source.path))


@pytest.mark.parametrize("field", ["device", "inode", "size", "mtime_ns"])
def test_a_file_with_another_stamp_is_refused_when_opened(lab: Any, field: str) -> None:
    source = lab.source(100)
    stamp = source.file.stamp
    other = Stamp(**{**stamp.__dict__, field: getattr(stamp, field) + 1})
    with pytest.raises(CheckpointChanged, match=f"{source.path} changed"):
        Engine([File(source.path, other)], ReadMode())


def extent_group(file: int, offset: int, nbytes: int, group_offset: int, size: int) -> Group:
    return Group("g", (), (Extent(file, offset, nbytes, group_offset),), size)


@pytest.mark.parametrize(
    "group",
    [
        extent_group(1, 0, 10, 0, 100),
        extent_group(-1, 0, 10, 0, 100),
        extent_group(0, -1, 10, 0, 100),
        extent_group(0, 0, -10, 0, 100),
        extent_group(0, 0, 101, 0, 100),
        extent_group(0, 0, 10, 91, 100),
        extent_group(0, 0, 10, -1, 100),
        extent_group(0, 2**62, 2**62, 2**62, 100),
        extent_group(0, 0, 10, 0, 1001),
        extent_group(0, 0, 0, 0, -1),
    ],
)
def test_extents_outside_their_file_group_or_arena_are_refused(lab: Any, group: Group) -> None:
    engine = lab.engine([lab.source(1000)], ReadMode())
    arena = torch.empty(1000, dtype=torch.uint8)
    with pytest.raises(EngineError, match=r"must (lie|fit)"):
        engine.attach([arena], [group], [0], [0], 1)
    # Nothing was started: the same engine takes a group that fits.
    engine.attach([arena], [extent_group(0, 0, 10, 0, 100)], [0], [0], 1)
    engine.acquire(0, arena)


@pytest.mark.parametrize("order", [[0, 0], [2], [-1], [0, 1, 0]])
def test_an_order_names_each_group_once(lab: Any, order: list[int]) -> None:
    engine = lab.engine([lab.source(1000)], ReadMode())
    arenas = [torch.empty(100, dtype=torch.uint8) for _ in range(2)]
    groups = [extent_group(0, 0, 10, 0, 100), extent_group(0, 10, 10, 0, 100)]
    with pytest.raises(EngineError, match="each once"):
        engine.attach(arenas, groups, [0, 1], order, 1)


def test_groups_need_arenas_that_exist_and_one_attach(lab: Any) -> None:
    engine = lab.engine([lab.source(1000)], ReadMode())
    arena = torch.empty(100, dtype=torch.uint8)
    group = extent_group(0, 0, 10, 0, 100)
    for index in (-1, 1, 2**40):
        with pytest.raises(EngineError, match="arena that exists"):
            engine.attach([arena], [group], [index], [0], 1)
    engine.attach([arena], [group], [0], [0], 1)
    with pytest.raises(EngineError, match="attached once"):
        engine.attach([arena], [group], [0], [0], 1)


def test_digests_come_for_every_group_and_with_a_known_word(lab: Any) -> None:
    rig = lab.rig([lab.source(4 * GROUP)], lab.slices(GROUP, 4))
    for digests in ([], [0] * 3, [0] * 5):
        with pytest.raises(EngineError, match=f"got {len(digests)} for 4 groups"):
            rig.engine.set_digests(digests, "first")
    with pytest.raises(ConfigError, match='got "sometimes"'):
        rig.engine.set_digests([0] * 4, "sometimes")
    rig.sweep()


@pytest.mark.parametrize(
    ("file", "offset", "nbytes"),
    [(0, 0, 1001), (0, 1000, 1), (0, -1, 1), (0, 0, -1), (0, 2**62, 2**62), (1, 0, 1), (-1, 0, 1)],
)
def test_a_view_outside_its_file_is_refused(lab: Any, file: int, offset: int, nbytes: int) -> None:
    engine = lab.engine([lab.source(1000)], ReadMode(io="mmap"))
    with pytest.raises(EngineError, match=r"view lies inside|are mapped"):
        engine.map(file, offset, nbytes)
    assert engine.map(0, 0, 1000).shape == (1000,)


def test_only_mmap_has_views(lab: Any) -> None:
    engine = lab.engine([lab.source(1000)], ReadMode())
    with pytest.raises(EngineError, match='opened with io="mmap"'):
        engine.map(0, 0, 10)
