"""What stays, what streams and how long it takes: facts, and properties against brute force."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from nexus_ext.errors import BudgetError, ConfigError
from nexus_ext.plan import Plan, Rates, _assign_arenas, make_plan, predict_step

MIB = 1 << 20
SIZES = st.lists(st.integers(0, 50), max_size=16)
LOOKAHEADS = st.one_of(st.just("auto"), st.integers(1, 5))


@st.composite
def streaming_plans(draw: st.DrawFn) -> Plan:
    """Any plan that streams: room for the biggest arenas, not for everything."""
    sizes = draw(st.lists(st.integers(1, 50), min_size=3, max_size=14))
    lookahead = draw(st.integers(1, min(4, len(sizes) - 2)))
    biggest = sum(sorted(sizes)[-lookahead - 1 :])
    return make_plan(sizes, 0, draw(st.integers(biggest, sum(sizes) - 1)), lookahead)


@st.composite
def compute_and_plans(draw: st.DrawFn) -> tuple[list[float], Plan]:
    plan = draw(streaming_plans())
    seconds = st.floats(0, 100, allow_subnormal=False)
    return draw(st.lists(seconds, min_size=plan.num_groups, max_size=plan.num_groups)), plan


def step(plan: Plan, seconds: list[float], rate: float) -> float:
    return predict_step(plan.group_bytes, plan.streamed, plan.arena_of, seconds, rate)


def plan_or_none(*args: Any, **options: Any) -> Plan | None:
    try:
        return make_plan(*args, **options)
    except BudgetError:
        return None


def ring_gaps(members: tuple[int, ...], ring: int) -> list[int]:
    return [later - earlier for earlier, later in pairwise((*members, members[0] + ring))]


def smallest_distance(arena_of: tuple[int, ...]) -> int:
    """Steps between the two nearest groups of one arena, around the ring."""
    places = [tuple(i for i, a in enumerate(arena_of) if a == arena) for arena in set(arena_of)]
    return min(gap for members in places for gap in ring_gaps(members, len(arena_of)))


def can_keep_apart(num_streamed: int, num_arenas: int, distance: int) -> bool:
    """Exhaustive search: is there any mapping with no two of one arena closer than `distance`?"""

    def extend(taken: list[int]) -> bool:
        place = len(taken)
        if place == num_streamed:
            return True
        near = {
            taken[other]
            for other in range(place)
            if min(place - other, num_streamed - place + other) < distance
        }
        # A new arena is as good as any other new one: try only the first.
        choices = range(min(num_arenas, max(taken, default=-1) + 2))
        return any(extend([*taken, arena]) for arena in choices if arena not in near)

    return extend([])


# --- what stays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lookahead", ["auto", 1, 7])
def test_what_fits_stays_and_needs_no_arena(lookahead: Any) -> None:
    plan = make_plan([10, 20, 30], 5, 65, lookahead)
    assert plan.resident == (0, 1, 2)
    assert plan.streamed == plan.arena_of == plan.arena_bytes == ()
    assert plan.lookahead == 0
    assert plan.device_bytes == 65


def test_one_byte_less_than_everything_streams() -> None:
    plan = make_plan([10] * 6, 5, 64, lookahead=1)
    assert len(plan.resident) == 3
    assert plan.streamed_bytes == 30
    assert len(plan.arena_bytes) == 2


def test_no_groups_is_a_plan_too() -> None:
    plan = make_plan([], 5, 5)
    assert (plan.num_groups, plan.device_bytes, plan.minimum_bytes) == (0, 5, 5)


def test_residents_lie_between_the_streamed_groups() -> None:
    assert make_plan([10] * 8, 0, 60, lookahead=1).resident == (1, 3, 5, 7)
    assert make_plan([10] * 9, 0, 50, lookahead=1).resident == (2, 5, 8)


def test_a_small_group_stays_where_a_big_one_would_not_fit() -> None:
    plan = make_plan([10, 10, 10, 10, 10, 10, 3, 3], 0, 26, lookahead=1)
    assert set(plan.resident) == {6, 7}


@pytest.mark.parametrize(
    ("small", "residents"),
    [((0, 6, 9), [(9,), (6, 9), (0, 6, 9)]), ((3, 8, 9), [(9,), (3, 9), (3, 8, 9)])],
)
def test_the_group_that_is_added_is_the_farthest_from_the_residents(
    small: tuple[int, ...], residents: list[tuple[int, ...]]
) -> None:
    sizes = [1 if group in small else 9 for group in range(10)]
    budgets = (19, 20, 21)
    assert [make_plan(sizes, 0, budget, lookahead=1).resident for budget in budgets] == residents


@given(SIZES, st.integers(0, 50), st.integers(0, 900), LOOKAHEADS, st.integers(0, 200))
def test_the_budget_is_never_exceeded(
    sizes: list[int], outside: int, budget: int, lookahead: Any, in_flight: int
) -> None:
    plan = plan_or_none(sizes, outside, budget, lookahead, in_flight_bytes=in_flight)
    if plan is None:
        assert budget < outside + sum(sizes)
        return
    arenas = [0] * len(plan.arena_bytes)
    for group, arena in zip(plan.streamed, plan.arena_of, strict=True):
        arenas[arena] = max(arenas[arena], sizes[group])
    used = outside + sum(sizes[group] for group in plan.resident) + sum(arenas)
    assert plan.device_bytes == used <= budget
    assert sorted((*plan.resident, *plan.streamed)) == list(range(len(sizes)))
    assert list(plan.resident) == sorted(plan.resident)
    assert list(plan.streamed) == sorted(plan.streamed)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 4))
def test_equal_groups_are_spread_evenly(num_groups: int, room: int, lookahead: int) -> None:
    plan = plan_or_none([7] * num_groups, 0, 7 * room, lookahead)
    assume(plan is not None and plan.streamed and plan.resident)
    assert plan is not None
    assert len(plan.resident) == room - lookahead - 1
    gaps = ring_gaps(plan.resident, num_groups)
    assert max(gaps) - min(gaps) <= 1


# --- which arena --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_streamed", "num_arenas"), [(n, a) for a in range(1, 6) for n in range(a + 1, 13)]
)
def test_no_mapping_keeps_the_groups_of_an_arena_further_apart(
    num_streamed: int, num_arenas: int
) -> None:
    arena_of = _assign_arenas(num_streamed, num_arenas)
    assert set(arena_of) == set(range(num_arenas))
    best = smallest_distance(arena_of)
    assert can_keep_apart(num_streamed, num_arenas, best)
    assert not can_keep_apart(num_streamed, num_arenas, best + 1)


@pytest.mark.parametrize(
    ("num_streamed", "arena_of"),
    [
        (6, (0, 1, 2, 0, 1, 2)),
        (8, (0, 1, 2, 0, 1, 2, 0, 1)),
        (7, (0, 1, 2, 0, 1, 0, 1)),
        (5, (0, 1, 2, 0, 1)),
        (4, (0, 1, 0, 2)),
    ],
)
def test_the_ring_is_walked_in_blocks_and_the_last_ones_are_shorter(
    num_streamed: int, arena_of: tuple[int, ...]
) -> None:
    assert make_plan([1] * num_streamed, 0, 3, lookahead=2).arena_of == arena_of


def test_an_arena_is_as_big_as_its_biggest_group() -> None:
    plan = make_plan([10, 4, 8, 6], 1, 17, lookahead=1)
    assert plan.arena_of == (0, 1, 0, 1)
    assert plan.arena_bytes == (10, 6)


# --- how far ahead ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "lookahead"),
    [(64 * MIB, 1), (16 * MIB, 1), (15 * MIB, 2), (4 * MIB, 4), (1 * MIB, 4)],
)
def test_auto_goes_deeper_only_to_keep_the_disk_busy(group: int, lookahead: int) -> None:
    assert make_plan([group] * 40, 0, 20 * group).lookahead == lookahead


def test_auto_goes_only_as_deep_as_the_budget() -> None:
    assert make_plan([MIB] * 40, 0, 2 * MIB).lookahead == 1
    assert make_plan([MIB] * 40, 0, 4 * MIB).lookahead == 3


def test_auto_spends_no_arena_that_only_one_group_would_use() -> None:
    plan = make_plan([MIB] * 10, 0, 8 * MIB)
    assert plan.lookahead == 1
    assert len(plan.resident) == 6


@given(streaming_plans())
def test_a_streaming_plan_has_one_arena_more_than_it_looks_ahead(plan: Plan) -> None:
    assert 1 <= plan.lookahead <= 4
    assert len(plan.arena_bytes) == plan.lookahead + 1 < len(plan.streamed)
    assert set(plan.arena_of) == set(range(plan.lookahead + 1))


@pytest.mark.parametrize("lookahead", [1, 2, 3, 4])
def test_an_explicit_lookahead_is_kept_or_refused(lookahead: int) -> None:
    arenas = 10 * (lookahead + 1)
    assert make_plan([10] * 6, 0, arenas, lookahead).lookahead == lookahead
    with pytest.raises(BudgetError):
        make_plan([10] * 6, 0, arenas - 1, lookahead)


@pytest.mark.parametrize("lookahead", [0, -1, True, 1.0, "1", None])
def test_an_impossible_lookahead_is_refused(lookahead: Any) -> None:
    with pytest.raises(ConfigError, match="lookahead is 'auto' or an int from 1"):
        make_plan([1] * 5, 0, 3, lookahead)


# --- too small ----------------------------------------------------------------------------------


def test_too_small_says_what_is_needed_and_what_would_work() -> None:
    with pytest.raises(BudgetError) as caught:
        make_plan([10] * 5, 4, 33, lookahead=2)
    message = str(caught.value)
    assert "got 33 bytes" in message
    assert "needed 34 = outside 4 + resident 0 + 3 arenas 30 (lookahead 2)" in message
    assert "smallest budget that works is 24 bytes" in message


def test_the_smallest_budget_is_two_arenas_or_everything() -> None:
    assert make_plan([10] * 5, 4, 99).minimum_bytes == 24
    assert make_plan([10], 4, 99).minimum_bytes == 14
    assert make_plan([10, 3], 4, 99).minimum_bytes == 17
    assert make_plan([9, 2, 9, 2], 0, 99).minimum_bytes == 11


@given(SIZES, st.integers(0, 50), st.sampled_from(["auto", 1]), st.integers(0, 200))
def test_the_smallest_budget_works_and_one_byte_less_does_not(
    sizes: list[int], outside: int, lookahead: Any, in_flight: int
) -> None:
    everything = outside + sum(sizes)
    minimum = make_plan(sizes, outside, everything, lookahead, Rates(), in_flight).minimum_bytes
    plan = make_plan(sizes, outside, minimum, lookahead, Rates(), in_flight)
    assert plan.device_bytes <= minimum == plan.minimum_bytes
    if minimum > 0:
        with pytest.raises(BudgetError, match=f"smallest budget that works is {minimum} bytes"):
            make_plan(sizes, outside, minimum - 1, lookahead, Rates(), in_flight)


@pytest.mark.parametrize("sizes", [([-1], 0, 9), ([1], -1, 9), ([1], 0, -1)])
def test_negative_sizes_are_refused(sizes: Any) -> None:
    with pytest.raises(ConfigError, match="got -1"):
        make_plan(*sizes)


# --- how long -----------------------------------------------------------------------------------


@given(compute_and_plans())
def test_a_step_takes_the_longer_of_both_at_least_and_their_sum_at_most(
    case: tuple[list[float], Plan],
) -> None:
    seconds, plan = case
    io, compute = plan.streamed_bytes, sum(seconds)
    assert max(io, compute) - 1e-6 <= step(plan, seconds, 1.0) <= io + compute + 1e-6


@given(streaming_plans())
def test_without_compute_a_step_is_the_reading(plan: Plan) -> None:
    seconds = step(plan, [0.0] * plan.num_groups, 2.0)
    assert seconds == pytest.approx(plan.streamed_bytes / 2)


@given(compute_and_plans())
def test_with_an_infinite_disk_a_step_is_the_compute(case: tuple[list[float], Plan]) -> None:
    seconds, plan = case
    assert step(plan, seconds, math.inf) == pytest.approx(sum(seconds))


def test_two_arenas_in_turn_hide_the_shorter_of_load_and_compute() -> None:
    assert predict_step([6] * 4, range(4), (0, 1, 0, 1), [2.0] * 4, 2.0) == 12.0
    assert predict_step([6] * 4, range(4), (0, 1, 0, 1), [5.0] * 4, 2.0) == 20.0


def test_two_neighbours_in_one_arena_cannot_overlap() -> None:
    # 3 s loads, 5 s computes. Groups 2 and 0 share an arena and meet where the pass wraps.
    assert predict_step([6] * 3, range(3), (0, 1, 0), [5.0] * 3, 2.0) == 15.0 + 3.0


def test_a_resident_hides_the_load_that_follows_it() -> None:
    # 4 s loads: alone a 1 s compute hides little, with a 3 s resident after each it hides all.
    assert predict_step([4, 4], (0, 1), (0, 1), [1.0, 1.0], 1.0) == 8.0
    args = ([4, 9, 4, 9], (0, 2), (0, 1), [1.0, 3.0, 1.0, 3.0], 1.0)
    assert predict_step(*args) == 8.0
    assert sum(args[3]) == 8.0


def test_the_plan_predicts_from_the_rates() -> None:
    plan = make_plan([100] * 8, 0, 600, 1, Rates(50.0, 3.0))
    assert plan.predicted_io_seconds == 8.0
    assert plan.predicted_compute_seconds == 24.0
    assert plan.predicted_step_seconds == 24.0
    assert "step      24 s: I/O 8 s, compute 24 s" in plan.describe()


def test_unknown_compute_gives_the_io_bound_and_says_so() -> None:
    plan = make_plan([100] * 8, 0, 600, 1, Rates(disk_bytes_per_second=50.0))
    assert (plan.predicted_io_seconds, plan.predicted_step_seconds) == (8.0, 8.0)
    assert plan.predicted_compute_seconds is None
    assert "at least 8 s: I/O 8 s, compute unknown" in plan.describe()


def test_without_a_disk_rate_only_a_resident_model_is_predicted() -> None:
    rates = Rates(compute_seconds_per_group=3.0)
    streamed, resident = make_plan([100] * 8, 0, 600, 1, rates), make_plan([100], 0, 600, 1, rates)
    assert (streamed.predicted_io_seconds, streamed.predicted_step_seconds) == (None, None)
    assert (resident.predicted_io_seconds, resident.predicted_step_seconds) == (0.0, 3.0)
    assert "step      unknown: I/O unknown, compute 24 s" in streamed.describe()


@pytest.mark.parametrize("rates", [Rates(0.0), Rates(math.nan), Rates(-1.0), Rates(1.0, -1.0)])
def test_impossible_rates_are_refused(rates: Rates) -> None:
    with pytest.raises(ConfigError, match="a rate is positive"):
        make_plan([1], 0, 1, rates=rates)


def test_the_table_has_every_figure() -> None:
    text = make_plan([MIB] * 8, 2 * MIB, 8 * MIB, lookahead=1).describe()
    assert text.splitlines()[:5] == [
        "outside   2.00 MiB, always on the device",
        "resident  groups: 4, 4.00 MiB",
        "streamed  groups: 4, 4.00 MiB a pass",
        "arenas    2, 2.00 MiB, lookahead 1",
        "device    8.00 MiB of a budget of 8.00 MiB; the smallest that works is 4.00 MiB",
    ]


# --- what stays in RAM --------------------------------------------------------------------------


def in_ram(ram_bytes: int, sizes: list[int] | None = None, budget: int = 20) -> tuple[int, ...]:
    return make_plan(sizes or [10] * 8, 0, budget, 1, ram_bytes=ram_bytes).in_ram


def test_without_room_nothing_stays_in_ram() -> None:
    assert make_plan([10] * 8, 0, 20, 1).in_ram == in_ram(0) == in_ram(9) == ()


def test_groups_in_ram_are_spread_between_those_from_disk() -> None:
    assert in_ram(10) == (7,)
    assert in_ram(49) == (1, 3, 5, 7)
    assert in_ram(79) == (1, 2, 3, 4, 5, 6, 7)
    assert in_ram(80) == tuple(range(8))


def test_residents_are_not_in_ram_too() -> None:
    plan = make_plan([10] * 8, 0, 60, 1, ram_bytes=20)
    assert plan.resident == (1, 3, 5, 7)
    assert plan.in_ram == (2, 6)
    everything = make_plan([10] * 8, 0, 80, 1, ram_bytes=1000)
    assert (everything.streamed, everything.in_ram) == ((), ())


def test_small_groups_stay_in_ram_where_a_big_one_would_not_fit() -> None:
    sizes = [10, 30, 10, 30, 10, 30]
    assert in_ram(29, sizes, 40) == (0, 2)
    assert in_ram(30, sizes, 40) == (5,)  # spread first
    assert in_ram(50, sizes, 40) == (0, 2, 5)
    assert in_ram(60, sizes, 40) == (0, 2, 4, 5)


@given(streaming_plans(), st.integers(0, 900))
def test_ram_is_never_exceeded_and_takes_nothing_from_the_device(plan: Plan, room: int) -> None:
    kept = make_plan(
        plan.group_bytes, 0, plan.budget_bytes, plan.lookahead, Rates(), ram_bytes=room
    )
    assert kept.ram_bytes == sum(kept.group_bytes[group] for group in kept.in_ram) <= room
    assert set(kept.in_ram) <= set(kept.streamed)
    assert list(kept.in_ram) == sorted(kept.in_ram)
    assert (kept.resident, kept.arena_of) == (plan.resident, plan.arena_of)
    assert kept.device_bytes == plan.device_bytes
    assert kept.disk_bytes + kept.ram_bytes == kept.streamed_bytes
    if room >= kept.streamed_bytes:
        assert kept.in_ram == kept.streamed
        assert kept.disk_bytes == 0


@given(st.integers(3, 40), st.integers(0, 40))
def test_equal_groups_in_ram_are_spread_evenly(num_groups: int, room: int) -> None:
    plan = make_plan([7] * num_groups, 0, 14, 1, ram_bytes=7 * room)
    assert len(plan.in_ram) == min(room, num_groups)
    if plan.in_ram:
        gaps = ring_gaps(plan.in_ram, num_groups)
        assert max(gaps) - min(gaps) <= 1


def test_the_table_has_a_line_for_ram() -> None:
    text = make_plan([MIB] * 8, 0, 2 * MIB, 1, ram_bytes=3 * MIB + 5).describe()
    assert "in RAM    groups: 3, 3.00 MiB\n" in text
    assert "in RAM" not in make_plan([MIB] * 8, 0, 2 * MIB, 1).describe()


def test_negative_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="got -1"):
        make_plan([1] * 5, 0, 3, ram_bytes=-1)


# --- a link between disk and device -------------------------------------------------------------


def test_a_link_slower_than_the_disk_sets_the_pace() -> None:
    args = ([6] * 4, range(4), (0, 1, 0, 1), [0.0] * 4, 6.0)
    assert predict_step(*args) == 4.0
    assert predict_step(*args, link_bytes_per_second=2.0) == 12.0
    # A faster one carries bytes as they come: the last of a group is there when it is read.
    assert predict_step(*args, link_bytes_per_second=60.0) == pytest.approx(4.0)


def test_what_is_in_ram_takes_the_link_alone() -> None:
    args = ([6] * 4, range(4), (0, 1, 0, 1), [0.0] * 4, 1.0)
    kept = {"in_ram": range(4), "link_bytes_per_second": 6.0}
    assert predict_step(*args, **kept) == 4.0
    # Over an infinitely fast one it is there at once.
    assert predict_step(*args, in_ram=range(4)) == 0.0


def test_a_disk_reads_the_next_group_while_one_comes_from_ram() -> None:
    # Every other group is read, for 6 s; the rest take 3 s of the link meanwhile, or of compute.
    args = ([6] * 4, range(4), (0, 1, 0, 1), [3.0] * 4, 1.0)
    alone = predict_step(*args, link_bytes_per_second=2.0)
    assert alone == 24.0
    kept = predict_step(*args, in_ram=(1, 3), link_bytes_per_second=2.0)
    assert 12.0 <= kept < alone


def test_compute_hides_a_link_as_it_hides_a_disk() -> None:
    args = ([6] * 4, range(4), (0, 1, 0, 1), [5.0] * 4, math.inf)
    assert predict_step(*args, in_ram=range(4), link_bytes_per_second=2.0) == 20.0


@given(compute_and_plans(), st.floats(0.1, 10), st.data())
def test_a_step_over_a_link_lies_between_its_longest_part_and_their_sum(
    case: tuple[list[float], Plan], link: float, data: st.DataObject
) -> None:
    seconds, plan = case
    kept = data.draw(st.sets(st.sampled_from(plan.streamed)))
    read = sum(plan.group_bytes[group] for group in plan.streamed if group not in kept)
    carried = plan.streamed_bytes / link
    taken = predict_step(
        plan.group_bytes,
        plan.streamed,
        plan.arena_of,
        seconds,
        1.0,
        in_ram=kept,
        link_bytes_per_second=link,
    )
    assert max(read, carried, sum(seconds)) - 1e-6 <= taken
    assert taken <= read + carried + sum(seconds) + 1e-6


@given(compute_and_plans(), st.data())
def test_more_in_ram_never_takes_longer(
    case: tuple[list[float], Plan], data: st.DataObject
) -> None:
    seconds, plan = case
    more = data.draw(st.sets(st.sampled_from(plan.streamed)))
    fewer = {group for group in more if data.draw(st.booleans())}
    args = (plan.group_bytes, plan.streamed, plan.arena_of, seconds, 1.0)
    slow, fast = (
        predict_step(*args, in_ram=kept, link_bytes_per_second=4.0) for kept in (fewer, more)
    )
    assert fast <= slow + 1e-6


@given(compute_and_plans())
def test_an_infinite_link_changes_nothing(case: tuple[list[float], Plan]) -> None:
    seconds, plan = case
    args = (plan.group_bytes, plan.streamed, plan.arena_of, seconds, 1.0)
    assert predict_step(*args, link_bytes_per_second=math.inf) == predict_step(*args)


def test_the_plan_predicts_from_disk_and_link() -> None:
    def predicted(ram_bytes: int, disk: float | None, link: float | None) -> float | None:
        rates = Rates(disk, None, link)
        plan = make_plan([100] * 8, 0, 200, 1, rates, ram_bytes=ram_bytes)
        assert plan.predicted_io_seconds == pytest.approx(plan.predicted_step_seconds)
        return plan.predicted_io_seconds

    assert predicted(0, 50.0, 500.0) == pytest.approx(16.0)
    assert predicted(0, 500.0, 50.0) == pytest.approx(16.0)
    assert predicted(800, 50.0, 400.0) == pytest.approx(2.0)
    # All of it in RAM: what the disk can do does not matter.
    assert predicted(800, None, 400.0) == pytest.approx(2.0)


def test_half_of_it_in_ram_is_bound_by_the_disk_that_reads_the_other_half() -> None:
    plan = make_plan([100] * 8, 0, 200, 1, Rates(50.0, None, 1e9), ram_bytes=400)
    assert plan.disk_bytes == 400
    assert plan.predicted_io_seconds == pytest.approx(8.0)
    assert plan.predicted_step_seconds == pytest.approx(8.0)


@pytest.mark.parametrize("link", [0.0, -1.0, math.nan])
def test_an_impossible_link_is_refused(link: float) -> None:
    with pytest.raises(ConfigError, match="a rate is positive"):
        make_plan([1], 0, 1, rates=Rates(link_bytes_per_second=link))
