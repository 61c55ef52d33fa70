"""The order of use is learnt: what the engine reads ahead is what followed the last time."""

from __future__ import annotations

import random
import threading
from typing import Any

import pytest
import torch

from nexus_ext.errors import ThreadConflict
from tests.conftest import PATIENCE_SECONDS

GROUP = 32 << 10
NUM_GROUPS = 7
FORWARD = list(range(NUM_GROUPS))


@pytest.fixture(params=[2, 3, 4])
def rig(lab: Any, request: pytest.FixtureRequest) -> Any:
    """Seven groups over two to four arenas, poisoned when they are freed."""
    source = lab.source(NUM_GROUPS * GROUP)
    return lab.rig([source], lab.slices(GROUP, NUM_GROUPS), num_arenas=request.param, poison=True)


def walk(rig: Any, groups: list[int]) -> int:
    """Acquire in this order, look at every byte; returns how many came as a surprise."""
    before = rig.stats["num_mispredicted"]
    for group in groups:
        rig.acquire(group)
        assert rig.num_wrong(group) == 0, group
    return int(rig.stats["num_mispredicted"] - before)


def test_the_declared_order_is_no_surprise_from_the_first_pass_on(rig: Any) -> None:
    assert [walk(rig, FORWARD) for _ in range(3)] == [0, 0, 0]


def test_the_first_backward_pass_surprises_once_and_later_ones_never(rig: Any) -> None:
    step = FORWARD + FORWARD[::-1]
    surprises = [walk(rig, step) for _ in range(4)]
    # The turn is not foreseen, and for as many groups as were read ahead of it.
    assert surprises[0] <= 2 * len(rig.arenas)
    assert surprises[2:] == [0, 0]


@pytest.mark.parametrize(
    "order",
    [
        FORWARD[::-1],
        [0, 1, 2, 1, 2, 3, 4, 5, 6],
        [0, 2, 4, 6],
        [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 3, 4, 5, 6],
        [3, 1, 4, 0, 5, 2, 6, 5],
        [0, 0, 1, 1, 2, 2],
    ],
)
def test_another_order_is_learnt_in_its_first_passes(rig: Any, order: list[int]) -> None:
    walk(rig, FORWARD)
    for _ in range(2):
        walk(rig, order)
    assert [walk(rig, order) for _ in range(3)] == [0, 0, 0]


def test_after_a_change_of_mind_the_old_order_is_soon_known_again(rig: Any) -> None:
    for _ in range(3):
        walk(rig, FORWARD[::-1])
    assert sum(walk(rig, FORWARD) for _ in range(3)) <= 3
    assert [walk(rig, FORWARD) for _ in range(3)] == [0, 0, 0]


@pytest.mark.parametrize("seed", range(5))
def test_no_order_is_ever_a_wrong_byte(rig: Any, seed: int) -> None:
    choose = random.Random(seed)
    walk(rig, [choose.randrange(NUM_GROUPS) for _ in range(300)])


def test_groups_that_were_foreseen_are_read_ahead(lab: Any) -> None:
    rig = lab.rig([lab.source(NUM_GROUPS * GROUP)], lab.slices(GROUP, NUM_GROUPS), num_arenas=2)
    backward = FORWARD[::-1]
    for _ in range(3):
        walk(rig, backward)
    before = rig.stats
    for place, group in enumerate(backward):
        rig.acquire(group)
        # Whoever comes next lands before anybody asks.
        num_landed = before["num_landed"] + min(place + 2, NUM_GROUPS)
        rig.wait_until(lambda stats, wanted=num_landed: stats["num_landed"] >= wanted)
    after = rig.stats
    # The last group and the first share an arena: one of seven cannot be read ahead.
    assert after["num_hits"] == before["num_hits"] + NUM_GROUPS - 1
    assert after["num_waits"] == before["num_waits"] + 1


# -- held groups and threads -----------------------------------------------------------------------


def in_thread(run: Any) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_another_thread_waits_until_a_held_group_is_released(lab: Any) -> None:
    rig = lab.rig(
        [lab.source(NUM_GROUPS * GROUP)], lab.slices(GROUP, NUM_GROUPS), num_arenas=2, poison=True
    )
    rig.acquire_held(0)
    got: list[int] = []

    def take() -> None:
        # Group 2 has the arena of group 0.
        rig.acquire_held(2)
        got.append(rig.num_wrong(2))
        rig.release(2)

    thread = in_thread(take)
    thread.join(0.3)
    assert got == []
    assert rig.num_wrong(0) == 0
    rig.release(0)
    thread.join(PATIENCE_SECONDS)
    assert got == [0]


@pytest.mark.slow
def test_a_hold_that_is_never_released_is_given_up_and_its_holder_told(lab: Any) -> None:
    rig = lab.rig(
        [lab.source(NUM_GROUPS * GROUP)], lab.slices(GROUP, NUM_GROUPS), num_arenas=2, poison=True
    )
    rig.acquire_held(0)
    got: list[Any] = []

    def take() -> None:
        try:
            rig.acquire_held(2)
        except RuntimeError as error:
            got.append(str(error))
        rig.acquire_held(2)
        got.append(rig.num_wrong(2))
        rig.release(2)

    in_thread(take).join(PATIENCE_SECONDS)
    assert "ThreadConflict" in got[0]
    assert "has held the arena of group 2" in got[0]
    assert got[1] == 0
    with pytest.raises(RuntimeError, match=r"ThreadConflict.*may have been overwritten"):
        rig.release(0)
    rig.sweep()


def test_a_pass_that_another_thread_broke_into_is_told_at_its_end(lab: Any) -> None:
    rig = lab.rig([lab.source(NUM_GROUPS * GROUP)], lab.slices(GROUP, NUM_GROUPS), num_arenas=2)
    rig.acquire(3)
    refused: list[str] = []

    def insist() -> None:
        for _ in range(2):
            try:
                rig.acquire(1)
            except ThreadConflict as error:
                refused.append(str(error))

    in_thread(insist).join(PATIENCE_SECONDS)
    assert len(refused) == 1
    with pytest.raises(ThreadConflict, match="may have been overwritten"):
        rig.engine.end_pass()
    rig.engine.end_pass()
    assert torch.equal(rig.arena(1), rig.arena(3))
