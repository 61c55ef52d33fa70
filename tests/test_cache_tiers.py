"""Several tiers: what moves when, what nobody loses, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_bench import PAGE, UNIT, fill, layer, tiered_stores, where

from nexus_ext.cache import DiskTier, Tier, TieredStore
from nexus_ext.errors import ConfigError, EngineClosed, ReadError

store = pytest.fixture(tiered_stores)


# -- up and down -----------------------------------------------------------------------------------


def test_what_has_no_room_goes_down_and_is_not_lost(store: Callable[..., TieredStore]) -> None:
    one = store(2, 2, 4)
    fill(one, 6)
    assert where(one) == {
        "layer/0": "hdd",
        "layer/1": "hdd",
        "layer/2": "ssd",
        "layer/3": "ssd",
        "layer/4": "nvme",
        "layer/5": "nvme",
    }
    for index in range(6):
        loaded = one.load(f"layer/{index}")
        assert loaded is not None
        assert torch.equal(loaded, layer(index))
    stats = one.stats()
    assert (stats.demotions, stats.demoted_bytes, stats.dropped) == (6, 6 * PAGE, 0)
    assert [tier.hits for tier in stats.tiers] == [2, 2, 2]
    assert (stats.entries, stats.hits, stats.misses) == (6, 6, 0)


def test_what_has_no_room_anywhere_is_dropped(store: Callable[..., TieredStore]) -> None:
    one = store(1, 1)
    fill(one, 3)
    assert where(one) == {"layer/1": "ssd", "layer/2": "nvme"}
    assert one.load("layer/0") is None
    assert (one.stats().demotions, one.stats().dropped, one.stats().misses) == (2, 1, 1)


def test_what_is_too_large_for_the_tier_below_is_dropped(
    store: Callable[..., TieredStore],
) -> None:
    one = store(4, 1)
    assert one.put("large", [layer(1, 3 * PAGE)]) is not None  # takes four pages
    assert one.put("larger", [layer(2, 7 * PAGE)]) is not None  # takes eight
    assert where(one) == {"larger": "nvme"}
    assert (one.stats().demotions, one.stats().dropped) == (0, 1)


@pytest.mark.parametrize("use", ["get", "load"])
def test_the_second_use_moves_an_entry_up(store: Callable[..., TieredStore], use: str) -> None:
    one = store(1, 4)
    fill(one, 2)
    assert where(one) == {"layer/0": "ssd", "layer/1": "nvme"}
    getattr(one, use)("layer/0")
    assert where(one)["layer/0"] == "ssd"
    getattr(one, use)("layer/0")
    assert where(one) == {"layer/0": "nvme", "layer/1": "ssd"}
    loaded = one.load("layer/0")
    assert loaded is not None
    assert torch.equal(loaded, layer(0))
    stats = one.stats()
    assert (stats.promotions, stats.promoted_bytes) == (1, PAGE)
    # layer/0 once when it was put over, and layer/1 when layer/0 came back.
    assert (stats.demotions, stats.demoted_bytes, stats.dropped) == (2, 2 * PAGE, 0)
    assert [tier.hits for tier in stats.tiers] == [1, 2]


def test_a_use_in_another_process_counts_as_the_first(store: Callable[..., TieredStore]) -> None:
    with store(1, 4) as first:
        fill(first, 2)
        first.get("layer/0")
    second = store(1, 4)
    entry = second.get("layer/0")
    assert entry is not None
    assert entry.folder.name == "nvme"
    assert torch.equal(second.read(entry), layer(0))


def test_an_entry_can_be_read_wherever_it_went(store: Callable[..., TieredStore]) -> None:
    one = store(1, 4)
    entry = one.put("layer/0", [layer(0)])
    assert entry is not None
    one.put("layer/1", [layer(1)])
    assert where(one)["layer/0"] == "ssd"
    assert torch.equal(one.read(entry), layer(0))
    one.evict("layer/0")
    with pytest.raises(ReadError, match="evicted"):
        one.read(entry)


def test_what_is_held_moves_nowhere(store: Callable[..., TieredStore]) -> None:
    one = store(2, 4)
    fill(one, 3)
    with one.hold("layer/1") as up, one.hold("layer/0") as down:
        assert up is not None
        assert down is not None
        one.put("layer/3", [layer(3)])
        one.load("layer/0")
        one.load("layer/0")
        assert where(one)["layer/1"] == "nvme"
        assert where(one)["layer/0"] == "ssd"
        assert torch.equal(one.read(up), layer(1))
    with one.hold("nothing") as nothing:
        assert nothing is None


def test_one_blob_with_two_keys_moves_with_both(store: Callable[..., TieredStore]) -> None:
    one = store(1, 4)
    one.put("tied/a", [layer(7)], about={"name": "a"})
    one.put("tied/b", [layer(7)], about={"name": "b"})
    one.put("other", [layer(8)])
    assert where(one) == {"tied/a": "ssd", "tied/b": "ssd", "other": "nvme"}
    one.get("tied/a")
    entry = one.get("tied/a")
    assert entry is not None
    assert entry.about == {"name": "a"}
    assert where(one) == {"tied/a": "nvme", "tied/b": "nvme", "other": "ssd"}


def test_a_key_has_one_value_wherever_it_lies(store: Callable[..., TieredStore]) -> None:
    one = store(1, 4)
    fill(one, 2)
    assert where(one)["layer/0"] == "ssd"
    one.put("layer/0", [layer(99)])
    loaded = one.load("layer/0")
    assert loaded is not None
    assert torch.equal(loaded, layer(99))
    assert [entry.key for entry in one.entries()].count("layer/0") == 1


def test_what_the_first_tier_refuses_the_next_takes(tmp_path: Path) -> None:
    tiers = [
        Tier(tmp_path / "nvme", "1GiB", write_budget_bytes_per_day=UNIT),
        Tier(tmp_path / "hdd", "1GiB"),
    ]
    with TieredStore(tiers) as one:
        fill(one, 3)
        assert where(one) == {"layer/0": "nvme", "layer/1": "hdd", "layer/2": "hdd"}


def test_a_smaller_budget_hands_down_when_the_store_is_opened(
    store: Callable[..., TieredStore],
) -> None:
    with store(4, 8) as one:
        fill(one, 4)
    two = store(1, 8)
    assert sorted(where(two).values()) == ["nvme", "ssd", "ssd", "ssd"]
    assert two.stats().demotions == 3


# -- rates -----------------------------------------------------------------------------------------


def test_rates_are_measured_kept_and_measured_again_when_old(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    with store(1, 1) as one:
        rates = [tier.rate for tier in one.stats().tiers]
    assert all(rate is not None and rate.bytes_per_second > 0 for rate in rates)
    assert list(tmp_path.rglob("*.nx")) == []
    assert [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"] == []
    with store(1, 1) as two:
        assert [tier.rate for tier in two.stats().tiers] == rates
    with store(1, 1, max_rate_age_seconds=0) as three:
        assert all(
            new.rate is not None
            and old is not None
            and new.rate.measured_seconds > old.measured_seconds
            for new, old in zip(three.stats().tiers, rates, strict=True)
        )


@pytest.mark.parametrize("damage", ["", "{", "[1]", '{"bytes_per_second": 1e12}'])
def test_a_damaged_rate_is_measured_anew(
    store: Callable[..., TieredStore], tmp_path: Path, damage: str
) -> None:
    store(1).close()
    kept = tmp_path / "node" / "nvme" / "rate.json"
    kept.write_text(damage)
    with store(1) as one:
        rate = one.stats().tiers[0].rate
    assert rate is not None
    assert rate.bytes_per_second != 1e12
    assert json.loads(kept.read_text())["bytes_per_second"] == rate.bytes_per_second


def test_the_order_is_compared_with_the_rates(
    store: Callable[..., TieredStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = store(1, 1)
    rate = one._levels.all[0].rate
    assert rate is not None
    for first, second, is_ordered in [(2e9, 1e8, True), (1e9, 1.1e9, True), (1e8, 2e9, False)]:
        for level, value in zip(one._levels.all, (first, second), strict=True):
            monkeypatch.setattr(level, "rate", type(rate)(value, 0.0, "direct"))
        assert one.stats().is_ordered is is_ordered


# -- the rest of the face --------------------------------------------------------------------------


def test_clear_verify_and_close(store: Callable[..., TieredStore]) -> None:
    one = store(1, 1, 2)
    fill(one, 4)
    report = one.verify()
    assert (report.num_blobs, report.nbytes, report.bad) == (4, 4 * PAGE, ())
    assert one.evict("layer/0")
    assert not one.evict("layer/0")
    assert one.clear() == 3
    assert one.entries() == []
    one.close()
    one.close()
    with pytest.raises(EngineClosed):
        one.get("layer/0")


def test_a_store_wants_folders_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="got none"):
        TieredStore([])
    with pytest.raises(ConfigError, match="a folder of its own"):
        TieredStore([Tier(tmp_path / "a", 1), Tier(tmp_path / "b" / ".." / "a", 1)])
    with pytest.raises(ConfigError, match="compress"):
        TieredStore([Tier(tmp_path / "a", 1, compress="yes")])  # type: ignore[arg-type]
    with (
        TieredStore([Tier(tmp_path / "a", 1)]) as one,
        pytest.raises(ConfigError, match="under another name"),
    ):
        one.put("key", [layer(0)], about={"nexus.zstd": {}})
    with (
        DiskTier(tmp_path / "other", "1MiB") as other,
        TieredStore([Tier(tmp_path / "a", 1)]) as one,
    ):
        entry = other.put("key", [layer(0)])
        assert entry is not None
        with pytest.raises(ConfigError, match="has its folder"):
            one.read(entry)
