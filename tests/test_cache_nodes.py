"""Several tiers: death in a move, damage, two processes, two nodes over one store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_bench import PAGE, UNIT, fill, layer, tiered_stores, where

from nexus_ext.cache import DiskTier, RemoteStore, Tier, TieredStore
from nexus_ext.cache.level import Level
from nexus_ext.cache.work_locks import locked
from nexus_ext.errors import ConfigError, CorruptCheckpoint, ReadError

CRASHED = 41

store = pytest.fixture(tiered_stores)


# -- damage and death ------------------------------------------------------------------------------


def test_a_damaged_copy_is_a_miss_and_never_moves(store: Callable[..., TieredStore]) -> None:
    one = store(1, 4)
    fill(one, 2)
    entry = next(entry for entry in one.entries() if entry.key == "layer/0")
    with open(entry.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - layer(0)[-1].item()]))
    assert one.load("layer/0") is None
    assert one.stats().tiers[1].disk.corruptions == 1
    assert (one.stats().misses, one.stats().hits) == (1, 0)
    assert where(one) == {"layer/1": "nvme"}


def test_what_is_damaged_is_not_handed_down(store: Callable[..., TieredStore]) -> None:
    one = store(1, 4)
    entry = one.put("layer/0", [layer(0)])
    assert entry is not None
    with open(entry.path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([255 - layer(0)[-1].item()]))
    one.put("layer/1", [layer(1)])
    assert where(one) == {"layer/1": "nvme"}
    with pytest.raises((CorruptCheckpoint, ReadError)):
        one.read(entry)


def die_in_a_move(folder: Path, what: str) -> int:
    """Exit code of a process that ends where the copy is there and the original is not gone yet."""
    program = Path(__file__).with_name("tier_children.py")
    command = [sys.executable, str(program), what, str(folder)]
    return subprocess.run(command, env=os.environ | {"PYTHONSAFEPATH": "1"}, check=False).returncode


def tiers_of(folder: Path) -> list[Tier]:
    return [
        Tier(folder / "nvme", UNIT, compress="off"),
        Tier(folder / "ssd", 8 * UNIT, compress="off"),
    ]


def num_blobs(folder: Path) -> int:
    return len(list(folder.rglob("*.nx")))


def test_death_between_copy_and_end_on_the_way_down_loses_nothing(tmp_path: Path) -> None:
    with TieredStore(tiers_of(tmp_path)) as one:
        one.put("layer/0", [layer(0)])
    assert die_in_a_move(tmp_path, "die-down") == CRASHED
    assert num_blobs(tmp_path) == 2  # two copies of layer/0
    check_that_one_copy_is_left(tmp_path)


def test_death_between_copy_and_end_on_the_way_up_loses_nothing(tmp_path: Path) -> None:
    with TieredStore(tiers_of(tmp_path)) as one:
        one.put("layer/0", [layer(0)])
        one.put("layer/1", [layer(1)])
        one.evict("layer/1")
        one.get("layer/0")
        assert where(one) == {"layer/0": "ssd"}
    assert die_in_a_move(tmp_path, "die-up") == CRASHED
    assert num_blobs(tmp_path) == 2
    check_that_one_copy_is_left(tmp_path)


def check_that_one_copy_is_left(folder: Path) -> None:
    with TieredStore(tiers_of(folder)) as one:
        loaded = one.load("layer/0")
        assert loaded is not None
        assert torch.equal(loaded, layer(0))
        assert where(one) == {"layer/0": "nvme"}
        stats = one.stats()
        assert (stats.entries, stats.settled) == (1, 1)
        assert sum(tier.disk.stored_bytes for tier in stats.tiers) == UNIT
    assert num_blobs(folder) == 1
    assert [path for path in folder.rglob("*") if path.suffix == ".tmp"] == []


def test_a_copy_is_not_removed_while_somebody_moves_it(tmp_path: Path) -> None:
    """Else the mover would take the other one, and none would be left."""
    with TieredStore(tiers_of(tmp_path)) as one:
        for level in one._levels.all:
            assert level.put("layer/0", [layer(0)]) is not None
        with locked(one._levels.all[1].folder / "moves.lock"):
            assert one.load("layer/0") is not None
            assert num_blobs(tmp_path) == 2
        assert one.load("layer/0") is not None
        assert num_blobs(tmp_path) == 1


def test_threads_that_use_the_same_keys_never_see_a_wrong_byte(
    store: Callable[..., TieredStore],
) -> None:
    one = store(2, 2, 16)
    fill(one, 8)
    wrong: list[str] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(40):
            index = int(torch.randint(0, 8, (), generator=generator))
            loaded = one.load(f"layer/{index}")
            if loaded is not None and not torch.equal(loaded, layer(index)):
                wrong.append(f"layer/{index}")
            if loaded is None:
                one.put(f"layer/{index}", [layer(index)])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len({entry.key for entry in one.entries()}) == len(one.entries())
    assert one.verify().bad == ()


# -- two nodes -------------------------------------------------------------------------------------


def test_two_nodes_share_what_one_of_them_fetched(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/shared"
    first = store(8, under="a", remote=RemoteStore(url, compress="off"), publish=True)
    fill(first, 6)
    published = first.stats()
    assert published.remote is not None
    assert (published.published, published.remote.puts) == (6, 6)
    second = store(8, under="b", remote=RemoteStore(url, compress="off"))
    for _ in range(2):
        for index in range(6):
            loaded = second.load(f"layer/{index}")
            assert loaded is not None
            assert torch.equal(loaded, layer(index))
    stats = second.stats()
    assert stats.remote is not None
    # Every byte came over the wire once, with 32 bytes of head for each object.
    assert stats.remote.wire_bytes_in == published.remote.wire_bytes_out == 6 * (PAGE + 32)
    assert (stats.fetched, stats.fetched_bytes) == (6, 6 * PAGE)
    assert (stats.hits, stats.misses, stats.hit_rate) == (6, 6, 0.5)
    assert second.load("layer/none") is None


def test_threads_that_want_the_same_layer_fetch_it_once(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/shared"
    RemoteStore(url).publish("layer/0", [layer(0)])
    one = store(8, remote=RemoteStore(url))
    found: list[torch.Tensor | None] = []
    threads = [threading.Thread(target=lambda: found.append(one.load("layer/0"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(payload is not None and torch.equal(payload, layer(0)) for payload in found)
    stats = one.stats()
    assert stats.remote is not None
    assert (len(found), stats.fetched, stats.remote.hits) == (4, 1, 1)


def test_two_processes_of_a_node_fetch_a_layer_once(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/shared"
    publisher = RemoteStore(url)
    for index in range(6):
        publisher.publish(f"layer/{index}", [layer(index)])
    program = Path(__file__).with_name("tier_children.py")
    children = [
        subprocess.Popen(
            [sys.executable, str(program), "load", str(tmp_path / "node"), url],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    told = [json.loads(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert [one["right"] for one in told] == [6, 6]
    assert sum(one["fetched"] for one in told) == 6
    assert sum(one["plain_bytes_in"] for one in told) == 6 * PAGE


def test_two_processes_that_move_the_same_entries_never_see_a_wrong_byte(tmp_path: Path) -> None:
    program = Path(__file__).with_name("tier_children.py")
    children = [
        subprocess.Popen(
            [sys.executable, str(program), "together", str(tmp_path), str(seed)],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            stdout=subprocess.PIPE,
        )
        for seed in range(2)
    ]
    told = [json.loads(child.communicate()[0]) for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert all(one["found"] > 0 and one["wrong"] == one["corruptions"] == 0 for one in told)
    names = ("nvme", "ssd", "hdd")
    with TieredStore([Tier(tmp_path / name, 3 * UNIT, compress="off") for name in names]) as one:
        assert one.verify().bad == ()
        assert len({entry.key for entry in one.entries()}) == len(one.entries())
        assert sum(tier.disk.stored_bytes for tier in one.stats().tiers) <= 9 * UNIT


def test_what_is_fetched_lands_in_out_and_another_out_is_refused(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/shared"
    RemoteStore(url).publish("layer/0", [layer(0)], kind="expert", about={"is": "small"})
    one = store(8, remote=RemoteStore(url))
    with pytest.raises(ConfigError, match="out must be"):
        one.load("layer/0", torch.empty(3, dtype=torch.uint8))
    out = torch.empty(PAGE, dtype=torch.uint8)
    assert one.load("layer/0", out) is not None
    assert torch.equal(out, layer(0))
    entry = one.get("layer/0")
    assert entry is not None
    assert (entry.kind, entry.about) == ("expert", {"is": "small"})


def test_a_store_without_room_serves_what_it_fetches(
    store: Callable[..., TieredStore], tmp_path: Path
) -> None:
    url = f"file://{tmp_path}/shared"
    RemoteStore(url).publish("large", [layer(0, 3 * PAGE)])
    one = store(1, remote=RemoteStore(url))
    loaded = one.load("large")
    assert loaded is not None
    assert torch.equal(loaded, layer(0, 3 * PAGE))
    assert one.get("large") is None
    assert one.entries() == []


def test_a_level_is_a_disk_tier() -> None:
    assert issubclass(Level, DiskTier)
