"""Which experts leave: each policy against what it says it does."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import ConfigError
from nexus_ext.experts.policy import POLICIES, Lfu, Policy, Reuse, make_policy
from nexus_ext.experts.routes import synthetic_routes

LAYERS, EXPERTS = 3, 8
LAYER_OF = [layer for layer in range(LAYERS) for _ in range(EXPERTS)]
ALL = torch.ones(len(LAYER_OF), dtype=torch.bool)


def key(layer: int, expert: int) -> int:
    return layer * EXPERTS + expert


def keys_of(layer: int) -> range:
    return range(layer * EXPERTS, (layer + 1) * EXPERTS)


def mask(keys: Sequence[int]) -> torch.Tensor:
    there = torch.zeros(len(LAYER_OF), dtype=torch.bool)
    there[torch.tensor(keys, dtype=torch.int64)] = True
    return there


def some_routes(num_tokens: int, seed: int = 0) -> Iterator[tuple[int, tuple[int, ...]]]:
    trace = synthetic_routes(LAYERS, EXPERTS, 2, num_tokens, seed=seed)
    return ((route.layer, route.keys) for route in trace.routes)


def fed(name: str, num_tokens: int = 40) -> Policy:
    policy = make_policy(name, LAYER_OF)
    for layer, keys in some_routes(num_tokens):
        policy.select(layer, keys)
    return policy


def turn(policy: Policy, experts: Sequence[int], layers: Sequence[int] = range(LAYERS)) -> None:
    for layer in layers:
        policy.select(layer, [key(layer, expert) for expert in experts])


# -- all of them -----------------------------------------------------------------------------------


def test_an_unknown_policy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="lru, lfu, reuse; got 'arc'"):
        make_policy("arc", LAYER_OF)


def test_a_policy_knows_its_name() -> None:
    assert [make_policy(name, LAYER_OF).name for name in POLICIES] == list(POLICIES)


def test_keys_that_are_not_numbered_layer_by_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="layer by layer"):
        make_policy("lru", [0, 1, 0])


@pytest.mark.parametrize("name", POLICIES)
@given(
    present=st.sets(st.integers(0, len(LAYER_OF) - 1)),
    held=st.sets(st.integers(0, len(LAYER_OF) - 1)),
    count=st.integers(0, 30),
)
def test_victims_are_the_least_of_those_that_may_leave(
    name: str, present: set[int], held: set[int], count: int
) -> None:
    policy = fed(name, 5)
    worth = policy.worth().tolist()
    victims = policy.victims(count, mask(sorted(present)), held)
    may_leave = sorted(worth[each] for each in present - held)
    assert [worth[each] for each in victims] == may_leave[:count]
    assert len(set(victims)) == len(victims)
    assert set(victims) <= present - held


@pytest.mark.parametrize("name", POLICIES)
def test_what_is_remembered_survives_json(name: str) -> None:
    policy, twin = fed(name), make_policy(name, LAYER_OF)
    twin.restore(json.loads(json.dumps(policy.state())))
    # Of those equally hot any may come first.
    heat = policy._heat()
    ours, theirs = heat[policy.hottest(6)], heat[twin.hottest(6)]
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert not torch.allclose(ours, heat[make_policy(name, LAYER_OF).hottest(6)], atol=1e-4)
    assert float(twin.worth()[twin.hottest(1)]) > float(twin.worth().min())


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("how", ["name", "missing", "short", "text", "ragged", "nan", "none"])
def test_a_state_that_is_not_this_policys_is_refused(name: str, how: str) -> None:
    state: dict[str, Any] = json.loads(json.dumps(fed(name).state()))
    what = next(each for each in state if each != "name")
    spoilt: dict[str, dict[str, Any]] = {
        "name": state | {"name": "another"},
        "missing": {"name": name},
        "short": state | {what: state[what][1:]},
        "text": state | {what: "much"},
        "ragged": state | {what: [[1.0], [1.0, 2.0]]},
        "nan": state | {what: [float("nan")] * len(state[what])},
        "none": {},
    }
    with pytest.raises(ConfigError, match="a state must"):
        make_policy(name, LAYER_OF).restore(spoilt[how])


@pytest.mark.parametrize("name", POLICIES)
def test_the_hottest_are_those_used_most(name: str) -> None:
    policy = make_policy(name, LAYER_OF)
    for _ in range(20):
        turn(policy, [2, 5])
    assert set(policy.hottest(6)) == {key(layer, e) for layer in range(LAYERS) for e in (2, 5)}
    assert policy.hottest(0) == []
    assert len(policy.hottest(1000)) == len(LAYER_OF)


@pytest.mark.parametrize("name", POLICIES)
def test_a_model_without_experts_has_no_victims(name: str) -> None:
    policy = make_policy(name, [])
    assert policy.victims(3, torch.zeros(0, dtype=torch.bool), ()) == []
    assert policy.hottest(3) == []


@pytest.mark.parametrize("name", POLICIES)
def test_worth_is_always_a_number(name: str) -> None:
    """Layers of one expert, forwards that use all, none or one, layers in any order."""
    layer_of, source = [0, 1, 1, 2, 2, 2, 2, 2], random.Random(0)
    members = {layer: [k for k, of in enumerate(layer_of) if of == layer] for layer in range(3)}
    policy = make_policy(name, layer_of)
    for _ in range(3000):
        layer = source.randrange(3)
        count = source.choice([0, 1, len(members[layer])])
        policy.select(layer, source.sample(members[layer], count), is_prefill=source.random() < 0.1)
        assert policy.worth().isfinite().all()
    assert policy.worth().dtype == torch.float64


# -- one by one ------------------------------------------------------------------------------------


def test_lru_lets_those_go_that_were_not_used_for_longest() -> None:
    policy = make_policy("lru", LAYER_OF)
    last: dict[int, int] = {}
    for clock, (layer, keys) in enumerate(some_routes(30)):
        policy.select(layer, keys)
        last.update(dict.fromkeys(keys, clock))
    used = sorted(last)
    ages = [last[each] for each in policy.victims(5, mask(used), ())]
    assert ages == sorted(last.values())[:5]


def test_lfu_is_the_evolved_lru_of_the_source() -> None:
    policy = make_policy("lfu", LAYER_OF)
    hotness, last = dict.fromkeys(range(len(LAYER_OF)), 0), dict.fromkeys(range(len(LAYER_OF)), -1)
    tokens = 0
    for clock, (layer, keys) in enumerate(some_routes(100)):
        tokens += layer == 0
        if layer == 0 and tokens in (17, 33, 49, 65, 81, 97):
            hotness = {each: value // 2 for each, value in hotness.items()}
        policy.select(layer, keys)
        for each in keys:
            hotness[each] += 1
            last[each] = clock
        used = [each for each, when in last.items() if when >= 0]
        want = sorted((hotness[each], last[each]) for each in used)
        victims = policy.victims(len(used), mask(used), ())
        # Those used by one forward have the same clock, and any may go first.
        assert [(hotness[each], last[each]) for each in victims] == want


def test_lfu_saturates() -> None:
    policy = Lfu(LAYER_OF)
    for _ in range(300):
        policy.select(0, [0], is_prefill=True)
    assert policy.state()["hotness"][0] == 255


def test_lfu_counts_a_token_when_a_layer_comes_again() -> None:
    policy = Lfu(LAYER_OF)
    for _ in range(16):
        policy.select(1, [key(1, 0)])
    assert policy.state()["hotness"][key(1, 0)] == 16
    policy.select(1, [key(1, 0)])
    assert policy.state()["hotness"][key(1, 0)] == 16 // 2 + 1


def test_reuse_keeps_what_is_used_more() -> None:
    policy = make_policy("reuse", LAYER_OF)
    for token in range(60):
        turn(policy, [0, 1 + token % 7])
    for layer in range(LAYERS):
        worth = policy.worth()[list(keys_of(layer))]
        assert int(worth.argmax()) == 0


def test_reuse_lets_the_layer_that_passed_go_before_the_one_that_comes() -> None:
    policy = make_policy("reuse", LAYER_OF)
    for _ in range(60):
        turn(policy, [0, 1])
    turn(policy, [0, 1], layers=[0])
    worth = policy.worth().tolist()
    assert worth[key(1, 0)] > worth[key(2, 0)] > worth[key(0, 0)]
    turn(policy, [0, 1], layers=[1])
    worth = policy.worth().tolist()
    assert worth[key(2, 0)] > worth[key(0, 0)] > worth[key(1, 0)]


def test_reuse_learns_that_what_was_just_used_is_not_needed_next() -> None:
    """Two sets take turns. Recency says keep the last one, and so say the first weights."""
    policy, sets = make_policy("reuse", LAYER_OF), ([0, 1], [2, 3])
    present = mask([key(2, expert) for expert in range(4)])
    for token in range(3):
        turn(policy, sets[token % 2])
    assert set(policy.victims(2, present, ())) == {key(2, expert) for expert in sets[1]}
    for token in range(3, 801):
        turn(policy, sets[token % 2])
    assert set(policy.victims(2, present, ())) == {key(2, expert) for expert in sets[0]}


def test_a_prefill_does_not_touch_what_reuse_knows_of_decoding() -> None:
    policy, twin, before = fed("reuse"), fed("reuse"), fed("reuse")
    for layer in range(LAYERS):
        policy.select(layer, list(keys_of(layer)), is_prefill=True)
        twin.select(layer, list(keys_of(layer)))
    assert policy.state() == before.state()
    assert twin.state() != before.state()
    # A turn has passed; weights learned since a layer was last looked at change little.
    assert torch.allclose(policy.worth() + 1.0, before.worth(), atol=0.05)
    assert not torch.allclose(twin.worth() + 1.0, before.worth(), atol=0.5)


def test_before_any_token_a_prefill_is_all_that_is_known() -> None:
    policy = make_policy("reuse", LAYER_OF)
    for layer in range(LAYERS):
        policy.select(layer, [key(layer, 3), key(layer, 6)], is_prefill=True)
    assert set(policy.hottest(6)) == {key(layer, e) for layer in range(LAYERS) for e in (3, 6)}
    turn(policy, [0, 1])
    turn(policy, [0, 1])
    assert set(policy.hottest(6)) == {key(layer, e) for layer in range(LAYERS) for e in (0, 1)}


def test_a_layer_that_is_left_out_does_not_seem_nearer_turn_by_turn() -> None:
    policy = make_policy("reuse", LAYER_OF)
    for _ in range(200):
        turn(policy, [0, 1])

    def lead() -> float:
        worth = policy.worth().tolist()
        return worth[key(2, 0)] - worth[key(1, 0)]

    turn(policy, [0, 1], layers=[0, 1])
    before = lead()
    for _ in range(50):
        turn(policy, [0, 1], layers=[0, 1])
    assert lead() == pytest.approx(before, abs=0.2)


def test_averages_of_reuse_do_not_fade_to_slow_numbers() -> None:
    policy = Reuse(LAYER_OF)
    for _ in range(1000):
        turn(policy, [0])
    smallest = min(share for average in policy.state()["averages"] for share in average)
    averages = torch.cat([habits.averages for habits in policy._layers.values()])
    assert smallest >= 0
    assert float(averages.min()) > torch.finfo(torch.float32).tiny
