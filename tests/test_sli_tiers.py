"""A `LayerCache` over several tiers, and over a store of several nodes: the same layers."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nexus_ext.cache import DiskTier, RemoteStore, Tier, TieredStore
from nexus_ext.cache.rates import Rate
from nexus_ext.errors import ConfigError, MissingExtra
from nexus_ext.sli import LayerCache

WIDTH = 64
KB = 1000
# A layer takes five pages of a disk: its header, and 17 KB of weights.
STORED_BYTES = 6 * 4096
NUM_LAYERS = 6
LINEAR = nn.Linear(WIDTH, WIDTH)

Make = Callable[..., LayerCache]


def layer(index: int) -> nn.Linear:
    """Always the same one."""
    made = nn.Linear(WIDTH, WIDTH)
    with torch.no_grad():
        made.weight.copy_(torch.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) * (index + 1))
        made.bias.fill_(index)
    return made


def is_right(found: nn.Module | None, index: int) -> bool:
    return found is not None and all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(found.parameters(), layer(index).parameters(), strict=True)
    )


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Opens caches without memory, so that every layer comes from a disk, or from far away."""
    made: list[LayerCache] = []

    def open_cache(*rooms: int, name: str = "node", **options: Any) -> LayerCache:
        """Tiers with room for so many layers each."""
        tiers = [
            Tier(tmp_path / name / f"tier{number}", room * STORED_BYTES, compress="off")
            for number, room in enumerate(rooms)
        ]
        settings: dict[str, Any] = {"tiers": tiers, "max_memory_cache_size_gb": 0} | options
        cache = LayerCache(**settings)
        cache.set_template("m", LINEAR)
        made.append(cache)
        return cache

    yield open_cache
    for cache in made:
        cache.close()


def fill(cache: LayerCache, count: int = NUM_LAYERS) -> None:
    for index in range(count):
        cache.cache_layer("m", index, layer(index))


def found_in(cache: LayerCache) -> list[int]:
    return [tier["hits"] for tier in cache.get_stats()["tiers"]]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/shared"


# -- tiers -----------------------------------------------------------------------------------------


def test_layers_go_down_for_want_of_room_and_come_from_there(make: Make) -> None:
    cache = make(2, 8)
    fill(cache)
    stats = cache.get_stats()
    assert (stats["demotions"], stats["evictions"]) == (4, 0)
    assert stats["moved_bytes"] == stats["demoted_bytes"] > 4 * WIDTH * WIDTH * 4
    assert all(is_right(cache.get_layer("m", index), index) for index in range(NUM_LAYERS))
    assert found_in(cache) == [2, 4]
    stats = cache.get_stats()
    assert (stats["hits"], stats["ssd_hits"], stats["misses"]) == (6, 6, 0)
    assert [tier["bytes"] > 0 for tier in stats["tiers"]] == [True, True]
    assert stats["ssd_bytes"] == sum(tier["bytes"] for tier in stats["tiers"])
    assert [Path(tier["folder"]) for tier in stats["tiers"]] == cache.folders
    assert all(tier["bytes_per_second"] > 0 for tier in stats["tiers"])
    assert cache.layers("m") == list(range(NUM_LAYERS))


def test_a_layer_that_is_used_again_moves_up(make: Make) -> None:
    cache = make(2, 8)
    fill(cache)
    for _ in range(3):
        assert is_right(cache.get_layer("m", 0), 0)
    stats = cache.get_stats()
    assert stats["promotions"] == 1
    assert stats["promoted_bytes"] + stats["demoted_bytes"] == stats["moved_bytes"]
    assert found_in(cache) == [1, 2]


def test_layers_are_found_again_by_another_cache_over_the_same_tiers(make: Make) -> None:
    cache = make(2, 8)
    fill(cache)
    cache.close()
    again = make(2, 8)
    assert all(is_right(again.get_layer("m", index), index) for index in range(NUM_LAYERS))


def test_memory_serves_what_lies_in_any_tier(make: Make) -> None:
    cache = make(2, 8, max_memory_cache_size_gb=0.1)
    fill(cache)
    read_before = cache.get_stats()["ssd_read_bytes"]
    assert all(is_right(cache.get_layer("m", index), index) for index in range(NUM_LAYERS))
    stats = cache.get_stats()
    assert (stats["memory_hits"], stats["ssd_hits"]) == (NUM_LAYERS, 0)
    assert stats["ssd_read_bytes"] == read_before


def test_what_the_last_tier_drops_is_gone(make: Make) -> None:
    cache = make(1, 2)
    fill(cache)
    found = [cache.get_layer("m", index) is not None for index in range(NUM_LAYERS)]
    assert sum(found) == 3
    assert (cache.get_stats()["evictions"], cache.get_stats()["misses"]) == (3, 3)


def test_a_damaged_layer_is_a_miss_and_can_be_cached_again(make: Make, tmp_path: Path) -> None:
    cache = make(8, 8)
    fill(cache, 1)
    (path,) = (tmp_path / "node").rglob("*.nx")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    assert cache.get_layer("m", 0) is None
    stats = cache.get_stats()
    assert (stats["ssd_corruptions"], stats["misses"]) == (1, 1)
    fill(cache, 1)
    assert is_right(cache.get_layer("m", 0), 0)


def test_layers_are_compressed_where_that_is_read_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    level = sys.modules["nexus_ext.cache.level"]
    monkeypatch.setattr(level, "rate_of", lambda *_: Rate(1e3, 0.0, "direct"))
    with LayerCache(tiers=[Tier(tmp_path, "1MiB")], max_memory_cache_size_gb=0) as cache:
        fill(cache)
        (tier,) = cache.get_stats()["tiers"]
        assert "which is less" in tier["compression"]
        assert tier["bytes"] < NUM_LAYERS * STORED_BYTES
        assert all(is_right(cache.get_layer("m", index), index) for index in range(NUM_LAYERS))
    # A cache that does not know about it must not take the packed bytes for a layer.
    with LayerCache(tmp_path, max_memory_cache_size_gb=0) as plain:
        plain.set_template("m", LINEAR)
        assert plain.get_layer("m", 0) is None
        fill(plain, 1)
        assert is_right(plain.get_layer("m", 0), 0)


def test_a_preset_takes_tiers(tmp_path: Path) -> None:
    tiers = [Tier(tmp_path / "nvme", "1MiB"), Tier(tmp_path / "hdd", "1MiB")]
    with LayerCache.preset("high-performance", tiers=tiers) as cache:
        assert isinstance(cache.disk, TieredStore)
        assert cache.ram.max_bytes == 8 * 10**9
        assert cache.folders == [tmp_path / "nvme", tmp_path / "hdd"]


def test_threads_over_tiers_that_move_get_right_layers(make: Make, url: str) -> None:
    """Little room above, so that every use moves something; and some layers forgotten meanwhile."""
    cache = make(2, 3, remote=url, publish=True, max_memory_cache_size_gb=0.1)
    fill(cache)
    wrong: list[int] = []

    def ask(start: int) -> None:
        for step in range(40):
            index = (start + step * (start + 1)) % NUM_LAYERS
            if step % 5 == start:
                cache.ram.clear()
            if step % 7 == start:
                cache.evict("m", index)
            if not is_right(cache.get_layer("m", index), index):
                wrong.append(index)

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = cache.get_stats()
    assert wrong == []
    assert (stats["misses"], stats["ssd_corruptions"], stats["remote_refused"]) == (0, 0, 0)
    assert stats["promotions"] > 0
    assert stats["remote_hits"] > 0


# -- a store of several nodes ----------------------------------------------------------------------


def test_what_one_node_publishes_another_one_gets(make: Make, url: str) -> None:
    first = make(8, name="a", remote=url, publish=True)
    fill(first)
    assert first.get_stats()["published_bytes"] > 0
    second = make(8, name="b", remote=RemoteStore(url))
    assert all(is_right(second.get_layer("m", index), index) for index in range(NUM_LAYERS))
    stats = second.get_stats()
    assert (stats["remote_hits"], stats["hits"], stats["misses"]) == (NUM_LAYERS, 0, 0)
    assert stats["remote_bytes"] == first.get_stats()["published_bytes"]
    assert stats["remote_avg_latency_ms"] > 0
    # From now on they are here.
    assert all(is_right(second.get_layer("m", index), index) for index in range(NUM_LAYERS))
    again = second.get_stats()
    assert (again["remote_bytes"], again["ssd_hits"]) == (stats["remote_bytes"], NUM_LAYERS)
    assert again["hit_ratio"] == 0.5


def test_one_folder_may_have_a_remote_store_behind_it(tmp_path: Path, url: str) -> None:
    with LayerCache(tmp_path / "a", remote=url, publish=True) as first:
        fill(first)
    with LayerCache(tmp_path / "b", 1.0, 0.1, remote=url) as second:
        second.set_template("m", LINEAR)
        for tier in ("remote_hits", "memory_hits"):
            assert all(is_right(second.get_layer("m", index), index) for index in range(NUM_LAYERS))
            assert second.get_stats()[tier] == NUM_LAYERS
    # And without it what came from there is here.
    with LayerCache(tmp_path / "b", 1.0, 0) as alone:
        alone.set_template("m", LINEAR)
        assert isinstance(alone.disk, DiskTier)
        assert all(is_right(alone.get_layer("m", index), index) for index in range(NUM_LAYERS))


def test_without_publish_nothing_leaves_the_node(make: Make, url: str, tmp_path: Path) -> None:
    fill(make(8, remote=url))
    assert not list((tmp_path / "shared").rglob("*"))


def test_a_layer_that_was_damaged_here_comes_from_the_store(
    make: Make, url: str, tmp_path: Path
) -> None:
    cache = make(8, remote=url, publish=True)
    fill(cache, 1)
    (path,) = (tmp_path / "node").rglob("*.nx")
    path.write_bytes(path.read_bytes()[:-1])
    assert is_right(cache.get_layer("m", 0), 0)
    stats = cache.get_stats()
    assert (stats["ssd_corruptions"], stats["remote_hits"], stats["misses"]) == (1, 1, 0)


def test_a_damaged_object_is_a_miss_and_counted(make: Make, url: str, tmp_path: Path) -> None:
    fill(make(8, name="a", remote=url, publish=True), 1)
    (path,) = (path for path in (tmp_path / "shared/blobs").rglob("*") if path.is_file())
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    second = make(8, name="b", remote=url)
    assert second.get_layer("m", 0) is None
    assert second.get_stats()["remote_refused"] == 1
    assert second.layers("m") == []


def test_a_store_that_cannot_be_reached_is_a_miss(make: Make, tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("no folder")
    cache = make(8, remote=f"file://{tmp_path}/shared/deep", publish=True)
    assert cache.get_layer("m", 0) is None
    fill(cache, 1)
    assert is_right(cache.get_layer("m", 0), 0)
    assert cache.get_stats()["remote_error"] != ""


def test_what_no_tier_takes_still_comes_from_the_store(make: Make, url: str) -> None:
    fill(make(8, name="a", remote=url, publish=True), 2)
    small = make(0, name="b", remote=url, max_memory_cache_size_gb=0.1)
    for _ in range(2):
        assert is_right(small.get_layer("m", 1), 1)
    assert small.get_stats()["remote_hits"] == 2
    assert small.layers("m") == []


def test_a_layer_that_no_disk_took_is_not_replaced_by_an_older_one_of_the_store(
    make: Make, url: str
) -> None:
    fill(make(8, name="a", remote=url, publish=True), 1)
    cache = make(0, name="b", remote=url)
    cache.cache_layer("m", 0, layer(5))
    assert cache.get_layer("m", 0) is None
    cache = make(0, name="b", remote=url, publish=True)
    cache.cache_layer("m", 0, layer(5))
    assert is_right(cache.get_layer("m", 0), 5)


def test_a_layer_that_is_forgotten_here_is_still_in_the_store(make: Make, url: str) -> None:
    cache = make(8, remote=url, publish=True)
    fill(cache, 2)
    assert cache.evict("m", 0)
    assert not cache.evict("m", 0)
    assert cache.layers("m") == [1]
    assert cache.get_stats()["remote_bytes"] == 0  # forgetting fetches nothing
    assert is_right(cache.get_layer("m", 0), 0)
    cache.clear()
    assert cache.layers("m") == []
    assert is_right(cache.get_layer("m", 1), 1)


# -- counters that outlive the process -------------------------------------------------------------


def test_counters_of_several_tiers_are_kept_with_the_first(make: Make, tmp_path: Path) -> None:
    cache = make(2, 8)
    cache.count("prefetched", 3)
    cache.close()
    for number, wanted in enumerate((3, 0)):
        with DiskTier(tmp_path / f"node/tier{number}", "1GiB") as tier:
            assert tier.totals()["prefetched"] == wanted


# -- options that exclude each other ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tiers": []}, "one Tier or more"),
        ({"tiers": [Tier("a", 1)], "cache_dir": "b"}, "Leave it out"),
        ({"tiers": [Tier("a", 1), Tier("a", 1)]}, "folder of its own"),
        ({"tiers": [Tier("a", 1)], "admission": "second-touch"}, "one disk tier"),
        ({"tiers": [Tier("a", 1)], "write_budget_gb_per_day": 1}, "write budget of its own"),
        ({"remote": "memory://x", "admission": "second-touch"}, "one disk tier"),
        ({"remote": "memory://x", "max_cache_size_gb": 0}, "Allow it some room"),
        ({"remote": "memory://x", "cache_dir": ["a", "b"]}, "needs tiers"),
        ({"publish": True}, "pass remote"),
        ({"remote": "no-such-protocol://x"}, "URL that fsspec knows"),
    ],
)
def test_what_cannot_be_asked_for_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        LayerCache(**options)
    assert list(tmp_path.iterdir()) == []


def test_a_driver_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(MissingExtra, match="pip install fsspec"):
        LayerCache(remote="file:///nowhere")
