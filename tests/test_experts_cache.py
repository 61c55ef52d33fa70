"""The accounts of expert slots, against a store that lands in any order, fails, and checks."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest

from nexus_ext.errors import ReadError
from nexus_ext.experts.cache import ExpertCache
from nexus_ext.experts.policy import make_policy


class LooseStore:
    """Loads land when it pleases; every rule of the native store is asserted."""

    def __init__(self, class_of: list[int], slots: list[int], seed: int) -> None:
        self.class_of = class_of
        self.slots_of = []
        end = 0
        for count in slots:
            self.slots_of.append(range(end, end + count))
            end += count
        self.random = random.Random(seed)
        self.in_slot: dict[int, int] = {}  # slot to key
        self.landed: set[int] = set()
        self.fails: set[int] = set()
        self.num_loads: dict[int, int] = {}
        self.most_present = 0

    def place(self, keys: Sequence[int], slots: Sequence[int], *, ahead: bool = False) -> None:
        for key, slot in zip(keys, slots, strict=True):
            assert slot in self.slots_of[self.class_of[key]]
            assert key not in self.in_slot.values(), "it has a slot already"
            before = self.in_slot.pop(slot, None)
            self.landed.discard(-1 if before is None else before)
            self.in_slot[slot] = key
            self.num_loads[key] = self.num_loads.get(key, 0) + 1
        self.most_present = max(self.most_present, len(self.in_slot))

    def collect(self, keys: Sequence[int], *, at_least: int) -> list[int]:
        assert set(keys) <= set(self.in_slot.values()), "collected without a slot"
        assert at_least <= len(keys), "would wait for ever"
        open_ = [key for key in keys if key not in self.landed]
        need = at_least - (len(keys) - len(open_))
        count = max(need, self.random.randint(0, len(open_)))
        for key in self.random.sample(open_, count):
            if key in self.fails:
                self.fails.discard(key)
                raise ReadError(f"no bytes for {key}")
            self.landed.add(key)
        return [key for key in keys if key in self.landed]

    def evict(self, keys: Collection[int]) -> None:
        for slot, key in list(self.in_slot.items()):
            if key in keys:
                del self.in_slot[slot]
                self.landed.discard(key)


class Rig:
    def __init__(
        self,
        *,
        layers: int = 3,
        experts: int = 8,
        slots: Sequence[int] = (8,),
        passing: Sequence[int] = (2,),
        policy: str = "lru",
        seed: int = 0,
    ) -> None:
        self.layers = [range(n * experts, (n + 1) * experts) for n in range(layers)]
        num_keys = layers * experts
        self.store = LooseStore([n % len(slots) for n in range(num_keys)], list(slots), seed)
        layer_of = [n // experts for n in range(num_keys)]
        self.cache = ExpertCache(
            self.store, make_policy(policy, layer_of), self.layers, list(passing)
        )
        self.num_passing = sum(passing)

    def run(self, layer: int, experts: Sequence[int], *, is_prefill: bool = False) -> list[int]:
        keys = [self.layers[layer].start + expert for expert in experts]
        seen: list[int] = []

        def compute(landed: Sequence[int]) -> None:
            for key in landed:
                assert key in self.store.landed
                assert self.store.in_slot[self.cache.slot_of[key]] == key
                seen.append(key)

        self.cache.run(layer, keys, compute, is_prefill=is_prefill)
        assert sorted(seen) == sorted(keys), "each once"
        self.check()
        return seen

    def check(self) -> None:
        """What holds between runs."""
        there = {key: slot for key, slot in enumerate(self.cache.slot_of) if slot >= 0}
        assert {slot: key for key, slot in there.items()} == self.store.in_slot
        for index, one in enumerate(self.cache._classes):
            slots = self.store.slots_of[index]
            assert sorted([*one.free, *(s for s in there.values() if s in slots)]) == [*slots]
            assert one.num_over <= one.num_passing // 2
            of_class = [k for k in there if self.store.class_of[k] == index]
            assert one.present.nonzero().flatten().tolist() == sorted(of_class)
            assert one.num_guesses == len(self.cache._ahead.intersection(of_class))


@pytest.mark.parametrize("policy", ["lru", "lfu", "reuse"])
@pytest.mark.parametrize("slots", [(2,), (3,), (9,), (24,), (2, 2), (6, 3)])
def test_any_sequence_computes_every_expert_once_where_it_lies(
    policy: str, slots: tuple[int, ...]
) -> None:
    for seed in range(12):
        rig = Rig(slots=slots, passing=[2] * len(slots), policy=policy, seed=seed)
        for step in range(60):
            layer = step % 3
            count = rig.store.random.randint(1, 8)
            experts = sorted(rig.store.random.sample(range(8), count))
            rig.run(layer, experts, is_prefill=rig.store.random.random() < 0.3)
            if rig.store.random.random() < 0.5:
                keys = list(rig.layers[(layer + 1) % 3])
                rig.store.random.shuffle(keys)
                rig.cache.fetch_ahead(keys, rig.store.random.randint(0, 3))
                rig.check()
        counts = rig.cache.counts
        assert counts.num_runs + counts.num_prefill_runs == 60


def test_what_was_used_is_found_again() -> None:
    rig = Rig(slots=(8,), passing=(2,))
    rig.run(0, [1, 2, 3])
    loads = dict(rig.store.num_loads)
    rig.run(0, [1, 2, 3])
    assert rig.store.num_loads == loads
    assert (rig.cache.counts.num_hits, rig.cache.counts.num_misses) == (3, 3)


def test_the_selection_is_never_evicted_for_itself() -> None:
    """Six experts through three slots: waves, each expert read once."""
    rig = Rig(slots=(3,), passing=(2,))
    rig.run(0, [0, 1, 2, 3, 4, 5])
    assert set(rig.store.num_loads.values()) == {1}
    assert rig.cache.counts.num_waves > 0


def test_a_prefill_leaves_the_decode_set_alone() -> None:
    rig = Rig(slots=(8,), passing=(2,))
    for _ in range(3):
        for layer in range(3):
            rig.run(layer, [0, 1])
    decode_set = [key for key, slot in enumerate(rig.cache.slot_of) if slot >= 0]
    assert len(decode_set) == 6
    rig.store.num_loads.clear()
    for layer in range(3):
        rig.run(layer, range(8), is_prefill=True)
    assert [key for key, slot in enumerate(rig.cache.slot_of) if slot >= 0] == decode_set
    assert set(rig.store.num_loads.values()) == {1}, "every expert is read once in a prefill"
    assert len(rig.store.num_loads) == 24 - 6
    counts = rig.cache.counts
    assert counts.num_ahead_used > 0, "the next layer's were read while one computed"
    assert counts.num_prefill_hits + counts.num_prefill_joined == 6 + counts.num_ahead_used
    assert counts.num_evicted == 0


def test_a_prefill_fills_what_is_empty() -> None:
    rig = Rig(slots=(8,), passing=(2,))
    rig.run(0, range(8), is_prefill=True)
    assert sum(rig.cache.slot_of[key] >= 0 for key in rig.layers[0]) == 6
    assert rig.cache.num_present == 8  # the others are the next layer's, on their way


def test_a_guess_costs_nobody_his_place() -> None:
    rig = Rig(slots=(6,), passing=(2,))
    rig.run(0, [0, 1, 2, 3])
    assert rig.cache.fetch_ahead(list(rig.layers[1]), 5) == [8, 9]
    assert all(rig.cache.slot_of[key] >= 0 for key in (0, 1, 2, 3))
    rig.run(1, [0, 5])
    assert rig.cache.counts.num_ahead == 2
    assert rig.cache.counts.num_ahead_used == 1
    assert rig.cache.counts.num_ahead_wasted == 1
    assert 9 not in rig.cache._ahead


def test_guesses_yield_to_those_who_are_asked_for() -> None:
    rig = Rig(slots=(4,), passing=(2,))
    rig.run(0, [0, 1])
    assert len(rig.cache.fetch_ahead(list(rig.layers[2]), 5)) == 2
    rig.run(1, [0, 1, 2, 3])  # needs every slot
    assert rig.cache.counts.num_ahead_wasted == 2


def test_what_is_on_its_way_is_joined() -> None:
    rig = Rig(slots=(6,), passing=(2,), seed=3)
    joined = 0
    for _ in range(20):
        rig.cache.clear()
        rig.cache.fetch_ahead([0, 1], 2)
        rig.run(0, [0, 1])
        joined = rig.cache.counts.num_joined
    assert joined > 0
    assert rig.cache.counts.num_misses == 0
    assert rig.cache.counts.num_hits + joined == 40


def test_preloading_fills_what_may_stay_and_no_more() -> None:
    rig = Rig(slots=(8,), passing=(2,))
    assert rig.cache.preload([5, 3, 9, 1, 2, 4, 6, 7]) == [5, 3, 9, 1, 2, 4]
    rig.cache.wait()
    rig.check()
    rig.run(0, [3, 5])
    assert rig.cache.counts.num_hits == 2


@pytest.mark.parametrize("is_prefill", [False, True])
def test_a_failed_load_is_an_error_and_the_next_run_is_right(is_prefill: bool) -> None:
    for seed in range(30):
        rig = Rig(slots=(4,), passing=(2,), seed=seed)
        rig.run(0, [6, 7])
        rig.store.fails = {2}
        with pytest.raises(ReadError, match="no bytes for 2"):
            rig.run(0, [0, 1, 2, 3, 4, 7], is_prefill=is_prefill)
        rig.check()
        rig.run(0, [0, 1, 2, 3, 4, 7], is_prefill=is_prefill)
        assert rig.cache.counts.num_failed == 1


def test_an_error_of_the_computation_leaves_the_accounts_right() -> None:
    rig = Rig(slots=(4,), passing=(2,))

    def compute(landed: Sequence[int]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.cache.run(0, [0, 1, 2, 3, 4], compute)
    rig.check()
    rig.run(0, [0, 1, 2, 3, 4])
