"""The order in which layers are asked for is learnt, and what is fetched ahead follows it."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nexus_ext.demo import make_llama
from nexus_ext.sli import ComputeIOOverlap, IOOptimizer, LayerCache
from nexus_ext.sli.order import Order
from nexus_ext.sli.prefetch import Prefetcher
from tests.conftest import PATIENCE_SECONDS

NUM_LAYERS = 8
NUM_PASSES = 6
FORWARD = list(range(NUM_LAYERS))
# Passes over layers, none of which says i + 1 where it matters.
IRREGULAR = {
    "jumping": [0, 4, 2, 6],
    "reversed": FORWARD[::-1],
    "skipping": [0, 2, 4, 6],
    "each one twice": [0, 0, 2, 2, 4, 4, 6, 6],
    "with detours": [6, 2, 0, 6, 4, 0, 2, 0],
}

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


# -- what comes next -------------------------------------------------------------------------------


def surprises(order: Order, requests: Sequence[int], total: int = NUM_LAYERS) -> int:
    """How many requests were not the first guess after the one before."""
    count, guess = 0, None
    for index in requests:
        count += guess is not None and guess != [index]
        order.visit(index)
        guess = order.predict(1, total)[0]
    return count


def test_before_anything_is_known_the_next_numbers_come_next() -> None:
    order = Order()
    order.visit(2)
    assert order.predict(3, NUM_LAYERS) == ([3, 4, 5], False)
    assert order.predict(3, 4) == ([3], False)
    order.visit(3)
    assert order.predict(3, 4) == ([], False)


@pytest.mark.parametrize("name", IRREGULAR)
def test_an_order_is_known_after_its_first_passes(name: str) -> None:
    order = Order()
    assert surprises(order, 2 * IRREGULAR[name]) > 0
    assert surprises(order, NUM_PASSES * IRREGULAR[name]) == 0


def test_a_new_order_is_known_after_its_first_passes() -> None:
    order = Order()
    surprises(order, 3 * FORWARD)
    assert surprises(order, 2 * FORWARD[::-1]) > 0
    assert surprises(order, 3 * FORWARD[::-1]) == 0


def test_several_are_guessed_the_most_urgent_first() -> None:
    order = Order()
    surprises(order, 2 * [0, 4, 2, 6] + [0])
    assert order.predict(3, NUM_LAYERS) == ([4, 2, 6], True)
    assert order.predict(8, NUM_LAYERS) == ([4, 2, 6], True)  # each of them once
    assert order.predict(3, 5) == ([4, 2], True)  # no layer that the model has not


def test_the_layer_in_use_is_guessed_where_it_comes_again_at_once() -> None:
    order = Order()
    surprises(order, 2 * [0, 0, 1, 1] + [0])
    assert order.predict(2, NUM_LAYERS) == ([0, 1], True)
    order.visit(0)
    assert order.predict(2, NUM_LAYERS) == ([1], True)


def test_what_is_remembered_is_bounded_and_stays_right() -> None:
    order = Order()
    assert surprises(order, 1000 * IRREGULAR["with detours"]) < 3 * NUM_LAYERS
    assert len(order._history) <= 1024
    assert surprises(order, 10 * IRREGULAR["with detours"]) == 0


def test_the_same_requests_give_the_same_guesses() -> None:
    draw = random.Random(5)
    requests = [draw.randrange(NUM_LAYERS) for _ in range(3000)]
    first, second = Order(), Order()
    for index in requests:
        first.visit(index)
        second.visit(index)
        assert first.predict(3, NUM_LAYERS) == second.predict(3, NUM_LAYERS)


# -- fetched ahead ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    path = folder / "llama"
    make_llama(path, num_blocks=NUM_LAYERS, hidden=64, intermediate=96, vocabulary=64)
    return path


@pytest.fixture
def no_memory(tmp_path: Path) -> Iterator[LayerCache]:
    """A cache that keeps nothing: a hit is a layer that was fetched ahead."""
    with LayerCache(tmp_path / "none", 0, 0) as made:
        yield made


def until(is_true: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(100 * PATIENCE_SECONDS):
        if is_true():
            return
        tick.wait(0.01)
    raise AssertionError("it did not happen")


def ask(prefetcher: Prefetcher, model: Path, requests: Sequence[int]) -> dict[str, Any]:
    """What these requests add to the counters; each waits until nothing is on its way."""
    before = prefetcher.stats()
    for index in requests:
        layer = prefetcher.get(model, index, NUM_LAYERS)
        assert isinstance(layer, nn.Module)
        until(lambda: prefetcher.stats()["queue_depth"] == 0)
    return {name: value - before[name] for name, value in prefetcher.stats().items()}


@pytest.mark.parametrize("name", IRREGULAR)
def test_a_learnt_order_gives_hits_where_the_next_number_gives_none(
    no_memory: LayerCache, llama: Path, name: str
) -> None:
    requests = IRREGULAR[name]
    with Prefetcher(no_memory, lookahead=1, learns_order=False) as prefetcher:
        plain = ask(prefetcher, llama, NUM_PASSES * requests)
    assert (plain["prefetch_used"], plain["cache_hits"], plain["learnt_issued"]) == (0, 0, 0)
    assert plain["prefetch_issued"] > 0
    with Prefetcher(no_memory, lookahead=1) as prefetcher:
        ask(prefetcher, llama, 2 * requests)
        learnt = ask(prefetcher, llama, NUM_PASSES * requests)
    # Every request is served by what was fetched ahead, and nothing else is fetched.
    asked = NUM_PASSES * len(requests)
    assert learnt["total_requests"] == learnt["cache_hits"] == learnt["prefetch_used"] == asked
    assert learnt["learnt_used"] == learnt["learnt_issued"] == asked
    assert learnt["prefetch_dropped"] == 0


def test_a_plain_loop_wraps_around(no_memory: LayerCache, llama: Path) -> None:
    with Prefetcher(no_memory, lookahead=2) as prefetcher:
        first = ask(prefetcher, llama, FORWARD)
        assert (first["learnt_issued"], first["prefetch_used"]) == (0, NUM_LAYERS - 1)
        ask(prefetcher, llama, FORWARD)
        third = ask(prefetcher, llama, FORWARD)
        assert third["prefetch_used"] == NUM_LAYERS  # the first layer, too
        assert prefetcher.stats()["prefetch_hit_rate"] == 1.0


def test_models_have_orders_of_their_own(
    no_memory: LayerCache, llama: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    make_llama(other, num_blocks=NUM_LAYERS, hidden=64, intermediate=96, vocabulary=64)
    with Prefetcher(no_memory, lookahead=1) as prefetcher:
        for _ in range(3):
            one = ask(prefetcher, llama, IRREGULAR["jumping"])
            two = ask(prefetcher, other, IRREGULAR["reversed"])
        # But for the first ones: the turn of the other model took their place.
        assert (one["prefetch_used"], two["prefetch_used"]) == (3, NUM_LAYERS - 1)


def test_an_optimizer_learns_unless_it_is_told_not_to(no_memory: LayerCache, llama: Path) -> None:
    for learns in (True, False):
        with IOOptimizer(no_memory, prefetch_lookahead=1, learn_order=learns) as optimizer:
            ask(optimizer.prefetcher, llama, 3 * IRREGULAR["jumping"])
            counts = optimizer.get_stats()["prefetcher"]
            assert (counts["learnt_used"] > 0) == (counts["prefetch_used"] > 0) == learns


def test_a_pipeline_that_runs_again_finds_its_beginning(no_memory: LayerCache, llama: Path) -> None:
    with IOOptimizer(no_memory) as optimizer:
        overlap = ComputeIOOverlap(optimizer, pipeline_depth=2)
        for _ in range(3):
            overlap.start_pipeline(llama)
            weights = []
            while (layer := overlap.get_next_layer(llama)) is not None:
                weights.append(layer.get_parameter("mlp.up_proj.weight"))
                until(lambda: optimizer.prefetcher.stats()["queue_depth"] == 0)
            assert len(weights) == NUM_LAYERS
            assert not torch.equal(weights[0], weights[1])
        counts = optimizer.get_stats()["prefetcher"]
        # All layers of all runs; after the last run the first two wait for another one.
        assert counts["from_source"] == counts["total_requests"] == 3 * NUM_LAYERS
        assert counts["prefetch_issued"] <= 3 * NUM_LAYERS + 2


# -- what outlives the process ---------------------------------------------------------------------


def test_what_was_fetched_ahead_is_counted_for_good(tmp_path: Path, llama: Path) -> None:
    for _ in range(2):
        with LayerCache(tmp_path) as cache, IOOptimizer(cache, prefetch_lookahead=1) as optimizer:
            ask(optimizer.prefetcher, llama, FORWARD)
    with LayerCache(tmp_path) as cache:
        assert cache.disk is not None
        totals = cache.disk.totals()  # type: ignore[union-attr]
    assert totals["prefetched"] == totals["prefetch_used"] == 2 * (NUM_LAYERS - 1)
    assert totals["queue_looks"] == 2 * NUM_LAYERS
    assert 0 <= totals["queue_depths"] <= 2 * NUM_LAYERS


def test_who_fetches_nothing_ahead_counts_nothing(tmp_path: Path, llama: Path) -> None:
    with LayerCache(tmp_path) as cache, IOOptimizer(cache, enable_prefetch=False) as optimizer:
        ask(optimizer.prefetcher, llama, FORWARD)
        totals = cache.disk.totals()  # type: ignore[union-attr]
    assert {totals[name] for name in ("prefetched", "queue_looks", "queue_depths")} == {0}
