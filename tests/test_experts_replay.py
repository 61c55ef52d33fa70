"""Replays against brute force and plain twins, and traces against what they promise."""

from __future__ import annotations

import json
from collections import OrderedDict
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import ConfigError
from nexus_ext.experts.policy import POLICIES
from nexus_ext.experts.replay import belady, replay
from nexus_ext.experts.routes import (
    Route,
    RouteTrace,
    load_routes,
    save_routes,
    synthetic_routes,
)

NUM_KEYS = 6


def one_layer(selections: list[list[int]], sizes: list[int] | None = None) -> RouteTrace:
    steps = [[Route(0, tuple(keys))] for keys in selections]
    return RouteTrace({0: NUM_KEYS}, steps, sizes or [1] * NUM_KEYS)


@st.composite
def traces(draw: st.DrawFn, max_size: int = 1) -> RouteTrace:
    selection = st.lists(st.integers(0, NUM_KEYS - 1), min_size=1, max_size=3, unique=True)
    selections = draw(st.lists(selection, min_size=1, max_size=9))
    sizes = draw(st.lists(st.integers(1, max_size), min_size=NUM_KEYS, max_size=NUM_KEYS))
    return one_layer(selections, sizes)


def fewest_bytes(trace: RouteTrace, capacity: int) -> int:
    """By trying everything: after each forward any keys may stay that fit."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for route in trace.routes:
        after: dict[frozenset[int], int] = {}
        for there, missed in states.items():
            now = there.union(route.keys)
            cost = missed + sum(trace.sizes[key] for key in route.keys if key not in there)
            for count in range(len(now) + 1):
                for kept in map(frozenset, combinations(now, count)):
                    if sum(trace.sizes[key] for key in kept) <= capacity:
                        after[kept] = min(cost, after.get(kept, cost))
        states = after
    return min(states.values())


def plain_lru(trace: RouteTrace, capacity: int) -> tuple[int, int]:
    """Hits and bytes missed."""
    there: OrderedDict[int, None] = OrderedDict()
    hits = missed = 0
    for route in trace.routes:
        hits += sum(key in there for key in route.keys)
        missed += sum(trace.sizes[key] for key in route.keys if key not in there)
        for key in route.keys:
            there[key] = None
            there.move_to_end(key)
        while sum(trace.sizes[key] for key in there) > capacity:
            there.popitem(last=False)
    return hits, missed


# -- the best possible -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(traces(), st.integers(0, 5))
def test_belady_is_the_optimum(trace: RouteTrace, capacity: int) -> None:
    best = belady(trace, capacity)
    assert best.bytes_missed == best.misses == fewest_bytes(trace, capacity)
    assert best.hits + best.misses == trace.num_selected


@settings(max_examples=100, deadline=None)
@given(traces(max_size=4), st.integers(0, 10))
def test_with_several_sizes_belady_is_a_bound(trace: RouteTrace, capacity: int) -> None:
    assert belady(trace, capacity).bytes_missed <= fewest_bytes(trace, capacity)


def test_the_bound_lets_keys_leave_in_part() -> None:
    """Room for 3 bytes, two keys of 2: a real cache keeps one, the bound one and a half."""
    trace = one_layer([[0], [1]] * 2, [2] * 2 + [1] * 4)
    assert belady(trace, 3).bytes_missed == 5
    assert fewest_bytes(trace, 3) == 6


@given(traces(), st.integers(0, 5), st.integers(0, 6))
def test_room_for_part_of_an_expert_is_no_room(trace: RouteTrace, capacity: int, more: int) -> None:
    sizes = [7] * NUM_KEYS
    exact = belady(trace, capacity * 7, sizes=sizes)
    nearly = belady(trace, capacity * 7 + more, sizes=sizes)
    assert (nearly.hits, nearly.bytes_missed) == (exact.hits, exact.bytes_missed)
    assert exact.hits == belady(trace, capacity).hits
    assert exact.bytes_missed == 7 * exact.misses


@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=60, deadline=None)
@given(traces(max_size=3), st.integers(0, 12))
def test_no_policy_misses_less_than_belady(name: str, trace: RouteTrace, capacity: int) -> None:
    ours, best = replay(trace, capacity, name), belady(trace, capacity)
    assert ours.bytes_missed >= best.bytes_missed
    if len(set(trace.sizes)) == 1:
        assert ours.hits <= best.hits


# -- what a replay does ----------------------------------------------------------------------------


# Their order within a forward is not defined for a policy, so one key each.
SINGLES = st.lists(st.integers(0, NUM_KEYS - 1).map(lambda key: [key]), min_size=1, max_size=30)


@settings(deadline=None)
@given(SINGLES, st.lists(st.integers(1, 3), min_size=6, max_size=6), st.integers(0, 9))
def test_lru_does_what_a_plain_lru_does(
    selections: list[list[int]], sizes: list[int], capacity: int
) -> None:
    trace = one_layer(selections, sizes)
    ours = replay(trace, capacity, "lru")
    assert (ours.hits, ours.bytes_missed) == plain_lru(trace, capacity)


@pytest.mark.parametrize("name", POLICIES)
def test_with_room_for_all_every_key_is_missed_once(name: str) -> None:
    trace = synthetic_routes(2, 8, 2, 30, expert_bytes=5)
    ours = replay(trace, 16 * 5, name)
    used = {key for route in trace.routes for key in route.keys}
    assert (ours.misses, ours.bytes_missed, ours.evictions) == (len(used), 5 * len(used), 0)
    assert ours.hits == trace.num_selected - len(used)
    assert ours == belady_as(name, trace)


def belady_as(name: str, trace: RouteTrace) -> object:
    best = belady(trace, sum(trace.sizes))
    return type(best)(**{**vars(best), "policy": name})


@pytest.mark.parametrize("name", POLICIES)
def test_without_room_nothing_stays(name: str) -> None:
    trace = synthetic_routes(2, 8, 2, 10)
    ours = replay(trace, 0, name)
    assert (ours.hits, ours.misses, ours.hit_rate) == (0, 40, 0.0)
    assert ours.evictions == 40


def test_a_key_may_be_loaded_for_one_forward_only() -> None:
    """Key 0 is used always, the others once: with room for one, keeping 0 is right."""
    trace = one_layer([[0], [0, 1], [0, 2], [0, 3], [0, 4]])
    assert belady(trace, 1).hits == 4
    assert replay(trace, 1, "lfu").hits >= 3


def test_nobody_leaves_for_what_a_prefill_loads() -> None:
    decode, prompt = Route(0, (0, 1)), Route(0, (2, 3, 4, 5), 100, is_prefill=True)
    trace = RouteTrace({0: 6}, [[decode], [prompt], [decode]], [1] * 6)
    for name in POLICIES:
        assert replay(trace, 2, name).hits == 2
        # What there is room for stays.
        assert replay(trace, 3, name).evictions == 3


def test_rates_are_shares() -> None:
    ours = replay(one_layer([[0], [0], [0], [1]], [1, 9, 1, 1, 1, 1]), 100, "lru")
    assert ours.hit_rate == 0.5
    assert ours.byte_hit_rate == 2 / 12


@pytest.mark.parametrize("run", [belady, lambda *a, **k: replay(*a, "lru", **k)])
def test_what_cannot_be_is_refused(run: object) -> None:
    trace = one_layer([[0]])
    with pytest.raises(ConfigError, match="at least 0"):
        run(trace, -1)  # type: ignore[operator]
    with pytest.raises(ConfigError, match="each of 6 experts, got 1"):
        run(trace, 1, sizes=[1])  # type: ignore[operator]


@pytest.mark.parametrize("share", [0.1, 0.2, 0.4])
def test_reuse_keeps_more_than_the_others_of_routes_like_a_models(share: float) -> None:
    trace = synthetic_routes(8, 32, 4, 300, skew=0.5, locality=0.6)
    kept = {name: replay(trace, int(share * 256), name).hits for name in POLICIES}
    assert kept["reuse"] > kept["lfu"] > kept["lru"]


# -- traces ----------------------------------------------------------------------------------------


def test_a_trace_survives_a_file(tmp_path: Path) -> None:
    trace = RouteTrace({1: 3, 4: 2}, [], [5, 5, 5, 7, 7])
    trace.append(1, [0, 2], 9, is_prefill=True)
    trace.append(4, [3])
    trace.append(1, [1], 2)
    save_routes(trace, tmp_path / "t.jsonl")
    assert load_routes(tmp_path / "t.jsonl") == trace
    line = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[2])
    assert line["rec"] == "route"
    assert (line["layer"], line["experts"], line["tokens"], line["step"]) == (4, [0], 1, 0)


def test_a_step_ends_when_a_layer_comes_again() -> None:
    trace = RouteTrace({0: 1, 1: 1, 2: 1}, [], [1] * 3)
    for layer in (0, 2, 0, 1, 1):
        trace.append(layer, [layer])
    assert [[route.layer for route in step] for step in trace.steps] == [[0, 2], [0, 1], [1]]


def test_a_profile_without_the_record_of_experts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"rec": "io", "stage": "cpu_to_gpu"}\n'
        '{"rec": "route", "step": 7, "layer": 3, "experts": [0, 4], "tokens": 1}\n'
        '{"rec": "route", "step": 8, "layer": 1, "experts": [2], "tokens": 64}\n'
    )
    trace = load_routes(path)
    assert trace.num_experts == {1: 3, 3: 5}
    assert trace.steps == [[Route(3, (3, 7))], [Route(1, (2,), 64, is_prefill=True)]]
    assert list(trace.sizes) == [1] * 8


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "must have records of routes"),
        ("{", "line 1"),
        ("[]", "lacks rec"),
        ('{"rec": "io"}\n{"rec": "route", "layer": 0}', "line 2 .* lacks experts, step, tokens"),
        (
            '{"rec": "experts", "num_experts": [[0, 2]], "bytes": [1, 1]}\n'
            '{"rec": "route", "step": 0, "layer": 0, "experts": [2], "tokens": 1}',
            "must be below 2",
        ),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, text: str, what: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ConfigError, match=what):
        load_routes(tmp_path / "t.jsonl")


def test_a_trace_has_a_size_for_every_expert() -> None:
    with pytest.raises(ConfigError, match="each of 4 experts, got 3"):
        RouteTrace({0: 4}, [], [1, 1, 1])


def test_made_up_routes_are_the_same_again_and_others_with_another_seed() -> None:
    one, same = synthetic_routes(2, 8, 2, 20, seed=3), synthetic_routes(2, 8, 2, 20, seed=3)
    assert one == same
    assert one != synthetic_routes(2, 8, 2, 20, seed=4)


def test_made_up_routes_are_routes() -> None:
    trace = synthetic_routes(3, 8, 2, 20, expert_bytes=9)
    assert len(trace.steps) == 20
    for step in trace.steps:
        assert [route.layer for route in step] == [0, 1, 2]
        for route in step:
            assert len(set(route.keys)) == 2
            assert all(trace.layer_of[key] == route.layer for key in route.keys)
    assert list(trace.sizes) == [9] * 24


def shared(trace: RouteTrace) -> float:
    """What share of its keys a layer used for the token before, too."""
    pairs = zip(trace.steps, trace.steps[1:], strict=False)
    same = [
        len(set(now.keys).intersection(before.keys)) / len(now.keys)
        for first, second in pairs
        for before, now in zip(first, second, strict=True)
    ]
    return sum(same) / len(same)


def share_of_most_used(trace: RouteTrace) -> float:
    counts = [0] * trace.num_keys
    for route in trace.routes:
        for key in route.keys:
            counts[key] += 1
    return sum(sorted(counts)[-trace.num_keys // 10 :]) / sum(counts)


def test_locality_makes_tokens_share_experts_as_in_real_models() -> None:
    local = shared(synthetic_routes(4, 64, 8, 400, skew=0.5, locality=0.6))
    independent = shared(synthetic_routes(4, 64, 8, 400, skew=0.0, locality=0.0))
    assert 0.3 < local < 0.45
    # Eight of 64 at random.
    assert independent == pytest.approx(8 / 64, abs=0.02)


def test_skew_makes_some_experts_popular() -> None:
    even = share_of_most_used(synthetic_routes(4, 64, 8, 400, skew=0.0, locality=0.0))
    skewed = share_of_most_used(synthetic_routes(4, 64, 8, 400, skew=1.0, locality=0.0))
    assert even < 0.15
    assert skewed > 0.3


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": 9}, {"locality": 1.0}])
def test_routes_that_cannot_be_made_up_are_refused(wrong: dict[str, float]) -> None:
    options: dict[str, float] = {"top_k": 2, "locality": 0.5} | wrong
    with pytest.raises(ConfigError, match="must be in"):
        synthetic_routes(2, 8, int(options["top_k"]), 5, locality=options["locality"])
