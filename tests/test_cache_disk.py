"""The disk tier: what stays, what goes, what is let in, and what is counted."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_bench import PAGE, UNIT, blobs_in, disk_tiers, keys, layer, page

from nexus_ext.cache import DiskTier
from nexus_ext.cache.blob import BLOCK_BYTES
from nexus_ext.cache.rotation import Rotation

tier = pytest.fixture(disk_tiers)


# -- what is put is there --------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 3_000_000])
def test_what_is_put_is_loaded(tier: Callable[..., DiskTier], nbytes: int) -> None:
    data, one = layer(1, nbytes), tier()
    entry = one.put("model/0", [data[:1000], data[1000:]], kind="expert", about={"from": ["here"]})
    assert entry is not None
    assert (entry.key, entry.kind, entry.nbytes) == ("model/0", "expert", nbytes)
    assert entry.about == {"from": ["here"]}
    assert torch.equal(one.read(entry), data)
    assert torch.equal(one.load("model/0"), data)
    out = torch.zeros(nbytes, dtype=torch.uint8)
    assert one.load("model/0", out).data_ptr() == out.data_ptr() or nbytes == 0
    assert torch.equal(out, data)
    assert one.load("model/1") is None
    assert one.get("model/1") is None
    stats = one.stats()
    assert (stats.hits, stats.misses, stats.puts) == (2, 2, 1)
    assert stats.hit_rate == 0.5
    assert stats.payload_bytes == nbytes
    assert stats.io_mode in ("direct", "buffered")
    assert stats.reader in ("io_uring", "threads")


def test_it_is_there_when_the_folder_is_opened_again(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    one.put("a", [page(1)], about={"x": 1})
    one.get("a")
    one.close()
    again = tier()
    entry = again.get("a")
    assert entry.uses == 1
    assert entry.about == {"x": 1}
    assert torch.equal(again.load("a"), page(1))
    assert again.stats().zones[0].num_rebuilds == 0


def test_the_same_bytes_are_written_once(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier()
    first = one.put("a", [page(1)])
    blob = blobs_in(tmp_path)[0]
    before = blob.stat().st_ino, blob.stat().st_mtime_ns
    for key in ("a", "b"):
        again = one.put(key, [page(1)[:7], page(1)[7:]])
        assert again.digest == first.digest
        assert again.key == key
    assert blobs_in(tmp_path) == [blob]
    assert (blob.stat().st_ino, blob.stat().st_mtime_ns) == before
    stats = one.stats()
    assert (stats.puts, stats.puts_known, stats.entries) == (1, 2, 2)
    assert stats.stored_bytes == UNIT
    assert keys(one) == ["a", "b"] or keys(one) == ["b", "a"]
    assert one.evict("a")  # they are one file
    assert one.get("b") is None


def test_other_bytes_under_a_key_take_the_place_of_the_old_ones(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier()
    one.put("a", [page(1)])
    one.put("b", [page(1)])  # another name for what goes
    one.put("a", [page(2)])
    assert len(blobs_in(tmp_path)) == 1
    assert torch.equal(one.load("a"), page(2))
    assert one.load("b") is None
    assert keys(one) == ["a"]


def test_keys_need_not_be_names_of_files(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier()
    names = [
        "",
        "../../up",
        "/etc/passwd",
        "a\x00b",
        "ü\udcff",
        "'; DROP TABLE names; --",
        "k" * 9999,
    ]
    for number, name in enumerate(names):
        assert one.put(name, [page(number)])
    for number, name in enumerate(names):
        assert torch.equal(one.load(name), page(number))
    assert sorted(keys(one)) == sorted(names)
    assert {path.name for path in tmp_path.iterdir()} == {"cache"}


def test_two_stores_on_one_folder_see_each_other(tier: Callable[..., DiskTier]) -> None:
    one, other = tier(), tier()
    one.put("a", [page(1)])
    assert torch.equal(other.load("a"), page(1))
    other.put("b", [page(2)])
    assert other.evict("a")
    assert one.load("a") is None
    assert torch.equal(one.load("b"), page(2))


# -- what goes -------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier(max_bytes=4 * UNIT)
    for number in range(4):
        one.put(str(number), [page(number)])
    assert one.load("0") is not None
    assert one.get("2") is not None
    one.put("4", [page(4)])
    assert keys(one) == ["3", "0", "2", "4"]
    one.put("5", [page(5)])
    assert keys(one) == ["0", "2", "4", "5"]
    stats = one.stats()
    assert stats.evictions == 2
    assert stats.stored_bytes == 4 * UNIT == sum(b.stat().st_size for b in blobs_in(tmp_path))


def test_a_random_history_is_that_of_a_list(tier: Callable[..., DiskTier]) -> None:
    """Against a model: a list, the latest at the end."""
    one, room = tier(max_bytes=10 * UNIT), 10
    order: list[int] = []
    generator = torch.Generator().manual_seed(3)
    for number in torch.randint(0, 30, (300,), generator=generator).tolist():
        if number in order:
            assert torch.equal(one.load(str(number)), page(number))
            order.remove(number)
        else:
            assert one.load(str(number)) is None
            one.put(str(number), [page(number)])
        order = [*order, number][-room:]
        assert one.stats().stored_bytes <= room * UNIT
    assert keys(one) == [str(number) for number in order]


def test_a_clock_that_is_set_back_changes_no_order(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = tier(max_bytes=3 * UNIT)
    for number in range(3):
        monkeypatch.setattr(time, "time_ns", lambda n=number: (9 - n) * 10**18)
        one.put(str(number), [page(number)])
    one.put("3", [page(3)])
    assert keys(one) == ["1", "2", "3"]
    assert torch.equal(one.load("1"), page(1))


def test_a_budget_that_shrank_is_kept_from_the_start(tier: Callable[..., DiskTier]) -> None:
    one = tier()
    for number in range(5):
        one.put(str(number), [page(number)])
    one.close()
    assert keys(tier(max_bytes=2 * UNIT)) == ["3", "4"]


def test_what_is_larger_than_the_budget_is_not_kept(tier: Callable[..., DiskTier]) -> None:
    one = tier(max_bytes=2 * UNIT)
    one.put("small", [page(1)])
    assert one.put("large", [layer(1, 5 * PAGE)]) is None
    assert one.stats().refused_too_large == 1
    assert keys(one) == ["small"]


def test_clearing_removes_everything(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier("a", "b")
    for number in range(5):
        one.put(str(number), [page(number)])
    one.put("alias", [page(0)])
    assert one.clear() == 5
    assert keys(one) == []
    assert blobs_in(tmp_path) == []
    assert not one.evict("0")


# -- what is let in --------------------------------------------------------------------------------


def test_the_second_touch_is_written(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier(admission="second-touch")
    assert one.put("a", [page(1)]) is None
    one.close()
    one = tier(admission="second-touch")  # it is remembered
    assert one.put("b", [page(2)]) is None
    assert blobs_in(tmp_path) == []
    assert one.put("a", [page(1)]) is not None
    assert one.put("a", [page(3)]) is not None  # what is there may be replaced
    assert one.stats().refused_first_touch == 1
    assert keys(one) == ["a"]


def test_no_more_is_written_in_a_day_than_allowed(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now)
    one = tier(write_budget_bytes_per_day=2 * UNIT)
    assert one.put("0", [page(0)])
    one.close()
    one = tier(write_budget_bytes_per_day=2 * UNIT)
    assert one.put("1", [page(1)])
    assert one.put("2", [page(2)]) is None
    assert one.put("1", [page(1)]) is not None  # costs nothing
    assert one.stats().refused_write_budget == 1
    now += 25 * 3600 * 10**9
    assert one.put("2", [page(2)])
    assert one.stats().zones[0].written_bytes == 3 * UNIT
    assert one.stats().zones[0].written_bytes_of_day == UNIT


def test_a_clock_that_was_in_the_future_does_not_stop_writing(
    tier: Callable[..., DiskTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time_ns()
    one = tier(write_budget_bytes_per_day=UNIT)
    with monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: real + 400 * 86400 * 10**9)
        assert one.put("0", [page(0)])
    one.close()
    assert tier(write_budget_bytes_per_day=UNIT).put("1", [page(1)])


def test_what_writing_costs_is_reported(tier: Callable[..., DiskTier], tmp_path: Path) -> None:
    one = tier(max_bytes=2 * UNIT)
    for number in range(6):
        one.put(str(number), [page(number)])
    stats = one.stats()
    assert stats.written_bytes == stats.zones[0].written_bytes == 6 * UNIT
    assert stats.write_amplification == 2.0  # a page of header on every page


# -- zones -----------------------------------------------------------------------------------------


def test_folders_are_written_in_turn_and_read_as_one(
    tier: Callable[..., DiskTier], tmp_path: Path
) -> None:
    one = tier("a", "b", max_bytes=6 * UNIT)
    for number in range(6):
        one.put(str(number), [page(number)])
    assert [zone.entries for zone in one.stats().zones] == [3, 3]
    for number in range(6):
        assert torch.equal(one.load(str(number)), page(number))
    one.put("6", [page(6)])
    assert keys(one) == ["1", "2", "3", "4", "5", "6"]
    one.close()
    assert sorted(keys(tier("b")) + keys(tier("a"))) == ["1", "2", "3", "4", "5", "6"]


def test_a_key_has_one_value_in_all_folders(tier: Callable[..., DiskTier]) -> None:
    one = tier("a", "b")
    for number in range(6):
        one.put("key", [page(number)])
        assert torch.equal(one.load("key"), page(number))
        assert keys(one).count("key") == 1
        one.put(f"other {number}", [page(100 + number)])


def test_turns_follow_the_room_there_is() -> None:
    rotation = Rotation(3)
    turns = [rotation.next([3.0, 1.0, 0.0]) for _ in range(40)]
    assert turns.count(0) == 30
    assert turns.count(1) == 10
    assert all(turns[at : at + 4].count(1) == 1 for at in range(0, 40, 4))
    assert rotation.next([0.0, 0.0, 0.0]) is None
