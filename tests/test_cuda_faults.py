"""Every call of the driver fails once, at every place: a typed error or right bytes, and no leak.

What a failed call leaves behind decides: an engine that cannot tell what is safe to overwrite ends;
any other goes on. Lost devices end it too, and closing works all the same.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexus_ext.errors import DeviceError, DeviceLost, EngineClosed, NexusError

KIB = 1 << 10
INVALID_VALUE, OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED = 1, 2, 700, 719

pytestmark = pytest.mark.needs_simcuda


def small_rig(bench: Any, **given: Any) -> Any:
    chosen = {"num_arenas": 2, "depth": 2, "num_slots": 3, "in_ram": [1]} | given
    return bench.rig(bench.groups(count=3, nbytes=80 * KIB), **chosen)


def run(bench: Any, **given: Any) -> tuple[list[NexusError], int]:
    """A short life of an engine: the errors that the caller saw, and the bytes that were wrong."""
    errors: list[NexusError] = []
    try:
        rig = small_rig(bench, **given)
    except NexusError as error:
        return [error], 0
    for _ in range(2):
        for group in (0, 1, 2):
            try:
                rig.use(group)
            except NexusError as error:
                errors.append(error)
    try:
        return errors, 0 if given_up(bench) else rig.num_wrong()
    except ValueError:
        # It may be lost after the last use, by a call that the caller hears nothing of. What
        # kernels saw on a lost device nobody will ever see.
        if not given_up(bench):
            raise
        return errors, 0


def given_up(bench: Any) -> bool:
    """Whether the device itself answers no more."""
    return bench.gpu.sim.library.cuInit(0) != 0


@pytest.fixture
def num_calls(bench: Any, sim_gpu: Any) -> int:
    """Of the driver, in a life without errors."""
    sim_gpu.reset()
    assert run(bench) == ([], 0)
    bench.close()
    return sum(sim_gpu.sim.calls().values()) + 10  # from run to run it differs by a few


@pytest.mark.parametrize("code", [INVALID_VALUE, OUT_OF_MEMORY])
def test_any_call_may_fail_once(bench: Any, sim_gpu: Any, num_calls: int, code: int) -> None:
    num_seen = num_lost = 0
    for nth in range(num_calls):
        sim_gpu.reset(nth, 100)
        sim_gpu.sim.fail("*", nth, code)
        errors, wrong = run(bench)
        assert wrong == 0, f"call {nth}"
        assert all(isinstance(error, DeviceError) for error in errors), f"call {nth}: {errors}"
        lost = [error for error in errors if isinstance(error, DeviceLost)]
        # An engine that ended says so from then on, and one that did not goes on.
        assert not lost or isinstance(errors[-1], DeviceLost), f"call {nth}"
        bench.close()
        assert not sim_gpu.sim.leaks(), f"call {nth}"
        num_seen += bool(errors)
        num_lost += bool(lost)
    assert num_seen > 10
    assert num_lost > 5


def test_a_failed_copy_or_wait_leaves_the_engine_usable(bench: Any, sim_gpu: Any) -> None:
    for call in ("cuMemcpyHtoDAsync", "cuStreamWaitEvent", "cuStreamIsCapturing"):
        for nth in range(12):
            sim_gpu.reset(nth, 100)
            rig = small_rig(bench)
            sim_gpu.sim.fail(call, nth, INVALID_VALUE)
            errors = []
            for group in [0, 1, 2] * 3:
                try:
                    rig.use(group)
                except DeviceError as error:
                    errors.append(error)
                    rig.use(group)  # the same call may be tried again
            assert not any(isinstance(error, DeviceLost) for error in errors)
            assert rig.num_wrong() == 0
            bench.close()


@pytest.mark.parametrize("code", [ILLEGAL_ADDRESS, LAUNCH_FAILED])
def test_a_device_may_be_lost_at_any_call(
    bench: Any, sim_gpu: Any, num_calls: int, code: int
) -> None:
    for nth in range(0, num_calls, 3):
        sim_gpu.reset(nth, 100)
        sim_gpu.sim.fail("*", nth, code, sticky=True)
        errors, wrong = run(bench)
        assert wrong == 0
        assert all(isinstance(error, DeviceError) for error in errors), errors
        bench.close()
        assert not sim_gpu.sim.leaks(), f"call {nth}"


def use_for_ever(rig: Any) -> None:
    while True:
        for group in (0, 1, 2):
            rig.use(group)


def test_a_device_may_be_lost_while_it_copies(bench: Any, sim_gpu: Any) -> None:
    """The copy was accepted; a later call, whichever, says that it failed."""
    for nth in range(8):
        sim_gpu.reset(nth, 200)
        rig = small_rig(bench)
        sim_gpu.sim.fail_async(nth, LAUNCH_FAILED)
        with pytest.raises(DeviceLost, match="a new process is needed"):
            use_for_ever(rig)
        with pytest.raises(DeviceLost):
            rig.use(0)
        with pytest.raises(DeviceLost):
            rig.engine.stats()
        bench.close()
        with pytest.raises(EngineClosed):
            rig.use(0)
        assert not sim_gpu.sim.leaks()


def test_the_driver_may_go_first(bench: Any, sim_gpu: Any) -> None:
    """At the end of a process nobody knows who goes first."""
    rig = small_rig(bench)
    rig.sweep()
    sim_gpu.synchronize()
    sim_gpu.sim.deinitialise()
    rig.engine.close()
    assert sim_gpu.sim.counts()["num_calls_after_shutdown"] > 0  # it was asked, and believed


def test_a_group_that_is_captured_is_refused(bench: Any, sim_gpu: Any) -> None:
    rig = small_rig(bench)
    sim_gpu.sim.set_capturing(sim_gpu._current, 1)
    with pytest.raises(DeviceError, match=r"CUDA graph.*reduce-overhead"):
        rig.use(0)
    sim_gpu.sim.set_capturing(sim_gpu._current, 0)
    rig.sweep(passes=2)
    assert rig.num_wrong() == 0


def test_loading_goes_on_while_somebody_captures(bench: Any, sim_gpu: Any) -> None:
    """A graph is captured on one stream; until it is done, nobody else may ask how far an event is,
    except who says that its questions are none of the graph's.
    """
    rig = bench.rig(num_slots=3, depth=2)
    elsewhere = sim_gpu.sim.create_stream()
    sim_gpu.sim.set_capturing(elsewhere, 2)
    rig.sweep(passes=3)
    sim_gpu.sim.set_capturing(elsewhere, 0)
    assert rig.num_wrong() == 0
    assert sim_gpu.sim.calls()["cuEventQuery"] > 0


# -- page-locked memory ----------------------------------------------------------------------------


def slot_bytes(num_slots: int) -> int:
    return num_slots * (64 * KIB + 2 * 4096)


def test_a_ring_that_is_refused_becomes_smaller(bench: Any, sim_gpu: Any) -> None:
    sim_gpu.sim.set_registered_limit(slot_bytes(6))
    rig = bench.rig(num_slots=20)
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    stats = rig.stats
    assert (stats["num_slots"], stats["is_pinned"]) == (5, True)
    assert "OUT_OF_MEMORY" in stats["pin_refusal"]
    assert sim_gpu.sim.counts()["num_pageable_copies"] == 0


def test_without_any_page_locked_memory_it_is_slower_and_right(bench: Any, sim_gpu: Any) -> None:
    sim_gpu.sim.set_registered_limit(0)
    rig = bench.rig(num_slots=20, in_ram=[1, 2])
    rig.sweep(passes=3)
    assert rig.num_wrong() == 0
    stats = rig.stats
    assert (stats["num_slots"], stats["is_pinned"], stats["ram_bytes"]) == (20, False, 0)
    assert "pinning memory" in stats["pin_refusal"]
    assert sim_gpu.sim.counts()["num_pageable_copies"] > 0


def test_a_group_that_finds_no_room_in_ram_is_read_whenever_it_is_needed(
    bench: Any, sim_gpu: Any
) -> None:
    room_for_two = slot_bytes(6) + 2 * 160 * KIB
    sim_gpu.sim.set_registered_limit(room_for_two)
    rig = bench.rig(num_slots=6, in_ram=range(5), num_arenas=2)
    rig.sweep(passes=4)
    assert rig.num_wrong() == 0
    stats = rig.stats
    assert 2 * 150 * KIB <= stats["ram_bytes"] <= 2 * 160 * KIB
    assert stats["num_ram_loads"] > 0
    assert "OUT_OF_MEMORY" in stats["pin_refusal"]


def test_what_stays_may_be_captured(bench: Any, sim_gpu: Any) -> None:
    """Nothing has to be ordered with what is there for good."""
    rig = bench.rig(bench.groups(count=4), num_resident=2, num_arenas=2)
    rig.engine.wait(0)
    rig.engine.wait(1)
    sim_gpu.sim.set_capturing(sim_gpu._current, 1)
    for _ in range(2):
        for group in (0, 1):
            rig.engine.acquire(group, rig.arenas[group])
            group_id = rig.engine.group_id(group)
            turn = torch.zeros(1, dtype=torch.uint8)
            torch.ops.nexus.acquire_.held(rig.arenas[group], turn, turn, group_id)
            torch.ops.nexus.release_(rig.arenas[group], turn, [], group_id)
    sim_gpu.sim.set_capturing(sim_gpu._current, 0)
    rig.sweep(passes=2)
    assert rig.num_wrong() == 0
